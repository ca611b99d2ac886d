"""The threads of an engine: as many as it was asked for, on its cores, for as long as it is open."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import pytest

from llmrun import Engine
from llmrun.cores import CoreShare
from llmrun.errors import ResourceError, UsageError
from llmrun.operators import Operators
from operator_threads import cpu_seconds, operator_threads

if TYPE_CHECKING:
    import ctypes

Packed = Callable[..., Path]
IDS = list(range(3, 60))


def test_threads_work_for_one_engine_and_end_with_it(packed_tiny: Packed) -> None:
    path = packed_tiny(1, "q4")
    with Engine(path, threads=1) as engine:
        assert operator_threads() == {}
        expected = engine.logits(IDS)
        with Engine(path, threads=2) as other:
            (thread,) = operator_threads().values()
            before = cpu_seconds(thread)
            np.testing.assert_array_equal(engine.logits(IDS), expected)
            assert cpu_seconds(thread) == pytest.approx(before, abs=0.005)  # at most its end of spinning
            for _ in range(20):
                np.testing.assert_array_equal(other.logits(IDS), expected)
            assert cpu_seconds(thread) > before
        assert operator_threads() == {}
        with pytest.raises(UsageError, match="the engine is closed"):
            list(other.generate_ids(IDS, max_tokens=1))
        assert not other.job.is_broken  # nothing was begun, nor sent to ranks that have left


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_each_thread_has_a_core_of_its_own(packed_tiny: Packed) -> None:
    own = sorted(os.sched_getaffinity(0))
    with Engine(packed_tiny(1, "q4"), threads=2):
        (thread,) = operator_threads().values()
        assert os.sched_getaffinity(thread) == {own[1]}
    with Engine(packed_tiny(1, "q4"), threads=len(own) + 1):  # too few cores: the system decides
        for thread in operator_threads().values():
            assert os.sched_getaffinity(thread) == set(own)


class _Refusing:
    """The operator library where the system refuses a thread (tests/ops has the real one)."""

    def llmpack_ops_use_threads(self, _number: int, _cores: object) -> int:
        return -1

    def llmpack_ops_last_error(self) -> bytes:
        return b"llmpack_ops_use_threads: thread 12 of 1000 cannot be started (Resource temporarily unavailable)."


def test_refused_threads_are_an_error_that_says_what_to_do() -> None:
    operators = Operators.__new__(Operators)
    operators.functions = cast("ctypes.CDLL", _Refusing())
    with pytest.raises(ResourceError, match=r"thread 12 of 1000 cannot be started .*\. Use fewer --threads\."):
        with operators.running_on(CoreShare(1000, ())):
            pass
