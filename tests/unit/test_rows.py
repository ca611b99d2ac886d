"""Choosing by the likeliest tokens of a row gives what the whole row gives, in the sampler and in an engine."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmrun import Engine
from llmrun.errors import NumericError
from llmrun.logprobs import likeliest_logprobs, token_logprobs
from llmrun.rows import Likeliest, Rows, merge_candidates
from llmrun.sampler import Sampler, SamplingParams

K = 8
PROMPTS = ["The king", "O", "To be, or not to be, that is the question", "War and peace"]


def record(logits: np.ndarray, first_id: int = 0) -> np.ndarray:
    """A rank's record of its columns, by the words of FORMAT.md 8.4, number by number."""
    rows = []
    for row in logits:
        keys = []
        for column, value in enumerate(row):
            bits = int((value + np.float32(0)).view(np.uint32))
            order = bits - (1 << 32) if bits < 1 << 31 else (bits ^ 0x7FFFFFFF) - (1 << 32)
            order = bits if bits < 1 << 31 else order  # sorts like the number
            keys.append((order << 32) | (0x7FFFFFFF - first_id - column))
        keys = [*sorted(keys, reverse=True), *[-(2**63) + 1] * K][:K]
        total = np.float32(
            np.exp(row.astype(np.float64) - row.max(initial=-np.inf)).sum() if np.isfinite(row).all() else np.nan
        )
        rows.append([*keys, int(total.view(np.int32))])
    return np.array(rows, np.int64)


def likeliest(logits: np.ndarray, ranks: int = 1) -> Likeliest:
    share = -(-logits.shape[1] // ranks)
    parts = [record(logits[:, i * share : (i + 1) * share], i * share) for i in range(ranks)]
    return merge_candidates(parts, logits.shape[1])


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("size", [4, 5, 40, 41], ids=["fewer_than_ranks_share", "fewer_than_candidates", "even", "odd"])
def test_ranks_merge_to_the_order_of_the_whole_row(ranks: int, size: int) -> None:
    logits = np.round(np.random.default_rng([ranks, size]).standard_normal((4, size)) * 3).astype(np.float32)
    logits[0, :2] = 0.0, -0.0
    found = likeliest(logits, ranks)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :K]
    np.testing.assert_array_equal(found.ids, order)
    np.testing.assert_array_equal(found.logits, np.take_along_axis(logits, order, 1))
    np.testing.assert_allclose(found.weight_sums, np.exp(logits - logits.max(1, keepdims=True)).sum(1), rtol=1e-6)


def test_a_nan_of_any_rank_shows() -> None:
    logits = np.zeros((2, 10), np.float32)
    logits[1, 9] = np.nan
    rows = Rows(None, likeliest(logits, 2))
    assert (rows.are_finite, rows[:1].are_finite, len(rows)) == (False, True, 2)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=["nan", "inf", "minus_inf"])
def test_whole_rows_know_their_first_tokens_and_what_is_not_finite(bad: float) -> None:
    logits = np.array([[1, 5, 5, -2], [0, 0, 0, 0], [7, -9, 3, 6]], np.float32)
    rows = Rows(logits)
    assert (rows.first_ids, rows.are_finite) == ([1, 0, 0], True)
    logits[1, 2] = bad
    rows = Rows(logits)
    assert (rows.first_ids, rows.are_finite) == ([1, -1, 0], False)
    assert (rows[1:].first_ids, rows[2:].are_finite) == ([-1, 0], True)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"top_k": 1},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.5, "top_k": K, "top_p": 0.8},
        {"temperature": 2.0, "top_k": 6, "min_p": 0.1},
        {"temperature": 0.9, "top_k": 7, "top_p": 0.95, "min_p": 0.02},
    ],
    ids=str,
)
def test_the_sampler_chooses_what_it_would_choose_from_the_row(values: dict[str, Any]) -> None:
    """Equal logits, draws and all: many rows, one random state."""
    rng = np.random.default_rng(0)
    params = SamplingParams(**values, seed=3)
    whole, few = Sampler(params), Sampler(params)
    assert few.num_candidates is not None
    assert few.num_candidates <= K
    chosen = set()
    for size in (5, 30, 60) * 40:  # with 5, top-k is all there is, or more
        row = np.round(rng.standard_normal(size) * 2, 1).astype(np.float32)
        found = likeliest(row[None])
        chosen.add(expected := whole.sample(row, ()))
        assert few.choose(found.logits[0], found.ids[0]) == expected
    assert len(chosen) > 5


@pytest.mark.parametrize(
    ("values", "bias"),
    [
        ({"temperature": 1.0}, None),
        ({"temperature": 1.0, "top_p": 0.5}, None),
        ({"temperature": 1.0, "min_p": 0.1}, None),
        ({"repeat_penalty": 1.1}, None),
        ({"presence_penalty": 0.5}, None),
        ({"temperature": 1.0, "top_k": 4, "frequency_penalty": 0.5}, None),
        ({}, {3: 1.0}),
    ],
    ids=str,
)
def test_what_the_likeliest_cannot_decide_is_left_to_the_row(
    values: dict[str, Any], bias: dict[int, float] | None
) -> None:
    assert Sampler(SamplingParams(**values), bias).num_candidates is None


def test_log_probabilities_are_the_rows() -> None:
    logits = (np.random.default_rng(5).standard_normal((3, 200)) * 5).astype(np.float32)
    found = likeliest(logits, 2)
    ids = [int(i) for i in found.ids[:, 2]]
    for whole, few in zip(token_logprobs(logits, ids, 4), likeliest_logprobs(found, ids, 4), strict=True):
        assert whole.token_id == few.token_id
        assert few.logprob == pytest.approx(whole.logprob, abs=2e-7)
        assert [i for i, _ in few.top] == [i for i, _ in whole.top]
        assert [p for _, p in few.top] == pytest.approx([p for _, p in whole.top], abs=2e-7)


class ByLikeliest:
    """A CPU's session that shows whole rows to no one who has not asked for them, as a GPU's does."""

    num_likeliest = K

    def __init__(self, inner: Any) -> None:
        self.inner, self.graph_s, self.steps, self.is_broken = inner, 0.0, [], False

    def run(self, plan: Any) -> Rows:
        logits = self.inner.run(plan).logits
        if self.is_broken:
            logits[-1, -1] = np.nan
        self.steps.append(plan.asks_whole_rows)
        return Rows(logits if plan.asks_whole_rows else None, likeliest(logits, 2))


@pytest.fixture
def engines(packed_tiny: Callable[..., Path]):
    with Engine(packed_tiny(1, "f32"), max_num_seqs=3) as plain, Engine(packed_tiny(1, "f32"), max_num_seqs=3) as few:
        few.core._job._session = ByLikeliest(few.core._job.session)  # pyright: ignore[reportAttributeAccessIssue]
        yield plain, few, few.core._job.session


class Even:
    """A constraint: only ids that two divides."""

    is_done = False

    def __init__(self, size: int) -> None:
        self.size = size

    def mask(self, _tokens: Any) -> np.ndarray:
        return np.arange(self.size) % 2 == 0

    def accept(self, token_id: int) -> None: ...


def run(engine: Engine, requests: list[dict[str, Any]]) -> list[Any]:
    """All of them together."""
    vocab_size = engine.manifest.model.vocab_size
    handles = []
    for i, (prompt, options) in enumerate(zip(itertools.cycle(PROMPTS), requests, strict=False)):
        own = {
            "max_tokens": 12,
            "ignore_eos": True,
            "temperature": 0.0,
            "top_k": 0,
            "top_p": 1.0,
            "min_p": 0.0,
            "seed": i,
        }
        own |= options
        if own.get("constraint"):
            own["constraint"] = Even(vocab_size)
        handles.append(engine.submit(prompt, **own))
    while any(handle.finish_reason is None for handle in handles):
        engine.step()
    return handles


DRAWN = {"temperature": 1.0, "top_k": 5, "top_p": 0.9}


@pytest.mark.parametrize(
    ("requests", "asks_for_rows"),
    [
        ([{}, {}, {}, {}], {False}),
        ([DRAWN, {"temperature": 3.0, "top_k": K}, {"speculate": 4}, {"logprobs": 3}], {False}),
        ([{}, {"temperature": 1.0}], {True}),
        ([{}, {**DRAWN, "repeat_penalty": 1.3}, DRAWN], {True}),
        ([{"max_tokens": 20}, {"constraint": True, "max_tokens": 4}], {False, True}),
        ([{"logit_bias": {5: 3.0}, "max_tokens": 3}, DRAWN], {False, True}),
        ([{"prompt_logprobs": 2}, {}], {False, True}),
        ([{"logprobs": K + 1}], {True}),
    ],
    ids=["greedy", "drawn", "no_top_k", "penalty", "constraint", "bias", "prompt_logprobs", "many_logprobs"],
)
def test_every_request_gets_the_same_and_rows_travel_only_when_needed(engines, requests, asks_for_rows) -> None:
    plain, few, session = engines
    expected, found = run(plain, requests), run(few, requests)
    assert [request.ids for request in found] == [request.ids for request in expected]
    assert set(session.steps) == asks_for_rows
    for one, other in zip(expected, found, strict=True):
        for name in ("logprobs", "prompt_logprobs"):
            for a, b in zip(getattr(one, name) or (), getattr(other, name) or (), strict=True):
                assert (a is None) == (b is None)
                if a is not None and b is not None:
                    assert (a.token_id, [i for i, _ in a.top]) == (b.token_id, [i for i, _ in b.top])
                    assert b.logprob == pytest.approx(a.logprob, abs=2e-7)


def test_a_nan_ends_the_request_without_its_rows(engines) -> None:
    _, few, session = engines
    session.is_broken = True
    with pytest.raises(NumericError, match="NaN or infinity"):
        run(few, [{}])
    assert session.steps == [False]
