"""Where the time of rank 0's steps goes: operators by their place in the model, ONNX Runtime between them, and the rest.

In: an engine whose steps the caller runs. Out: rows that add up to the time of these steps. Measures rank 0 only: a
collective's time there includes waiting for the slowest rank.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmrun.engine import Engine


@dataclass(frozen=True)
class Row:
    """Time spent in one place; `calls` is 0 where nothing was called."""

    op: str
    role: str
    calls: int
    seconds: float


class Profile:
    """Counts from `start` to `stop`."""

    def __init__(self, engine: Engine) -> None:
        self._job = engine.job
        self._before = (0.0, 0.0, 0.0)

    def start(self) -> None:
        """Begin to count."""
        self._before = self._counters()
        self._job.operators.functions.llmpack_ops_profile(1)

    def stop(self, steps_s: float) -> list[Row]:
        """Return where `steps_s`, the duration of the steps since `start`, went; the longest rows first."""
        self._job.operators.functions.llmpack_ops_profile(0)
        send_s, run_s, graph_s = (now - then for now, then in zip(self._counters(), self._before, strict=True))
        operators = read_operators(self._job.operators.functions)
        operators_s = sum(row.seconds for row in operators)
        rest = [
            Row("onnxruntime", "standard operators, and between all", 0, graph_s - operators_s),
            Row("llmrun", "step messages to the other ranks", 0, send_s),
            Row("llmrun", "binding and filling inputs", 0, run_s - graph_s),
            Row("llmrun", "scheduling and sampling", 0, steps_s - run_s - send_s),
        ]
        return sorted(operators, key=lambda row: -row.seconds) + rest

    def _counters(self) -> tuple[float, float, float]:
        return self._job.send_s, self._job.run_s, self._job.session.graph_s


def read_operators(ops: ctypes.CDLL) -> list[Row]:
    """Return the operators that ran while the library's profile was on."""
    name, calls, nanoseconds = ctypes.c_char_p(), ctypes.c_uint64(), ctypes.c_uint64()
    pointers = [ctypes.byref(value) for value in (name, calls, nanoseconds)]
    rows = []
    index = 0
    while ops.llmpack_ops_profile_read(index, *pointers) == 0:
        index += 1
        if calls.value:
            op, role = split_name((name.value or b"").decode())
            rows.append(Row(op, role, calls.value, nanoseconds.value * 1e-9))
    return rows


def split_name(name: str) -> tuple[str, str]:
    """Return the operator and its role.

    >>> split_name("MatMulQ4 /model/layers.*/mlp/down_proj")
    ('MatMulQ4', 'mlp/down_proj')
    >>> split_name("AllGather /lm_head/all_gather")
    ('AllGather', 'lm_head')
    """
    op, _, path = name.partition(" ")
    role = path.removeprefix("/model").removeprefix("/layers.*").removeprefix("/")
    return op, role.removesuffix("/all_reduce").removesuffix("/all_gather")
