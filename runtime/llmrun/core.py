"""Requests in, events out: the engine without its conveniences. Rank 0 only; threads take turns, step by step.

A step is: plan, run on all ranks, sample, record. Knows nothing of generators or of other ranks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llmrun.constraint import Constraint
from llmrun.errors import InternalError, LlmpackError, NumericError, UsageError
from llmrun.harmony import answer_text
from llmrun.interrupts import InterruptsLater
from llmrun.kv_cache import BlockPool
from llmrun.logprobs import TokenLogprobs, token_logprobs
from llmrun.lookup import PromptLookup
from llmrun.requests import Event, Prompt, Request, check_ids, check_prompt, check_speculate, is_whole
from llmrun.row_sampling import sample_rows
from llmrun.rows import Rows
from llmrun.sampler import Sampler, SamplingParams, TokenHistory
from llmrun.scheduler import Scheduler
from llmrun.sequence import Piece, RunningSequence
from llmrun.stats import Stats
from llmrun.step_budget import DEFAULT_TOKEN_BUDGET

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmrun.job import Job
    from llmrun.manifest import Manifest
    from llmrun.tokenizer import Tokenizer

_MAX_ROW_BYTES = 64 << 20  # logits of prompt tokens that one step may ask for


class Core:
    """Holds the open requests and runs them, step by step."""

    def __init__(
        self,
        job: Job,
        tokenizer: Tokenizer | None,
        *,
        max_seq_len: int,
        max_num_seqs: int,
        speculate: int = 0,
        num_blocks: int | None = None,
    ) -> None:
        """Begin with an empty cache.

        Args:
            job: loaded.
            tokenizer: None: ids in, ids out.
            max_seq_len: positions of one sequence at most.
            max_num_seqs: sequences that run at the same time.
            speculate: tokens that are guessed ahead, at most, unless a request says otherwise.
            num_blocks: blocks of the cache to use; None: all.
        """
        self._job = job
        self.tokenizer = tokenizer
        self.manifest: Manifest = job.manifest
        self.max_seq_len = max_seq_len
        self._max_num_seqs = max_num_seqs
        self._speculate = speculate
        identity = f"{job.artifact.digest} {self.manifest.kv_cache.dtype}".encode()
        self._pool = BlockPool(num_blocks or job.num_blocks, self.manifest.kv_cache.block_size, identity)
        self._scheduler = self._new_scheduler(DEFAULT_TOKEN_BUDGET, max_num_seqs)
        self._requests: dict[int, Request] = {}
        # Held by the thread whose step it is: they take turns. A request may also be cancelled in the midst of a step, by the
        # thread itself: a generator that is collected then.
        self.turn = threading.RLock()
        self._is_inside = False
        self._left: list[Request] = []
        self._num_prompt_tokens = self._num_generated = self._num_drafts = self._num_accepted = self._num_steps = 0
        self._last_step_s = 0.0

    @property
    def has_work(self) -> bool:
        """Whether a request waits or runs."""
        return self._scheduler.has_work

    def stats(self) -> Stats:
        """Return the numbers of now."""
        running, waiting = self._scheduler.counts()
        return Stats(
            running=running,
            waiting=waiting,
            kv_blocks_used=self._pool.num_blocks - self._pool.num_free,
            kv_blocks_total=self._pool.num_blocks,
            prefix_hits=self._scheduler.prefix_hits,
            prefix_queries=self._scheduler.prefix_queries,
            prompt_tokens=self._num_prompt_tokens,
            generated_tokens=self._num_generated,
            draft_tokens=self._num_drafts,
            accepted_tokens=self._num_accepted,
            preemptions=self._scheduler.num_preemptions,
            steps=self._num_steps,
            last_step_s=self._last_step_s,
        )

    def prepare(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = None,
        stop: str | Sequence[str] | None = None,
        ignore_eos: bool = False,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        logit_bias: Mapping[int, float] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        constraint: Constraint | None = None,
        speculate: int | None = None,
        reuse_prefix: bool = True,
        is_continuation: bool | None = None,
        shown_tokens: Mapping[int, str] | None = None,
        **sampling: Any,
    ) -> Request:
        """Check and tokenize; arguments and errors as in `Engine.submit`. Changes nothing, so any thread may call it."""
        vocab_size = self.manifest.model.vocab_size
        least_tokens = 1 if prompt_logprobs is None else 0
        prompt_ids, max_tokens = check_prompt(
            prompt,
            max_tokens,
            self.tokenizer,
            vocab_size,
            self.max_seq_len,
            self.manifest.max_seq_len,
            least_tokens=least_tokens,
            chat_template_kwargs=chat_template_kwargs,
        )
        params = self.sampling_params(**sampling)
        if logit_bias:
            check_ids(list(logit_bias), vocab_size)
        for name, value in (("logprobs", logprobs), ("prompt_logprobs", prompt_logprobs)):
            if value is not None and not is_whole(value, 0, vocab_size):
                raise UsageError(f"{name} {value!r}: expected a whole number from 0 to {vocab_size}.")
        speculate = self._speculate if speculate is None else check_speculate(speculate)
        stops = (stop,) if isinstance(stop, str) else stop or ()
        if stops and self.tokenizer is None:
            raise UsageError("stop texts need a tokenizer, and the artifact has none.", code="E205")
        self._scheduler.check(len(prompt_ids), max_tokens)
        if is_continuation is None:
            is_continuation = isinstance(prompt, str) or constraint is not None
        sequence = RunningSequence(
            -1,
            list(prompt_ids),
            len(prompt_ids),
            max_tokens,
            num_rows_taken=len(prompt_ids) if prompt_logprobs is None else 0,
            can_share=reuse_prefix,
        )
        sampler = Sampler(params, logit_bias)
        stream = None
        if self.tokenizer is not None:
            stream = answer_text(self.tokenizer, prompt, prompt_ids, stops, is_continuation, shown_tokens)
        return Request(
            sequence,
            prompt_ids,
            sampler,
            stream,
            frozenset() if ignore_eos else frozenset(self.manifest.eos_token_ids),
            constraint,
            TokenHistory(prompt_ids) if sampler.needs_history else None,
            PromptLookup(speculate) if speculate else None,
            num_top=logprobs,
            num_prompt_top=prompt_logprobs,
            logprobs=None if logprobs is None else [],
            prompt_logprobs=None if prompt_logprobs is None else [None],
        )

    def enqueue(self, request: Request) -> None:
        """Queue a prepared request."""
        with InterruptsLater(), self.turn:
            self._enqueue(request)

    def step(self) -> list[Event]:
        """Run one step of whatever is queued, if anything is; return what it added.

        The error of a request that failed is in its last event, NumericError where a logit is NaN or infinite: nothing is
        sampled from it. Events also wait at the requests that somebody reads one by one. Ctrl-C raises after the step, whose
        tokens the requests then have.

        Raises:
            LlmpackError: the step failed, and with it every request.
        """
        with InterruptsLater(), self.turn:
            self._is_inside = True
            try:
                events = self._step() if self._scheduler.has_work else []
            finally:
                self._leave()
            for event in events:
                if event.request.events is not None:
                    event.request.events.append(event)
        return events

    def cancel(self, request: Request) -> None:
        """End a request, whatever its state, and free its cache blocks; one that has ended stays as it is."""
        with InterruptsLater(), self.turn:
            if self._is_inside:
                self._left.append(request)
            else:
                self._cancel(request)

    def _enqueue(self, request: Request) -> None:
        self._scheduler.submit(request.sequence)
        self._requests[request.sequence.id] = request
        self._num_prompt_tokens += request.sequence.num_prompt

    def _leave(self) -> None:
        """Cancel what was to be cancelled meanwhile."""
        self._is_inside = False
        while self._left:
            self._cancel(self._left.pop())

    def _step(self) -> list[Event]:
        started = time.perf_counter()
        is_guessing = any(request.lookup is not None for request in self._requests.values())
        plan, pieces = self._scheduler.plan(self._propose if is_guessing else None)
        if self._job.session.num_likeliest:
            plan.asks_whole_rows = any(map(self._needs_whole_rows, pieces))
        rows = self._job.run(plan)
        are_finite = rows.are_finite
        events: list[Event] = []
        for piece in pieces:
            request = self._requests[piece.sequence.id]
            request.started_s = request.started_s or started
            own_rows = rows[piece.rows] if len(pieces) > 1 else rows
            try:
                if not are_finite and not own_rows.are_finite:
                    raise NumericError(
                        "the model computed NaN or infinity. `llmrun verify --deep` tells whether the artifact or this"
                        " machine is at fault."
                    )
                events += self._record(request, piece, own_rows)
            except Exception as error:  # a constraint is somebody else's code: its failure is its request's alone
                known = error if isinstance(error, LlmpackError) else InternalError(f"{type(error).__name__}: {error}")
                events.append(self._end(request, "error", error=known))
        self._num_steps += 1
        self._last_step_s = time.perf_counter() - started
        return events

    def _cancel(self, request: Request) -> None:
        if self._requests.get(request.sequence.id) is request:
            del self._requests[request.sequence.id]
            self._scheduler.finish(request.sequence, is_sound=not isinstance(request.error, NumericError))
            request.finish_reason = request.finish_reason or "cancelled"

    def logits(self, sequences: Sequence[Sequence[int]], chunk: int | None) -> list[NDArray[np.float32]]:
        """Return the logits after each id of several sequences, run together; see `Engine.logits`."""
        if chunk is not None and not is_whole(chunk, 1):
            raise UsageError(f"chunk {chunk!r}: expected a whole number of tokens from 1, or None.")
        with self.turn:
            self._is_inside = True
            try:
                return self._logits(sequences, chunk)
            finally:
                self._leave()

    def _logits(self, sequences: Sequence[Sequence[int]], chunk: int | None) -> list[NDArray[np.float32]]:
        previous = self._scheduler
        if previous.has_work:
            raise UsageError("logits: other requests are still running.")
        budget = chunk or DEFAULT_TOKEN_BUDGET
        if self._job.placement.gpu is not None:
            budget = min(budget, DEFAULT_TOKEN_BUDGET)
        requests: list[Request] = []
        try:
            # No more sequences than tokens: the scheduler would take one of each, whatever the budget.
            self._scheduler = self._new_scheduler(budget, min(self._max_num_seqs, budget))
            for ids in sequences:
                checked = check_ids(ids, self.manifest.model.vocab_size)
                self._scheduler.check(len(checked), 0, least_tokens=0)
                request = Request(RunningSequence(-1, list(checked), len(checked), 0, num_rows_taken=0), checked)
                requests.append(request)
                with InterruptsLater():
                    self._enqueue(request)
            while any(request.finish_reason is None for request in requests):
                with InterruptsLater():
                    events = self._step()
                if errors := [event.error for event in events if event.error is not None]:
                    raise errors[0]
        finally:
            with InterruptsLater():
                for request in requests:
                    self._cancel(request)
                self._scheduler = previous
        return [np.concatenate(request.rows) for request in requests]

    def sampling_params(self, **given: Any) -> SamplingParams:
        """Return the given parameters (None: not given), completed with the artifact's defaults.

        Raises:
            UsageError: there is no such parameter, or its value is out of range.
        """
        wanted = {name: value for name, value in given.items() if value is not None}
        if unknown := wanted.keys() - SamplingParams.__dataclass_fields__.keys():
            raise UsageError(f"sampling: there is no parameter {min(unknown)!r}.")
        return SamplingParams(**{**vars(self.manifest.generation), **wanted})

    def _new_scheduler(self, token_budget: int, max_num_seqs: int) -> Scheduler:
        return Scheduler(
            self._pool,
            max_seq_len=self.max_seq_len,
            max_num_seqs=max_num_seqs,
            token_budget=token_budget,
            max_rows=max(1, _MAX_ROW_BYTES // (4 * self.manifest.model.vocab_size)),
        )

    def _propose(self, sequence: RunningSequence, limit: int) -> Sequence[int]:
        lookup = self._requests[sequence.id].lookup
        return () if lookup is None else lookup.propose(sequence.tokens, limit)

    def _is_by_likeliest(self, request: Request) -> bool:
        """Whether the likeliest tokens that a step names are enough; the request decides, not who runs beside it."""
        return request.num_candidates is not None and request.num_candidates <= self._job.session.num_likeliest

    def _needs_whole_rows(self, piece: Piece) -> bool:
        if piece.num_prompt_rows:
            return True
        return piece.is_last and not self._is_by_likeliest(self._requests[piece.sequence.id])

    def _record(self, request: Request, piece: Piece, rows: Rows) -> list[Event]:
        """Take a step's logits into a request; return its events."""
        if piece.num_prompt_rows:
            self._take_prompt_rows(request, piece, rows[: piece.num_prompt_rows].logits)
        if not piece.is_last:
            self._scheduler.advance(piece, [])
            return []
        if len(request.ids) >= request.sequence.max_tokens:
            self._scheduler.advance(piece, [])
            return [self._end(request, "length")]
        if (first := len(rows) - 1 - len(piece.drafts)) > 0:
            rows = rows[first:]
        sampled, scored = sample_rows(request, piece.drafts, rows, is_by_likeliest=self._is_by_likeliest(request))
        if request.lookup is not None:
            self._num_drafts += len(piece.drafts)
            self._num_accepted += len(sampled) - 1
        self._scheduler.advance(piece, sampled)
        events: list[Event] = []
        # The constraint has taken all of them, and stops `sample_rows` where it is done.
        is_done = request.constraint is not None and request.constraint.is_done
        for i, (token_id, logprobs) in enumerate(zip(sampled, scored, strict=True), 1):
            events.append(self._take_token(request, token_id, logprobs, is_done=is_done and i == len(sampled)))
            if request.finish_reason is not None:
                break
        return events

    def _take_token(self, request: Request, token_id: int, scored: TokenLogprobs | None, *, is_done: bool) -> Event:
        """Add a sampled token to a request, after which its constraint may be done; decide whether the request ends."""
        request.last_token_s = time.perf_counter()
        request.first_token_s = request.first_token_s or request.last_token_s
        self._num_generated += 1
        request.num_generated += 1
        if token_id in request.end_ids:
            return self._end(request, "stop", logprobs=scored)
        request.ids.append(token_id)
        if request.logprobs is not None and scored is not None:
            request.logprobs.append(scored)
        text = ""
        if request.stream is not None and self.tokenizer is not None and token_id < self.tokenizer.vocab_size:
            text = request.stream.push(token_id)
        has_stopped = request.stream is not None and request.stream.stopped
        if has_stopped or is_done:
            return self._end(request, "stop", token_id, text, scored)
        if len(request.ids) >= request.sequence.max_tokens:
            return self._end(request, "length", token_id, text, scored)
        request.text += text
        return Event(request, token_id, text, scored)

    def _end(
        self,
        request: Request,
        reason: str,
        token_id: int | None = None,
        text: str = "",
        logprobs: TokenLogprobs | None = None,
        error: Exception | None = None,
    ) -> Event:
        text += request.stream.finish() if request.stream is not None else ""
        request.text += text
        request.error = error
        request.finish_reason = reason  # after what it tells of: another thread may wait for it
        self._cancel(request)
        return Event(request, token_id, text, logprobs, reason, error)

    def _take_prompt_rows(self, request: Request, piece: Piece, rows: NDArray[np.float32]) -> None:
        """Keep the logits of prompt tokens, or what they say of the tokens that follow."""
        if request.prompt_logprobs is None:
            request.rows.append(rows.copy())
            return
        first = piece.first_prompt_row + 1
        following = request.prompt_ids[first : first + len(rows)]  # the prompt's last row predicts no prompt token
        request.prompt_logprobs += token_logprobs(rows[: len(following)], following, request.num_prompt_top or 0)
