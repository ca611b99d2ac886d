"""Fault injection for tests, inactive unless LLMRUN_FAULT=rank:point:kind is set. Debug only.

Points: load, prefill, decode, idle. Kinds: raise; exit (sys.exit); vanish (a library calls _exit(0)); kill; stop;
nan; slow. A fault fires once. `nan` fires at decode and is carried out by the caller, who owns the memory to spoil.
"""

from __future__ import annotations

import functools
import os
import signal
import time

SLOW_S = 3.0

_fired = False


@functools.cache
def _wanted() -> str:
    return os.environ.get("LLMRUN_FAULT", "")


def fire(rank: int, point: str) -> bool:
    """Carry out the fault that is due at this point of this rank; True: the caller must compute NaN."""
    global _fired
    wanted = _wanted()
    if not wanted or _fired:
        return False
    fault_rank, fault_point, kind = wanted.split(":")
    if (int(fault_rank), fault_point) != (rank, point):
        return False
    _fired = True
    if kind == "raise":
        raise RuntimeError(f"injected fault at {point}")
    if kind == "exit":
        raise SystemExit(0)
    if kind == "vanish":
        os._exit(0)
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if kind == "slow":
        time.sleep(SLOW_S)
    return kind == "nan"
