"""Continuous batching: which tokens of which sequences the next step runs.

In: requests. Out: one `StepPlan` at a time; sampled tokens come back through `Scheduler.advance`. One sequence is the
special case of one. Prompt pass and decode are not two modes: each running sequence has tokens whose keys and values
are not in the cache yet, and a step takes the next of them within a budget (chunked prefill, Agrawal et al. 2023).
Samples nothing, runs nothing.

Who comes first: sequences that decode get their token in every step. What is left of the budget goes to prompts, half
of it to the oldest, so that none starves, and half to the one with the least left, so that a short prompt need not wait
for a long one. When blocks run out, the latest arrival gives its own back and is computed again later; the oldest is
never chosen, so it always gets on, and whatever fits the cache alone ends at last.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Sequence

from llmrun.errors import ResourceError, UsageError
from llmrun.kv_cache import BlockPool, Key
from llmrun.sequence import Piece, RunningSequence, build_plan
from llmrun.step_budget import DEFAULT_MIXED_BUDGET, DEFAULT_TOKEN_BUDGET, most_tokens
from llmrun.step_plan import StepPlan

Propose = Callable[[RunningSequence, int], Sequence[int]]


class Scheduler:
    """Holds waiting and running sequences and plans steps over them, first come, first served."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_seq_len: int,
        max_num_seqs: int,
        token_budget: int = DEFAULT_TOKEN_BUDGET,
        mixed_budget: int = DEFAULT_MIXED_BUDGET,
        max_rows: int | None = None,
    ) -> None:
        """Begin with nothing.

        Args:
            pool: the cache's blocks.
            max_seq_len: positions of one sequence at most.
            max_num_seqs: sequences that run at the same time.
            token_budget: tokens in one step at most; at least one for each of several sequences, and one more.
            mixed_budget: of these, prompt tokens and guesses at most, in a step in which a sequence decodes.
            max_rows: rows of logits that prompts ask for in one step, at most (they take memory).
        """
        self._pool = pool
        self.max_seq_len = max_seq_len
        self.max_num_seqs = max_num_seqs
        self.token_budget = most_tokens(token_budget, max_num_seqs)
        self.mixed_budget = max(mixed_budget, 1)
        self._max_rows = max_rows or self.token_budget
        self._waiting: list[RunningSequence] = []  # both in order of arrival
        self._running: list[RunningSequence] = []
        self._computing: dict[Key, RunningSequence] = {}  # blocks of prompts that are soon to be published
        self._ids = itertools.count()
        self.num_preemptions = self.prefix_hits = self.prefix_queries = 0

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
        if (needed := self._pool.blocks_for(total)) > self._pool.num_blocks:
            raise ResourceError(
                f"KV cache: {total} tokens need {needed} blocks, and there are {self._pool.num_blocks}. Shorten the"
                " prompt, lower --max-tokens, or give more --kv-cache-mb.",
                code="E502",
            )

    def submit(self, sequence: RunningSequence) -> None:
        """Queue a sequence that `check` let pass."""
        sequence.id = next(self._ids)
        self._waiting.append(sequence)

    def plan(self, propose: Propose | None = None) -> tuple[StepPlan, list[Piece]]:
        """Decide the next step.

        Args:
            propose: returns up to so many tokens that may follow a sequence; they are run along with its own.
        Raises:
            ValueError: there is no work.
        """
        self._admit()
        chosen = self._choose_decodes()
        budget = self.token_budget - len(chosen)
        if chosen:
            budget = min(budget, self.mixed_budget)
        drafts: dict[int, Sequence[int]] = {}
        prompts = [sequence for sequence in self._running if sequence.num_pending > 1]
        # Beside prompts a step is long anyway, and guesses would take their turn.
        if propose is not None and not prompts:
            for sequence, _ in chosen:
                drafts[sequence.id] = self._draft(sequence, propose, budget)
                budget -= len(drafts[sequence.id])
        chosen += self._share_out(prompts, budget)
        if not chosen:
            raise ValueError("nothing to plan")
        return build_plan(chosen, drafts, self._pool.block_size)

    def advance(self, piece: Piece, sampled: Sequence[int]) -> None:
        """Record that a step ran for a sequence, and the tokens sampled from it: all but the last were its drafts."""
        sequence = piece.sequence
        sequence.tokens += sampled
        sequence.num_cached += piece.num_tokens + max(0, len(sampled) - 1)
        sequence.num_rows_taken = max(sequence.num_rows_taken, min(sequence.num_cached, sequence.num_prompt))
        num_full = sequence.num_cached // self._pool.block_size
        self._pool.extend_keys(sequence.keys, sequence.tokens, num_full)
        for i in range(sequence.num_published, num_full):
            self._pool.publish(sequence.blocks[i], sequence.keys[i])
            self._computing.pop(sequence.keys[i], None)
        sequence.num_published = max(sequence.num_published, num_full)

    def finish(self, sequence: RunningSequence, *, is_sound: bool = True) -> None:
        """End a sequence, wherever it is, and free its blocks; one that has ended stays ended.

        `is_sound`: whether what it computed may be shared.
        """
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        if sequence in self._running:
            self._running.remove(sequence)
        if not is_sound:
            self._pool.unpublish(sequence.blocks)
        self._give_back(sequence)

    # Blocks

    def _give_back(self, sequence: RunningSequence) -> None:
        if self._computing:
            self._computing = {key: other for key, other in self._computing.items() if other is not sequence}
        self._pool.release(sequence.blocks)
        sequence.set_blocks([])
        sequence.num_cached = sequence.num_published = 0

    def _admit(self) -> None:
        """Let waiting sequences run, in order, as long as there are blocks for all their tokens and to go on with."""
        if not self._waiting:
            return
        size = self._pool.block_size
        for sequence in list(self._waiting):
            if len(self._running) >= self.max_num_seqs:
                return
            # A shared block is not computed; the last token must be, and every row that is asked for.
            num_shareable = min(len(sequence.tokens) - 1, sequence.num_shareable) // size
            self._pool.extend_keys(sequence.keys, sequence.tokens, num_shareable)
            found = self._pool.find(sequence.keys[:num_shareable])
            if len(found) < num_shareable and sequence.keys[len(found)] in self._computing:
                continue  # another sequence is just computing what comes next
            num_new = self._pool.blocks_for(len(sequence.tokens)) - len(found)
            spare = len(self._running)  # a block each for those that run, or they would soon push it out again
            if num_new + self._pool.num_idle(found) + spare > self._pool.num_free:
                return
            self._waiting.remove(sequence)
            bisect.insort(self._running, sequence, key=lambda s: s.id)
            self._pool.share(found)
            sequence.set_blocks(found + self._pool.allocate(num_new))
            sequence.num_cached = len(found) * size
            sequence.num_published = len(found)
            for key in sequence.keys[len(found) : num_shareable]:
                self._computing.setdefault(key, sequence)
            if not sequence.was_admitted:
                sequence.was_admitted = True
                sequence.num_reused = sequence.num_cached
                self.prefix_hits += sequence.num_cached
                self.prefix_queries += sequence.num_prompt

    def _choose_decodes(self) -> list[tuple[RunningSequence, int]]:
        """Return the sequences with one token to run, oldest first, each with room for it."""
        chosen: list[tuple[RunningSequence, int]] = []
        for sequence in list(self._running):
            if sequence.num_pending == 1 and self._make_room(sequence):
                chosen.append((sequence, 1))
        return chosen

    def _make_room(self, sequence: RunningSequence) -> bool:
        """Give a sequence a block for its next token; false if it lost all of its own instead, now or before."""
        while len(sequence.tokens) > len(sequence.blocks) * self._pool.block_size:
            if sequence not in self._running:
                return False
            if self._pool.num_free > 0:
                sequence.set_blocks(sequence.blocks + self._pool.allocate(1))
            else:
                self._preempt(self._running[-1])
        return sequence in self._running

    def _preempt(self, sequence: RunningSequence) -> None:
        self._running.remove(sequence)
        self._give_back(sequence)
        bisect.insort(self._waiting, sequence, key=lambda s: s.id)
        self.num_preemptions += 1

    def _draft(self, sequence: RunningSequence, propose: Propose, budget: int) -> Sequence[int]:
        """Return tokens that may follow: never so many that somebody loses blocks, or that more than max_tokens come."""
        num_left = sequence.num_prompt + sequence.max_tokens - len(sequence.tokens) - 1
        size = self._pool.block_size
        num_slots = (len(sequence.blocks) + self._pool.num_free) * size - len(sequence.tokens)
        limit = min(num_left, num_slots, budget)
        drafts = propose(sequence, limit) if limit > 0 else ()
        if (num_new := self._pool.blocks_for(len(sequence.tokens) + len(drafts)) - len(sequence.blocks)) > 0:
            sequence.set_blocks(sequence.blocks + self._pool.allocate(num_new))
        return drafts

    def _share_out(self, prompts: list[RunningSequence], budget: int) -> list[tuple[RunningSequence, int]]:
        """Divide what is left of the budget among the sequences with more than one token to run."""
        if not prompts or budget < 1:
            return []
        wanted = {sequence.id: sequence.num_pending for sequence in prompts}
        given = dict.fromkeys(wanted, 0)
        rows_left = self._max_rows

        def give(sequence: RunningSequence, limit: int) -> int:
            nonlocal rows_left
            num_tokens = min(wanted[sequence.id] - given[sequence.id], limit)
            if sequence.num_rows_taken < sequence.num_prompt:
                num_tokens = min(num_tokens, rows_left)
                rows_left -= num_tokens
            given[sequence.id] += num_tokens
            return num_tokens

        budget -= give(prompts[0], (budget + 1) // 2)
        for sequence in sorted(prompts, key=lambda s: s.num_pending):  # stable: of equal ones the oldest first
            budget -= give(sequence, budget)
        return [(sequence, given[sequence.id]) for sequence in prompts if given[sequence.id]]
