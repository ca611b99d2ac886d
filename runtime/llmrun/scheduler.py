"""Continuous batching: which tokens of which sequences the next step runs.

In: requests. Out: one `StepPlan` at a time; sampled tokens come back through `Scheduler.advance`. One sequence is the
special case of one. Prompt pass and decode are not two modes: each running sequence has tokens whose keys and values
are not in the cache yet, and a step takes the next of them within a budget (chunked prefill, Agrawal et al. 2023).
Samples nothing, runs nothing.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from llmrun.errors import UsageError
from llmrun.kv_cache import BlockAllocator
from llmrun.step_plan import StepPlan

DEFAULT_TOKEN_BUDGET = 512


@dataclass(eq=False)
class RunningSequence:
    """One sequence from submission to its end; `tokens` are the prompt's and then the sampled ones."""

    id: int
    tokens: list[int]
    num_prompt: int
    max_tokens: int
    wants_all_logits: bool = False
    num_cached: int = 0  # tokens whose keys and values are in the cache
    num_reused: int = 0  # of the prompt, found in the cache
    blocks: list[int] = field(default_factory=list)

    @property
    def num_pending(self) -> int:
        """Tokens that a step must still run before the next one can be sampled."""
        return len(self.tokens) - self.num_cached


@dataclass(frozen=True)
class Piece:
    """What one step does for one sequence: its next `num_tokens` tokens; `rows` of the step's logits are its own."""

    sequence: RunningSequence
    num_tokens: int
    rows: slice
    is_last: bool  # the last of `rows` predicts the sequence's next token


class Scheduler:
    """Holds waiting and running sequences and plans steps over them, first come, first served."""

    def __init__(
        self,
        allocator: BlockAllocator,
        *,
        max_seq_len: int,
        max_num_seqs: int,
        token_budget: int = DEFAULT_TOKEN_BUDGET,
    ) -> None:
        """`token_budget`: tokens in one step at most; at least one for each of `max_num_seqs` sequences."""
        self._allocator = allocator
        self.max_seq_len = max_seq_len
        self.max_num_seqs = max_num_seqs
        self.token_budget = max(token_budget, max_num_seqs)
        self._waiting: collections.deque[RunningSequence] = collections.deque()
        self._running: list[RunningSequence] = []
        self._ids = itertools.count()

    @property
    def has_work(self) -> bool:
        """True while a sequence waits or runs."""
        return bool(self._waiting or self._running)

    def counts(self) -> tuple[int, int]:
        """Return how many sequences run, and how many wait."""
        return len(self._running), len(self._waiting)

    def check(self, num_prompt: int, max_tokens: int, *, least_tokens: int = 0) -> None:
        """Refuse a sequence that can never run.

        Args:
            num_prompt: prompt tokens.
            max_tokens: tokens to sample at most.
            least_tokens: what `max_tokens` must be at least.
        Raises:
            UsageError: an empty prompt, or prompt and max_tokens do not fit the context.
            ResourceError: they need more cache blocks than there are.
        """
        total = num_prompt + max_tokens
        if num_prompt < 1:
            raise UsageError("the prompt is empty.", code="E203")
        if max_tokens < least_tokens:
            raise UsageError(f"max_tokens {max_tokens}: expected {least_tokens} or more.")
        if total > self.max_seq_len:
            raise UsageError(
                f"the prompt has {num_prompt} tokens and max_tokens is {max_tokens}; together {total} do not fit the"
                f" context of {self.max_seq_len}. Shorten the prompt or lower --max-tokens.",
                code="E204",
            )
        if self._allocator.blocks_for(total) > self._allocator.num_blocks:
            self._allocator.allocate(total)  # can never be admitted: raises and says how many blocks there are

    def submit(self, sequence: RunningSequence) -> None:
        """Queue a sequence that `check` let pass."""
        sequence.id = next(self._ids)
        self._waiting.append(sequence)

    def plan(self) -> tuple[StepPlan, list[Piece]]:
        """Decide the next step: sequences with one pending token first, then prompts within the token budget.

        Raises:
            ValueError: there is no work.
        """
        self._admit()
        budget = self.token_budget
        chosen: list[tuple[RunningSequence, int]] = []
        for sequence in sorted(self._running, key=lambda s: s.num_pending > 1):  # stable: first come, first served
            num_tokens = min(sequence.num_pending, budget)
            if num_tokens > 0:
                chosen.append((sequence, num_tokens))
                budget -= num_tokens
        if not chosen:
            raise ValueError("nothing to plan")
        return self._build(chosen)

    def advance(self, piece: Piece, sampled: Sequence[int]) -> None:
        """Record that a step ran for a sequence, and the tokens sampled from it."""
        piece.sequence.num_cached += piece.num_tokens
        piece.sequence.tokens += sampled

    def finish(self, sequence: RunningSequence) -> None:
        """End a sequence, wherever it is, and free its blocks; one that has ended stays ended."""
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        if sequence in self._running:
            self._running.remove(sequence)
        self._allocator.release(sequence.blocks)
        sequence.blocks = []

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.max_num_seqs:
            total = len(self._waiting[0].tokens) + self._waiting[0].max_tokens
            if self._allocator.blocks_for(total) > self._allocator.num_free:
                return
            sequence = self._waiting.popleft()
            sequence.blocks = self._allocator.allocate(total)
            self._running.append(sequence)

    def _build(self, chosen: list[tuple[RunningSequence, int]]) -> tuple[StepPlan, list[Piece]]:
        """Lay the chosen tokens out flat; every piece gets at least one row of logits, so that R >= 1."""
        block_size = self._allocator.block_size
        ids: list[int] = []
        positions: list[np.ndarray] = []
        slots: list[np.ndarray] = []
        starts, seq_lens, rows = [0], [], []
        pieces: list[Piece] = []
        for sequence, num_tokens in chosen:
            begin, end = sequence.num_cached, sequence.num_cached + num_tokens
            ids += sequence.tokens[begin:end]
            at = np.arange(begin, end)
            positions.append(at)
            slots.append(np.asarray(sequence.blocks)[at // block_size] * block_size + at % block_size)
            starts.append(len(ids))
            seq_lens.append(end)
            first_row = len(rows)
            rows += range(starts[-2], starts[-1]) if sequence.wants_all_logits else [len(ids) - 1]
            pieces.append(Piece(sequence, num_tokens, slice(first_row, len(rows)), end == len(sequence.tokens)))
        table = np.zeros((len(chosen), max(self._allocator.blocks_for(n) for n in seq_lens)), np.int32)
        for row, (sequence, _), seq_len in zip(table, chosen, seq_lens, strict=True):
            used = self._allocator.blocks_for(seq_len)
            row[:used] = sequence.blocks[:used]
        plan = StepPlan(
            input_ids=np.asarray(ids, np.int32),
            positions=np.concatenate(positions).astype(np.int32),
            slot_mapping=np.concatenate(slots).astype(np.int32),
            query_start=np.asarray(starts, np.int32),
            seq_lens=np.asarray(seq_lens, np.int32),
            block_table=table,
            logit_rows=np.asarray(rows, np.int32),
        )
        return plan, pieces
