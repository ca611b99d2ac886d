"""moe_route: sigmoid scores, a correction bias, a factor and shared experts, against float64 (FORMAT.md 5.16, 8.4)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_moe_kernels import HALF, layer, run, run_route

from llmpack import moe_plan
from llmpack_ops import reference

# num_experts, num_experts_per_tok, num_shared, is_sigmoid, whether there is a correction bias, the factor.
KINDS = {
    "ERNIE 4.5's": (64, 6, 2, False, True, 1.0),
    "GLM-4.5's": (128, 8, 1, True, True, 2.5),
    "sigmoid alone": (60, 4, 0, True, False, 1.0),
    "a factor and shared ones": (5, 5, 3, False, False, 0.5),
    "more of them than lanes": (1, 1, 70, True, True, 1.0),
}


def truth(
    logits: np.ndarray,
    chosen: int,
    bias: np.ndarray | None,
    factor: float,
    *,
    is_normed: bool,
    num_shared: int,
    is_sigmoid: bool,
) -> tuple[np.ndarray, np.ndarray]:
    return reference.route(
        logits,
        chosen,
        norm_topk_prob=is_normed,
        sigmoid_scoring=is_sigmoid,
        e_score_correction_bias=bias,
        routed_scaling_factor=factor,
        num_shared_experts=num_shared,
    )


def check_route(logits: np.ndarray, chosen: int, bias: np.ndarray | None, factor: float, **others: Any) -> None:
    """`others`: what the kernel and the truth call alike."""
    given: dict[str, Any] = {} if bias is None else {"correction_bias": bias}
    if factor != 1.0:
        given["scaling_factor"] = factor
    has = {"has_correction_bias": bias is not None, "has_scaling_factor": factor != 1.0}
    experts, routing = run_route(logits, chosen, given=given, **has, **others)
    expected, weights = truth(logits, chosen, bias, factor, **others)
    np.testing.assert_array_equal(experts, expected)
    np.testing.assert_allclose(routing, weights, rtol=2e-5)  # of exp(-60)


@pytest.mark.parametrize("is_normed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_routing(kind: str, is_normed: bool) -> None:
    number, chosen, num_shared, is_sigmoid, has_bias, factor = KINDS[kind]
    rng = np.random.default_rng(number)
    logits = (rng.standard_normal((3, number)) * 2).astype(np.float32)
    bias = (rng.standard_normal(number) / 4).astype(np.float32) if has_bias else None
    others = {"num_shared": num_shared, "is_sigmoid": is_sigmoid}
    check_route(logits, chosen, bias, factor, is_normed=is_normed, **others)
    if has_bias and number > 1:
        by_logits, _ = truth(logits, chosen, None, 1.0, is_normed=is_normed, **others)
        assert (truth(logits, chosen, bias, 1.0, is_normed=is_normed, **others)[0] != by_logits).any()


@pytest.mark.parametrize("is_sigmoid", [False, True])
def test_equal_sums_and_scores_that_are_next_to_nothing(is_sigmoid: bool) -> None:
    """Scores of 30 and 40 are 1 both; of equal sums the lower expert is chosen. A sum of scores counts as 1e-20 at least."""
    logits = np.full((4, 6), -1, np.float32)
    logits[1] = -60, 40, -60, 40, 40, -60
    logits[2] = 30, 40, 30, 40, 40, 30
    logits[3] = 5, -60, -60, -61, -60, -60
    bias = np.full(6, 0.25, np.float32)
    check_route(logits, 2, bias, 1.0, is_normed=True, num_shared=1, is_sigmoid=is_sigmoid)
    bias[[1, 3]] = 2, 3  # which in the last row have no score to speak of
    check_route(logits, 2, bias, 1.0, is_normed=True, num_shared=1, is_sigmoid=is_sigmoid)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("is_sigmoid", [False, True])
def test_a_row_with_nan_has_experts_and_weights_of_nan(is_sigmoid: bool, has_bias: bool) -> None:
    """As one of whose logits the largest is infinite. Experts that tokens share keep their weight."""
    logits = np.random.default_rng(0).standard_normal((6, 20)).astype(np.float32)
    logits[1, 13], logits[2], logits[3, 4], logits[4], logits[5, :18] = np.nan, -np.nan, np.inf, -np.inf, -np.inf
    bias = np.linspace(-0.2, 0.2, 20, dtype=np.float32)
    given = {"correction_bias": bias} if has_bias else {}
    others = {"num_shared": 2, "is_sigmoid": is_sigmoid}
    experts, routing = run_route(logits, 3, is_normed=True, given=given, has_correction_bias=has_bias, **others)
    assert (experts[:, 3:] == [20, 21]).all()
    assert (routing[:, 3:] == 1).all()
    assert ((experts[:, :3] >= 0) & (experts[:, :3] < 20)).all()
    assert (np.diff(experts, axis=1) > 0).all(), "one of them twice"
    assert np.isnan(routing[1:5, :3]).all()
    numbers = [0, 5]
    expected, weights = truth(logits[numbers], 3, bias if has_bias else None, 1.0, is_normed=True, **others)
    np.testing.assert_array_equal(experts[numbers], expected)
    np.testing.assert_allclose(routing[numbers], weights, rtol=3e-6)


@pytest.mark.parametrize("most", [None, 8])
def test_the_whole_operator(most: int | None) -> None:
    """A row whose logits hold a NaN is NaN though what is shared is not."""
    members = {"num_shared": 2, "is_sigmoid": True, "has_correction_bias": True, "has_scaling_factor": True}
    own = layer("f16", number=5, chosen=3, **members)
    assert own.shape.few_rows == 1
    x, rng = own.x(7), np.random.default_rng(3)
    logits, bias = rng.standard_normal((7, 5)).astype(np.float32), (rng.standard_normal(5) / 4).astype(np.float32)
    logits[2, 1] = np.nan
    y = run(own, x, logits, most, correction_bias=bias, scaling_factor=2.5)
    assert np.isnan(y).all(axis=1).tolist() == [False, False, True, False, False, False, False]
    others = {"sigmoid_scoring": True, "e_score_correction_bias": bias, "routed_scaling_factor": 2.5}
    rest = [0, 1, 3, 4, 5, 6]
    exact = reference.moe(x[rest], logits[rest], own.gate_up, own.down, 3, norm_topk_prob=True, **others)
    np.testing.assert_allclose(y[rest], exact, atol=4 * HALF * np.abs(exact).max())


def test_kernels_have_constants_for_what_is_beside_the_choice_of_all_mixtures() -> None:
    """Those that older artifacts have, where there is nothing else: FORMAT.md 8.4."""
    plain = {"num_experts": 6, "num_experts_per_tok": 2, "norm_topk_prob": 1}
    members = {
        "num_shared": {"num_shared_experts": 1},
        "is_sigmoid": {"sigmoid_scoring": 1},
        "has_correction_bias": {"has_correction_bias": 1},
        "has_scaling_factor": {"has_scaling_factor": 1},
    }
    for member, constants in {None: {}, **members}.items():
        shape = moe_plan.Experts(32, 32, 6, 2, **({member: 1} if member else {}))
        route, sort, *_ = moe_plan.routing(shape, is_normed=True)
        assert route.constants == {**plain, **constants}
        assert sort.constants["num_experts"] == 6 + (member == "num_shared")
