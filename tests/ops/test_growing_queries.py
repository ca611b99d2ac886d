"""PagedAttention with queries that grow along a sequence (FORMAT.md 5.5)."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from test_attention import ALL, Sequence, World, check

GROWTH = {"llama_4_scaling_beta": 0.5, "original_max_position_embeddings": 20}
HEADS = {"GQA": (8, 2), "wide_GQA": (40, 1)}  # rows of a tile: of several heads of tokens, or a part of one


@pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=["f32", "f16"])
@pytest.mark.parametrize("window", [25, ALL], ids=str)
@pytest.mark.parametrize("heads", HEADS)
def test_prefill_and_decode_of_several_sequences(isa: str, heads: str, window: int, dtype: type) -> None:
    """Some far beyond the first step, some just before one and just behind it."""
    blocks = np.random.default_rng(1).permutation(15)
    sequences = [Sequence(n, list(b)) for n, b in zip((100, 21, 20, 60), np.split(blocks, [7, 9, 11]), strict=True)]
    world = World(*HEADS[heads], 32, 16, sequences, dtype, window=window, growth=GROWTH)
    check(world, world.step([(0, 0, 99), (1, 0, 20), (2, 0, 19), (3, 0, 20)]))
    check(world, world.step([(0, 99, 100), (1, 20, 21), (2, 19, 20), (3, 20, 60)]), threads=2)


def test_up_to_the_first_step_nothing_changes_and_later_all_does(isa: str) -> None:
    """And the bits of a token do not depend on where a step of the engine begins."""
    plain, whole, apart = (
        World(4, 2, 32, 16, [Sequence(70, [3, 0, 4, 1, 2])], growth=own) for own in ({}, GROWTH, GROWTH)
    )
    (before,), (grown,) = plain.whole(), whole.whole()
    np.testing.assert_array_equal(grown[:20], before[:20])
    assert (np.abs(grown[20:] - before[20:]).max(axis=1) > 1e-4).all()
    np.testing.assert_array_equal(whole.key_cache, plain.key_cache)
    pieces = [apart.run(apart.step([(0, first, end)])) for first, end in pairwise([0, 7, 20, 21, 55, 70])]
    np.testing.assert_array_equal(np.concatenate(pieces), grown)
