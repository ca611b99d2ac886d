"""The Python interface: an artifact in, text out, on one rank or on all ranks of an MPI job.

Rank 0 tokenizes, schedules and samples; the others run the steps that it sends. In a user's own script under mpirun
every rank makes the same calls: on ranks above 0 a call mirrors rank 0's, with its arguments ignored and its results
those of rank 0.
"""

from __future__ import annotations

import atexit
import collections
import os
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from llmrun import failstop
from llmrun.core import Core
from llmrun.errors import LlmpackError, UsageError
from llmrun.interrupts import InterruptsLater
from llmrun.job import Job
from llmrun.job_options import JobOptions
from llmrun.mirror import Mirror
from llmrun.requests import Completion, Event, Message, Prompt, Request, RequestOptions, check_prompt, check_speculate
from llmrun.sampler import SamplingParams
from llmrun.stats import Stats
from llmrun.step_plan import MessageKind
from llmrun.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmrun.manifest import Manifest


# What ends in order when Python does: other ranks wait for it. An engine alone may be collected before.
_open_jobs: set[Engine] = set()
_open_alone: weakref.WeakSet[Engine] = weakref.WeakSet()


class Engine:
    """A loaded model. Use it as a context manager: leaving it ends the other ranks.

    An engine of one rank may be used by several threads: their requests run together, and the threads take turns with the
    steps (`EngineLoop` and `AsyncEngine` have a thread for them).

    Under mpirun, `generate` and the like must be called by every rank in the same order, one at a time. Rank 0's
    closing a generator early ends it on every rank; another rank that stops early keeps running rank 0's steps until
    that call is over. `close` on ranks above 0 follows until rank 0 closes.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        provider: str = JobOptions.provider,
        threads: int | None = None,
        max_seq_len: int | None = None,
        max_num_seqs: int = JobOptions.max_num_seqs,
        kv_cache_mb: int | None = None,
        speculate: int = 0,
        verify: str = JobOptions.verify,
        isa: str | None = None,
        share_gpu: bool = JobOptions.share_gpu,
        prepare: Callable[[Engine], None] | None = None,
        is_mirroring: bool = True,
    ) -> None:
        """Load an artifact on every rank of the job.

        Args:
            path: the artifact's directory.
            provider: "cpu", "cuda", "rocm", or "auto": a GPU that the artifact holds code for, on every rank, else the CPU.
            threads: threads a rank; None: this rank's share of the host's cores.
            max_seq_len: positions of one sequence at most; None: as packed.
            max_num_seqs: sequences that run at the same time.
            kv_cache_mb: MiB of each rank's cache of keys and values, whose free part remembers prefixes; None: enough
                for `max_num_seqs` sequences of full length, or what fits 90 % of the free memory.
            speculate: tokens to guess ahead at most, by looking the last ones up in the sequence itself; 0: off.
            verify: "auto" compares the digests of files that have changed since they last were compared (`verified.py`),
                "full" of all; "size" and "off" only what the manifest and the sizes show.
            isa: instruction set of the CPU kernels; None: the best.
            share_gpu: let ranks share a GPU where there are fewer GPUs than ranks.
            prepare: called on rank 0 when the tokenizer is there and no weight has been read; its errors end the start.
            is_mirroring: whether ranks above 0 will make rank 0's calls too; False if they only `follow`.
        Raises:
            LlmpackError: the same on every rank.
        """
        started = time.perf_counter()
        self._closed, self._pid = False, os.getpid()
        check_speculate(speculate)
        options = JobOptions(provider, threads, max_seq_len, max_num_seqs, verify, isa, kv_cache_mb, share_gpu)
        self._job = job = Job(path, options)
        try:
            self.rank, self.size = job.rank, job.size
            self._mirror = Mirror(job, is_on=is_mirroring and self.size > 1)
            if self._mirror.is_on:
                failstop.install_hooks(self.rank, self.size, keep_traceback=True)
            self.manifest: Manifest = job.manifest
            self.max_seq_len = job.max_seq_len
            self.tokenizer = None
            job.stage("preparing", lambda: self._prepare(prepare), is_timed=False)
            spec = self.manifest.kv_cache
            if kv_cache_mb is None:
                job.load(max_num_seqs * -(-self.max_seq_len // spec.block_size))
            else:
                job.load((kv_cache_mb << 20) // (spec.block_size * spec.bytes_per_token), is_exact=True)
        except BaseException:
            job.abandon()
            raise
        self._core = Core(
            job, self.tokenizer, max_seq_len=self.max_seq_len, max_num_seqs=max_num_seqs, speculate=speculate
        )
        self.load_ms = (time.perf_counter() - started) * 1e3
        if self.size > 1:
            _open_jobs.add(self)
        else:
            _open_alone.add(self)
            weakref.finalize(self, job.abandon).atexit = False
        atexit.unregister(_close_all)  # once, and before MPI's own, which was registered by now
        atexit.register(_close_all)

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

    def generate(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> Generator[str, None, None]:
        """Answer a prompt, yielding text as it becomes certain: never half a character, never the start of a stop text.

        Args:
            prompt: text to continue, token ids taken as they are, or the messages of a chat.
            options: see `RequestOptions`.
        Raises:
            UsageError: before any work: empty prompt, no room in the context, no tokenizer, bad parameters.
            NumericError: the model computed NaN or infinity.
        """

        def pieces() -> Iterator[str]:
            if self.tokenizer is None:
                raise UsageError("the artifact has no tokenizer: use generate_ids (--ids).", code="E205")
            yield from (event.text for event in self._run(self._core.prepare(prompt, **options)) if event.text)

        return self._mirror.iterate(pieces)

    def generate_ids(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> Generator[int, None, None]:
        """Like `generate`, but yield token ids; needs no tokenizer if the prompt is ids."""

        def ids() -> Iterator[int]:
            events = self._run(self._core.prepare(prompt, **options))
            yield from (event.token_id for event in events if event.token_id is not None)

        return self._mirror.iterate(ids)

    def chat(self, messages: Sequence[Message], **options: Unpack[RequestOptions]) -> Generator[str, None, None]:
        """Answer the last of some messages, yielding text as `generate` does; of gpt-oss's answers, what is for the user.

        Args:
            messages: each a role ("system", "user", "assistant") and a content; the artifact's template makes them a
                prompt, and what it knows of earlier turns is found in the cache.
            options: see `RequestOptions`.
        Raises:
            UsageError: as `generate`; or no template, or it refuses the messages.
        """
        return self.generate(messages, **options)

    def complete(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> Completion:
        """Return the whole answer to a prompt; see `generate`."""
        return self.generate_batch([prompt], **options)[0]

    def generate_batch(self, prompts: Sequence[Prompt], **options: Unpack[RequestOptions]) -> list[Completion]:
        """Answer several prompts together, each as it would be alone; return the completions in order."""

        def completions() -> Iterator[list[Completion]]:
            requests: list[Request] = []
            try:
                for prompt in prompts:
                    requests.append(self._core.prepare(prompt, **options))
                    self._core.enqueue(requests[-1])
                while any(request.finish_reason is None for request in requests):
                    self._core.step()
                    if errors := [request.error for request in requests if request.error is not None]:
                        raise errors[0]
            finally:
                with InterruptsLater():
                    for request in requests:
                        self.cancel(request)
            yield [self.completion(request) for request in requests]

        return self._mirror.result(completions)

    def logits(self, ids: Sequence[int], *, chunk: int | None = None) -> NDArray[np.float32]:
        """Return the logits after each of `ids`: [len(ids), vocab_size], float32.

        `chunk`: tokens in one step at most; None: 512, which a GPU never exceeds. The result does not depend on it (on a GPU
        its last bits do).
        """
        return self.logits_batch([ids], chunk=chunk)[0]

    def logits_batch(
        self, sequences: Sequence[Sequence[int]], *, chunk: int | None = None
    ) -> list[NDArray[np.float32]]:
        """Return the logits of several sequences, run together; see `logits`."""

        def results() -> Iterator[list[NDArray[np.float32]]]:
            yield self._core.logits(sequences, chunk)

        return self._mirror.result(results)

    def selfcheck(self) -> tuple[float, float]:
        """Run the artifact's own example; return (largest difference from the packager's logits, tolerance)."""
        ids, expected, tolerance = self._job.artifact.read_selfcheck()
        return float(np.abs(self.logits(ids)[-1] - np.asarray(expected)).max()), tolerance

    # The steps underneath; rank 0 only

    def submit(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> Request:
        """Queue a prompt. Rank 0 only.

        Args:
            prompt: text to continue, token ids taken as they are, or the messages of a chat.
            options: see `RequestOptions`.
        Raises:
            UsageError: empty prompt, no room in the context, no tokenizer, bad parameters.
            ResourceError: it needs more cache than there is.
        """
        request = self._core.prepare(prompt, **options)
        self._core.enqueue(request)
        return request

    def step(self) -> list[Event]:
        """Run one step of whatever is submitted; return what it added. Rank 0 only.

        Raises:
            LlmpackError: of the first request that failed; NumericError where its logits are NaN or infinite. What the step
                added to others is in their `text` and `ids`.
        """
        events = self._core.step()
        if errors := [event.error for event in events if event.error is not None and event.request.events is None]:
            raise errors[0]
        return events

    def cancel(self, request: Request) -> None:
        """End a request, whatever its state, and free its cache blocks."""
        self._core.cancel(request)

    def completion(self, request: Request) -> Completion:
        """Return a finished (or cancelled) request as a result."""
        return request.completion(self.load_ms)

    def stats(self) -> Stats:
        """Return the engine's numbers of now. Rank 0 only."""
        return self._core.stats()

    def check_prompt(self, prompt: Prompt, max_tokens: int | None) -> tuple[list[int], int]:
        """Return the prompt's ids, and how many tokens to sample at most.

        Raises:
            UsageError: the prompt is empty, holds an id that is not in the vocabulary, or leaves no room.
        """
        vocab_size, packed = self.manifest.model.vocab_size, self.manifest.max_seq_len
        return check_prompt(prompt, max_tokens, self.tokenizer, vocab_size, self.max_seq_len, packed)

    def sampling_params(self, **given: Any) -> SamplingParams:
        """Return the given parameters (None: not given), completed with the artifact's defaults."""
        return self._core.sampling_params(**given)

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
        """End the job in order: rank 0 tells the others, which follow until then. The second call does nothing.

        Nor does one in a child process that was forked: the job is its parent's. Another thread's step is waited for, and its
        next one is refused.
        """
        _open_jobs.discard(self)
        _open_alone.discard(self)
        if self._closed or self._mirror.is_over or self._pid != os.getpid():
            return
        if self.rank == 0:
            with self._core.turn:  # another thread may be in the midst of a step
                self._closed = True
                self._job.close(exit_code)
        else:
            self.follow()

    @property
    def core(self) -> Core:
        """Requests and steps without conveniences, for `EngineLoop`."""
        return self._core

    @property
    def job(self) -> Job:
        """The rank's job: its threads, instruction set and artifact."""
        return self._job

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
        """Queue a request and step until it ends, yielding its events; those of others wait for whoever runs them."""
        events = request.events = collections.deque()
        try:
            self._core.enqueue(request)
            while True:
                if not events:  # what another thread's step has ended has its events when that step is over
                    has_ended = request.finish_reason is not None
                    self._core.step()
                    if has_ended and not events:
                        return
                    continue
                event = events.popleft()
                if event.error is not None:
                    raise event.error
                yield event
                if event.finish_reason is not None:
                    return
        finally:
            self.cancel(request)


def _close_all() -> None:
    for engine in [*_open_jobs, *_open_alone]:
        engine.close()
