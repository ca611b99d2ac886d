"""Ctrl-C between two steps, not in the midst of one: what a step moves is moved whole, or requests would lose tokens."""

from __future__ import annotations

import importlib
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

__all__ = ["InterruptsLater"]

# What is behind `signal.signal` and `signal.getsignal`, which try to make enums of handlers: 10 us a step.
_signal: Any = importlib.import_module("_signal")


class InterruptsLater:
    """A context in which Python's handler of SIGINT waits until the end, and then does what it does: mostly, raise.

    Only the main thread runs handlers, and while C code runs none does: a step on another thread needs this no more than it
    can have it. The command line's own handler is a thread's, which does not wait.
    """

    __slots__ = ("_arrived", "_handler")

    def __enter__(self) -> None:
        """Begin to note signals."""
        self._arrived: tuple[int, FrameType | None] | None = None
        self._handler: Any = None
        if threading.current_thread() is not threading.main_thread():
            return
        handler = _signal.getsignal(signal.SIGINT)
        if callable(handler):  # else it is no Python code's, and not ours to replace
            _signal.signal(signal.SIGINT, self._note)
            self._handler = handler

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        """Call the handler if a signal has come."""
        if self._handler is None:
            return
        _signal.signal(signal.SIGINT, self._handler)
        if self._arrived is not None:
            self._handler(*self._arrived)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._arrived = number, frame
