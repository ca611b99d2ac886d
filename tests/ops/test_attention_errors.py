"""PagedAttention refuses wrong shapes, types and indices with one sentence, before it writes (FORMAT.md 3.2, 5.5)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import Node
from test_attention import Sequence, World
from test_errors import F16, F32, ZEROS, assert_fails

KEYS, VALUES = (f"[num_blocks, num_kv_heads, {rest}]" for rest in ("head_dim, block_size", "block_size, head_dim"))
TWO_SEQUENCES = {"seq_lens": np.array([41, 40], np.int32), "block_table": ZEROS((2, 3), np.int32)}

# name: (inputs to replace, attributes to replace, sentence). The step: 40 tokens of sequence 0, blocks [2, 0, 1] of 16 slots.
ATTENTION_CASES: dict[str, tuple[dict[str, np.ndarray], dict[str, Any], str]] = {
    "heads that do not divide": (
        {}, {"num_heads": 5}, "num_heads is 5 and num_kv_heads 2, expected a multiple",
    ),
    "no heads": (
        {}, {"num_heads": 0}, "attribute num_heads is 0, expected a positive number",
    ),
    "no window": (
        {}, {"window": 0}, "attribute window is 0, expected a positive number",
    ),
    "a window that is a float": ({}, {"window": 9.0}, "attribute window is a float, expected an integer"),
    "a window before the token": (
        {}, {"window": -5}, "attribute window is -5, expected a positive number",
    ),
    "a window beyond all positions": (
        {}, {"window": 2**31}, "attribute window is 2147483648, expected at most 2147483647",
    ),
    "heads that wrap around": (  # with the KV heads (2^62 + 6) * 8, which is 48 more than 2^65
        {"qkv": ZEROS((40, 48), F32)}, {"num_heads": 2**62 + 2},
        "attribute num_heads is 4611686018427387906, expected at most 2147483647",
    ),
    "KV heads that wrap around": (
        {}, {"num_kv_heads": 2**31}, "attribute num_kv_heads is 2147483648, expected at most 2147483647",
    ),
    "odd head_dim": (
        {"cos_sin": ZEROS((40, 7), F32)}, {},
        "input cos_sin has 7 columns (head_dim), expected an even number up to 256",
    ),
    "large head_dim": (
        {"cos_sin": ZEROS((40, 258), F32)}, {},
        "input cos_sin has 258 columns (head_dim), expected an even number up to 256",
    ),
    "qkv": (
        {"qkv": ZEROS((40, 60), F32)}, {},
        "input qkv has shape [40, 60], expected [40, 64] = [tokens, (num_heads + 2 * num_kv_heads) * head_dim]",
    ),
    "key_cache": (
        {"key_cache": ZEROS((3, 1, 8, 16), F32)}, {},
        f"input key_cache has shape [3, 1, 8, 16], expected [any, 2, 8, any] = {KEYS}",
    ),
    "block_size": (
        {"key_cache": ZEROS((3, 2, 8, 24), F32)}, {},
        "input key_cache has blocks of 24 positions, expected a multiple of 16 up to 2147483647",
    ),
    "block_size of zero": (
        {"key_cache": ZEROS((3, 2, 8, 0), F32)}, {},
        "input key_cache has blocks of 0 positions, expected a multiple of 16 up to 2147483647",
    ),
    "block_size beyond any slot": (
        {"key_cache": ZEROS((0, 2, 8, 2**32), F32), "value_cache": ZEROS((0, 2, 2**32, 8), F32)}, {},
        "input key_cache has blocks of 4294967296 positions, expected a multiple of 16 up to 2147483647",
    ),
    "value_cache": (
        {"value_cache": ZEROS((2, 2, 16, 8), F32)}, {},
        f"input value_cache has shape [2, 2, 16, 8], expected [3, 2, 16, 8] = {VALUES}",
    ),
    "cache of integers": (
        {"key_cache": ZEROS((3, 2, 8, 16), np.int32), "value_cache": ZEROS((3, 2, 16, 8), np.int32)}, {},
        "input key_cache is of neither float32 nor float16, expected one of them",
    ),
    "caches of two types": (
        {"value_cache": ZEROS((3, 2, 16, 8), F16)}, {},
        "inputs key_cache and value_cache are of different types, expected one type",
    ),
    "slot_mapping": (
        {"slot_mapping": ZEROS(39, np.int32)}, {}, "input slot_mapping has shape [39], expected [40] = [tokens]",
    ),
    "query_start": (
        {"query_start": np.array([40], np.int32)}, {}, "input query_start has shape [1], expected [2] = [sequences + 1]",
    ),
    "block_table": (
        {"block_table": ZEROS((2, 3), np.int32)}, {},
        "input block_table has shape [2, 3], expected [1, any] = [sequences, max_blocks]",
    ),
    "a slot beyond the cache": (
        {"slot_mapping": np.array([*range(6), 48, *range(7, 40)], np.int32)}, {},
        "slot_mapping[6] is 48, expected less than 48, the slots of the cache",
    ),
    "query_start does not begin at 0": (
        {"query_start": np.array([1, 40], np.int32)}, {},
        "query_start goes from 1 to 40, expected from 0 to 40, the number of tokens",
    ),
    "query_start does not end at T": (
        {"query_start": np.array([0, 41], np.int32)}, {},
        "query_start goes from 0 to 41, expected from 0 to 40, the number of tokens",
    ),
    "query_start falls": (
        {"query_start": np.array([0, 41, 40], np.int32), **TWO_SEQUENCES}, {},
        "query_start[1] is 41 after 0, expected no less, and at most 40",
    ),
    "query_start is negative": (
        {"query_start": np.array([0, -4, 40], np.int32), **TWO_SEQUENCES}, {},
        "query_start[1] is -4 after 0, expected no less, and at most 40",
    ),
    "seq_len below the step": (
        {"seq_lens": np.array([39], np.int32)}, {},
        "seq_lens[0] is 39, expected at least its 40 tokens of this step and at most the 48 positions of block_table",
    ),
    "seq_len beyond the table": (
        {"seq_lens": np.array([49], np.int32)}, {},
        "seq_lens[0] is 49, expected at least its 40 tokens of this step and at most the 48 positions of block_table",
    ),
    "sinks": (
        {"sinks": ZEROS(5, F32)}, {}, "input sinks has shape [5], expected [4] = [num_heads]",
    ),
    "sinks of all layers": (
        {"sinks": ZEROS((2, 4), F32)}, {}, "input sinks has shape [2, 4], expected [4] = [num_heads]",
    ),
    "growth without its steps": (
        {}, {"llama_4_scaling_beta": 0.1},
        "attribute llama_4_scaling_beta is there and original_max_position_embeddings is not, expected both or neither",
    ),
    "steps without growth": (
        {}, {"original_max_position_embeddings": 64},
        "attribute original_max_position_embeddings is there and llama_4_scaling_beta is not, expected both or neither",
    ),
    "growth of zero": (
        {}, {"llama_4_scaling_beta": 0.0, "original_max_position_embeddings": 64},
        "attribute llama_4_scaling_beta is 0.000000, expected a finite number above 0",
    ),
    "growth beyond measure": (
        {}, {"llama_4_scaling_beta": float("inf"), "original_max_position_embeddings": 64},
        "attribute llama_4_scaling_beta is inf, expected a finite number above 0",
    ),
    "growth in steps of zero": (
        {}, {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 0},
        "attribute original_max_position_embeddings is 0, expected a positive number",
    ),
    "negative block": (
        {"block_table": np.array([[2, -1, 1]], np.int32)}, {}, "block_table[0, 1] is -1, expected a block from 0 to 2",
    ),
    "block beyond the cache": (
        {"block_table": np.array([[2, 0, 3]], np.int32)}, {}, "block_table[0, 2] is 3, expected a block from 0 to 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ATTENTION_CASES)
def test_attention(case: str) -> None:
    inputs, attributes, expected = ATTENTION_CASES[case]
    world = World(4, 2, 8, 16, [Sequence(40, [2, 0, 1])])
    node = Node("PagedAttention", world.step([(0, 0, 40)]) | inputs, ("out",), (), world.attributes() | attributes)
    assert_fails(node, expected)
    assert (world.key_cache == 7.0).all(), "the caches changed before the error was found"


@pytest.mark.parametrize("name", ["key_cache", "value_cache"])
def test_a_cache_that_is_an_initializer_is_refused(name: str) -> None:
    world = World(4, 2, 8, 16, [Sequence(40, [2, 0, 1])])
    node = Node("PagedAttention", world.step([(0, 0, 40)]), ("out",), (name,), world.attributes())
    assert_fails(node, f"input {name} is an initializer, expected an input of the graph: the operator writes into it")
