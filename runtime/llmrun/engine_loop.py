"""A thread that owns an engine, for users on other threads: submit and cancel from anywhere, events by callback.

All of the engine's work, and with it every MPI call, happens on the loop's thread (comm.py asks MPI for "serialized":
any thread, but one at a time). Between requests the thread sleeps, and the other ranks with it (`comm._poll`).
"""

from __future__ import annotations

import atexit
import collections
import dataclasses
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Unpack

from llmrun.errors import LlmpackError, PeerError, ResourceError
from llmrun.requests import Event, Prompt, Request, RequestOptions
from llmrun.stats import Stats

if TYPE_CHECKING:
    from llmrun.engine import Engine

OnEvent = Callable[[Event], None]


@dataclass(eq=False)
class Ticket:
    """A request that a loop runs; `request` may be read at any time, and changes until `is_done`."""

    request: Request
    on_event: OnEvent
    done: threading.Event = field(default_factory=threading.Event)

    @property
    def is_done(self) -> bool:
        """Whether the last event has been delivered."""
        return self.done.is_set()


class EngineLoop:
    """Runs an engine's steps on a thread of its own; on rank 0, with the other ranks following.

    Between `__init__` and `close` nobody else may use the engine, except `tokenizer`, `manifest`, `check_prompt`,
    `sampling_params` and other things that only read.
    """

    def __init__(self, engine: Engine, *, on_failed: Callable[[BaseException], None] | None = None) -> None:
        """Start the thread. `on_failed` is called on it, after the last event, if the engine fails."""
        self._engine, self._core = engine, engine.core
        self._on_failed = on_failed
        self._wakeup = threading.Condition()
        self._arrived: collections.deque[Ticket] = collections.deque()
        self._left: collections.deque[Ticket] = collections.deque()
        self._open: dict[Request, Ticket] = {}  # the thread's own; _num_open counts the arrived ones too
        self._num_open = 0
        self._is_draining = self._is_closed = False
        self._failed: BaseException | None = None
        self._stats = self._core.stats()
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # before the engine's own, which needs MPI for itself

    def __enter__(self) -> EngineLoop:
        """Return the loop."""
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: object, _trace: TracebackType | None) -> None:
        """Close."""
        self.close()

    @property
    def failed(self) -> BaseException | None:
        """What ended the loop; None while it is sound. Nothing can be submitted any more."""
        return self._failed

    def submit(self, prompt: Prompt, *, on_event: OnEvent, **options: Unpack[RequestOptions]) -> Ticket:
        """Queue a prompt. Tokenizes on the caller's thread.

        Args:
            prompt: as in `Engine.submit`.
            on_event: called on the loop's thread for each event, so it must be quick; the last event has a
                `finish_reason`, and comes whatever happens ("cancelled", "error" included). If it raises, the request
                is cancelled.
            options: see `RequestOptions`.
        Raises:
            UsageError: as in `Engine.submit`.
            ResourceError: as in `Engine.submit`; or the loop is draining or closed.
            PeerError: the engine has failed (see `failed`).
        """
        request = self._core.prepare(prompt, **options)
        ticket = Ticket(request, on_event)
        with self._wakeup:
            if self._failed is not None:
                raise PeerError(f"the engine has failed: {self._failed}")
            if self._is_draining or self._is_closed:
                raise ResourceError("the engine takes no more requests: it is about to end.", code="E504")
            self._arrived.append(ticket)
            self._num_open += 1
            self._wakeup.notify_all()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """End a request before the next step; its last event says "cancelled". One that has ended stays as it is."""
        with self._wakeup:
            if not ticket.is_done:
                self._left.append(ticket)
                self._wakeup.notify_all()

    def stats(self) -> Stats:
        """Return the numbers after the last step; requests on their way to the loop count as waiting."""
        stats = self._stats
        arrived = len(self._arrived)
        return dataclasses.replace(stats, waiting=stats.waiting + arrived) if arrived else stats

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests, and wait until the open ones have ended; return whether they have."""
        with self._wakeup:
            self._is_draining = True
            return self._wakeup.wait_for(lambda: self._num_open == 0, timeout)

    def close(self) -> None:
        """Cancel what is open and end the thread; the engine stays, and is the caller's again."""
        with self._wakeup:
            self._is_closed = True
            self._wakeup.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        atexit.unregister(self.close)

    # The thread

    def _main(self) -> None:
        try:
            while self._wait():
                self._admit()
                events = self._core.step()
                self._stats = self._core.stats()  # who has got the last event sees what it did
                for event in events:
                    self._deliver(event)
        except BaseException as error:
            self._fail(error)
            return
        for request in list(self._open):
            self._end(request)
        self._stats = self._core.stats()

    def _wait(self) -> bool:
        """Sleep until there is something to do; false if it is time to end."""
        with self._wakeup:
            while not (self._is_closed or self._arrived or self._left or self._core.has_work):
                self._wakeup.wait()
            if self._is_closed:
                while self._arrived:
                    ticket = self._arrived.popleft()
                    self._open[ticket.request] = ticket
            return not self._is_closed

    def _admit(self) -> None:
        """Take in what arrived, then put out what left; both in order."""
        while self._arrived:
            ticket = self._arrived.popleft()
            self._open[ticket.request] = ticket
            self._core.enqueue(ticket.request)
        while self._left:
            self._end(self._left.popleft().request)

    def _end(self, request: Request) -> None:
        self._core.cancel(request)
        request.finish_reason = request.finish_reason or "cancelled"  # one that was never queued, too
        self._deliver(Event(request, None, "", finish_reason=request.finish_reason))

    def _deliver(self, event: Event) -> None:
        ticket = self._open.get(event.request)
        if ticket is None:  # its callback failed earlier in this step, or it had ended when it was to be cancelled
            return
        is_last = event.finish_reason is not None
        if is_last:
            del self._open[event.request]
        try:
            ticket.on_event(event)
        except Exception:
            if not is_last:
                self._core.cancel(event.request)
                self._open.pop(event.request, None)
                is_last = True
        if is_last:
            ticket.done.set()
            with self._wakeup:
                self._num_open -= 1
                self._wakeup.notify_all()

    def _fail(self, error: BaseException) -> None:
        """Tell every open request that the engine has failed."""
        known = error if isinstance(error, LlmpackError) else PeerError(f"the engine failed: {error}")
        with self._wakeup:
            self._failed = error
            tickets = [*self._open.values(), *self._arrived]
            self._arrived.clear()
        for ticket in tickets:
            request = ticket.request
            self._open[request] = ticket
            request.finish_reason, request.error = "error", known
            self._deliver(Event(request, None, "", finish_reason="error", error=known))
        if self._on_failed is not None:
            self._on_failed(error)
