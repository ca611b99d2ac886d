"""One sequence as the scheduler sees it, and laying chosen tokens of several out as one step plan."""

from __future__ import annotations

import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from llmrun.kv_cache import Key
from llmrun.step_plan import StepPlan


@dataclass(eq=False)
class RunningSequence:
    """One sequence from submission to its end; `tokens` are the prompt's and then the sampled ones.

    Attributes:
        id: order of arrival.
        tokens, num_prompt, max_tokens: see above; `max_tokens` are sampled at most.
        num_rows_taken: prompt tokens whose logits nobody wants any more: `num_prompt` unless all were asked for.
        can_share: whether blocks of other sequences may be used.
        num_cached: tokens whose keys and values are in the cache.
        num_reused: of the prompt, those that were found there.
        blocks, table: in order of position; the first `num_published` can be found by others, and are never written again.
        keys: of the full blocks.
    """

    id: int
    tokens: list[int]
    num_prompt: int
    max_tokens: int
    num_rows_taken: int = -1
    can_share: bool = True
    num_cached: int = 0
    num_reused: int = 0
    num_published: int = 0
    was_admitted: bool = False
    blocks: list[int] = field(default_factory=list)
    keys: list[Key] = field(default_factory=list)
    table: array.array[int] = field(default_factory=lambda: array.array("i"))

    def __post_init__(self) -> None:
        """Want no logits of the prompt."""
        if self.num_rows_taken < 0:
            self.num_rows_taken = self.num_prompt

    @property
    def num_pending(self) -> int:
        """Tokens that a step must still run before the next one can be sampled."""
        return len(self.tokens) - self.num_cached

    @property
    def num_shareable(self) -> int:
        """Tokens at the beginning that need not be computed if somebody has."""
        if not self.can_share:
            return 0
        return len(self.tokens) if self.num_rows_taken >= self.num_prompt else self.num_rows_taken

    def set_blocks(self, blocks: list[int]) -> None:
        """Hold these blocks."""
        self.blocks = blocks
        self.table = array.array("i", blocks)


@dataclass(slots=True)  # not frozen: that takes three times as long to make
class Piece:
    """What one step does for one sequence.

    Attributes:
        sequence: whose next `num_tokens` tokens run, from position `begin`, and after them `drafts`.
        rows: the rows of the step's logits that are its own: first `num_prompt_rows` of prompt tokens, from position
            `first_prompt_row`, if asked for; with `is_last` the last 1 + len(drafts) predict what follows its last
            token and each draft (the two may overlap by one row).
    """

    sequence: RunningSequence
    begin: int
    num_tokens: int
    drafts: Sequence[int]
    rows: slice
    first_prompt_row: int
    num_prompt_rows: int
    is_last: bool


def build_plan(
    chosen: Sequence[tuple[RunningSequence, int]], drafts: Mapping[int, Sequence[int]], block_size: int
) -> tuple[StepPlan, list[Piece]]:
    """Lay the chosen tokens out flat; every piece gets at least one row of logits, so that R >= 1.

    Args:
        chosen: sequences, and how many of their next tokens.
        drafts: by the id of a sequence, what is run after them.
        block_size: positions of a block.
    """
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    starts, seq_lens, rows = [0], [], []
    pieces: list[Piece] = []
    for sequence, num_tokens in chosen:
        begin, end = sequence.num_cached, sequence.num_cached + num_tokens
        guesses = drafts.get(sequence.id, ())
        ids += sequence.tokens[begin:end]
        ids += guesses
        last = end + len(guesses)
        positions += range(begin, last)
        blocks = sequence.blocks
        slots += [blocks[at // block_size] * block_size + at % block_size for at in range(begin, last)]
        first_row = max(begin, sequence.num_rows_taken)
        num_prompt_rows = max(0, min(end, sequence.num_prompt) - first_row)
        at_row = len(rows)
        rows += range(starts[-1] + first_row - begin, starts[-1] + first_row - begin + num_prompt_rows)
        rows += range(starts[-1] + num_tokens - (num_prompt_rows == 0 or first_row + num_prompt_rows < end), len(ids))
        starts.append(len(ids))
        seq_lens.append(last)
        is_last = end == len(sequence.tokens)
        row_slice = slice(at_row, len(rows))
        pieces.append(Piece(sequence, begin, num_tokens, guesses, row_slice, first_row, num_prompt_rows, is_last))
    num_columns = -(-max(seq_lens) // block_size)
    plan = StepPlan.of(
        input_ids=ids,
        positions=positions,
        slot_mapping=slots,
        query_start=starts,
        seq_lens=seq_lens,
        block_table=[sequence.table[:num_columns] for sequence, _ in chosen],
        logit_rows=rows,
    )
    return plan, pieces
