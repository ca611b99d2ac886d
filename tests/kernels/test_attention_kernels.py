"""Paged attention on the GPU's terms against float64: float16 queries, keys and values (FORMAT.md 5.5, 8.4)."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from interpreter import launch

from llmpack import kernel_plan
from llmpack_ops import reference

# Queries and the exponentials are rounded to float16 (2^-11 each); the values are about 1, the weights sum to 1.
TOLERANCE = 3e-3
NO_WINDOW = 2**31 - 1
HEADS = {"MHA": (2, 2), "GQA": (4, 2), "MQA": (3, 1), "wide_GQA": (20, 1)}


class World:
    """Sequences of random tokens in a paged cache; `step` compares what is written and what is attended to."""

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        block_size: int,
        lengths: list[int],
        seed: int = 0,
        window: int = NO_WINDOW,
        sinks: np.ndarray | None = None,
        growth: dict[str, float] | None = None,
    ):
        self.window, self.sinks, self.growth = window, sinks, growth or {}
        rng = np.random.default_rng(seed)
        self.heads, self.kv_heads, self.d, self.block_size = heads, kv_heads, head_dim, block_size
        width = (heads + 2 * kv_heads) * head_dim
        self.qkv = [rng.standard_normal((n, width)).astype(np.float16) for n in lengths]
        angles = np.arange(max(lengths))[:, None] / 10000 ** (np.arange(head_dim // 2) * 2 / head_dim)
        self.cos_sin = np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
        counts = [-(-n // block_size) for n in lengths]
        blocks = rng.permutation(sum(counts) + 2)
        self.blocks = np.split(blocks[: sum(counts)], np.cumsum(counts)[:-1])
        shape = (len(blocks), block_size, kv_heads, head_dim)
        self.keys, self.values = np.full(shape, 7, np.float16), np.full(shape, 7, np.float16)
        has = {"has_sinks": sinks is not None, "has_growth": growth is not None}
        specs = kernel_plan.attention(heads, kv_heads, head_dim, block_size, **has)
        self.specs = {s.op: s for s in specs}

    def step(self, spans: list[tuple[int, int, int]], splits: int = 3, skip: int = 0) -> np.ndarray:
        """Run a step, few tokens both ways. A span is (sequence, first position, end); `skip` first tokens are not written."""
        table = np.full((len(spans), max(len(b) for b in self.blocks) + 1), -1, np.int32)
        slots, rows, angles = [], [np.zeros((0, self.qkv[0].shape[1]), np.float16)], [self.cos_sin[:0]]
        for i, (b, first, end) in enumerate(spans):
            used = -(-end // self.block_size)
            table[i, :used] = self.blocks[b][:used]
            slots += [self.blocks[b][p // self.block_size] * self.block_size + p % self.block_size
                      for p in range(first, end)]  # fmt: skip
            rows.append(self.qkv[b][first:end])
            angles.append(self.cos_sin[first:end])
        slot_mapping = np.array(slots, np.int32)
        slot_mapping[:skip] = -1
        inputs = {
            "qkv": np.concatenate(rows),
            "cos_sin": np.concatenate(angles),
            "key_cache": self.keys,
            "value_cache": self.values,
        }
        write = self.specs["cache_write"]
        _, keys, values = self._reference(inputs, slot_mapping, spans, table)
        launch(write, **inputs, slot_mapping=slot_mapping)
        np.testing.assert_allclose(self.keys.astype(float), keys.astype(float), rtol=2.0**-10, atol=1e-6)
        np.testing.assert_array_equal(self.values, values)

        exact, *_ = self._reference(inputs, np.full_like(slot_mapping, -1), spans, table)
        self._forget(spans, table)
        steps = {
            "query_start": np.cumsum([0] + [end - first for _, first, end in spans]).astype(np.int32),
            "seq_lens": np.array([end for *_, end in spans], np.int32),
            "block_table": table,
        }
        numbers = {"table_stride": table.shape[1], "scale": float(self.d**-0.5), "window": self.window}
        if self.growth:
            numbers["llama_4_scaling_beta"] = self.growth["llama_4_scaling_beta"]
            numbers["original_positions"] = self.growth["original_max_position_embeddings"]
        sinks = {} if self.sinks is None else {"sinks": self.sinks}
        out = np.full((len(slots), self.heads * self.d), 7, np.float16)
        count = len(spans)
        launch(self.specs["attention"], sequences=count, out=out, **inputs, **steps, **numbers, num_sequences=count,
               **sinks)  # fmt: skip
        np.testing.assert_allclose(out.astype(float), exact, rtol=0, atol=TOLERANCE)

        if len(slots) > 12:
            return out
        partial = self.partial = np.full((len(slots), self.heads, splits, self.d + 2), np.nan, np.float32)
        again = np.full_like(out, 7)
        launch(self.specs["attention_split"], sequences=count, splits=splits, partial=partial, **inputs, **steps,
               **numbers, num_splits=splits)  # fmt: skip
        launch(self.specs["attention_combine"], out=again, partial=partial, num_splits=splits, **sinks)
        np.testing.assert_allclose(again.astype(float), exact, rtol=0, atol=TOLERANCE)
        self.joined = again
        return out

    def _reference(self, inputs, slot_mapping, spans, table):
        return reference.paged_attention(
            **inputs,
            slot_mapping=slot_mapping,
            query_start=np.cumsum([0] + [end - first for _, first, end in spans]),
            seq_lens=np.array([end for *_, end in spans]),
            block_table=table,
            sinks=self.sinks,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            scale=float(self.d**-0.5),
            window=self.window,
            **self.growth,
        )

    def _forget(self, spans: list[tuple[int, int, int]], table: np.ndarray) -> None:
        """Make NaN of what no query of a span sees, and another number of the blocks in which all is so."""
        for i, (b, first, _) in enumerate(spans):
            unseen = max(0, first - self.window + 1)
            for p in range(unseen):
                at = self.blocks[b][p // self.block_size], p % self.block_size
                self.keys[at] = self.values[at] = np.nan
            table[i, : unseen // self.block_size] = 2**30


@pytest.mark.parametrize("heads", HEADS)
def test_prefill_of_one_sequence(heads: str) -> None:
    world = World(*HEADS[heads], 32, 8, [37])
    world.step([(0, 0, 36)])
    world.step([(0, 36, 37)])


@pytest.mark.parametrize("head_dim", [2, 64, 80, 96, 128])
def test_head_dims(head_dim: int) -> None:
    World(2, 1, head_dim, 16, [12]).step([(0, 0, 12)])


@pytest.mark.parametrize("block_size", [1, 3, 64])
def test_block_sizes(block_size: int) -> None:
    world = World(2, 1, 16, block_size, [21])
    world.step([(0, 0, 15)])
    world.step([(0, 15, 21)])


def test_context_across_blocks_of_keys_and_of_queries() -> None:
    world = World(2, 1, 16, 16, [150])
    world.step([(0, 0, 130)])
    world.step([(0, 130, 150)])


@pytest.mark.parametrize("splits", [1, 3, 20], ids=lambda s: f"{s}_splits")
def test_decode(splits: int) -> None:
    """Splits beyond the context have nothing to say, and their share must not be read as numbers."""
    world = World(4, 2, 16, 16, [100, 1, 64])
    world.step([(0, 0, 99), (2, 0, 63)])
    world.step([(0, 99, 100), (1, 0, 1), (2, 63, 64)], splits)


def test_prefill_and_decode_in_one_step() -> None:
    world = World(4, 2, 32, 16, [40, 5, 17])
    world.step([(0, 0, 39), (2, 0, 16)])
    world.step([(0, 39, 40), (1, 0, 5), (2, 16, 17)])


# A kernel takes 32 keys at once and 64 queries; cache blocks are of 16 positions.
WINDOWS = [5, 32, 33, 1000, *(pytest.param(window, marks=pytest.mark.extended) for window in (1, 31, 64, 100))]
# Of rows beyond a chunk's tokens, which nobody stores.
divides_nothing = pytest.mark.filterwarnings("ignore:invalid value encountered in divide")


@divides_nothing
@pytest.mark.parametrize("window", WINDOWS)
def test_windows_of_a_prompt_in_chunks(window: int) -> None:
    world = World(4, 2, 16, 16, [150], window=window)
    for first, end in pairwise([0, 3, 70, 71, 149, 150]):
        world.step([(0, first, end)])


@divides_nothing
@pytest.mark.parametrize("window", WINDOWS)
def test_windows_of_decoded_tokens(window: int) -> None:
    """Parts are of what is seen: in those that see nothing stands nothing, and it must not be read as numbers."""
    world = World(4, 2, 16, 16, [130, 1, 64], window=window)
    world.step([(0, 0, 129), (2, 0, 63)])
    for splits in (1, 3, 20) if window == 33 else (1, 3):  # 20 take seconds
        world.step([(0, 129, 130), (1, 0, 1), (2, 63, 64)], splits)


@divides_nothing
@pytest.mark.parametrize("window", [1, 7, 40])
def test_windows_of_a_ragged_batch(window: int) -> None:
    """Several tokens of some sequences and one of others, none of one; the kernel for decoding takes such steps too."""
    world = World(3, 1, 32, 8, [90, 5, 77, 20], window=window)
    world.step([(0, 0, 85), (2, 0, 76), (3, 0, 20)])
    world.step([(0, 85, 90), (1, 0, 5), (2, 76, 77), (3, 20, 20)])


def test_the_parts_of_a_window_are_equal_however_long_the_sequence() -> None:
    """Of 64 positions two parts have 32 each, not the last one all; with a query of zeros each of them counts 2^8."""
    world = World(1, 1, 16, 16, [1000], window=64)
    world.qkv[0][999, :16] = 0
    world.step([(0, 0, 999)])
    world.step([(0, 999, 1000)], splits=2)
    np.testing.assert_array_equal(world.partial[0, 0, :, -1], 32 * 2.0**8)


@divides_nothing
def test_a_token_has_the_same_bits_whatever_stands_beside_it() -> None:
    """Of the kernel for any step: sums go in steps from position 0, wherever a window begins."""
    whole, apart = (World(2, 1, 16, 16, [120], window=45) for _ in range(2))
    rows = whole.step([(0, 0, 120)])
    pieces = [apart.step([(0, first, end)]) for first, end in pairwise([0, 50, 77, 78, 120])]
    np.testing.assert_array_equal(np.concatenate(pieces), rows)


@divides_nothing
@pytest.mark.parametrize("window", [40, NO_WINDOW, pytest.param(5, marks=pytest.mark.extended)], ids=str)
@pytest.mark.parametrize("heads", HEADS)
def test_sinks(heads: str, window: int) -> None:
    """From those that count for little beside the scores to those that take nearly all, of each head another."""
    num_heads, num_kv_heads = HEADS[heads]
    sinks = np.linspace(-2, 7, num_heads).astype(np.float32)[::-1].copy()
    world = World(num_heads, num_kv_heads, 16, 16, [75, 1, 30], window=window, sinks=sinks)
    world.step([(0, 0, 74), (2, 0, 29)])
    for splits in (1, 4):
        world.step([(0, 74, 75), (1, 0, 1), (2, 29, 30)], splits)


@divides_nothing
@pytest.mark.parametrize("has_sinks", [False, True])
def test_growing_queries(has_sinks: bool) -> None:
    """Just before a step of the growth, behind it, and far beyond."""
    growth = {"llama_4_scaling_beta": 0.5, "original_max_position_embeddings": 20}
    sinks = np.array([2, -1, 5, 0], np.float32) if has_sinks else None
    world = World(4, 2, 16, 16, [75, 20, 21], sinks=sinks, growth=growth)
    world.step([(0, 0, 74), (1, 0, 19), (2, 0, 20)])
    world.step([(0, 74, 75), (1, 19, 20), (2, 20, 21)], splits=4)


def decoded(sink: float | None, key: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Both kernels' results of two heads whose sinks are `sink` and 1, None: without; `key`: what a feature of all keys is."""
    sinks = None if sink is None else np.array([sink, 1], np.float32)
    world = World(2, 1, 16, 16, [40], sinks=sinks)
    world.cos_sin[:] = [1.0] * 8 + [0.0] * 8
    world.qkv[0][:, :32] = np.abs(world.qkv[0][:, :32])  # queries
    world.step([(0, 0, 39)])
    world.keys[..., 5] = key
    return world.step([(0, 39, 40)], skip=1), world.joined


def test_a_sink_far_below_all_scores_is_as_none_and_one_far_above_takes_all() -> None:
    none = decoded(None)
    for sink in (-1e4, -1e30, -np.inf):
        for out, expected in zip(decoded(sink), none, strict=True):
            np.testing.assert_array_equal(out[0, :16], expected[0, :16])
    for out in decoded(1000.0):
        np.testing.assert_array_equal(out[0, :16], 0)
        assert np.abs(out[0, 16:]).max() > 0.1


@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:All-NaN")  # of rows that are no head's
def test_a_token_all_of_whose_scores_are_minus_infinity_gives_all_to_its_sink() -> None:
    for out in decoded(0.0, key=-np.inf):
        np.testing.assert_array_equal(out, 0)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("sink", [np.inf, np.nan])
def test_a_sink_that_is_no_score_shows(sink: float) -> None:
    for out in decoded(sink):
        assert np.isnan(out[0, :16]).all()
        assert np.isfinite(out[0, 16:]).all()


def test_sequences_without_tokens_in_this_step() -> None:
    world = World(2, 1, 16, 8, [9, 5, 20])
    world.step([(0, 0, 9), (2, 0, 20)])
    world.step([(0, 9, 9), (1, 0, 5), (2, 20, 20)])


def test_a_negative_slot_writes_nothing() -> None:
    World(2, 1, 16, 8, [9]).step([(0, 0, 9)], skip=2)


def test_large_scores_do_not_overflow() -> None:
    world = World(2, 1, 16, 8, [20])
    for qkv in world.qkv:
        qkv[:, : 3 * 16] *= 30  # queries and keys; scores of thousands, one key takes all
    inputs = world.step([(0, 0, 20)])
    assert np.isfinite(inputs).all()


def test_many_keys_far_below_the_maximum_where_the_matrix_unit_flushes_subnormals(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """MI200's: 2,000 keys whose exponentials are e^-10 of the first one's have a twelfth of the answer."""
    from triton.runtime import interpreter

    dot = interpreter.InterpreterBuilder.create_dot

    def flush(handle: interpreter.TensorHandle) -> interpreter.TensorHandle:
        is_subnormal = np.abs(handle.data) < np.finfo(np.float16).smallest_normal
        return interpreter.TensorHandle(np.where(is_subnormal, np.float16(0), handle.data), handle.dtype)

    monkeypatch.setattr(
        interpreter.InterpreterBuilder, "create_dot", lambda self, a, b, *rest: dot(self, flush(a), flush(b), *rest)
    )
    count, d = 2000, 16
    world = World(1, 1, d, 16, [count + 1])
    world.cos_sin[:] = [1.0] * (d // 2) + [0.0] * (d // 2)
    world.qkv[0][:] = 0
    world.qkv[0][count] = [d**0.5] + [0] * (d - 1) + [0] * d + [1] * d  # its query, its key, its value
    world.keys[:], world.values[:] = 0, 1
    world.keys[world.blocks[0][0], 0, 0, 0], world.values[world.blocks[0][0], 0] = 10, 0
    out = world.step([(0, count, count + 1)])
    np.testing.assert_allclose(out, count / (count + np.exp(10)), rtol=0, atol=TOLERANCE)
