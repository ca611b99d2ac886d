"""The Python interface: an artifact in, text out, on one rank or on all ranks of an MPI job.

Rank 0 tokenizes, schedules and samples; the others run the steps that it sends. In a user's own script under mpirun
every rank makes the same calls: on ranks above 0 a call mirrors rank 0's, with its arguments ignored and its results
those of rank 0.
"""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llmrun import failstop
from llmrun.errors import LlmpackError, NumericError, UsageError
from llmrun.job import Job, JobOptions
from llmrun.kv_cache import BlockAllocator
from llmrun.mirror import Mirror
from llmrun.requests import Completion, Event, Prompt, Request, check_ids, check_prompt
from llmrun.sampler import Sampler, SamplingParams
from llmrun.scheduler import DEFAULT_TOKEN_BUDGET, Piece, Scheduler
from llmrun.step_plan import MessageKind
from llmrun.text_stream import TextStream
from llmrun.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmrun.manifest import Manifest


class Engine:
    """A loaded model. Use it as a context manager: leaving it ends the other ranks.

    Under mpirun, `generate` and the like must be called by every rank in the same order, one at a time. Rank 0's
    closing a generator early ends it on every rank; another rank that stops early keeps running rank 0's steps until
    that call is over. `close` on ranks above 0 follows until rank 0 closes.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        provider: str = "auto",
        threads: int | None = None,
        max_seq_len: int | None = None,
        max_num_seqs: int = 8,
        verify: str = "auto",
        isa: str | None = None,
        prepare: Callable[[Engine], None] | None = None,
        is_mirroring: bool = True,
    ) -> None:
        """Load an artifact on every rank of the job.

        Args:
            path: the artifact's directory.
            provider: "auto" or "cpu".
            threads: threads a rank; None: this rank's share of the host's cores.
            max_seq_len: positions of one sequence at most; None: as packed.
            max_num_seqs: sequences that run at the same time.
            verify: "auto" compares the digests of files that have changed since they last were compared (`verified.py`),
                "full" of all; "size" and "off" only what the manifest and the sizes show.
            isa: instruction set of the CPU kernels; None: the best.
            prepare: called on rank 0 when the tokenizer is there and no weight has been read; its errors end the start.
            is_mirroring: whether ranks above 0 will make rank 0's calls too; False if they only `follow`.
        Raises:
            LlmpackError: the same on every rank.
        """
        started = time.perf_counter()
        self._closed = False
        options = JobOptions(provider, threads, max_seq_len, max_num_seqs, verify, isa)
        self._job = job = Job(path, options)
        try:
            self.rank, self.size = job.rank, job.size
            self._mirror = Mirror(job, is_on=is_mirroring and self.size > 1)
            if self._mirror.is_on:
                failstop.install_hooks(self.rank, self.size, keep_traceback=True)
            self.manifest: Manifest = job.manifest
            self.max_seq_len = job.max_seq_len
            self.tokenizer = None
            job.stage("preparing", lambda: self._prepare(prepare), deadline_s=None)
            block_size = self.manifest.kv_cache.block_size
            job.load(max_num_seqs * -(-self.max_seq_len // block_size))
        except BaseException:
            job.watchdog.close()
            raise
        self._allocator = BlockAllocator(job.num_blocks, block_size)
        self._scheduler = self._new_scheduler(DEFAULT_TOKEN_BUDGET)
        self._requests: dict[int, Request] = {}
        self.load_ms = (time.perf_counter() - started) * 1e3
        atexit.register(self.close)

    def __enter__(self) -> Engine:
        """Return the engine."""
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        """Close; after an error rank 0 ends the job with its exit code, and another rank leaves it to the caller."""
        if error is None:
            self.close()
        elif self.rank == 0:
            self.close(error.exit_code if isinstance(error, LlmpackError) else 1)

    # Generating

    def generate(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        **sampling: Any,
    ) -> Generator[str, None, None]:
        """Continue a prompt, yielding text as it becomes certain: never half a character, never the start of a stop string.

        Args:
            prompt: text, or token ids taken as they are.
            max_tokens: None: 256, or what the context has room for.
            stop: texts that end the answer and are not part of it.
            ignore_eos: go on after the model's end token.
            sampling: fields of `SamplingParams`; the artifact's defaults fill the rest.
        Raises:
            UsageError: before any work: empty prompt, no room in the context, no tokenizer, bad parameters.
            NumericError: the model computed NaN or infinity.
        """

        def pieces() -> Iterator[str]:
            if self.tokenizer is None:
                raise UsageError("the artifact has no tokenizer: use generate_ids (--ids).", code="E205")
            request = self.submit(prompt, max_tokens=max_tokens, stop=stop, ignore_eos=ignore_eos, **sampling)
            yield from (event.text for event in self._run(request) if event.text)

        return self._mirror.iterate(pieces)

    def generate_ids(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        **sampling: Any,
    ) -> Generator[int, None, None]:
        """Like `generate`, but yield token ids; needs no tokenizer if the prompt is ids."""

        def ids() -> Iterator[int]:
            request = self.submit(prompt, max_tokens=max_tokens, stop=stop, ignore_eos=ignore_eos, **sampling)
            yield from (event.token_id for event in self._run(request) if event.token_id is not None)

        return self._mirror.iterate(ids)

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        **sampling: Any,
    ) -> list[Completion]:
        """Complete several prompts together; arguments as in `generate`. Returns the completions in order."""

        def completions() -> Iterator[list[Completion]]:
            requests: list[Request] = []
            try:
                for prompt in prompts:
                    requests.append(
                        self.submit(prompt, max_tokens=max_tokens, stop=stop, ignore_eos=ignore_eos, **sampling)
                    )
                while any(request.finish_reason is None for request in requests):
                    self.step()
            finally:
                for request in requests:
                    self.cancel(request)
            yield [self.completion(request) for request in requests]

        return self._mirror.result(completions)

    def logits(self, ids: Sequence[int], *, chunk: int | None = None) -> NDArray[np.float32]:
        """Return the logits after each of `ids`: [len(ids), vocab_size], float32.

        `chunk`: tokens in one step at most; None: 512. The result does not depend on it, but for rounding.
        """
        return self.logits_batch([ids], chunk=chunk)[0]

    def logits_batch(
        self, sequences: Sequence[Sequence[int]], *, chunk: int | None = None
    ) -> list[NDArray[np.float32]]:
        """Return the logits of several sequences, run together; see `logits`."""

        def results() -> Iterator[list[NDArray[np.float32]]]:
            previous = self._scheduler
            if previous.has_work:
                raise UsageError("logits: other requests are still running.")
            self._scheduler = self._new_scheduler(chunk or DEFAULT_TOKEN_BUDGET)
            requests: list[Request] = []
            try:
                for ids in sequences:
                    checked = check_ids(ids, self.manifest.model.vocab_size)
                    sequence = self._scheduler.submit(checked, 0, wants_all_logits=True)
                    requests.append(Request(sequence, checked))
                    self._requests[sequence.id] = requests[-1]
                while any(request.finish_reason is None for request in requests):
                    self.step()
            finally:
                for request in requests:
                    self.cancel(request)
                self._scheduler = previous
            yield [np.concatenate(request.rows) for request in requests]

        return self._mirror.result(results)

    def selfcheck(self) -> tuple[float, float]:
        """Run the artifact's own example; return (largest difference from the packager's logits, tolerance)."""
        ids, expected, tolerance = self._job.artifact.read_selfcheck()
        return float(np.abs(self.logits(ids)[-1] - np.asarray(expected)).max()), tolerance

    # The steps underneath; rank 0 only

    def submit(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        **sampling: Any,
    ) -> Request:
        """Queue a prompt; arguments and errors as in `generate`. Rank 0 only."""
        prompt_ids, max_tokens = self.check_prompt(prompt, max_tokens)
        params = self.sampling_params(**sampling)
        if stop and self.tokenizer is None:
            raise UsageError("stop texts need a tokenizer, and the artifact has none.", code="E205")
        is_text = isinstance(prompt, str)
        stream = TextStream(self.tokenizer, stop, is_continuation=is_text) if self.tokenizer else None
        end_ids = frozenset() if ignore_eos else frozenset(self.manifest.eos_token_ids)
        sequence = self._scheduler.submit(prompt_ids, max_tokens)
        request = Request(sequence, prompt_ids, Sampler(params), stream, end_ids)
        self._requests[sequence.id] = request
        return request

    def step(self) -> list[Event]:
        """Run one step of whatever is submitted; return what it added. Rank 0 only.

        Raises:
            NumericError: a logit is NaN or infinite; nothing is sampled from such a step.
        """
        plan, pieces = self._scheduler.plan()
        logits = self._job.run(plan)
        if not np.isfinite(logits).all():
            raise NumericError(
                "the model computed NaN or infinity. `llmrun verify --deep` tells whether the artifact or this machine is"
                " at fault."
            )
        sampled: dict[int, int] = {}
        for piece in pieces:
            request = self._requests[piece.sequence.id]
            if piece.sequence.wants_all_logits:
                request.rows.append(logits[piece.rows].copy())
            elif piece.is_last and request.sampler is not None:
                sampled[piece.sequence.id] = request.sampler.sample(logits[piece.rows.stop - 1], piece.sequence.tokens)
        self._scheduler.advance(pieces, sampled)
        return [event for piece in pieces if (event := self._record(piece, sampled)) is not None]

    def cancel(self, request: Request) -> None:
        """End a request, whatever its state, and free its cache blocks."""
        if self._requests.pop(request.sequence.id, None) is not None:
            self._scheduler.finish(request.sequence)

    def completion(self, request: Request) -> Completion:
        """Return a finished (or cancelled) request as a result."""
        prompt_s = request.first_token_s - request.submitted_s if request.first_token_s else 0.0
        timings = {
            "prompt_n": len(request.prompt_ids),
            "prompt_ms": round(prompt_s * 1e3, 3),
            "predicted_n": len(request.sequence.tokens) - len(request.prompt_ids),
            "predicted_ms": round((request.last_token_s - request.first_token_s) * 1e3, 3),
            "load_ms": round(self.load_ms, 3),
        }
        text = None if request.stream is None else request.text
        return Completion(text, request.prompt_ids, request.ids, request.finish_reason or "stop", timings)

    def check_prompt(self, prompt: Prompt, max_tokens: int | None) -> tuple[list[int], int]:
        """Return the prompt's ids, and how many tokens to sample at most.

        Raises:
            UsageError: the prompt is empty, holds an id that is not in the vocabulary, or leaves no room.
        """
        vocab_size = self.manifest.model.vocab_size
        return check_prompt(prompt, max_tokens, self.tokenizer, vocab_size, self.max_seq_len)

    def sampling_params(self, **given: Any) -> SamplingParams:
        """Return the given parameters (None: not given), completed with the artifact's defaults."""
        defaults = vars(self.manifest.generation)
        return SamplingParams(**{**defaults, **{name: value for name, value in given.items() if value is not None}})

    # Ranks

    def follow(self) -> int:
        """Run rank 0's steps until it closes; return the job's exit code. Ranks above 0 only."""
        while True:
            kind, body = self._job.follow()
            if kind is MessageKind.SHUTDOWN:
                self._job.close(int(body[0]))
                self._closed = True
                return int(body[0])

    def close(self, exit_code: int = 0) -> None:
        """End the job in order: rank 0 tells the others, which follow until then. The second call does nothing."""
        if self._closed or self._mirror.is_over:
            return
        if self.rank == 0:
            self._closed = True
            self._job.close(exit_code)
        else:
            self.follow()

    @property
    def job(self) -> Job:
        """The rank's job: its threads, instruction set and artifact."""
        return self._job

    def _new_scheduler(self, token_budget: int) -> Scheduler:
        return Scheduler(
            self._allocator,
            max_seq_len=self.max_seq_len,
            max_num_seqs=self._job.options.max_num_seqs
            if token_budget >= self._job.options.max_num_seqs
            else token_budget,
            token_budget=token_budget,
        )

    def _prepare(self, prepare: Callable[[Engine], None] | None) -> None:
        if self.rank != 0:
            return
        if (spec := self.manifest.tokenizer) is not None:
            names = [spec.file, spec.golden, *([spec.chat_template] if spec.chat_template else [])]
            self._job.verify(names)
            self.tokenizer = load_tokenizer(self._job.artifact)
        if prepare is not None:
            prepare(self)

    def _run(self, request: Request) -> Iterator[Event]:
        """Step until a request ends, yielding its events."""
        try:
            while request.finish_reason is None:
                yield from (event for event in self.step() if event.request is request)
        finally:
            self.cancel(request)

    def _record(self, piece: Piece, sampled: dict[int, int]) -> Event | None:
        """Take a sampled token into its request; decide whether the request ends."""
        sequence, request = piece.sequence, self._requests[piece.sequence.id]
        if sequence.wants_all_logits:
            if sequence.num_pending == 0:
                request.finish_reason = "length"
                self.cancel(request)
            return None
        if sequence.id not in sampled:
            return None
        token_id = sampled[sequence.id]
        request.last_token_s = time.perf_counter()
        request.first_token_s = request.first_token_s or request.last_token_s
        is_end = token_id in request.end_ids
        text = ""
        if not is_end:
            request.ids.append(token_id)
            if request.stream is not None and self.tokenizer is not None and token_id < self.tokenizer.vocab_size:
                text = request.stream.push(token_id)
        if is_end or (request.stream is not None and request.stream.stopped):
            request.finish_reason = "stop"
        elif len(request.ids) >= sequence.max_tokens:
            request.finish_reason = "length"
        if request.finish_reason is not None:
            text += request.stream.finish() if request.stream is not None else ""
            self.cancel(request)
        request.text += text
        return Event(request, None if is_end else token_id, text)
