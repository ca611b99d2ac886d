"""moe_*: experts' biases and the SwiGLU that is cut off, gpt-oss's, against float64 (FORMAT.md 5.16, 8.4)."""

from __future__ import annotations

import numpy as np
import pytest
from interpreter import launch
from test_moe_kernels import HALF, check_blocks, check_down_rows, check_gate_up_rows, choose, layer

from llmpack import moe_plan

CLAMP = (1.702, 7.0)  # gpt-oss's swiglu_alpha and swiglu_limit
KINDS_OF_GATING = {
    "biases and a limit": ((True, True), CLAMP),
    "ranks but the first": ((True, False), CLAMP),
    "biases alone": ((True, True), None),
    "down's alone": ((False, True), None),
    "a limit alone": ((False, False), CLAMP),
    "another limit": ((True, True), (0.5, 0.25)),
}


@pytest.mark.parametrize("kind", KINDS_OF_GATING)
@pytest.mark.parametrize("storage", ["f16", pytest.param("mxfp4", marks=pytest.mark.extended)])
def test_biases_and_a_clamped_swiglu(storage: str, kind: str) -> None:
    """gpt-oss's, whose sizes are no powers of two; x is so large that some of the sums are beyond the limit."""
    biases, clamp = KINDS_OF_GATING[kind]
    own = layer(storage, 96, 96, 4, 3, biases=biases, clamp=clamp)
    check_gate_up_rows(own, 3, factor=6)
    check_down_rows(own, 3)
    check_blocks(own, choose(7, own.shape)[0], 8, factor=6)


@pytest.mark.parametrize("storage", ["mxfp4", *(pytest.param(s, marks=pytest.mark.extended) for s in ("q4", "q8"))])
@pytest.mark.parametrize("most", [None, 8, *(pytest.param(m, marks=pytest.mark.extended) for m in (64, 0))])
def test_biases_in_each_vendors_spelling(storage: str, most: int | None, backend: str) -> None:
    """Output features that are in another order on NVIDIA's matrix units, and fill no block."""
    own = layer(storage, 160, 96, 3, 2, biases=(True, True), clamp=CLAMP)
    if most is None:
        check_gate_up_rows(own, 2, backend, factor=4)
        check_down_rows(own, 2, backend)
    else:
        check_blocks(own, choose(20, own.shape)[0], most, backend, factor=4)


def test_a_limit_lets_nan_pass() -> None:
    """A gate's, and the other factor's."""
    own = layer("f16", biases=(True, False), clamp=CLAMP)
    x, (experts, _) = own.x(2), choose(2, own.shape)
    own.gate_up_bias[:, [3, own.shape.intermediate + 5]] = np.nan
    h = np.zeros((2 * own.shape.chosen, own.shape.intermediate), np.float16)
    launch(own.spec("moe_gate_up"), x=x, **own.inputs_of_gate_up, experts=experts, h=h)
    assert np.isnan(h).all(axis=0).nonzero()[0].tolist() == [3, 5]


def test_slots_that_no_expert_has_add_no_bias() -> None:
    """Of ten experts the last two are read with six that are none, whose place is the first expert's."""
    own = layer("f16", number=11, chosen=10, biases=(True, True))
    own.down_bias[0] = np.nan
    experts = np.arange(1, 11, dtype=np.int32).reshape(1, 10)
    h, y = own.activations(10).reshape(1, 10, -1), np.zeros((1, own.shape.hidden), np.float16)
    routing = np.full((1, 10), 0.1, np.float32)
    launch(own.spec("moe_down"), h=h, **own.inputs_of_down, experts=experts, routing=routing, y=y)
    exact = 0.1 * (np.einsum("cnk,ck->n", own.down[1:], h[0].astype(np.float64)) + own.down_bias[1:].sum(0))
    np.testing.assert_allclose(y[0], exact, atol=4 * HALF * np.abs(exact).max())


@pytest.mark.parametrize("shards", [1, 2])
def test_kernels_for_ranks_with_down_bias_and_without(shards: int) -> None:
    shape = moe_plan.Experts(96, 96, 4, 2, has_gate_up_bias=True, has_down_bias=True, has_limit=True)
    specs = list(moe_plan.products(shape, "mxfp4", 32, shards))
    for op, number in (("gate_up", 1), ("grouped_gate_up", 3), ("down", 1), ("grouped_down", 3)):
        found = [spec.constants for spec in specs if spec.op == f"moe_{op}_mxfp4"]
        is_down = op.endswith("down")
        assert [c["has_bias"] for c in found if "has_bias" in c] == [1] * number
        assert len(found) == number * (1 + (is_down and shards > 1))
        assert ["has_limit" in c for c in found] == [not is_down] * len(found)
    plain = moe_plan.products(moe_plan.Experts(96, 96, 4, 2), "mxfp4", 32, shards)
    assert all({"has_bias", "has_limit"}.isdisjoint(spec.constants) for spec in plain)
