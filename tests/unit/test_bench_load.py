"""`llmrun bench -d -b`: no sequence of a batch may end before the last prompt is in the cache and all steps are measured."""

from __future__ import annotations

import pytest

from llmrun.commands.bench import Load
from llmrun.kv_cache import BlockPool
from llmrun.scheduler import Scheduler
from llmrun.sequence import RunningSequence


@pytest.mark.parametrize(("depth", "batch"), [(16, 1), (2000, 1), (16, 3), (300, 8), (2000, 8), (700, 40)])
def test_max_tokens_last_until_the_end(depth: int, batch: int) -> None:
    load = Load(0, 32, depth, batch)
    scheduler = Scheduler(BlockPool(20000, 16), max_seq_len=load.longest, max_num_seqs=batch)
    sequences = [
        RunningSequence(-1, [10000 * s + i for i in range(depth)], depth, load.max_tokens, -1) for s in range(batch)
    ]
    for sequence in sequences:
        scheduler.submit(sequence)
    while any(len(sequence.tokens) == depth for sequence in sequences):
        _, pieces = scheduler.plan()
        for piece in pieces:
            is_done = piece.begin + piece.num_tokens == len(piece.sequence.tokens)
            scheduler.advance(piece, [7] if is_done else [])
    assert max(len(sequence.tokens) for sequence in sequences) - depth + load.n_gen <= load.max_tokens
