"""Threads for work that may take long, and that a process which ends does not wait for, unlike `ThreadPoolExecutor`'s."""

from __future__ import annotations

import concurrent.futures
import queue
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


class Workers(concurrent.futures.Executor):
    """At most `num_threads` threads, which begin when there is work for them."""

    def __init__(self, num_threads: int, name: str) -> None:
        """`name`: of the threads."""
        self._most, self._name = num_threads, name
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()  # of the two numbers
        self._num_threads = self._num_open = 0

    @property
    def is_busy(self) -> bool:
        """Whether work has been given that is not over yet."""
        return self._num_open > 0

    def submit(
        self, fn: Callable[_Parameters, _Result], /, *args: _Parameters.args, **kwargs: _Parameters.kwargs
    ) -> concurrent.futures.Future[_Result]:
        """Return the outcome to come of work that waits for a thread; until then it can be cancelled."""
        outcome: concurrent.futures.Future[_Result] = concurrent.futures.Future()

        def job() -> None:
            if outcome.set_running_or_notify_cancel():
                try:
                    outcome.set_result(fn(*args, **kwargs))
                except BaseException as error:
                    outcome.set_exception(error)

        with self._lock:
            self._num_open += 1
            is_short = self._num_threads < min(self._num_open, self._most)
            self._num_threads += is_short
            number = self._num_threads
        self._jobs.put(job)
        if is_short:
            threading.Thread(target=self._main, name=f"{self._name}_{number}", daemon=True).start()
        return outcome

    def _main(self) -> None:
        while True:
            self._jobs.get()()
            with self._lock:
                self._num_open -= 1
