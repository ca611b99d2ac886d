"""The sequences of one HTTP request on the engine's loop, and their events on the server's thread.

An `Answer` owns the tickets: leaving it, for whatever reason, cancels those that still run. What ends a request from
outside (the client leaves, time is over, the engine fails, the server shuts down) arrives in the same queue as the
events, so that a handler waits in one place.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

from llmrun.requests import Event
from llmrun.server.errors import ApiError, as_api_error
from llmrun.server.guard import ClientGoneError

if TYPE_CHECKING:
    from llmrun.engine_loop import Ticket
    from llmrun.server.service import Service


@dataclass(eq=False)
class Choice:
    """One sequence: its place in the response, its ticket, and when its tokens came (monotonic seconds)."""

    index: int
    prompt_index: int
    ticket: Ticket | None = None
    first_s: float = 0.0
    last_s: float = 0.0
    finish_reason: str | None = None

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return 0 if self.ticket is None else len(self.ticket.request.prompt_ids)

    @property
    def num_generated(self) -> int:
        """Tokens of the answer so far."""
        return 0 if self.ticket is None else len(self.ticket.request.ids)


@dataclass(frozen=True)
class _Arrival:
    choice: Choice
    event: Event
    at: float


@dataclass(eq=False)
class Answer:
    """The work for one HTTP request; an asynchronous context manager."""

    service: Service
    receive: Callable[[], Awaitable[MutableMapping[str, Any]]]
    num_sequences: int
    choices: list[Choice] = field(default_factory=list)

    async def __aenter__(self) -> Answer:
        """Take a place in the queue; watch the client and the clock.

        Raises:
            ApiError: 429 or 503.
        """
        self.service.admit(self)
        self._loop = asyncio.get_running_loop()
        self._started = time.monotonic()
        self._queue: asyncio.Queue[_Arrival | Exception] = asyncio.Queue()
        self._failure: Exception | None = None  # to be raised next
        self._ended = 0
        self._watch = self._loop.create_task(self._watch_client())
        seconds = self.service.limits.request_timeout
        late = ApiError(408, f"the answer took longer than {seconds:g} s.", code="request_timeout", may_retry=False)
        self._timer = self._loop.call_later(seconds, self.fail, late)
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _t: TracebackType | None
    ) -> None:
        """Cancel what still runs, and leave the queue."""
        self._timer.cancel()
        self._watch.cancel()
        for choice in self.choices:
            if choice.ticket is not None and choice.finish_reason is None:
                self.service.loop.cancel(choice.ticket)
                self._count(choice, "error" if isinstance(error, ApiError) and error.status >= 500 else "abort")
        self.service.release(self)

    def fail(self, error: Exception) -> None:
        """End the request from outside; on the server's thread."""
        self._queue.put_nowait(error)

    async def submit(self, prompts: list[Callable[[Callable[[Event], None], int], Ticket]], n: int) -> None:
        """Queue `n` sequences of each prompt, on a worker thread: it tokenizes.

        Args:
            prompts: each submits one sequence, given its callback and its number among the `n`.
            n: sequences of each prompt.
        Raises:
            UsageError: a prompt cannot be run.
        """

        def work() -> None:
            for prompt_index, prompt in enumerate(prompts):
                for i in range(n):
                    choice = Choice(len(self.choices), prompt_index)
                    self.choices.append(choice)
                    choice.ticket = prompt(self._callback(choice), i)

        await self.service.in_thread(work)

    async def events(self) -> list[tuple[Choice, Event]] | None:
        """Wait for events; all that are there, oldest first. None: nothing for `ping_interval`; empty: all has ended.

        Raises:
            ApiError: a sequence failed, or something ended the request from outside.
            ClientGoneError: the client left.
        """
        if self._failure is not None:
            raise self._failure
        if self._ended == len(self.choices) and self._queue.empty():
            return []
        try:
            async with asyncio.timeout(self.service.limits.ping_interval):
                items = [await self._queue.get()]
        except TimeoutError:
            return None
        while not self._queue.empty():
            items.append(self._queue.get_nowait())
        found: list[tuple[Choice, Event]] = []
        for item in items:
            try:
                if isinstance(item, Exception):
                    raise item
                self._take(item)
            except Exception as error:
                if not found:
                    raise
                self._failure = error  # after what came before it
                break
            found.append((item.choice, item.event))
        return found

    def _callback(self, choice: Choice) -> Callable[[Event], None]:
        # On the engine's thread; if the server's loop is gone, this raises: cancelled.
        def on_event(event: Event) -> None:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, _Arrival(choice, event, time.monotonic()))

        return on_event

    def _take(self, item: _Arrival) -> None:
        choice, event, metrics = item.choice, item.event, self.service.metrics
        if event.token_id is not None:
            if choice.first_s == 0:
                choice.first_s = item.at
                metrics.observe("time_to_first_token_seconds", item.at - self._started)
            else:
                metrics.observe("inter_token_latency_seconds", item.at - choice.last_s)
            choice.last_s = item.at
        if event.finish_reason is None:
            return
        choice.finish_reason = event.finish_reason
        self._ended += 1
        reason = {"stop": "stop", "length": "length", "cancelled": "abort"}.get(event.finish_reason, "error")
        self._count(choice, reason)
        if reason == "error":
            raise as_api_error(event.error or RuntimeError("the sequence failed"))
        if reason == "abort":
            raise ApiError(503, "the server has ended this request.", code="cancelled")

    def _count(self, choice: Choice, reason: str) -> None:
        metrics = self.service.metrics
        metrics.finished(reason)
        metrics.observe("e2e_request_latency_seconds", time.monotonic() - self._started)
        metrics.observe("request_prompt_tokens", choice.num_prompt)
        metrics.observe("request_generation_tokens", choice.num_generated)
        if choice.first_s:
            metrics.observe("request_decode_time_seconds", choice.last_s - choice.first_s)
        if choice.ticket is None or not (request := choice.ticket.request).started_s:
            return
        metrics.observe("request_queue_time_seconds", request.started_s - request.submitted_s)
        if request.first_token_s:
            metrics.observe("request_prefill_time_seconds", request.first_token_s - request.started_s)

    async def _watch_client(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass
        self.fail(ClientGoneError())
