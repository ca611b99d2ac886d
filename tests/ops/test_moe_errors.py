"""MoEF32, MoEF16, MoEQ8, MoEQ4 refuse wrong attributes, shapes and types with one sentence (FORMAT.md 5.16)."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from helpers import Mixture, Node, random_x, session
from test_errors import F16, F32, U8, ZEROS, assert_fails, message
from test_moe import random_logits

EXPERTS = "num_experts + num_shared_experts"
GATE_UP, DOWN = f"[({EXPERTS}) * 2 * intermediate_size / 16, ", f"[({EXPERTS}) * out_features / 16, "
MISSING = "is missing or no integer, expected an integer"

# name: (scheme, inputs to replace, attributes to replace or, where None, to leave out, sentence). Three tokens, six experts of
# 32 features, two for each token of 64.
MOE_CASES: dict[str, tuple[str, dict[str, np.ndarray], dict[str, float | None], str]] = {
    "num_experts is missing": ("f32", {}, {"num_experts": None}, f"attribute num_experts {MISSING}"),
    "no experts": ("f32", {}, {"num_experts": 0}, "attribute num_experts is 0, expected 1 to 1024"),
    "too many experts": ("q4", {}, {"num_experts": 1025}, "attribute num_experts is 1025, expected 1 to 1024"),
    "fewer experts than none": (
        "f32", {}, {"num_experts": -(2**63)}, "attribute num_experts is -9223372036854775808, expected 1 to 1024",
    ),
    "num_experts_per_tok is missing": (
        "q8", {}, {"num_experts_per_tok": None}, f"attribute num_experts_per_tok {MISSING}",
    ),
    "no expert for a token": ("f16", {}, {"num_experts_per_tok": 0}, "attribute num_experts_per_tok is 0, expected 1 to 6"),
    "more for a token than there are": (
        "q8", {}, {"num_experts_per_tok": 7}, "attribute num_experts_per_tok is 7, expected 1 to 6",
    ),
    "norm_topk_prob is missing": ("f32", {}, {"norm_topk_prob": None}, f"attribute norm_topk_prob {MISSING}"),
    "norm_topk_prob is neither": ("q4", {}, {"norm_topk_prob": 2}, "attribute norm_topk_prob is 2, expected 0 or 1"),
    "norm_topk_prob is negative": ("q4", {}, {"norm_topk_prob": -1}, "attribute norm_topk_prob is -1, expected 0 or 1"),
    "intermediate_size is missing": ("f32", {}, {"intermediate_size": None}, f"attribute intermediate_size {MISSING}"),
    "no intermediate_size": (
        "f32", {}, {"intermediate_size": 0}, "attribute intermediate_size is 0, expected a positive number",
    ),
    "intermediate_size that wraps around": (
        "f32", {}, {"intermediate_size": 2**31}, "attribute intermediate_size is 2147483648, expected at most 2147483647",
    ),
    "intermediate_size ends within a tile": (
        "f32", {}, {"intermediate_size": 24}, "attribute intermediate_size is 24, expected a multiple of 16",
    ),
    "intermediate_size ends within a group": (
        "q4", {}, {"intermediate_size": 48}, "attribute intermediate_size is 48, expected a multiple of group_size 32",
    ),
    "out_features is missing": ("f16", {}, {"out_features": None}, f"attribute out_features {MISSING}"),
    "out_features that wraps around": (
        "f16", {}, {"out_features": 2**31}, "attribute out_features is 2147483648, expected at most 2147483647",
    ),
    "out_features ends within a tile": (
        "f16", {}, {"out_features": 72}, "attribute out_features is 72, expected a multiple of 16",
    ),
    "out_features ends within a group": (
        "q8", {}, {"out_features": 80}, "attribute out_features is 80, expected a multiple of group_size 32",
    ),
    "group_size is missing": ("q4", {}, {"group_size": None}, f"attribute group_size {MISSING}"),
    "group_size is odd": ("q8", {}, {"group_size": 16}, "attribute group_size is 16, expected 32, 64 or 128"),
    "x of another hidden_size": (
        "f32", {"x": ZEROS((3, 65), F32)}, {}, "input x has shape [3, 65], expected [any, 64] = [tokens, out_features]",
    ),
    "x has three axes": (
        "q4", {"x": ZEROS((1, 3, 64), F32)}, {}, "input x has shape [1, 3, 64], expected [any, 64] = [tokens, out_features]",
    ),
    "logits of fewer tokens": (
        "q4", {"router_logits": ZEROS((2, 6), F32)}, {},
        "input router_logits has shape [2, 6], expected [3, 6] = [tokens, num_experts]",
    ),
    "logits of fewer experts": (
        "f16", {"router_logits": ZEROS((3, 5), F32)}, {},
        "input router_logits has shape [3, 5], expected [3, 6] = [tokens, num_experts]",
    ),
    "logits of one axis": (
        "f16", {"router_logits": ZEROS(18, F32)}, {},
        "input router_logits has shape [18], expected [3, 6] = [tokens, num_experts]",
    ),
    "gate_up of fewer experts": (
        "f32", {"gate_up": ZEROS((20, 64, 16), F32)}, {},
        f"input gate_up has shape [20, 64, 16], expected [24, 64, 16] = {GATE_UP}in_features, 16]",
    ),
    "gate without up": (
        "q8", {"gate_up": ZEROS((12, 16, 16, 4), U8)}, {},
        f"input gate_up has shape [12, 16, 16, 4], expected [24, 16, 16, 4] = {GATE_UP}in_features / 4, 16, 4]",
    ),
    "q8 gate_up for q4": (
        "q4", {"gate_up": ZEROS((24, 16, 16, 4), U8)}, {},
        f"input gate_up has shape [24, 16, 16, 4], expected [24, 8, 16, 4] = {GATE_UP}in_features / 8, 16, 4]",
    ),
    "too few scales of gate_up": (
        "q4", {"gate_up_scales": ZEROS((24, 1, 16), F16)}, {},
        f"input gate_up_scales has shape [24, 1, 16], expected [24, 2, 16] = {GATE_UP}in_features / group_size, 16]",
    ),
    "down of fewer experts": (
        "f16", {"down": ZEROS((20, 32, 16), F16)}, {},
        f"input down has shape [20, 32, 16], expected [24, 32, 16] = {DOWN}in_features, 16]",
    ),
    "q4 down for q8": (
        "q8", {"down": ZEROS((24, 4, 16, 4), U8)}, {},
        f"input down has shape [24, 4, 16, 4], expected [24, 8, 16, 4] = {DOWN}in_features / 4, 16, 4]",
    ),
    "too few scales of down": (
        "q8", {"down_scales": ZEROS((12, 1, 16), F16)}, {},
        f"input down_scales has shape [12, 1, 16], expected [24, 1, 16] = {DOWN}in_features / group_size, 16]",
    ),
    "another intermediate_size than the weights'": (
        "f32", {}, {"intermediate_size": 64},
        f"input gate_up has shape [24, 64, 16], expected [48, 64, 16] = {GATE_UP}in_features, 16]",
    ),
    "alpha without a limit": (
        "q4", {}, {"swiglu_alpha": 1.0},
        "one of the attributes swiglu_alpha and swiglu_limit is missing, expected both or neither",
    ),
    "a limit without alpha": (
        "mxfp4", {}, {"swiglu_limit": 1.0},
        "one of the attributes swiglu_alpha and swiglu_limit is missing, expected both or neither",
    ),
    "a limit below 0": (
        "f32", {}, {"swiglu_alpha": 1.0, "swiglu_limit": -1.0},
        "attribute swiglu_limit is -1.000000, expected at least 0",
    ),
    "a limit that is no number": (
        "f32", {}, {"swiglu_alpha": 1.0, "swiglu_limit": float("nan")},
        "attribute swiglu_limit is nan, expected at least 0",
    ),
    "gate_up_bias of fewer features": (
        "q4", {"gate_up_bias": ZEROS((6, 32), F32)}, {},
        f"input gate_up_bias has shape [6, 32], expected [6, 64] = [{EXPERTS}, 2 * intermediate_size]",
    ),
    "gate_up_bias of one axis": (
        "f32", {"gate_up_bias": ZEROS(384, F32)}, {},
        f"input gate_up_bias has shape [384], expected [6, 64] = [{EXPERTS}, 2 * intermediate_size]",
    ),
    "down_bias of fewer experts": (
        "mxfp4", {"gate_up_bias": ZEROS((6, 64), F32), "down_bias": ZEROS((5, 64), F32)}, {},
        f"input down_bias has shape [5, 64], expected [6, 64] = [{EXPERTS}, out_features]",
    ),
    "a bias of down, of all experts but those shared": (
        "f16", {"gate_up": ZEROS((28, 64, 16), F16), "down": ZEROS((28, 32, 16), F16), "down_bias": ZEROS((6, 64), F32)},
        {"num_shared_experts": 1},
        f"input down_bias has shape [6, 64], expected [7, 64] = [{EXPERTS}, out_features]",
    ),
    "weights of all experts but those shared": (
        "f16", {}, {"num_shared_experts": 2},
        f"input gate_up has shape [24, 64, 16], expected [32, 64, 16] = {GATE_UP}in_features, 16]",
    ),
    "fewer shared experts than none": (
        "f32", {}, {"num_shared_experts": -1}, "attribute num_shared_experts is -1, expected 0 to 1018",
    ),
    "more experts with those shared than there may be": (
        "q8", {}, {"num_shared_experts": 1019}, "attribute num_shared_experts is 1019, expected 0 to 1018",
    ),
    "sigmoid_scoring is neither": ("q4", {}, {"sigmoid_scoring": 2}, "attribute sigmoid_scoring is 2, expected 0 or 1"),
    **{
        f"a scaling factor of {factor}": (
            "f32", {}, {"routed_scaling_factor": factor},
            f"attribute routed_scaling_factor is {factor:.6f}, expected a finite number above 0",
        )
        for factor in (0.0, -1.0, float("nan"), float("inf"))
    },
    "a scaling factor that is an integer": (
        "f32", {}, {"routed_scaling_factor": 2}, "attribute routed_scaling_factor is an integer, expected a float",
    ),
    "sigmoid_scoring that is a float": (
        "f32", {}, {"sigmoid_scoring": 1.0}, "attribute sigmoid_scoring is a float, expected an integer",
    ),
    "e_score_correction_bias of fewer experts": (
        "mxfp4", {"e_score_correction_bias": ZEROS(5, F32)}, {},
        "input e_score_correction_bias has shape [5], expected [6] = [num_experts]",
    ),
    "e_score_correction_bias of two axes": (
        "f32", {"gate_up_bias": ZEROS((6, 64), F32), "e_score_correction_bias": ZEROS((1, 6), F32)}, {},
        "input e_score_correction_bias has shape [1, 6], expected [6] = [num_experts]",
    ),
    "q8 gate_up for mxfp4": (
        "mxfp4", {"gate_up": ZEROS((24, 16, 16, 4), U8)}, {},
        f"input gate_up has shape [24, 16, 16, 4], expected [24, 8, 16, 4] = {GATE_UP}in_features / 8, 16, 4]",
    ),
    "the widest and most experts that attributes say": (
        "f32", {}, {"num_experts": 1024, "intermediate_size": 2**31 - 16},
        "input router_logits has shape [3, 6], expected [3, 1024] = [tokens, num_experts]",
    ),
}  # fmt: skip


def wrong(scheme: str, inputs: dict[str, np.ndarray], attributes: dict[str, Any]) -> Node:
    node = Mixture(scheme).node(random_x(3, 64), random_logits(3, 6))
    assert inputs.keys() <= {*node.inputs, *node.optional}
    node.inputs |= inputs
    node.attributes = {k: v for k, v in ((node.attributes or {}) | attributes).items() if v is not None}
    return node


@pytest.mark.parametrize("case", MOE_CASES)
def test_moe(case: str) -> None:
    scheme, inputs, attributes, expected = MOE_CASES[case]
    assert_fails(wrong(scheme, inputs, attributes), expected)


def test_sizes_whose_product_is_beyond_memory_are_another_shape() -> None:
    """No number of tiles that attributes give wraps around."""
    E, F = 1024, 2**31 - 16
    node = wrong("f32", {"router_logits": ZEROS((3, E), F32)}, {"num_experts": E, "intermediate_size": F})
    assert_fails(
        node, f"input gate_up has shape [24, 64, 16], expected [{E * 2 * F // 16}, 64, 16] = {GATE_UP}in_features, 16]"
    )


@pytest.mark.parametrize(
    ("scheme", "name", "array"),
    [
        ("q4", "gate_up", ZEROS((24, 8, 16, 4), np.int32)),
        ("q8", "down_scales", ZEROS((24, 1, 16), F32)),
        ("f32", "down", ZEROS((24, 32, 16), F16)),
        ("f16", "gate_up", ZEROS((24, 64, 16), F32)),
        ("q4", "router_logits", ZEROS((3, 6), F16)),
        ("q8", "e_score_correction_bias", ZEROS(6, F16)),
    ],
)
def test_wrong_types_are_refused_when_the_model_loads(scheme: str, name: str, array: np.ndarray) -> None:
    assert re.search("[Tt]ype", message(wrong(scheme, {name: array}, {})))


def test_an_error_leaves_the_session_usable() -> None:
    node = Mixture("q4").node(random_x(3, 64), random_logits(3, 6))
    made = session(node.model(any_shape=True))
    feeds = {name: node.inputs[name] for name in ("x", "router_logits")}
    (good,) = made.run(None, feeds)
    with pytest.raises(Exception, match="input router_logits has shape"):
        made.run(None, feeds | {"x": random_x(2, 64)})
    np.testing.assert_array_equal(made.run(None, feeds)[0], good)
