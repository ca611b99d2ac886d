"""The threads of this process that loops of operators run on, beside those that call."""

from __future__ import annotations

import contextlib
from pathlib import Path

_TASKS = Path("/proc/self/task")


def operator_threads() -> dict[str, int]:
    """Return their ids by name."""
    found = {}
    for task in _TASKS.iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # another thread, which has just ended
            found[(task / "comm").read_text().strip()] = int(task.name)
    return {name: tid for name, tid in found.items() if name.startswith("llmpack-")}


def cpu_seconds(tid: int) -> float:
    """Return how long a thread has run."""
    return int((_TASKS / str(tid) / "schedstat").read_text().split()[0]) / 1e9
