"""PagedAttention against float64, and what must not change its result (FORMAT.md 3.2, 5.5)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import helpers
import numpy as np
import onnxruntime
import pytest
from helpers import TOLERANCES, Node, session
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmpack_ops import reference
from llmrun.job_options import ISAS

ALL = 2**31 - 1  # a window that hides nothing
FILL = 7.0  # what untouched cache slots hold: a wrong read shows


@dataclass
class Sequence:
    """`length` tokens once all steps are done; blocks of the cache in order."""

    length: int
    blocks: list[int]


@dataclass
class World:
    """Sequences with their true q, k, v; runs steps on a pair of caches."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    sequences: list[Sequence]
    dtype: type = np.float32
    num_blocks: int = 0
    seed: int = 0
    window: int = ALL
    sinks: np.ndarray | None = None
    growth: dict[str, float] = field(default_factory=dict)  # attributes
    qkv: list[np.ndarray] = field(init=False)
    cos_sin: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.num_blocks = self.num_blocks or 1 + max((b for s in self.sequences for b in s.blocks), default=0)
        width = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        self.qkv = [rng.standard_normal((s.length, width)).astype(np.float32) for s in self.sequences]
        longest = max((s.length for s in self.sequences), default=1)
        angles = np.arange(longest)[:, None] / 10000 ** (np.arange(self.head_dim // 2) * 2 / self.head_dim)
        self.cos_sin = np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
        of_a_head = (self.num_blocks, self.num_kv_heads)
        self.key_cache = np.full((*of_a_head, self.head_dim, self.block_size), FILL, self.dtype)
        self.value_cache = np.full((*of_a_head, self.block_size, self.head_dim), FILL, self.dtype)

    def step(self, spans: list[tuple[int, int, int]]) -> dict[str, np.ndarray]:
        """Inputs of one step; a span is (sequence, first position, end position)."""
        most = max((len(s.blocks) for s in self.sequences), default=1)
        table = np.full((len(spans), most), -1, np.int32)  # -1: an entry that must not be read
        slots, rows, angles = [], [], []
        for i, (b, first, end) in enumerate(spans):
            blocks = self.sequences[b].blocks
            used = -(-end // self.block_size)
            table[i, :used] = blocks[:used]
            slots += [blocks[p // self.block_size] * self.block_size + p % self.block_size for p in range(first, end)]
            rows.append(self.qkv[b][first:end])
            angles.append(self.cos_sin[first:end])
        return {
            "qkv": np.concatenate(rows),
            "cos_sin": np.concatenate(angles),
            "key_cache": self.key_cache,
            "value_cache": self.value_cache,
            "slot_mapping": np.array(slots, np.int32),
            "query_start": np.cumsum([0] + [end - first for _, first, end in spans]).astype(np.int32),
            "seq_lens": np.array([end for *_, end in spans], np.int32),
            "block_table": table,
            **({} if self.sinks is None else {"sinks": self.sinks}),
        }

    def attributes(self) -> dict[str, float]:
        sizes = {"num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads, "window": self.window}
        return {**sizes, "scale": float(self.head_dim**-0.5), **self.growth}

    def run(self, inputs: dict[str, np.ndarray], threads: int = 1) -> np.ndarray:
        """Runs the operator on this world's caches, bound so that it changes them in place."""
        return run_bound(Node("PagedAttention", inputs, ("out",), (), self.attributes()), threads)

    def whole(self, threads: int = 1) -> list[np.ndarray]:
        """All sequences in one step; out by sequence."""
        out = self.run(self.step([(b, 0, s.length) for b, s in enumerate(self.sequences)]), threads)
        return np.split(out, np.cumsum([s.length for s in self.sequences])[:-1])


def run_bound(node: Node, threads: int = 1) -> np.ndarray:
    if helpers.EMULATOR is not None:
        return node.run(threads)[0]
    s = session(node.model(), threads)
    binding = s.io_binding()
    # Values over numpy's memory: the operator writes through them.
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in node.inputs.items()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("out")
    s.run_with_iobinding(binding)
    for name in ("key_cache", "value_cache"):
        node.inputs[name][...] = values[name].numpy()
    return binding.get_outputs()[0].numpy()


def exactly(world: World, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The reference's out and caches, positions first."""
    keys, values = reference.positions_first(inputs["key_cache"], inputs["value_cache"])
    return reference.paged_attention(**inputs | {"key_cache": keys, "value_cache": values}, **world.attributes())


def check(world: World, inputs: dict[str, np.ndarray], threads: int = 1) -> np.ndarray:
    """Compares what a step wrote, and then what it read: attention over the caches as the operator left them."""
    _, keys, values = exactly(world, inputs)
    out = world.run(inputs, threads)
    found_keys, found_values = reference.positions_first(world.key_cache, world.value_cache)
    # One unit in the last place: the reference rotates in float64 before it rounds.
    step = 2.0**-10 if world.dtype is np.float16 else 2.0**-21
    np.testing.assert_allclose(found_keys.astype(np.float64), keys.astype(np.float64), rtol=step, atol=1e-6)
    np.testing.assert_array_equal(found_values, values)
    exact, *_ = exactly(world, inputs | {"slot_mapping": np.full_like(inputs["slot_mapping"], -1)})
    np.testing.assert_allclose(out, exact, rtol=0, atol=TOLERANCES["attention"])
    return out


HEADS = {"MHA": (4, 4), "GQA": (8, 2), "MQA": (6, 1), "wide_GQA": (20, 2)}


@pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=["f32", "f16"])
@pytest.mark.parametrize("head_dim", [2, 8, 32, 64, 80, 128, 256])
@pytest.mark.parametrize("heads", HEADS)
def test_prefill_of_one_sequence(isa: str, heads: str, head_dim: int, dtype: type) -> None:
    world = World(*HEADS[heads], head_dim, 16, [Sequence(77, [3, 0, 5, 1, 2])], dtype)
    check(world, world.step([(0, 0, 77)]))


@pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=["f32", "f16"])
def test_prefill_and_decode_in_one_step(isa: str, dtype: type) -> None:
    sequences = [Sequence(40, [9, 2, 4]), Sequence(5, [1]), Sequence(17, [0, 8]), Sequence(33, [7, 3, 5])]
    world = World(4, 2, 32, 16, sequences, dtype)
    check(world, world.step([(0, 0, 39), (2, 0, 16), (3, 0, 20)]))
    check(world, world.step([(0, 39, 40), (1, 0, 5), (2, 16, 17), (3, 20, 33)]), threads=2)


@pytest.mark.parametrize("block_size", [16, 48, 64, 128])
def test_block_sizes(isa: str, block_size: int) -> None:
    blocks = list(np.random.default_rng(1).permutation(80)[: -(-150 // block_size)])
    world = World(4, 2, 16, block_size, [Sequence(150, blocks)], num_blocks=80)
    check(world, world.step([(0, 0, 149)]))
    check(world, world.step([(0, 149, 150)]))


@pytest.mark.parametrize("window", [1, 5, 16, 63, 64, 65, 130, 150], ids=str)
@pytest.mark.parametrize("heads", ["MHA", "MQA", "wide_GQA"])
def test_windows(isa: str, heads: str, window: int) -> None:
    """Smaller and larger than a group of 16 positions, a stretch of 64, a tile's tokens, and the sequence."""
    sequences = [Sequence(150, [9, 2, 4, 0, 8, 1, 7, 3, 6, 5]), Sequence(70, [10, 14, 12, 11, 13])]
    world = World(*HEADS[heads], 32, 16, sequences, np.float16, window=window)
    check(world, world.step([(0, 0, 149), (1, 0, 30)]), threads=2)
    check(world, world.step([(0, 149, 150), (1, 30, 70)]))


@pytest.mark.parametrize("number", [np.inf, np.nan])
@pytest.mark.parametrize("window", [1, 17, 64, 80])
def test_nothing_before_the_window_is_seen(isa: str, window: int, number: float) -> None:
    """Nor multiplied by zero: neither by a token alone nor by those beside which others still see it."""
    world = World(4, 2, 32, 16, [Sequence(200, list(range(13)))], window=window)
    (clean,) = World(4, 2, 32, 16, world.sequences, window=window).whole()
    world.qkv[0][70, 4 * 32 :] = number
    (out,) = world.whole()
    np.testing.assert_array_equal(
        np.delete(out, range(70, 70 + window), 0), np.delete(clean, range(70, 70 + window), 0)
    )
    assert not np.isfinite(out[70 : 70 + window]).any()


@pytest.mark.parametrize("window", [33, ALL])
@pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=["f32", "f16"])
@pytest.mark.parametrize("chunk", [1, 7, 16, 60])
def test_chunks_give_the_bits_of_the_whole(isa: str, chunk: int, dtype: type, window: int) -> None:
    def make() -> World:
        return World(8, 2, 32, 16, [Sequence(133, [7, 1, 3, 0, 2, 6, 5, 8, 4])], dtype, window=window)

    whole, pieces = make(), make()
    (expected,) = whole.whole()
    out = [pieces.run(pieces.step([(0, p, min(p + chunk, 133))])) for p in range(0, 133, chunk)]
    np.testing.assert_array_equal(np.concatenate(out), expected)
    np.testing.assert_array_equal(whole.key_cache, pieces.key_cache)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=["f32", "f16"])
@pytest.mark.parametrize("block_size", [16, 48])
@pytest.mark.parametrize("heads", ["MHA", "wide_GQA"])
def test_both_ways_of_asking_for_keys_and_values(
    isa: str, weight_fetches: Iterator[bytes], heads: str, block_size: int, dtype: type
) -> None:
    out = []
    for _ in weight_fetches:
        world = World(*HEADS[heads], 64, block_size, [Sequence(150, list(range(-(-150 // block_size))))], dtype)
        out.append([check(world, world.step([(0, *tokens)])) for tokens in ((0, 149), (149, 150))])
    for through, past in zip(*out, strict=True):
        np.testing.assert_array_equal(through, past)


def test_a_batch_gives_the_bits_of_each_alone(isa: str) -> None:
    sequences = [Sequence(20, [4, 1, 7]), Sequence(1, [2]), Sequence(75, [0, 3, 5, 6, 8])]
    together = World(4, 2, 64, 16, sequences).whole(threads=2)
    for b, expected in enumerate(together):
        alone = World(4, 2, 64, 16, sequences)
        out = alone.run(alone.step([(b, 0, sequences[b].length)]))
        np.testing.assert_array_equal(out, expected)


def test_the_place_of_blocks_does_not_matter(isa: str) -> None:
    (a,) = World(4, 2, 32, 16, [Sequence(60, [0, 1, 2, 3])]).whole()
    (b,) = World(4, 2, 32, 16, [Sequence(60, [9, 3, 7, 0])]).whole()
    np.testing.assert_array_equal(a, b)


def test_threads_give_the_same_bits(isa: str) -> None:
    sequences = [Sequence(90, list(range(12))), Sequence(60, list(range(12, 20)))]
    one, two = World(8, 2, 64, 16, sequences).whole(1), World(8, 2, 64, 16, sequences).whole(2)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_negative_slot_writes_nothing_and_reads_what_is_cached(isa: str) -> None:
    world = World(4, 2, 32, 16, [Sequence(20, [2, 0, 1])])
    (expected,) = world.whole()
    inputs = world.step([(0, 15, 20)])
    inputs["slot_mapping"][:] = [-1, -5, -1, -(2**31), -1]
    inputs["qkv"][:, 4 * 32 :] = np.nan  # new keys and values, which nobody may see
    before = world.key_cache.copy()
    np.testing.assert_array_equal(world.run(inputs), expected[15:])
    np.testing.assert_array_equal(world.key_cache, before)


def test_sequences_without_tokens_in_this_step(isa: str) -> None:
    world = World(4, 2, 32, 16, [Sequence(9, [2, 0])])
    inputs = world.step([(0, 0, 9)])
    inputs["query_start"] = np.array([0, 0, 9, 9], np.int32)
    inputs["seq_lens"] = np.array([0, 9, 16], np.int32)
    inputs["block_table"] = np.array([[-9, -9], [2, -9], [-9, 99]], np.int32)
    check(world, inputs)


def test_no_token(isa: str) -> None:
    world = World(4, 2, 32, 16, [Sequence(9, [0, 1])])
    inputs = world.step([(0, 0, 0)])
    assert world.run(inputs).shape == (0, 4 * 32)


@pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=["f32", "f16"])
def test_large_scores_do_not_overflow(isa: str, dtype: type) -> None:
    world = World(4, 2, 32, 16, [Sequence(70, [0, 1, 2, 3, 4])], dtype)
    world.qkv[0][:, : 6 * 32] *= 60
    inputs = world.step([(0, 0, 70)])
    exact, *_ = exactly(world, inputs)
    out = world.run(inputs)
    # Scores near 1e5 carry float32 errors near 1e-2; the softmax is all but one-hot, so compare where it is clear.
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out, exact, atol=0.1 if dtype is np.float32 else 4.0)
    assert np.median(np.abs(out - exact)) < 1e-3


@pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=["f32", "f16"])
@pytest.mark.parametrize("first_seen", [1, 63, 64, 65, 130, 199])
def test_scores_of_minus_infinity_weigh_nothing(isa: str, first_seen: int, dtype: type) -> None:
    """Also where they fill the first stretches of positions; a row with no other score is NaN, as by the formula."""
    world = World(4, 2, 32, 16, [Sequence(200, list(range(13)))], dtype)
    world.cos_sin[:] = np.concatenate([np.ones(16), np.zeros(16)])  # no rotation: queries keep their signs
    world.qkv[0][:, : 4 * 32] = np.abs(world.qkv[0][:, : 4 * 32])
    world.run(world.step([(0, 0, 199)]))
    for p in range(first_seen):
        world.key_cache[p // 16, :, 5, p % 16] = -np.inf
    inputs = world.step([(0, 0, 200)])
    inputs["slot_mapping"][:199] = -1  # the cache as it is
    with np.errstate(invalid="ignore"):
        exact, *_ = exactly(world, inputs)
    out = world.run(inputs)
    assert np.isnan(exact[:first_seen]).all()
    assert np.isfinite(exact[first_seen:]).all()
    np.testing.assert_allclose(out, exact, rtol=0, atol=TOLERANCES["attention"])


@pytest.mark.parametrize("feature", [np.inf, np.nan])
@pytest.mark.parametrize("position", [0, 63, 64, 100])
def test_a_score_of_infinity_or_nan_shows(isa: str, position: int, feature: float) -> None:
    """Beside scores of minus infinity, too: what a broken model computes must not look like an answer."""
    world = World(2, 2, 16, 16, [Sequence(120, list(range(8)))])
    world.cos_sin[:] = np.concatenate([np.ones(8), np.zeros(8)])
    world.qkv[0][:, : 2 * 16] = np.abs(world.qkv[0][:, : 2 * 16])
    world.run(world.step([(0, 0, 119)]))
    for p in range(64):
        world.key_cache[p // 16, :, 5, p % 16] = -np.inf
    world.key_cache[position // 16, :, 5, position % 16] = feature
    assert np.isnan(world.run(world.step([(0, 119, 120)]))).all()


def test_values_beyond_float16_become_infinite(isa: str) -> None:
    world = World(1, 1, 8, 16, [Sequence(1, [0])], np.float16)
    world.qkv[0][0, 16:] = [65504, 65519, 65520, -1e30, 6e-8, 2.9e-8, 3.1e-8, 1.00048828125]
    world.whole()
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(world.value_cache[0, 0, 0], world.qkv[0][0, 16:].astype(np.float16))


def test_nan_reaches_later_tokens_only(isa: str) -> None:
    world = World(2, 1, 16, 16, [Sequence(30, [0, 1, 2, 3]), Sequence(12, [4, 5])])
    clean = World(2, 1, 16, 16, world.sequences).whole()
    world.qkv[0][20, 2 * 16 + 3] = np.nan  # in the key of position 20
    first, second = world.whole()
    assert np.isnan(first[20:]).all()
    np.testing.assert_array_equal(first[:20], clean[0][:20])
    np.testing.assert_array_equal(second, clean[1])


def test_an_infinite_value_reaches_later_tokens_only(isa: str) -> None:
    """Tokens share a tile and a stretch of the cache; what one of them may not see must not even be multiplied by zero."""
    world = World(2, 2, 16, 16, [Sequence(30, [0, 1, 2, 3])])
    (clean,) = World(2, 2, 16, 16, world.sequences).whole()
    world.qkv[0][20, 4 * 16 :] = np.inf
    (out,) = world.whole()
    np.testing.assert_array_equal(out[:20], clean[:20])
    assert not np.isfinite(out[20:]).any()


@pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=["f32", "f16"])
@pytest.mark.parametrize(("heads", "head_dim"), [((16, 2), 64), ((6, 6), 48), ((3, 1), 18), ((80, 1), 64)])
@pytest.mark.parametrize("window", [20, ALL])
def test_one_token_at_a_time_gives_the_bits_of_the_whole(
    isa: str, window: int, heads: tuple[int, int], head_dim: int, dtype: type
) -> None:
    """Across several tiles of tokens and stretches of positions, some of the heads in one tile and some in several."""

    def make() -> World:
        return World(*heads, head_dim, 16, [Sequence(100, [6, 0, 5, 1, 4, 2, 3])], dtype, window=window)

    whole, pieces = make(), make()
    expected = check(whole, whole.step([(0, 0, 100)]), threads=2)
    pieces.run(pieces.step([(0, 0, 90)]))
    for p in range(90, 100):
        np.testing.assert_array_equal(pieces.run(pieces.step([(0, p, p + 1)]))[0], expected[p])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_schedule(isa: str, data: st.DataObject) -> None:
    """Random sequences, cut into random chunks that run in random company, against the reference at each step."""
    num_kv_heads = data.draw(st.integers(1, 3))
    block_size = data.draw(st.sampled_from([16, 32, 48]))
    lengths = data.draw(st.lists(st.integers(1, 80), min_size=1, max_size=4))
    # The cuts come from a seed: drawn one by one they are too many for hypothesis to shrink.
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    free = list(rng.permutation(30))
    sequences = [Sequence(n, [int(free.pop()) for _ in range(-(-n // block_size))]) for n in lengths]
    world = World(
        num_kv_heads * data.draw(st.integers(1, 4)),
        num_kv_heads,
        data.draw(st.sampled_from([2, 8, 18, 32])),
        block_size,
        sequences,
        data.draw(st.sampled_from([np.float32, np.float16])),
        num_blocks=30,
        window=data.draw(st.sampled_from([ALL, 1, 20, 64])),
    )
    done = [0] * len(sequences)
    while any(d < s.length for d, s in zip(done, sequences, strict=True)):
        spans = []
        for b, s in enumerate(sequences):
            n = int(rng.integers(0, s.length - done[b] + 1))
            if n:
                spans.append((b, done[b], done[b] + n))
                done[b] += n
        if spans:
            check(world, world.step(spans), threads=int(rng.integers(1, 3)))
