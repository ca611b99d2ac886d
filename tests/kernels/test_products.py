"""matmul_* and embed_* against float64, in the spelling of each vendor (FORMAT.md 4.3, 8.4)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from helpers import RANGES, Projection, quantized_projection, random_projection
from interpreter import launch

from llmpack import kernel_plan
from llmpack_kernels.decode import prmt, v_perm
from llmpack_ops import reference

STORAGES = ("q4", "q6", "q8", "f16")
# Relative to the sum of |x| |w|: float32 sums of some hundred terms; and each weight's rounding to float16 on the matrix units.
ROWS_TOLERANCE, BLOCKS_TOLERANCE = 3e-7, 2.0**-11
FLOAT16_ROUNDING = 2.0**-11


def check(projection: Projection, M: int, max_rows: int, backend: str, y_bits: int = 32) -> np.ndarray:
    N, K = projection.weight.shape
    group_size = projection.attributes.get("group_size", 0)
    spec = kernel_plan.product(projection.scheme, N, K, group_size, y_bits, max_rows)
    x = np.random.default_rng([M, K]).standard_normal((M, K)).astype(np.float16)
    y = np.full((M + 1, N), 7, np.float32 if y_bits == 32 else np.float16)
    launch(spec, backend, x=x, **projection.initializers, y=y, num_rows=M)
    exact = reference.matmul(x, projection.weight)
    size = np.abs(x.astype(np.float64)) @ np.abs(projection.weight).T
    tolerance = ROWS_TOLERANCE if 0 < max_rows <= 4 or projection.scheme == "f16" else BLOCKS_TOLERANCE
    rounding = 0 if y_bits == 32 else FLOAT16_ROUNDING * np.abs(exact)
    assert (np.abs(y[:M] - exact) <= tolerance * size + rounding).all()
    assert (y[M] == 7).all(), "wrote beyond the last row"
    return y[:M]


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("N", [1, 16, 17, 48], ids=["one_feature", "one_tile", "odd_tail", "three_tiles"])
def test_any_number_of_features(storage: str, N: int, backend: str) -> None:
    check(random_projection(storage, N, 128), 1, 1, backend)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(("M", "max_rows"), [(1, 4), (2, 4), (3, 4), (4, 4), (5, 16), (16, 16), (17, 64), (130, 0)])
def test_any_number_of_tokens(storage: str, M: int, max_rows: int) -> None:
    check(random_projection(storage, 40, 96), M, max_rows, "cuda")


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("max_rows", [4, 16])
def test_each_vendors_spelling(storage: str, max_rows: int, backend: str) -> None:
    check(random_projection(storage, 40, 96), 3, max_rows, backend)


@pytest.mark.parametrize("storage", ["q4", "q6", "q8"])
@pytest.mark.parametrize("group_size", [64, 128])
@pytest.mark.parametrize("max_rows", [1, 16])
def test_group_sizes(storage: str, group_size: int, max_rows: int) -> None:
    check(random_projection(storage, 20, 384, group_size), 1, max_rows, "cuda")


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("max_rows", [1, 16], ids=["rows", "blocks"])
def test_in_features_that_fill_no_block(storage: str, max_rows: int) -> None:
    """4128 is 129 times 32: every loop has a tail."""
    check(random_projection(storage, 16, 4128), 1, max_rows, "cuda")


@pytest.mark.parametrize("max_rows", [1, 16], ids=["rows", "blocks"])
def test_float16_results_saturate(max_rows: int) -> None:
    projection = random_projection("f16", 16, 64)
    spec = kernel_plan.product("f16", 16, 64, 0, 16, max_rows)
    x, y = (np.sign(projection.weight[:1]) * 60000).astype(np.float16), np.zeros((1, 16), np.float16)
    launch(spec, x=x, **projection.initializers, y=y, num_rows=1)
    assert y[0, 0] == 65504
    assert np.isfinite(y).all()


def test_float16_results(backend: str) -> None:
    check(random_projection("q4", 40, 96), 2, 4, backend, y_bits=16)


@pytest.mark.parametrize("storage", ["q4", "q6", "q8"])
def test_every_level_is_exact(storage: str, backend: str) -> None:
    """Each stored number alone: scale 1, x a unit vector. The unpacked value must be the table's to the last bit."""
    low, high = RANGES[storage]
    quantized = np.resize(np.arange(low, high), (16, 512)).astype(np.uint8)
    quantized = np.stack([np.roll(row, i) for i, row in enumerate(quantized)])  # every number in every place of a word
    projection = quantized_projection(storage, quantized, np.ones((16, 16), np.float16))
    spec = kernel_plan.product(storage, 16, 512, 32, 32, 16)
    columns = np.arange(0, 512, 1 if storage == "q8" else 8)[:32]
    for first in range(0, len(columns), 16):
        chosen = columns[first : first + 16] + first // 16
        x, y = np.zeros((len(chosen), 512), np.float16), np.zeros((len(chosen), 16), np.float32)
        x[np.arange(len(chosen)), chosen] = 1
        launch(spec, backend, x=x, **projection.initializers, y=y, num_rows=len(chosen))
        np.testing.assert_array_equal(y, projection.weight[:, chosen].T)


@pytest.mark.parametrize("storage", ["q6", "q8"])
@pytest.mark.parametrize("group_size", [32, 128])
def test_embedding_rows(storage: str, group_size: int) -> None:
    projection = random_projection(storage, 40, 384, group_size)
    ids = np.array([0, 15, 16, 39, 39, 7], np.int32)
    y = np.full((6, 384), 7, np.float32)
    launch(kernel_plan.embedding(storage, 384, group_size), ids=ids, **projection.initializers, y=y)
    np.testing.assert_array_equal(y, projection.weight[ids].astype(np.float32))


def test_embedding_of_float16() -> None:
    weight = np.random.default_rng(0).standard_normal((20, 100)).astype(np.float16)
    ids, y = np.array([3, 19, 0], np.int32), np.zeros((3, 100), np.float32)
    launch(kernel_plan.embedding("f16", 100, 0), ids=ids, weight=weight, y=y)
    np.testing.assert_array_equal(y, weight[ids])


@triton.jit
def permute(a, b, selector, out, IS_CUDA: tl.constexpr):
    i = tl.arange(0, 1)
    x, y, z = tl.load(a + i), tl.load(b + i), tl.load(selector + i)
    tl.store(out + i, prmt(x, y, z) if IS_CUDA else v_perm(x, y, z))


def test_byte_permutations_are_those_of_the_manuals() -> None:
    """Examples by hand from the PTX ISA (prmt) and the RDNA ISA (v_perm_b32): what stands in for them must be them."""

    def run(a: int, b: int, selector: int, is_cuda: bool) -> int:
        words = [torch.tensor([v - (1 << 32) if v >> 31 else v], dtype=torch.int32) for v in (a, b, selector, 0)]
        permute[(1,)](*words, is_cuda)
        return int(words[3]) & 0xFFFFFFFF

    assert run(0x33221100, 0x77665544, 0x3210, True) == 0x33221100
    assert run(0x33221100, 0x77665544, 0x7531, True) == 0x77553311
    assert run(0x33221100, 0x77E65544, 0x0E64, True) == 0x00FFE644  # nibble 0xE: the sign of byte 6
    assert run(0x33221100, 0x77665544, 0x8123, True) == 0x00112233  # nibble 8: the sign of byte 0
    # v_perm: bytes 0 to 3 are those of the second operand.
    assert run(0x77665544, 0x33221100, 0x03020100, False) == 0x33221100
    assert run(0x77665544, 0x33221100, 0x07050301, False) == 0x77553311
