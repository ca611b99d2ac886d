"""PagedAttention with sinks: a score of each head more in its softmax, whose value is zero (FORMAT.md 5.5)."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import TOLERANCES, Node
from test_attention import ALL, HEADS, Sequence, World, check


def sinks_of(heads: int) -> np.ndarray:
    """Some that count for little beside a token's scores, some for much; each head has another."""
    return np.linspace(-2, 9, heads).astype(np.float32)[np.random.default_rng(5).permutation(heads)]


def make(sinks: np.ndarray | None = None, window: int = ALL, dtype: type = np.float32) -> World:
    return World(4, 2, 32, 16, [Sequence(133, [7, 1, 3, 0, 2, 6, 5, 8, 4])], dtype, window=window, sinks=sinks)


@pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=["f32", "f16"])
@pytest.mark.parametrize("window", [1, 20, ALL], ids=str)
@pytest.mark.parametrize("heads", HEADS)
def test_prefill_and_decode_of_several_sequences(isa: str, heads: str, window: int, dtype: type) -> None:
    sequences = [
        Sequence(100, [9, 2, 4, 10, 6, 11, 12]),
        Sequence(5, [1]),
        Sequence(17, [0, 8]),
        Sequence(33, [7, 3, 5]),
    ]
    num_heads, num_kv_heads = HEADS[heads]
    world = World(num_heads, num_kv_heads, 32, 16, sequences, dtype, window=window, sinks=sinks_of(num_heads))
    check(world, world.step([(0, 0, 99), (2, 0, 16), (3, 0, 20)]))
    check(world, world.step([(0, 99, 100), (1, 0, 5), (2, 16, 17), (3, 20, 33)]), threads=2)


@pytest.mark.parametrize("head_dim", [2, 18, 64, 256])
def test_head_dims(isa: str, head_dim: int) -> None:
    """A tile holds several heads of tokens, or a part of one."""
    for heads in ((6, 2), (80, 1)):
        world = World(*heads, head_dim, 16, [Sequence(70, [0, 1, 2, 3, 4])], sinks=sinks_of(heads[0]))
        check(world, world.step([(0, 0, 70)]))


def test_an_initializer(isa: str) -> None:
    """As it is in an artifact: read when the node is made."""
    world = make(sinks_of(4))
    expected = check(world, inputs := world.step([(0, 0, 133)]))
    node = Node("PagedAttention", inputs, ("out",), ("sinks",), world.attributes())
    stored, *_ = node.run()
    np.testing.assert_array_equal(stored, expected)


@pytest.mark.parametrize("window", [1, 33, ALL], ids=str)
def test_far_below_all_scores_it_is_as_none(isa: str, window: int) -> None:
    (none,) = make(window=window).whole()
    for sink in (-1e4, -1e38, -np.inf):
        (found,) = make(np.full(4, sink, np.float32), window).whole()
        np.testing.assert_array_equal(found, none)


@pytest.mark.parametrize("sink", [1000.0, 1e38])
def test_far_above_all_scores_it_takes_all(isa: str, sink: float) -> None:
    sinks = np.array([0, sink, 0, 0], np.float32)
    (found,) = make(sinks).whole()
    (others,) = make(np.zeros(4, np.float32)).whole()
    assert np.abs(found[:, 32:64]).max() < 1e-30
    np.testing.assert_array_equal(np.delete(found, range(32, 64), 1), np.delete(others, range(32, 64), 1))


@pytest.mark.parametrize("sink", [np.inf, np.nan])
def test_what_is_no_score_shows(isa: str, sink: float) -> None:
    """What a broken model computes must not look like an answer."""
    (found,) = make(np.array([0, 0, sink, 0], np.float32)).whole()
    assert np.isnan(found[:, 64:96]).all()
    assert np.isfinite(np.delete(found, range(64, 96), 1)).all()


@pytest.mark.parametrize("sink", [0.0, -1e38])
def test_a_token_all_of_whose_scores_are_minus_infinity_gives_all_to_it(isa: str, sink: float) -> None:
    world = World(2, 1, 16, 16, [Sequence(100, list(range(7)))], sinks=np.full(2, sink, np.float32))
    world.cos_sin[:] = np.concatenate([np.ones(8), np.zeros(8)])  # no rotation: queries keep their signs
    world.qkv[0][:, : 2 * 16] = np.abs(world.qkv[0][:, : 2 * 16])
    world.run(world.step([(0, 0, 99)]))
    for p in range(70):
        world.key_cache[p // 16, :, 5, p % 16] = -np.inf
    inputs = world.step([(0, 0, 100)])
    inputs["slot_mapping"][:99] = -1  # the cache as it is
    out = check(world, inputs)
    np.testing.assert_array_equal(out[:70], 0)
    assert np.abs(out[70:]).max() > 100 * TOLERANCES["attention"]


@pytest.mark.parametrize("window", [33, ALL], ids=str)
@pytest.mark.parametrize("chunk", [1, 7, 60])
def test_chunks_give_the_bits_of_the_whole(isa: str, chunk: int, window: int) -> None:
    (expected,) = make(sinks_of(4), window, np.float16).whole(threads=2)
    pieces = make(sinks_of(4), window, np.float16)
    out = [pieces.run(pieces.step([(0, p, min(p + chunk, 133))])) for p in range(0, 133, chunk)]
    np.testing.assert_array_equal(np.concatenate(out), expected)
