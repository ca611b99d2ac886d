"""Experts that all tokens share, and scores other than a softmax (FORMAT.md 5.16); ERNIE 4.5's and GLM-4.5's mixtures."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from helpers import Mixture, random_x
from test_moe import MOST_PAIRS, check, random_logits

from llmpack_ops import reference

KINDS: dict[str, dict[str, Any]] = {
    "shared": {"S": 3},
    "ernie": {"S": 2, "corrects": True},
    "glm": {"S": 1, "sigmoid": True, "corrects": True, "scaling": 2.5},
    "scaled": {"scaling": 0.125, "norms": False},
    "sigmoid": {"sigmoid": True, "norms": False, "S": 1, "biases": 2},
}


@pytest.mark.parametrize("scheme", ["f32", "q4"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [1, 3, 20])
def test_kinds_of_mixtures(isa: str, scheme: str, kind: str, T: int) -> None:
    x, logits, mixture = random_x(T, 96), random_logits(T, 5), Mixture(scheme, 5, 2, 96, 64, **KINDS[kind])
    y = check(mixture, x, logits)
    for name in KINDS[kind].keys() - {"norms", "biases", "S"}:  # each makes a difference
        other = replace(mixture, **{name: Mixture.__dataclass_fields__[name].default})
        assert T < 20 or not np.array_equal(y, other.node(x, logits).run()[0])


@pytest.mark.parametrize(
    ("E", "k", "S", "T"),
    [
        pytest.param(1022, 3, 2, 2, id="most"),
        pytest.param(3, 1, 1, MOST_PAIRS + 9, id="more_tokens_than_a_group_has"),
        pytest.param(3, 1, 2, MOST_PAIRS // 2, id="two_are_a_group"),
        pytest.param(300, 255, 3, 1, id="a_group_ends_among_them", marks=pytest.mark.extended),
    ],
)
def test_any_number_of_shared_experts(library, E: int, k: int, S: int, T: int) -> None:
    check(Mixture("f16", E, k, 16, 16, S=S), random_x(T, 16), random_logits(T, E), threads=2)


def corrected(logits: list[float], bias: list[float], k: int, **kind: Any) -> tuple[list[int], np.ndarray]:
    """The experts of one token and their weights, as `reference.route` has them, once the operator agrees."""
    own, x = np.array([logits], np.float32), random_x(1, 32)
    mixture = Mixture("f32", len(logits), k, 32, **kind, corrects=True)
    node, correction = mixture.node(x, own), np.array(bias, np.float32)
    node.inputs["e_score_correction_bias"] = correction
    routing: dict[str, Any] = {**mixture.routing, "e_score_correction_bias": correction}
    experts, weights = reference.route(own, k, **routing)
    expected, size = mixture.by_products(x, experts, weights)
    (y,) = node.run()
    assert (np.abs(y - expected) <= 5e-6 * size + 1e-30).all()
    return experts[0].tolist(), weights[0]


def test_a_correction_chooses_and_does_not_weigh(library) -> None:
    p = reference.matmul(np.exp([[2.0, 1, 0, -1]]), np.eye(4))[0] / np.exp([2.0, 1, 0, -1]).sum()
    experts, weights = corrected([2, 1, 0, -1], [-1, 0, 0, 1], 2, norms=False)
    assert experts == [1, 3]
    np.testing.assert_allclose(weights, p[[1, 3]], rtol=1e-12)
    experts, weights = corrected([2, 1, 0, -1], [-1, 0, 0, 1], 2, sigmoid=True, scaling=3.0)
    q = 1 / (1 + np.exp([-1.0, 1]))
    assert experts == [1, 3]
    np.testing.assert_allclose(weights, 3 * q / q.sum(), rtol=1e-12)


@pytest.mark.parametrize("sigmoid", [False, True], ids=["", "sigmoid"])
def test_of_equal_corrected_scores_the_lower_experts_are_chosen(library, sigmoid: bool) -> None:
    """Equal as float32: a score that is larger by less than that of the sum says counts for nothing."""
    assert corrected([0, 1e-6, 0, 0], [64, 64, 64, -1], 2, sigmoid=sigmoid)[0] == [0, 1]
    assert corrected([0, 0, 1e-6, 0], [64, 64, 64, -1], 2, sigmoid=sigmoid)[0] == [0, 1]
    assert corrected([0, 0, 0, 0], [-0.0, 0, 0, 0], 2, sigmoid=sigmoid)[0] == [0, 1]
    assert corrected([0, 0, 1e-6, 0], [0, 0, 0, 0], 2, sigmoid=sigmoid)[0] == [0, 2]


def test_scores_next_to_nothing_are_not_made_large(library) -> None:
    """10^-20 is the least sum that weights are divided by."""
    _, weights = corrected([-60, -61], [0, 0], 1, sigmoid=True)
    np.testing.assert_allclose(weights, np.exp(-60) / 1e-20, rtol=1e-12)
    experts, weights = corrected([0, -60, -200], [0, 2, 2], 2)
    assert experts == [1, 2]
    np.testing.assert_allclose(weights, np.exp([-60, -200]) / 1e-20, rtol=1e-12)


@pytest.mark.parametrize("bad", [[np.nan], [-np.nan], [np.inf], [-np.inf] * 5, [np.inf, np.nan]], ids=str)
@pytest.mark.parametrize("kind", ["ernie", "glm", "sigmoid"])
def test_logits_that_are_no_numbers_give_nan(library, kind: str, bad: list[float]) -> None:
    """Whatever shared experts give; those beside them stay as they are."""
    mixture, x, logits = Mixture("q4", 5, 2, **KINDS[kind]), random_x(3, 64), random_logits(3, 5)
    (clean,) = mixture.node(x, logits).run()
    logits[1, 5 - len(bad) :] = bad
    (y,) = mixture.node(x, logits).run()
    assert np.isnan(y[1]).all()
    np.testing.assert_array_equal(y[[0, 2]], clean[[0, 2]])
    logits[1] = [-np.inf, 0, -np.inf, -np.inf, -np.inf]
    assert np.isfinite(check(mixture, x, logits)).all()


@pytest.mark.parametrize("scheme", ["f32", "q4"])
def test_an_optional_input_is_there_without_the_others(isa: str, scheme: str) -> None:
    """What is missing is as if it were zero."""
    x, logits = random_x(3, 64), random_logits(3, 5)
    full = Mixture(scheme, 5, 2, biases=2, **KINDS["glm"]).node(x, logits)
    for missing in product([False, True], repeat=len(full.optional)):
        zeroed, lacking = (replace(full, inputs=dict(full.inputs)) for _ in range(2))
        for name in (name for name, is_missing in zip(full.optional, missing, strict=True) if is_missing):
            zeroed.inputs[name] = 0 * full.inputs[name]
            del lacking.inputs[name]
        lacking.initializers = tuple(name for name in full.initializers if name in lacking.inputs)
        np.testing.assert_array_equal(lacking.run()[0], zeroed.run()[0])
