"""MatMulF32, MatMulF16, MatMulQ8, MatMulQ6, MatMulQ4 against float64 (FORMAT.md 4.3, 5.1), and what is joined with them.

SwiGLU or GeGLU (5.10), AddRMSNorm (5.12) and the norm before that (5.15); with AllReduce they need ranks: collectives_ranks.py.
"""

from __future__ import annotations

import contextlib
import platform

import numpy as np
import pytest
from helpers import (
    RANGES,
    TOLERANCES,
    Node,
    Projection,
    layout_float,
    quantized_projection,
    random_projection,
    random_x,
    subnormals_flushed,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmpack_ops import reference
from llmrun.job_options import ISAS

SCHEMES = ("f32", "f16", "q8", "q6", "q4")
QUANTIZED = ("q8", "q6", "q4")
JOINED = ("f32", "f16", "q8", "q4")


def check(projection: Projection, x: np.ndarray, threads: int = 1, flushed=contextlib.nullcontext) -> np.ndarray:
    """Runs the product and compares it with the exact one; returns y."""
    with flushed():
        (y,) = projection.node(x).run(threads)
    exact = reference.matmul(x, projection.weight)
    assert y.shape == exact.shape
    assert y.dtype == np.float32
    size = np.abs(x.astype(np.float64)) @ np.abs(projection.weight).T
    if projection.scheme in QUANTIZED:
        group_size = projection.attributes["group_size"]
        bound = reference.activation_quantization_bound(x, projection.weight, group_size)
        # float32 rounding, also of values near the smallest float32, whose products have fewer digits.
        rounding = TOLERANCES["quantized_matmul"] * size + 1e-44 * np.abs(projection.weight).sum(axis=1) + 1e-44
        # Half of the smallest float32 is lost from weight scale * token scale, which multiplies levels * integers up to 127.
        rounding = rounding + 127 * 0.71e-45 * projection.sum_of_levels
        excess = np.abs(y - exact) - bound - rounding
        assert excess.max(initial=-1.0) <= 0.0
    else:
        # A product near the smallest float32 loses up to half of 1.4e-45, its last place, in each of the K additions.
        lost = 1e-45 * x.shape[1]
        assert (np.abs(y - exact) <= TOLERANCES["matmul"] * size + lost).all()
    return y


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "N", [1, 16, 17, 31, 48], ids=["one_row", "one_tile", "odd_tail", "full_minus_one", "three_tiles"]
)
def test_any_number_of_rows(isa: str, scheme: str, N: int) -> None:
    check(random_projection(scheme, N, 128), random_x(3, 128))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("M", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 33])
def test_any_number_of_tokens(isa: str, scheme: str, M: int) -> None:
    check(random_projection(scheme, 40, 96), random_x(M, 96))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_token(isa: str, scheme: str) -> None:
    assert check(random_projection(scheme, 40, 96), random_x(0, 96)).shape == (0, 40)


@pytest.mark.parametrize("scheme", QUANTIZED)
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_group_sizes(isa: str, scheme: str, group_size: int) -> None:
    check(random_projection(scheme, 35, 384, group_size), random_x(6, 384))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_llama_shape(isa: str, scheme: str) -> None:
    """in_features of TinyLlama's down_proj, a tenth of its out_features."""
    check(random_projection(scheme, 208, 5632), random_x(9, 5632))


@pytest.mark.parametrize("scheme", ["f32", "f16"])
@pytest.mark.parametrize("K", [1, 2, 15, 33])
def test_in_features_need_not_be_even(isa: str, scheme: str, K: int) -> None:
    check(random_projection(scheme, 20, K), random_x(3, K))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_threads_give_the_same_bits(isa: str, scheme: str) -> None:
    projection, x = random_projection(scheme, 500, 512), random_x(40, 512)
    one, two = projection.node(x).run(1)[0], projection.node(x).run(2)[0]
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_token_does_not_depend_on_the_others(isa: str, scheme: str) -> None:
    projection, x = random_projection(scheme, 50, 256), random_x(21, 256)
    (together,) = projection.node(x).run()
    for t in range(len(x)):
        np.testing.assert_array_equal(projection.node(x[t : t + 1]).run()[0][0], together[t])
    np.testing.assert_array_equal(projection.node(x[5:16]).run()[0], together[5:16])


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_instruction_sets_quantize_alike(library, scheme: str) -> None:
    """Integer activations and dot products are exact everywhere; only the float sum over groups may round differently."""
    projection, x = random_projection(scheme, 33, 1024), random_x(5, 1024)
    results = {}
    before = library.llmpack_ops_isa()
    for name in ISAS:
        if library.llmpack_ops_set_isa(name.encode()) == 0:
            (results[name],) = projection.node(x).run()
    library.llmpack_ops_set_isa(before)
    size = np.abs(x) @ np.abs(projection.weight).T
    for y in results.values():
        assert (np.abs(y - results["portable"]) / size).max() <= 1e-6


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_one_group_gives_the_same_bits_on_every_instruction_set(library, scheme: str) -> None:
    """With one group and power-of-two scales nothing rounds after the integers: y / step is the integer itself."""
    rng = np.random.default_rng(5)
    low, high = RANGES[scheme]
    quantized = rng.integers(low, high + 1, (16, 128)).astype(np.uint8)
    projection = quantized_projection(scheme, quantized, np.full((16, 1), 0.5, np.float16))
    x = rng.standard_normal((3, 128)).astype(np.float32)
    absmax = np.abs(x).max(axis=1, keepdims=True)
    integers = np.rint(x * (np.float32(127) / absmax)).astype(np.int64)
    step = (absmax / np.float32(127)) * np.float32(0.5)
    expected = (integers @ reference.LEVELS[scheme][quantized].T).astype(np.float32) * step
    before = library.llmpack_ops_isa()
    for name in ISAS:
        if library.llmpack_ops_set_isa(name.encode()) == 0:
            np.testing.assert_array_equal(projection.node(x).run()[0], expected, err_msg=name)
    library.llmpack_ops_set_isa(before)


@pytest.mark.parametrize("scheme", QUANTIZED)
@pytest.mark.parametrize("extreme", ["highest", "lowest", "alternating"])
def test_extreme_weights_and_activations_do_not_overflow(isa: str, scheme: str, extreme: str) -> None:
    """Every product at its largest: 16-bit intermediate sums would saturate if they could."""
    low, high = RANGES[scheme]
    pattern = {"highest": [high], "lowest": [low], "alternating": [high, low]}[extreme]
    quantized = np.resize(np.array(pattern, np.uint8), (16, 128))
    projection = quantized_projection(scheme, quantized, np.full((16, 1), 1.0, np.float16))
    signs = np.resize(np.array([1, -1], np.float32), (1, 128))
    check(projection, np.concatenate([np.ones_like(signs), -np.ones_like(signs), signs, -signs]))


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_groups_of_zeros_in_x(isa: str, scheme: str) -> None:
    x = random_x(3, 128)
    x[0] = 0
    x[1, 32:64] = 0
    y = check(random_projection(scheme, 20, 128), x)
    assert not y[0].any()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("size", [1e-45, 1e-41, 3e-38, 1e-30, 1e30], ids=str)
def test_tiny_and_huge_activations(isa: str, scheme: str, size: float) -> None:
    x = (random_x(3, 128) * size).astype(np.float32)
    projection = random_projection(scheme, 20, 128)
    check(projection, x)


FLUSHED = pytest.mark.parametrize(
    "flushed",
    [
        contextlib.nullcontext,
        pytest.param(subnormals_flushed, marks=pytest.mark.skipif(platform.machine() != "x86_64", reason="sets MXCSR")),
    ],
    ids=["", "flushed"],
)


@FLUSHED
@pytest.mark.parametrize("scheme", QUANTIZED)
def test_largest_and_subnormal_scales(isa: str, scheme: str, flushed) -> None:
    low, high = RANGES[scheme]
    quantized = random_x(18, 64).view(np.uint8)[:, :64] % (high - low + 1) + low
    for scale in (65504.0, 6e-8, 0.0, -6e-8, -65504.0):
        projection = quantized_projection(scheme, quantized, np.full((18, 2), scale, np.float16))
        check(projection, random_x(2, 64), flushed=flushed)


@FLUSHED
def test_float16_weights_of_every_kind(isa: str, flushed) -> None:
    """Every float16 but infinities and NaN, as a weight times 1: conversion is exact."""
    bits = np.arange(65536, dtype=np.uint16)
    weight = bits[(bits & 0x7C00) != 0x7C00].view(np.float16).reshape(-1, 1)
    projection = Projection(
        "f16", weight.astype(np.float64), {"weight": layout_float(weight)}, {"out_features": len(weight)}
    )
    node = projection.node(np.ones((1, 1), np.float32))
    with flushed():
        (y,) = node.run()
    np.testing.assert_array_equal(y[0], weight[:, 0].astype(np.float32))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf], ids=["nan", "negative_nan", "inf"])
def test_nan_in_x_reaches_every_output_of_its_token(isa: str, scheme: str, bad: float) -> None:
    projection, x = random_projection(scheme, 20, 128), random_x(9, 128)
    (clean,) = projection.node(x).run()
    x[4, 77] = bad
    (y,) = projection.node(x).run()
    assert not np.isfinite(y[4]).any()
    np.testing.assert_array_equal(np.delete(y, 4, 0), np.delete(clean, 4, 0))


def assert_gated_alike(projection: Projection, x: np.ndarray, threads: int = 1) -> None:
    """The product and then SwiGLU or GeGLU, each compared with float64 elsewhere, say what both give, to the bit."""
    (gate_up,) = projection.node(x).run()
    for op in ("SwiGLU", "GeGLU"):
        (expected,) = Node(op, {"gate_up": gate_up}).run()
        together = projection.node(x)
        together.op += op
        (y,) = together.run(threads)
        assert y.shape == (len(x), len(projection.weight) // 2)
        np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("scheme", JOINED)
@pytest.mark.parametrize("M", [0, 1, 2, 3, 4, 5, 8, 9, 16, 17, 24, 33])
def test_gated_products_of_any_number_of_tokens(isa: str, scheme: str, M: int) -> None:
    assert_gated_alike(random_projection(scheme, 96, 96), random_x(M, 96))


@pytest.mark.parametrize("scheme", JOINED)
@pytest.mark.parametrize("N", [32, 64, 1024])
@pytest.mark.parametrize("M", [1, 3, 40])
@pytest.mark.parametrize("threads", [1, 2])
def test_gated_products_of_any_number_of_rows(isa: str, scheme: str, N: int, M: int, threads: int) -> None:
    assert_gated_alike(random_projection(scheme, N, 640, 64), random_x(M, 640), threads)


def assert_normed_alike(projection: Projection, x: np.ndarray, threads: int = 1, *, norms: bool) -> None:
    """The product and then AddRMSNorm, each compared with float64 elsewhere, say what both together give, to the bit.

    `norms`: RMSNorm is between the two.
    """
    product, M, N = projection.node(x), len(x), len(projection.weight)
    residual, norm_weight, epsilon = random_x(M, N, 2), random_x(1, N, 3)[0], {"epsilon": 1e-5}
    (added,), x_weight = product.run(), {"x_weight": random_x(1, N, 4)[0]} if norms else {}
    if norms:
        (added,) = Node("RMSNorm", {"x": added, "weight": x_weight["x_weight"]}, attributes=epsilon).run()
    inputs = {"x": added, "residual": residual, "weight": norm_weight}
    expected = Node("AddRMSNorm", inputs, ("y", "sum"), attributes=epsilon).run()
    together = Node(
        f"{product.op}{'RMSNorm' * norms}AddRMSNorm",
        {**product.inputs, **x_weight, "residual": residual, "norm_weight": norm_weight},
        ("y", "sum"),
        (*product.initializers, *x_weight, "norm_weight"),
        {**projection.attributes, **epsilon},
    )
    for got, wanted in zip(together.run(threads), expected, strict=True):
        assert got.shape == (M, N)
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("scheme", JOINED)
@pytest.mark.parametrize("M", [0, 1, 3, 20])
@pytest.mark.parametrize(("N", "threads"), [(40, 1), (96, 2)], ids=["odd_tail", "two_threads"])
@pytest.mark.parametrize("norms", [False, True], ids=["", "norms_before_adding"])
def test_products_with_a_norm(isa: str, scheme: str, M: int, N: int, threads: int, norms: bool) -> None:
    assert_normed_alike(random_projection(scheme, N, 192, 64), random_x(M, 192), threads, norms=norms)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("M", [1, 2, 3, 4, 5, 8, 9])
@pytest.mark.parametrize("N", [160, 208], ids=["two_streams", "two_streams_and_a_tile"])
def test_both_ways_of_asking_for_weights(isa: str, weight_fetches, scheme: str, M: int, N: int) -> None:
    projection, x = random_projection(scheme, N, 192, 64), random_x(M, 192)
    through, past = (check(projection, x) for _ in weight_fetches)
    np.testing.assert_array_equal(through, past)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("scheme", JOINED)
@pytest.mark.parametrize("M", [1, 3, 5])
def test_gated_products_with_both_ways_of_asking_for_weights(isa: str, weight_fetches, scheme: str, M: int) -> None:
    for _ in weight_fetches:
        assert_gated_alike(random_projection(scheme, 96, 192, 64), random_x(M, 192))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    scheme=st.sampled_from(SCHEMES),
    M=st.integers(1, 20),
    N=st.integers(1, 70),
    groups=st.integers(1, 5),
    group_size=st.sampled_from([32, 64, 128]),
    size=st.sampled_from([1e-20, 1.0, 1e10]),
    threads=st.integers(1, 2),
)
def test_any_shape(
    isa: str, scheme: str, M: int, N: int, groups: int, group_size: int, size: float, threads: int
) -> None:
    K = groups * group_size
    check(random_projection(scheme, N, K, group_size), (random_x(M, K) * size).astype(np.float32), threads)
