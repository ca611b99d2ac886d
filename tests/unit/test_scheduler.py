"""The scheduler against a model of the cache: whatever is batched with whatever, each token runs once, in its place."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llmrun.errors import ResourceError, UsageError
from llmrun.kv_cache import BlockPool
from llmrun.lookup import PromptLookup
from llmrun.scheduler import Scheduler
from llmrun.sequence import Piece, RunningSequence
from llmrun.step_plan import FIELDS, StepPlan

BLOCK_SIZE = 4


def make_scheduler(num_blocks: int = 64, **options: int) -> tuple[Scheduler, BlockPool]:
    pool = BlockPool(num_blocks, BLOCK_SIZE)
    settings = {"max_seq_len": 100, "max_num_seqs": 4, "token_budget": 8, **options}
    return Scheduler(pool, **settings), pool


def submit(
    scheduler: Scheduler, prompt: list[int], max_tokens: int, *, wants_all_rows: bool = False
) -> RunningSequence:
    scheduler.check(len(prompt), max_tokens, least_tokens=0 if wants_all_rows else 1)
    sequence = RunningSequence(-1, list(prompt), len(prompt), max_tokens, 0 if wants_all_rows else -1)
    scheduler.submit(sequence)
    return sequence


def advance(scheduler: Scheduler, pieces: list[Piece], sampled: dict[int, int]) -> None:
    for piece in pieces:
        scheduler.advance(piece, [sampled[piece.sequence.id]] if piece.sequence.id in sampled else [])


class CacheModel:
    """Runs plans on a dictionary: slot -> token; checks that each sequence finds its own tokens at its own positions."""

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self.slots: dict[int, int] = {}

    def run(self, plan: StepPlan, pieces: list[Piece]) -> None:
        fields = plan.fields()
        written = [int(slot) for slot in fields["slot_mapping"]]
        assert len(set(written)) == len(written)
        for slot, token in zip(written, fields["input_ids"], strict=True):
            block = slot // BLOCK_SIZE
            assert self.pool._holders[block] == 1, "written although shared"
            assert block not in self.pool._key_of, "written although others can find it"
            self.slots[slot] = int(token)
        for row, piece in enumerate(pieces):
            begin, end = fields["query_start"][row], fields["query_start"][row + 1]
            seq_len = int(fields["seq_lens"][row])
            assert list(fields["positions"][begin:end]) == list(range(seq_len - (end - begin), seq_len))
            blocks = fields["block_table"][row]
            seen = [self.slots[int(blocks[p // BLOCK_SIZE]) * BLOCK_SIZE + p % BLOCK_SIZE] for p in range(seq_len)]
            known = piece.begin + piece.num_tokens
            assert seen == [*piece.sequence.tokens[:known], *piece.drafts]
            last = fields["logit_rows"][piece.rows.stop - 1 - len(piece.drafts) : piece.rows.stop]
            assert list(last) == list(range(end - 1 - len(piece.drafts), end))


def next_token(sequence: RunningSequence, position: int) -> int:
    """What a model would say: depends on the tokens before only by their number, so that answers are shared too."""
    return 1000 + position % 7


def run_all(scheduler: Scheduler, sequences: list[RunningSequence], budget: int, num_drafts: int = 0) -> int:
    """Run to the end, with guesses of which every other is right; return the number of steps."""
    cache = CacheModel(scheduler._pool)

    def propose(sequence: RunningSequence, limit: int) -> list[int]:
        at = len(sequence.tokens)
        right = [next_token(sequence, at + i) for i in range(min(limit, num_drafts))]
        return [token if (at + i) % 3 else -1 for i, token in enumerate(right)]

    for step in itertools.count():
        if not scheduler.has_work:
            return step
        plan, pieces = scheduler.plan(propose if num_drafts else None)
        assert 1 <= plan.num_tokens <= budget
        assert len({piece.sequence.id for piece in pieces}) == len(pieces)
        assert all(piece.num_tokens for piece in pieces), "a row of logits for nothing"
        assert any(piece.sequence is scheduler._running[0] for piece in pieces), "the oldest always gets on"
        decoding = [s for s in scheduler._running if s.num_pending == 1]
        assert all(any(piece.sequence is s for piece in pieces) for s in decoding), "who decodes never waits"
        cache.run(plan, pieces)
        for piece in pieces:
            sequence = piece.sequence
            sampled: list[int] = []
            if piece.is_last:
                for draft in [*piece.drafts, None]:
                    sampled.append(next_token(sequence, len(sequence.tokens) + len(sampled)))
                    if sampled[-1] != draft:
                        break
            scheduler.advance(piece, sampled)
            if len(sequence.tokens) - sequence.num_prompt >= sequence.max_tokens:
                scheduler.finish(sequence)
        assert step < 3000, "livelock"
    raise AssertionError


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 30), st.integers(1, 15)), min_size=1, max_size=8),
    st.integers(1, 4),
    st.integers(1, 16),
    st.integers(12, 20),
    st.integers(0, 4),
)
@example([(0, 30, 1), (1, 1, 15), (2, 1, 15)], 3, 1, 20, 0)  # all others decode from the first step on
def test_each_sequence_finds_its_own_tokens(
    shapes: list[tuple[int, int, int]], max_num_seqs: int, budget: int, num_blocks: int, num_drafts: int
) -> None:
    scheduler, pool = make_scheduler(
        num_blocks, max_num_seqs=max_num_seqs, token_budget=budget, mixed_budget=max(1, budget // 2)
    )
    sequences = [submit(scheduler, [100 * stem + k for k in range(n)], m) for stem, n, m in shapes]
    run_all(scheduler, sequences, max(budget, max_num_seqs + 1), num_drafts)
    assert pool.num_free == pool.num_blocks
    assert not scheduler._computing
    for sequence, (_, num_prompt, max_tokens) in zip(sequences, shapes, strict=True):
        assert len(sequence.tokens) == num_prompt + max_tokens
        assert sequence.tokens[num_prompt:] == [
            next_token(sequence, at) for at in range(num_prompt, len(sequence.tokens))
        ]


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
    scheduler, _ = make_scheduler(token_budget=16, mixed_budget=7)
    first = submit(scheduler, [1], 5)
    _, pieces = scheduler.plan()
    advance(scheduler, pieces, {first.id: 7})
    submit(scheduler, list(range(50)), 1)
    plan, pieces = scheduler.plan()
    assert [(piece.sequence.id, piece.num_tokens) for piece in pieces] == [(first.id, 1), (first.id + 1, 7)]
    assert list(plan.fields()["input_ids"][:2]) == [7, 0]


def test_a_short_prompt_passes_a_long_one_which_still_gets_half() -> None:
    scheduler, _ = make_scheduler(token_budget=8)
    submit(scheduler, list(range(60)), 1)
    submit(scheduler, list(range(100, 106)), 1)
    _, pieces = scheduler.plan()
    assert [(piece.num_tokens, piece.is_last) for piece in pieces] == [(4, False), (4, False)]
    advance(scheduler, pieces, {})
    _, pieces = scheduler.plan()
    assert [(piece.num_tokens, piece.is_last) for piece in pieces] == [(6, False), (2, True)]


def test_blocks_are_taken_as_they_are_needed() -> None:
    scheduler, pool = make_scheduler(64)
    sequence = submit(scheduler, [1] * 5, 50)
    for expected in (2, 2, 2, 2, 3):
        _, pieces = scheduler.plan()
        assert pool.num_blocks - pool.num_free == expected
        advance(scheduler, pieces, {sequence.id: 9})


def test_a_prefix_is_computed_once() -> None:
    scheduler, pool = make_scheduler(token_budget=64, mixed_budget=64)
    prompt = list(range(18))
    first = submit(scheduler, [*prompt, 50], 3)
    _, pieces = scheduler.plan()
    advance(scheduler, pieces, {first.id: 7})
    second = submit(scheduler, [*prompt, 60], 3)
    third = submit(scheduler, [1, *prompt], 3)
    _, pieces = scheduler.plan()
    sizes = {piece.sequence.id: piece.num_tokens for piece in pieces}
    assert sizes == {first.id: 1, second.id: 19 - 16, third.id: 19}
    assert second.blocks[:4] == first.blocks[:4]
    assert not set(second.blocks[4:]) & set(first.blocks)
    scheduler.finish(first)
    assert pool._holders[second.blocks[0]] == 1
    assert (scheduler.prefix_hits, scheduler.prefix_queries) == (16, 3 * 19)


def test_what_another_is_computing_is_waited_for() -> None:
    scheduler, _ = make_scheduler(token_budget=16)
    first, second = submit(scheduler, list(range(40)), 3), submit(scheduler, [*range(40), 7], 3)
    for size in (16, 16, 8):
        _, pieces = scheduler.plan()
        assert [(piece.sequence, piece.num_tokens) for piece in pieces] == [(first, size)]
        advance(scheduler, pieces, {first.id: 9} if pieces[0].is_last else {})
    _, pieces = scheduler.plan()
    assert [(piece.sequence, piece.num_tokens) for piece in pieces] == [(first, 1), (second, 1)]


def test_nobody_waits_for_one_that_has_left() -> None:
    scheduler, _ = make_scheduler(token_budget=16)
    first, second = submit(scheduler, list(range(40)), 3), submit(scheduler, [*range(40), 7], 3)
    _, pieces = scheduler.plan()
    advance(scheduler, pieces, {})
    scheduler.finish(first)
    _, pieces = scheduler.plan()
    assert [(piece.sequence, piece.begin) for piece in pieces] == [(second, 16)]


def test_another_model_shares_nothing() -> None:
    keys: list[list[bytes]] = []
    for identity in (b"a", b"b"):
        pool = BlockPool(4, BLOCK_SIZE, identity)
        keys.append([])
        pool.extend_keys(keys[-1], list(range(8)), 2)
    assert not set(keys[0]) & set(keys[1])


def test_without_sharing_the_whole_prompt_is_computed() -> None:
    scheduler, _ = make_scheduler(token_budget=64, mixed_budget=64)
    first = submit(scheduler, list(range(20)), 3)
    _, pieces = scheduler.plan()
    advance(scheduler, pieces, {first.id: 7})
    alone = RunningSequence(-1, list(range(20)), 20, 3, can_share=False)
    scheduler.submit(alone)
    scored = submit(scheduler, list(range(20)), 3, wants_all_rows=True)
    _, pieces = scheduler.plan()
    assert [(piece.sequence, piece.begin) for piece in pieces] == [(first, 20), (alone, 0), (scored, 0)]


def test_the_latest_arrival_gives_its_blocks_back() -> None:
    scheduler, pool = make_scheduler(6)
    first, second = submit(scheduler, [1] * 8, 12), submit(scheduler, [2] * 8, 8)
    while scheduler.num_preemptions == 0:
        _, pieces = scheduler.plan()
        advance(scheduler, pieces, {piece.sequence.id: 9 for piece in pieces if piece.is_last})
    assert scheduler._running == [first]
    assert (second.blocks, second.num_cached) == ([], 0)
    assert second.num_prompt < len(second.tokens)  # what it had sampled stays sampled
    run_until_done(scheduler)
    assert [len(first.tokens), len(second.tokens)] == [20, 16]
    assert pool.num_free == pool.num_blocks


def run_until_done(scheduler: Scheduler) -> None:
    while scheduler.has_work:
        _, pieces = scheduler.plan()
        for piece in pieces:
            scheduler.advance(piece, [9] if piece.is_last else [])
            if len(piece.sequence.tokens) - piece.sequence.num_prompt >= piece.sequence.max_tokens:
                scheduler.finish(piece.sequence)


def test_what_a_failed_sequence_computed_is_not_shared() -> None:
    scheduler, pool = make_scheduler(token_budget=64)
    first = submit(scheduler, list(range(20)), 3)
    _, pieces = scheduler.plan()
    advance(scheduler, pieces, {first.id: 7})
    scheduler.finish(first, is_sound=False)
    assert pool.num_free == pool.num_blocks
    submit(scheduler, list(range(20)), 3)
    _, pieces = scheduler.plan()
    assert pieces[0].begin == 0


def test_what_can_never_fit_is_refused_at_once() -> None:
    scheduler, _ = make_scheduler(4)
    with pytest.raises(ResourceError, match="24 tokens need 6 blocks, and there are 4"):
        submit(scheduler, [1] * 20, 4)


def test_all_logits_asks_for_each_row() -> None:
    scheduler, _ = make_scheduler()
    submit(scheduler, [5, 6, 7], 0, wants_all_rows=True)
    submit(scheduler, [8, 9], 1)
    plan, pieces = scheduler.plan()
    assert list(plan.fields()["logit_rows"]) == [0, 1, 2, 4]
    assert [(piece.rows, piece.num_prompt_rows) for piece in pieces] == [(slice(0, 3), 3), (slice(3, 4), 0)]


def test_rows_of_a_step_are_bounded() -> None:
    scheduler, _ = make_scheduler(token_budget=64, max_rows=5)
    submit(scheduler, [5] * 12, 0, wants_all_rows=True)
    sizes = []
    for _ in range(3):
        plan, pieces = scheduler.plan()
        sizes.append(plan.num_rows)
        advance(scheduler, pieces, {})
    assert sizes == [5, 5, 2]
    submit(scheduler, [6] * 12, 1)
    assert scheduler.plan()[0].num_tokens == 12, "a prompt that asks for no rows goes in one"


def test_waiting_and_ended_sequences_can_be_ended() -> None:
    scheduler, pool = make_scheduler(max_num_seqs=1)
    running, waiting = submit(scheduler, [1], 1), submit(scheduler, [2], 1)
    scheduler.plan()
    for sequence in (waiting, running, running):
        scheduler.finish(sequence)
    assert not scheduler.has_work
    assert pool.num_free == pool.num_blocks


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


def test_a_plan_is_its_message() -> None:
    fields = {
        "input_ids": [5, 6, 7, 8],
        "positions": [0, 1, 2, 20],
        "slot_mapping": [32, 33, 34, 4],
        "query_start": [0, 3, 4],
        "seq_lens": [3, 21],
        "block_table": [[2], [1, 3]],
        "logit_rows": [0, 2, 3],
    }
    plan = StepPlan.of(**fields)
    again = StepPlan.read(np.array(plan.message, np.int32))
    assert tuple(again.fields()) == FIELDS
    for name, value in again.fields().items():
        expected = [[2, *[0] * 7], [1, 3, *[0] * 6]] if name == "block_table" else fields[name]
        assert value.tolist() == expected
        assert value.dtype == np.int32
        assert np.shares_memory(value, again.message)
    assert again.shape == plan.shape == (4, 2, 8, 3)
    with pytest.raises(ValueError, match="4 tokens and 2 sequences: shapes disagree"):
        StepPlan.of(**fields | {"positions": [0, 1, 2]})


def test_a_message_says_whether_whole_rows_are_asked_for() -> None:
    scheduler, _ = make_scheduler()
    submit(scheduler, [5, 6], 1)
    plan, _ = scheduler.plan()
    for asks in (True, False, True):
        plan.asks_whole_rows = asks
        assert StepPlan.read(np.array(plan.message, np.int32)).asks_whole_rows == asks


def test_a_cut_message_is_refused() -> None:
    scheduler, _ = make_scheduler()
    submit(scheduler, [5, 6], 1)
    message = scheduler.plan()[0].message
    with pytest.raises(ValueError, match=f"{len(message) - 1} numbers, expected {len(message)}"):
        StepPlan.read(np.array(message[:-1], np.int32))


def test_the_number_of_guesses_follows_how_many_were_right() -> None:
    lookup, tokens = PromptLookup(max_drafts=8), [1, 2, *range(10, 30), 1, 2]
    assert lookup.propose(tokens, limit=3) == [10, 11, 12]
    for guessed, right, expected in ((8, 0, 1), (1, 1, 2), (0, 0, 2), (2, 2, 4), (4, 2, 3), (3, 3, 6), (6, 6, 8)):
        lookup.learn(guessed, right)
        assert lookup.propose(tokens, limit=99) == list(range(10, 10 + expected))
