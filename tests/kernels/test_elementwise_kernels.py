"""Norms, QKNorm, SwiGLU, GeGLU and the choice of the largest logits, against float64 (FORMAT.md 5, 8.4)."""

from __future__ import annotations

import numpy as np
import pytest
from interpreter import launch

from llmpack import kernel_plan
from llmpack.kernel_plan import KernelSpec
from llmpack_ops import reference
from llmrun.rows import merge_candidates

HALF_ROUNDING = 2.0**-11  # of a result to float16
FLOAT_SUM = 1e-6  # a few float32 roundings, relative to the result
SMALLEST_HALF = 2.0**-25  # half of the last place of the smallest float16


GATED = {"swiglu": reference.swiglu, "geglu": reference.geglu}


def norm_of(op: str, hidden: int = 64) -> KernelSpec:
    has_post_norms = op == "norm_add_rms_norm"
    return next(s for s in kernel_plan.norms(hidden, has_post_norms=has_post_norms) if s.op == op)


def assert_half(y: np.ndarray, exact: np.ndarray) -> None:
    error = np.abs(y.astype(np.float64) - exact)
    assert (error <= (HALF_ROUNDING + FLOAT_SUM) * np.abs(exact) + SMALLEST_HALF).all()


@pytest.mark.parametrize("hidden", [2, 64, 100, 257], ids=["smallest", "power_of_two", "even", "odd"])
@pytest.mark.parametrize("rows", [1, 3])
def test_norms(hidden: int, rows: int) -> None:
    rng = np.random.default_rng([hidden, rows])
    residual = (rng.standard_normal((rows, hidden)) * 1e4).astype(
        np.float32
    )  # beyond what float16 could hold when squared
    weight = rng.standard_normal(hidden).astype(np.float32)
    y = np.zeros((rows, hidden), np.float16)
    launch(norm_of("rms_norm", hidden), x=residual, weight=weight, y=y, epsilon=1e-5)
    assert_half(y, reference.rms_norm(residual, weight, 1e-5))

    x = rng.standard_normal((rows, hidden)).astype(np.float16)
    exact, total = reference.add_rms_norm(x, residual, weight, 1e-5)
    launch(norm_of("add_rms_norm", hidden), x=x, residual=residual, weight=weight, y=y, epsilon=1e-5)
    np.testing.assert_allclose(residual, total, rtol=2.0**-24)
    assert_half(y, exact)


@pytest.mark.parametrize("hidden", [2, 64, 100, 257], ids=["smallest", "power_of_two", "even", "odd"])
@pytest.mark.parametrize("rows", [1, 3])
def test_norm_of_what_is_added(hidden: int, rows: int) -> None:
    """Rows far from the length of 1 that they are given; neither they nor the sum are rounded on the way."""
    rng = np.random.default_rng([hidden, rows])
    x = (rng.standard_normal((rows, hidden)) * 10.0 ** rng.integers(-2, 4, (rows, 1))).astype(np.float16)
    x_weight, weight = (rng.standard_normal(hidden).astype(np.float32) * scale for scale in (300, 1))
    residual = rng.standard_normal((rows, hidden)).astype(np.float32)
    exact, total = reference.rms_norm_add_rms_norm(x, x_weight, residual, weight, 1e-5)
    y = np.zeros((rows, hidden), np.float16)
    operands = {"x": x, "x_weight": x_weight, "residual": residual, "weight": weight, "y": y}
    launch(norm_of("norm_add_rms_norm", hidden), **operands, epsilon=1e-5)
    np.testing.assert_allclose(residual, total, rtol=FLOAT_SUM, atol=FLOAT_SUM * np.abs(x_weight).max())
    assert_half(y, reference.rms_norm(residual, weight, 1e-5))
    np.testing.assert_allclose(y.astype(float), exact, rtol=2 * HALF_ROUNDING, atol=1e-5)


@pytest.mark.parametrize("dim", [2, 80, 128], ids=["smallest", "even", "power_of_two"])
@pytest.mark.parametrize("is_in_place", [False, True])
def test_qk_norm(dim: int, is_in_place: bool) -> None:
    heads, kv_heads = 4, 2
    rng = np.random.default_rng(dim)
    qkv = (rng.standard_normal((3, (heads + 2 * kv_heads) * dim)) * 30).astype(np.float16)
    q, k = rng.standard_normal((2, dim)).astype(np.float32)
    exact = reference.qk_norm(qkv, q, k, num_heads=heads, num_kv_heads=kv_heads, epsilon=1e-5)
    y = qkv if is_in_place else np.zeros_like(qkv)
    launch(kernel_plan.qk_norm(heads, kv_heads, dim), qkv=qkv, q_weight=q, k_weight=k, y=y, epsilon=1e-5)
    assert_half(y, exact)


def test_norm_of_zeros_is_zero() -> None:
    y = np.ones((1, 64), np.float16)
    x = np.zeros((1, 64), np.float32)
    launch(norm_of("rms_norm"), x=x, weight=np.ones(64, np.float32), y=y, epsilon=1e-5)
    assert (y == 0).all()


@pytest.mark.parametrize("op", GATED)
@pytest.mark.parametrize("intermediate", [1, 1024, 1500], ids=["smallest", "one_block", "odd_tail"])
def test_gated(op: str, intermediate: int) -> None:
    gate_up = (np.random.default_rng(intermediate).standard_normal((2, 2 * intermediate)) * 4).astype(np.float16)
    y = np.full((2, intermediate), 7, np.float16)
    launch(kernel_plan.gated(op, intermediate), gate_up=gate_up, y=y)
    assert_half(y, GATED[op](gate_up))


@pytest.mark.filterwarnings("ignore:overflow")  # of the exponential, which is infinite then
@pytest.mark.parametrize("op", GATED)
def test_every_finite_gate(op: str) -> None:
    """Saturated, where the result has no float16; nowhere infinite, nowhere NaN."""
    gate = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    gate = gate[np.isfinite(gate)]
    gate_up = np.concatenate([gate, np.full_like(gate, 2)])[None]
    y = np.full((1, len(gate)), 7, np.float16)
    launch(kernel_plan.gated(op, len(gate)), gate_up=gate_up, y=y)
    assert_half(y, np.clip(GATED[op](gate_up), -65504, 65504))


def likeliest(logits: np.ndarray, first_id: int = 0, known: int | None = None) -> np.ndarray:
    """Return the record of `top_k_last` for one rank's columns, of which `known` are tokens."""
    rows, columns = logits.shape
    first, last = kernel_plan.sampling(columns)
    parts = -(-columns // first.constants["chunk"])
    keys, sums = np.zeros((rows, parts, kernel_plan.TOP_K), np.int64), np.zeros((rows, parts), np.float32)
    top = np.zeros((rows, kernel_plan.TOP_K + 1), np.int64)
    launch(
        first, logits=logits, keys=keys, sums=sums, first_id=first_id, num_columns=columns if known is None else known
    )
    launch(last, keys=keys, sums=sums, top=top)
    return top


@pytest.mark.parametrize("columns", [64, 2048, 2100], ids=["one_chunk", "full_chunk", "odd_tail"])
def test_the_likeliest_tokens_in_order(columns: int) -> None:
    logits = (np.random.default_rng(columns).standard_normal((2, columns)) * 10).astype(np.float32)
    found = merge_candidates([likeliest(logits)], columns)
    expected = np.argsort(-logits, axis=1, kind="stable")[:, : kernel_plan.TOP_K]
    np.testing.assert_array_equal(found.ids, expected)
    np.testing.assert_array_equal(found.logits, np.take_along_axis(logits, expected, 1))
    exact = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True)).sum(axis=1)
    np.testing.assert_allclose(found.weight_sums, exact, rtol=1e-6)


@pytest.mark.parametrize("parts", [1, 3, 8, 37])
def test_the_likeliest_of_many_parts(parts: int) -> None:
    """Each part's candidates fall; nothing else is known of them, and what lies behind the last part is none."""
    _, last = kernel_plan.sampling(parts * kernel_plan.TOP_K_CHUNK)
    rng = np.random.default_rng(parts)
    keys = rng.integers(-(2**62), 2**62, (3, parts, kernel_plan.TOP_K))
    keys[1] >>= rng.integers(0, 20, (parts, 1))  # most of a row's largest stand in few parts
    keys = -np.sort(-keys, axis=2)
    top = np.zeros((3, kernel_plan.TOP_K + 1), np.int64)
    launch(last, keys=keys, sums=np.ones((3, parts), np.float32), top=top)
    np.testing.assert_array_equal(top[:, :-1], -np.sort(-keys.reshape(3, -1), axis=1)[:, : kernel_plan.TOP_K])


def test_equal_logits_come_in_order_of_ids() -> None:
    logits = np.zeros((1, 2100), np.float32)
    logits[0, ::2] = -0.0
    logits[0, 2090] = 5
    logits[0, :3] = -1
    found = merge_candidates([likeliest(logits)], 2100)
    np.testing.assert_array_equal(found.ids[0], [2090, *range(3, 2 + kernel_plan.TOP_K)])


def test_two_ranks_find_what_one_finds() -> None:
    """101 tokens over columns of 51: the last one of the second rank is none, whatever stands there."""
    logits = np.round(np.random.default_rng(1).standard_normal((3, 102)) * 4).astype(np.float32)  # many are equal
    logits[:, 101] = 99
    records = [likeliest(np.ascontiguousarray(logits[:, :51])), likeliest(np.ascontiguousarray(logits[:, 51:]), 51, 50)]
    one, two = merge_candidates([likeliest(logits, 0, 101)], 101), merge_candidates(records, 101)
    np.testing.assert_array_equal(two.ids, np.argsort(-logits[:, :101], axis=1, kind="stable")[:, : kernel_plan.TOP_K])
    np.testing.assert_array_equal(one.ids, two.ids)
    np.testing.assert_array_equal(one.logits, two.logits)
    np.testing.assert_allclose(one.weight_sums, two.weight_sums, rtol=1e-6)


@pytest.mark.parametrize(
    "bad", [np.nan, -np.float32(np.nan), np.inf, -np.inf], ids=["nan", "minus_nan", "inf", "minus_inf"]
)
def test_what_is_not_finite_shows_in_the_sum_of_its_row_alone(bad: float) -> None:
    logits = np.zeros((3, 70), np.float32)
    logits[1, 66] = bad
    for records in ([likeliest(logits)], [likeliest(np.ascontiguousarray(logits[:, i : i + 35]), i) for i in (0, 35)]):
        sums = merge_candidates(records, 70).weight_sums
        np.testing.assert_array_equal(np.isnan(sums), [False, True, False])


@pytest.mark.parametrize("op", GATED)
def test_nan_stays_nan_on_its_way_to_the_logits(op: str) -> None:
    """Saturation must not make a number of it: that is how whoever samples learns that a model is broken."""
    gate_up = np.zeros((1, 128), np.float16)
    gate_up[0, 3] = np.nan
    y = np.zeros((1, 64), np.float16)
    launch(kernel_plan.gated(op, 64), gate_up=gate_up, y=y)
    np.testing.assert_array_equal(np.isnan(y[0]), np.arange(64) == 3)
    launch(norm_of("rms_norm"), x=gate_up[:, :64].astype(np.float32), weight=np.ones(64, np.float32), y=y, epsilon=1e-5)
    assert np.isnan(y).all()
