"""The scheduler against a model of the cache: whatever is batched with whatever, each token runs once, in its place."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrun.errors import ResourceError, UsageError
from llmrun.kv_cache import BlockAllocator
from llmrun.scheduler import Piece, RunningSequence, Scheduler
from llmrun.step_plan import FIELDS, StepPlan

BLOCK_SIZE = 4


def make_scheduler(num_blocks: int = 64, **options: int) -> tuple[Scheduler, BlockAllocator]:
    allocator = BlockAllocator(num_blocks, BLOCK_SIZE)
    settings = {"max_seq_len": 100, "max_num_seqs": 4, "token_budget": 8, **options}
    return Scheduler(allocator, **settings), allocator


def submit(
    scheduler: Scheduler, prompt: list[int], max_tokens: int, *, wants_all_logits: bool = False
) -> RunningSequence:
    scheduler.check(len(prompt), max_tokens, least_tokens=0 if wants_all_logits else 1)
    sequence = RunningSequence(-1, list(prompt), len(prompt), max_tokens, wants_all_logits)
    scheduler.submit(sequence)
    return sequence


def advance(scheduler: Scheduler, pieces: list[Piece], sampled: dict[int, int]) -> None:
    for piece in pieces:
        scheduler.advance(piece, [sampled[piece.sequence.id]] if piece.sequence.id in sampled else [])


class CacheModel:
    """Runs plans on a dictionary: slot -> token; checks that each sequence finds its own tokens at its own positions."""

    def __init__(self) -> None:
        self.slots: dict[int, int] = {}

    def run(self, plan: StepPlan, pieces: list[Piece]) -> None:
        for slot, token in zip(plan.slot_mapping, plan.input_ids, strict=True):
            self.slots[int(slot)] = int(token)
        for row, piece in enumerate(pieces):
            begin, end = plan.query_start[row], plan.query_start[row + 1]
            seq_len = int(plan.seq_lens[row])
            assert list(plan.positions[begin:end]) == list(range(seq_len - (end - begin), seq_len))
            blocks = plan.block_table[row]
            seen = [self.slots[int(blocks[p // BLOCK_SIZE]) * BLOCK_SIZE + p % BLOCK_SIZE] for p in range(seq_len)]
            assert seen == piece.sequence.tokens[:seq_len]
            assert plan.logit_rows[piece.rows.stop - 1] == end - 1


def run_all(scheduler: Scheduler, sequences: list[RunningSequence], budget: int) -> int:
    """Run to the end, sampling ids that tell sequence and position apart; return the number of steps."""
    cache = CacheModel()
    for step in itertools.count():
        if not scheduler.has_work:
            return step
        plan, pieces = scheduler.plan()
        assert 1 <= plan.num_tokens <= budget
        assert len({piece.sequence.id for piece in pieces}) == len(pieces)
        cache.run(plan, pieces)
        sampled = {p.sequence.id: 1000 * p.sequence.id + len(p.sequence.tokens) for p in pieces if p.is_last}
        advance(scheduler, pieces, sampled)
        for piece in pieces:
            if len(piece.sequence.tokens) - piece.sequence.num_prompt >= piece.sequence.max_tokens:
                scheduler.finish(piece.sequence)
    raise AssertionError


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 10)), min_size=1, max_size=8),
    st.integers(1, 4),
    st.integers(1, 16),
)
def test_each_sequence_finds_its_own_tokens(shapes: list[tuple[int, int]], max_num_seqs: int, budget: int) -> None:
    scheduler, allocator = make_scheduler(12, max_num_seqs=max_num_seqs, token_budget=budget)
    sequences = [submit(scheduler, [100 * i + k for k in range(n)], m) for i, (n, m) in enumerate(shapes)]
    run_all(scheduler, sequences, max(budget, max_num_seqs))
    assert allocator.num_free == allocator.num_blocks
    for sequence, (num_prompt, max_tokens) in zip(sequences, shapes, strict=True):
        assert len(sequence.tokens) == num_prompt + max_tokens


def test_a_long_prompt_goes_in_chunks() -> None:
    scheduler, _ = make_scheduler(token_budget=8)
    sequence = submit(scheduler, list(range(20)), 1)
    sizes = []
    while sequence.num_pending:
        plan, pieces = scheduler.plan()
        sizes.append((plan.num_tokens, pieces[0].is_last))
        advance(scheduler, pieces, {})
    assert sizes == [(8, False), (8, False), (4, True)]


def test_decoding_goes_on_beside_a_long_prompt() -> None:
    scheduler, _ = make_scheduler(token_budget=8)
    first = submit(scheduler, [1], 5)
    _, pieces = scheduler.plan()
    advance(scheduler, pieces, {first.id: 7})
    submit(scheduler, list(range(50)), 1)
    plan, pieces = scheduler.plan()
    assert [(piece.sequence.id, piece.num_tokens) for piece in pieces] == [(first.id, 1), (first.id + 1, 7)]
    assert list(plan.input_ids[:2]) == [7, 0]


def test_a_request_waits_until_its_blocks_are_free() -> None:
    scheduler, allocator = make_scheduler(4)
    first, second = submit(scheduler, [1] * 8, 4), submit(scheduler, [2] * 8, 4)
    _, pieces = scheduler.plan()
    assert [piece.sequence for piece in pieces] == [first]
    scheduler.finish(first)
    _, pieces = scheduler.plan()
    assert [piece.sequence for piece in pieces] == [second]
    assert allocator.num_free == 1


def test_what_can_never_fit_is_refused_at_once() -> None:
    scheduler, _ = make_scheduler(4)
    with pytest.raises(ResourceError, match="6 blocks needed"):
        submit(scheduler, [1] * 20, 4)


def test_all_logits_asks_for_each_row() -> None:
    scheduler, _ = make_scheduler()
    submit(scheduler, [5, 6, 7], 0, wants_all_logits=True)
    submit(scheduler, [8, 9], 1)
    plan, pieces = scheduler.plan()
    assert list(plan.logit_rows) == [0, 1, 2, 4]
    assert [piece.rows for piece in pieces] == [slice(0, 3), slice(3, 4)]


def test_waiting_and_ended_sequences_can_be_ended() -> None:
    scheduler, allocator = make_scheduler(max_num_seqs=1)
    running, waiting = submit(scheduler, [1], 1), submit(scheduler, [2], 1)
    scheduler.plan()
    for sequence in (waiting, running, running):
        scheduler.finish(sequence)
    assert not scheduler.has_work
    assert allocator.num_free == allocator.num_blocks


@pytest.mark.parametrize(
    ("ids", "max_tokens", "message"),
    [([], 1, "empty"), ([1], 0, "1 or more"), ([1] * 60, 41, "together 101 do not fit")],
)
def test_bad_requests_are_refused(ids: list[int], max_tokens: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        submit(make_scheduler()[0], ids, max_tokens)


def test_no_work_is_no_plan() -> None:
    with pytest.raises(ValueError, match="nothing"):
        make_scheduler()[0].plan()


def test_a_plan_survives_packing() -> None:
    scheduler, _ = make_scheduler()
    submit(scheduler, [5, 6, 7], 0, wants_all_logits=True)
    submit(scheduler, [8, 9, 10, 11, 12], 1)
    plan, _ = scheduler.plan()
    again = StepPlan.unpack(plan.pack())
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(again, name), getattr(plan, name))
        assert getattr(again, name).dtype == np.int32


def test_a_cut_message_is_refused() -> None:
    scheduler, _ = make_scheduler()
    submit(scheduler, [5, 6], 1)
    packed = scheduler.plan()[0].pack()
    with pytest.raises(ValueError, match="numbers"):
        StepPlan.unpack(packed[:-1])
