"""What the routes share: the engine's loop, the queue's bound, health, and how the server's life ends.

Three threads: the server's (asyncio), the engine's (`EngineLoop`), and the main one, which waits. Attributes are
changed on the server's thread unless said otherwise.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.types import Receive, Scope

from llmrun.engine_loop import EngineLoop
from llmrun.harmony import EFFORTS, speaks_harmony
from llmrun.server.errors import ApiError, as_api_error, bad
from llmrun.server.fields import Record
from llmrun.server.grammar import Grammars, TokenConstraint
from llmrun.server.guard import read_body
from llmrun.server.json_body import parse_json
from llmrun.server.limits import Limits
from llmrun.server.metrics import Metrics
from llmrun.server.schemas import Schemas
from llmrun.server.workers import Workers
from llmrun.thoughts import REASONING_FORMATS, THINK, may_think, tags_answers, tags_of

if TYPE_CHECKING:
    from llmrun.engine import Engine
    from llmrun.server.tasks import Answer

Result = TypeVar("Result")
WORKERS = 4  # threads that parse, render, tokenize and submit
LAST_WORDS_S = 1.5
WARM_UP_S = 600.0


class Service:
    """One model, being served; `state` is loading, ready, draining or failed."""

    engine: Engine
    loop: EngineLoop
    grammars: Grammars | None

    def __init__(
        self,
        limits: Limits,
        names: Sequence[str],
        metrics_prefix: str,
        max_num_seqs: int,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        reasoning_format: str = REASONING_FORMATS[0],
    ) -> None:
        """Prepare to serve.

        Args:
            limits: of requests and connections.
            names: of the model, the first of which responses carry.
            metrics_prefix: of the names in /metrics.
            max_num_seqs: sequences that run together.
            chat_template_kwargs: where a request has none.
            reasoning_format: one of REASONING_FORMATS.
        """
        self._chat_template_kwargs = chat_template_kwargs or {}
        self._reasoning_format = reasoning_format
        # All are known with the model.
        self.tells_thoughts = False  # apart from an answer's text
        self.thought_tags = THINK
        self.tags_answers = False  # behind thoughts
        self.speaks_harmony = False
        self.limits, self.names, self.model_name = limits, tuple(names), names[0]
        self.schemas = Schemas(limits)
        self.metrics = Metrics(self.model_name, metrics_prefix)
        self.created = int(time.time())
        self.fingerprint = ""
        self.state = "loading"
        self.failure: BaseException | None = None
        self.on_over: Callable[[], None] = lambda: None  # tells the listening server to end
        self._capacity = max_num_seqs + limits.max_queue
        self._answers: set[Answer] = set()
        self._workers = Workers(WORKERS, "worker")
        self._compiler = Workers(1, "compiler")
        self._asyncio: asyncio.AbstractEventLoop | None = None
        self._progress: tuple[int, float] = (0, time.monotonic())

    def template_kwargs(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the variables of a request's template: those that it has given, and the server's others."""
        return {**self._chat_template_kwargs, **given}

    # Life

    def started(self, loop: asyncio.AbstractEventLoop) -> None:
        """Take the server's own loop; on its thread."""
        self._asyncio = loop

    def attach(self, engine: Engine) -> None:
        """Take the loaded engine, and decode one token with it: only then the server is ready. On the main thread.

        Raises:
            LlmpackError: the model does not work.
        """
        self.engine = engine
        self.fingerprint = f"fp_{engine.job.artifact.digest[:10]}"
        tokenizer, model = engine.tokenizer, engine.manifest.model
        if speaks_harmony(tokenizer):
            self.speaks_harmony, self.schemas = True, Schemas(self.limits, EFFORTS)
        self.tells_thoughts = self._reasoning_format != "none" and (self.speaks_harmony or may_think(tokenizer))
        self.thought_tags, self.tags_answers = tags_of(tokenizer), tags_answers(tokenizer)
        self.grammars = (
            None
            if tokenizer is None
            else Grammars(tokenizer, model.vocab_size, sorted(engine.manifest.eos_token_ids), self.limits)
        )
        self.loop = EngineLoop(engine, on_failed=self._failed)
        ticket = self.loop.submit([0], on_event=lambda _event: None, max_tokens=2, ignore_eos=True, temperature=0.0)
        ticket.done.wait(WARM_UP_S)
        if ticket.request.finish_reason != "length":
            self.loop.close()
            raise ticket.request.error or self.failure or RuntimeError("the first decode did not end")
        self._on_server(lambda: setattr(self, "state", "ready"))

    def drain(self) -> None:
        """Begin to end: no new work; what runs has `drain_timeout`. From any thread."""

        def begin() -> None:
            if self.state in ("ready", "loading"):
                self.state = "draining"
            assert self._asyncio is not None
            self._asyncio.call_later(self.limits.drain_timeout, self.fail_all, _shutting_down())
            self.on_over()

        self._on_server(begin)

    def _failed(self, error: BaseException) -> None:
        """Begin to end because the engine has; on its thread, after every ticket got its error."""
        self.failure = error

        def begin() -> None:
            self.state = "failed"
            self.fail_all(as_api_error(error))
            self.on_over()

        self._on_server(begin)

    def fail_all(self, error: Exception) -> None:
        """End every open request with an error."""
        for answer in list(self._answers):
            answer.fail(error)

    def last_words(self, _code: int) -> None:
        """Tell every open stream that the job has failed, just before the process ends; from any thread but the server's."""

        def begin() -> None:
            self.state = "failed"
            self.fail_all(ApiError(503, "a rank of the model is lost; the server ends.", code="peer_lost"))

        self._on_server(begin)
        until = time.monotonic() + LAST_WORDS_S
        time.sleep(0.1)
        while self._answers and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(0.1)  # for the last bytes

    @property
    def is_busy(self) -> bool:
        """Whether a thread still works for a request, which it may do for long after the server has given up on it."""
        return self._workers.is_busy or self._compiler.is_busy

    def _on_server(self, action: Callable[[], None]) -> None:
        if self._asyncio is not None and not self._asyncio.is_closed():
            if threading.get_ident() == getattr(self._asyncio, "_thread_id", None):
                action()
            else:
                self._asyncio.call_soon_threadsafe(action)

    def watch(self) -> None:
        """Note whether the engine makes progress; called once a second."""
        if self.state != "ready":
            return
        stats = self.loop.stats()
        if stats.steps != self._progress[0] or not (stats.running or stats.waiting):
            self._progress = (stats.steps, time.monotonic())

    def health(self) -> str:
        """Return "ok", or what is the matter."""
        if self.state != "ready":
            return self.state
        return "stuck" if time.monotonic() - self._progress[1] > self.limits.health_timeout else "ok"

    # Requests

    def check_ready(self) -> None:
        """Refuse work before and after the time for it.

        Raises:
            ApiError: 503.
        """
        if self.state == "loading":
            raise ApiError(503, "the model is being loaded.", code="loading", retry_after=1)
        if self.state != "ready":
            raise _shutting_down()

    def admit(self, answer: Answer) -> None:
        """Let a request into the queue.

        Raises:
            ApiError: 400: more sequences than there is room for at all; 429: no room now.
        """
        self.check_ready()
        if answer.num_sequences > self._capacity:
            raise bad(f"{answer.num_sequences} sequences in one request: at most {self._capacity} are allowed.", "n")
        if sum(other.num_sequences for other in self._answers) + answer.num_sequences > self._capacity:
            raise ApiError(429, f"{self._capacity} sequences run and wait already.", code="queue_full", retry_after=1)
        self._answers.add(answer)

    def release(self, answer: Answer) -> None:
        """Give a request's room back."""
        self._answers.discard(answer)

    async def read(self, scope: Scope, receive: Receive, record: Record) -> tuple[Any, dict[str, str]]:
        """Return a request's JSON, and a header that names the fields that are ignored.

        Raises:
            ApiError: 400, 408, 413 or 503.
        """
        self.check_ready()
        data = await read_body(scope, receive, self.limits)

        def work() -> tuple[Any, list[str]]:
            body = parse_json(data, max_depth=self.limits.max_json_depth)
            return body, self.schemas.ignored(record, body)

        body, names = await self.in_thread(work)
        shown = (name for name in names if name.isascii() and name.replace(".", "_").isidentifier())
        value = ",".join(shown)[:200]
        return body, {"x-llmrun-ignored": value} if value else {}

    def check_model(self, name: str | None) -> None:
        """Refuse a model that is not the one served.

        Raises:
            ApiError: 404.
        """
        if name is not None and name not in self.names:
            known = ", ".join(self.names)
            raise ApiError(
                404, f"the model {name[:100]!r} does not exist: this is {known}.", param="model", code="model_not_found"
            )

    def empty_prompt(self) -> list[int]:
        """Return the ids that stand for no prompt: what begins a text.

        Raises:
            ApiError: 400: the model has no such token.
        """
        tokenizer = self.engine.tokenizer
        if tokenizer is None or not tokenizer.prefix:
            raise bad("the prompt is empty.", "prompt")
        return [*tokenizer.prefix]

    async def in_thread(self, work: Callable[[], Result]) -> Result:
        """Do work on a worker thread, so that other clients' tokens go on flowing."""
        return await asyncio.get_running_loop().run_in_executor(self._workers, work)

    async def compile(self, source: tuple[str, Any] | None) -> None:
        """Compile a grammar, so that `constraint` finds it, on a thread of its own.

        Raises:
            ApiError: 400: it is refused, or takes too long. 503: others take too long.
        """
        if source is None or await self.in_thread(lambda: self._grammars().is_remembered(*source)):
            return
        work = self._compiler.submit(self.constraint, source)
        try:
            async with asyncio.timeout(self.limits.grammar_timeout):
                await asyncio.wrap_future(work)
        except TimeoutError:
            if work.cancelled():  # it was never begun: others' are slow
                raise ApiError(503, "other schemas are being compiled.", code="compiler_busy", retry_after=1) from None
            seconds = self.limits.grammar_timeout
            raise bad(f"the schema or grammar took longer than {seconds:g} s to compile.", "response_format") from None

    def constraint(self, source: tuple[str, Any] | None) -> TokenConstraint | None:
        """Return a new constraint, if one is wanted; on a worker thread.

        Raises:
            ApiError: 400: the source is refused.
        """
        return None if source is None else self._grammars().constraint(*source)

    def _grammars(self) -> Grammars:
        if self.grammars is None:
            raise bad("structured output needs a tokenizer, and this artifact has none.", "response_format")
        return self.grammars


def _shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down.", code="shutting_down", retry_after=1)
