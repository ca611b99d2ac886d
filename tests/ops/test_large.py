"""Weights and caches whose places are beyond 32 bits: vocabularies of 256K, models of 70B. Of their memory only what is written
exists; reading the rest reads zeros."""

from __future__ import annotations

import mmap

import numpy as np
from helpers import Mixture, Node, random_projection, random_x, session
from test_attention import Sequence, World

NO_RESERVE = 0x4000  # MAP_NORESERVE
BEYOND = 2**32  # bytes, or numbers


def zeros(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    count = int(np.prod(shape))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    return np.frombuffer(mmap.mmap(-1, count * np.dtype(dtype).itemsize, flags=flags), dtype, count).reshape(shape)


def test_rows_of_a_weight_of_more_than_4_gib() -> None:
    """The last rows are others than all before: a place that wraps around gives those or none of them."""
    K, group = 8192, 128
    tiles = BEYOND // (16 * K) + 1
    last = random_projection("q8", 16, K, group)
    weight, scales = zeros((tiles, K // 4, 16, 4), np.uint8), zeros((tiles, K // group, 16), np.float16)
    weight[-1:], scales[-1:] = last.initializers["weight"], last.initializers["scales"]
    stored, sizes = {"weight": weight, "scales": scales}, {"group_size": group}
    N = 16 * tiles

    for M in (1, 20):  # two streams of tiles; tiles that are decoded for many tokens
        x = random_x(M, K)
        (y,) = Node("MatMulQ8", {"x": x, **stored}, attributes={"out_features": N, **sizes}).run(2)
        np.testing.assert_array_equal(y[:, -16:], last.node(x).run()[0])
        assert not y[:, :-16].any()

    ids = np.array([N - 16, 5, N - 1], np.int32)
    (rows,) = Node("EmbeddingQ8", {"ids": ids, **stored}, attributes={"num_embeddings": N, **sizes}).run()
    np.testing.assert_array_equal(rows, [last.weight[0], np.zeros(K), last.weight[15]])


def test_experts_of_more_than_4_gib() -> None:
    """The last expert gives the bits that it gives alone; all others give zeros."""
    alone = Mixture("q8", E=1, k=1, H=2048, F=1088, group_size=64)
    x, E = random_x(20, alone.H), 1024
    node = alone.node(x, np.zeros((len(x), 1), np.float32))
    (expected,) = node.run()
    assert node.inputs["gate_up"].nbytes * (E - 1) > BEYOND
    for name in node.initializers:
        last = node.inputs[name]
        node.inputs[name] = zeros((len(last) * E, *last.shape[1:]), last.dtype.type)
        node.inputs[name][-len(last) :] = last
    node.initializers = ()
    node.attributes = {**(node.attributes or {}), "num_experts": E}
    for T in (1, len(x)):
        logits = np.full((T, E), -np.inf, np.float32)
        logits[:, -1] = 0
        node.inputs |= {"x": x[:T], "router_logits": logits}
        np.testing.assert_array_equal(node.run(2)[0], expected[:T])


def test_blocks_of_a_cache_of_more_than_4_giga_numbers() -> None:
    """Blocks at both ends give the bits of the same step in a cache that holds no others."""
    heads, head_dim, block_size = 8, 128, 16
    of_a_block = heads * head_dim * block_size
    blocks = BEYOND // of_a_block + 2
    small = World(16, heads, head_dim, block_size, [Sequence(40, [1, 0, 2])], np.float16)
    inputs = small.step([(0, 0, 40)])
    far = np.array([blocks - 2, 0, blocks - 1], np.int32)
    caches = {name: zeros((blocks, *inputs[name].shape[1:]), np.float16) for name in ("key_cache", "value_cache")}
    slots = np.repeat(far, block_size)[:40] * block_size + np.arange(40, dtype=np.int32) % block_size
    node = Node("PagedAttention", inputs | caches | {"slot_mapping": slots, "block_table": far[None]}, ("out",))
    node.attributes = small.attributes()
    made = session(node.model(), 2)
    (out,) = made.run(None, node.inputs)
    np.testing.assert_array_equal(out, small.run(inputs))
    assert caches["key_cache"][-2].any(), "the operator worked on a copy"
