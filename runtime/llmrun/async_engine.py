"""The engine for asyncio: many tasks, one model.

    async with AsyncEngine("artifacts/demo") as engine:
        async for piece in engine.generate("Once upon a time"):
            print(piece, end="")

Requests of different tasks run together (continuous batching), on the thread of an `EngineLoop`; the event loop is never
blocked but for tokenizing a prompt.
"""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import AsyncGenerator, Sequence
from types import TracebackType
from typing import Any, Unpack

from llmrun.engine import Engine
from llmrun.engine_loop import EngineLoop
from llmrun.errors import UsageError
from llmrun.requests import Completion, Event, Message, Prompt, Request, RequestOptions
from llmrun.stats import Stats


class AsyncEngine:
    """A loaded model, for use in one event loop. Under mpirun on rank 0; the other ranks call `follow`."""

    def __init__(self, path: str | os.PathLike[str], **options: Any) -> None:
        """Load an artifact; arguments and errors as in `Engine`. Blocks: do it before the event loop is busy."""
        self._engine = Engine(path, is_mirroring=False, **options)
        self.rank, self.tokenizer = self._engine.rank, self._engine.tokenizer
        self._loop = EngineLoop(self._engine) if self.rank == 0 else None
        if self._loop is not None:  # whose thread would keep itself, and the model, for ever
            weakref.finalize(self, self._loop.close).atexit = False

    async def __aenter__(self) -> AsyncEngine:
        """Return the engine."""
        return self

    async def __aexit__(self, _kind: type[BaseException] | None, _error: object, _trace: TracebackType | None) -> None:
        """Close."""
        await self.close()

    async def generate(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> AsyncGenerator[str, None]:
        """Answer a prompt, yielding text as it becomes certain; leaving the loop cancels the request.

        To leave early and go on, close the generator too (`contextlib.aclosing`): a `break` alone leaves that to the
        event loop, which does it once nothing refers to the generator any more.

        Args:
            prompt: text to continue, token ids taken as they are, or the messages of a chat.
            options: see `RequestOptions`.
        Raises:
            LlmpackError: as `Engine.generate`; PeerError if the engine has failed.
        """
        if self.tokenizer is None:
            raise UsageError("the artifact has no tokenizer: use `events`.", code="E205")
        events = self.events(prompt, **options)
        try:
            async for event in events:
                if event.text:
                    yield event.text
        finally:
            await events.aclose()

    def chat(self, messages: Sequence[Message], **options: Unpack[RequestOptions]) -> AsyncGenerator[str, None]:
        """Answer the last of some messages; see `generate` and `Engine.chat`."""
        return self.generate(messages, **options)

    async def complete(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> Completion:
        """Return the whole answer to a prompt; cancelling the task cancels the request."""
        request: Request | None = None
        async for event in self.events(prompt, **options):
            request = event.request
        assert request is not None  # there is always a last event
        return self._engine.completion(request)

    async def complete_batch(self, prompts: Sequence[Prompt], **options: Unpack[RequestOptions]) -> list[Completion]:
        """Answer several prompts together; return the completions in order. If one fails, all are cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self.complete(prompt, **options)) for prompt in prompts]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None  # as `Engine.generate_batch`
        return [task.result() for task in tasks]

    async def events(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> AsyncGenerator[Event, None]:
        """Answer a prompt, yielding the engine's events: token ids, texts and log-probabilities."""
        if self._loop is None:
            raise UsageError("AsyncEngine: requests are rank 0's; the other ranks call `follow`.")
        asyncio_loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Event] = asyncio.Queue()
        ticket = self._loop.submit(
            prompt,
            on_event=lambda event: asyncio_loop.call_soon_threadsafe(queue.put_nowait, event) and None,
            **options,
        )
        try:
            while True:
                event = await queue.get()
                if event.error is not None:
                    raise event.error
                yield event
                if event.finish_reason is not None:
                    return
        finally:
            self._loop.cancel(ticket)

    def stats(self) -> Stats:
        """Return the engine's numbers after its last step."""
        return self._engine.stats() if self._loop is None else self._loop.stats()

    def follow(self) -> int:
        """Run rank 0's steps until it closes; return the job's exit code. Ranks above 0 only."""
        return self._engine.follow()

    async def close(self, exit_code: int = 0) -> None:
        """Cancel what is open and end the job."""
        if self._loop is not None:
            await asyncio.to_thread(self._loop.close)
        self._engine.close(exit_code)
