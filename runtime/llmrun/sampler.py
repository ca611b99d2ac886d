"""Choose the next token from one row of logits.

In: the logits of one position, [vocab_size] float32, or of its likeliest tokens, and the ids so far. Out: one token id.
The order is that of transformers (`GenerationMixin._get_logits_processor`), because a checkpoint's
`generation_config.json` was written for it, after what is allowed at all:

    constraint -> logit bias -> repeat penalty -> presence and frequency penalty -> temperature -> top-k -> top-p
    -> min-p -> draw

llama.cpp applies temperature last, so its top-p and min-p see the distribution at temperature 1; ours, like
transformers', see the one that is drawn from. Ties are broken by the lower id, so that top-k keeps exactly k
tokens and top-k 1 is greedy.

Only rank 0 samples. Nothing here knows of ranks, of stop conditions or of text.
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmrun.errors import NumericError, UsageError
from llmrun.row_scan import RUN_TOKENS, find_at_least, weigh_runs

__all__ = ["Sampler", "SamplingParams", "TokenHistory"]

_SEED_LIMIT = 2**63
_LARGEST_BIAS = 3e38  # float32
# First guess of how many tokens top-p keeps: sorting this many of a 128k vocabulary costs nothing beside
# finding them.
_TOP_P_FIRST_GUESS = 128
_LEAST_TEMPERATURE = 1e-30  # in float32: greedy
_PARTS = 64  # of a row, a token of each side by side: the largest of every column is found at the speed of memory


@dataclass(frozen=True)
class SamplingParams:
    """How to sample; every default is "off", and temperature 0 is greedy.

    Args:
        temperature: 0 to 100; 0 takes the most likely token.
        top_k: tokens to keep; 0, or more than the vocabulary has, keeps all.
        top_p: in (0, 1]; keep the most likely tokens until their probabilities add up to this.
        min_p: in [0, 1); drop tokens less likely than this times the most likely one.
        repeat_penalty: in (0, 10]; logits of ids seen before are divided (if positive) or multiplied by it.
        presence_penalty: -2 to 2; subtracted from the logit of each id generated before (OpenAI's).
        frequency_penalty: -2 to 2; subtracted once for each time that the id was generated (OpenAI's).
        seed: 0 to 2**63 - 1; None draws one from the operating system.
    Raises:
        UsageError: a value is out of its range, not a number or of the wrong type (names it and its range).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, "a number from 0 to 100", lambda x: 0 <= x <= 100)
        _check("top_k", self.top_k, "a whole number from 0 (0: off)", lambda x: x >= 0, whole=True)
        _check("top_p", self.top_p, "a number above 0, at most 1 (1: off)", lambda x: 0 < x <= 1)
        _check("min_p", self.min_p, "a number from 0 (0: off) to below 1", lambda x: 0 <= x < 1)
        _check("repeat_penalty", self.repeat_penalty, "a number above 0, at most 10 (1: off)", lambda x: 0 < x <= 10)
        for name in ("presence_penalty", "frequency_penalty"):
            _check(name, getattr(self, name), "a number from -2 to 2 (0: off)", lambda x: -2 <= x <= 2)
        if self.seed is not None:
            _check("seed", self.seed, "a whole number from 0 to 2**63 - 1", lambda x: 0 <= x < _SEED_LIMIT, whole=True)


def _check(name: str, value: Any, expected: str, holds: Callable[[Any], bool], *, whole: bool = False) -> None:
    kind = numbers.Integral if whole else numbers.Real
    # A NaN fails every comparison, so it is refused without a case of its own.
    if isinstance(value, bool) or not isinstance(value, kind) or not holds(value):
        raise UsageError(f"sampling: {name} is {value!r}: expected {expected}")


class Sampler:
    """Samples one sequence: it holds the random state, so the same seed and logits give the same tokens."""

    def __init__(self, params: SamplingParams, logit_bias: Mapping[int, float] | None = None) -> None:
        """`logit_bias`: numbers added to the logits of these ids; -inf: never.

        Raises:
            UsageError: a bias is NaN, +inf or not a number, or an id is negative.
        """
        self.params = params
        self._bias_ids, self._biases = _check_bias(logit_bias or {})

    @functools.cached_property
    def _rng(self) -> np.random.Generator:
        """The random state; made when it is needed, as numpy imports `numpy.random` only then."""
        return np.random.Generator(np.random.PCG64(self.params.seed))

    @functools.cached_property
    def needs_history(self) -> bool:
        """Whether `sample` has any use for the ids so far."""
        params = self.params
        return params.repeat_penalty != 1.0 or params.presence_penalty != 0 or params.frequency_penalty != 0

    @functools.cached_property
    def num_candidates(self) -> int | None:
        """How many of the likeliest tokens decide, before any constraint; None: all of the vocabulary."""
        if self.needs_history or len(self._bias_ids):
            return None
        if self.params.temperature == 0:
            return 1
        return self.params.top_k or None

    def choose(self, logits: NDArray[np.float32], ids: NDArray[np.integer[Any]]) -> int:
        """Return the next token id, the same that `sample` would return from the whole row.

        Args:
            logits: of the likeliest tokens, finite, the largest first: `num_candidates`, or as many as there are.
            ids: theirs; of equal logits the lower id comes first.
        """
        if self.params.temperature == 0:
            return int(ids[0])
        order = np.argsort(ids[: self.params.top_k])  # as in the row, for that is the order of the draw
        return self._draw(logits[order], float(logits[0]), ids[order])

    def sample(
        self,
        logits: NDArray[np.float32],
        context: Sequence[int] | TokenHistory,
        allowed: NDArray[np.bool_] | None = None,
    ) -> int:
        """Return the next token id.

        Args:
            logits: [vocab_size], float32; -inf means never. Not changed.
            context: the ids so far, for the penalties; plain ids are taken for a prompt's.
            allowed: [vocab_size]; the ids that may be sampled; None: all.
        Raises:
            NumericError: the logits hold NaN or +inf, or are all -inf.
            UsageError: the logits are not one row, or an id of the context lies outside of it; or nothing is allowed.
        """
        if logits.ndim != 1 or logits.shape[0] == 0:
            raise UsageError(f"sampling: logits have shape {logits.shape}: expected [vocab_size]")
        logits = np.ascontiguousarray(logits, np.float32)
        if allowed is not None:
            if not allowed.any():
                raise UsageError("sampling: the constraint allows no token")
            logits = np.where(allowed, logits, np.float32(-np.inf))
        given = logits
        if len(self._bias_ids):
            _check_ids(self._bias_ids, logits, "logit_bias")
            logits = logits.copy()
            logits[self._bias_ids] += self._biases
        if self.needs_history:
            logits = _penalize(
                logits, context if isinstance(context, TokenHistory) else TokenHistory(context), self.params
            )
        # A NaN is the maximum of everything, and of equals the first is, so one pass finds the likeliest, NaN, +inf and
        # "all -inf".
        likeliest = int(logits.argmax())
        highest = float(logits[likeliest])
        if not math.isfinite(highest):
            if math.isfinite(float(given.max())):
                raise UsageError(
                    f"sampling: after logit_bias and penalties the largest logit is {highest}: expected a finite one."
                    " Use smaller ones, and leave a token that may come."
                )
            raise NumericError(f"sampling: the largest logit is {highest}: the model computed NaN or infinity")
        if self.params.temperature == 0:
            return likeliest
        if 0 < self.params.top_k < logits.shape[0]:
            # Temperature does not change the order, so top-k may come first and leave it less to do.
            ids = _top_k(logits, self.params.top_k)
            return self._draw(logits[ids], highest, ids)
        return self._draw_from_row(logits, highest)

    def _draw_from_row(self, logits: NDArray[np.float32], highest: float) -> int:
        """Draw from a whole row: nothing of its size is made (LOG.md)."""
        temperature = max(self.params.temperature, _LEAST_TEMPERATURE)
        if self.params.top_p < 1.0:
            ids = _nucleus(logits, highest, temperature, self.params.top_p)
            return self._draw_weighted(_weights(logits[ids], highest, temperature), ids)
        if self.params.min_p > 0.0:
            threshold = np.float32(highest + temperature * math.log(self.params.min_p))
            ids = find_at_least(logits, np.nextafter(threshold, np.float32(-np.inf)))  # rounding may have lifted it
            return self._draw_weighted(_weights(logits[ids], highest, temperature), ids)
        return _place_in_row(logits, highest, temperature, self._rng.random())

    def _draw(self, logits: NDArray[np.float32], highest: float, ids: NDArray[np.integer[Any]]) -> int:
        """Draw from what top-k has left."""
        weights = _weights(logits, highest, self.params.temperature)
        if self.params.top_p < 1.0:
            kept = _top_p(weights, self.params.top_p)
            weights, ids = weights[kept], ids[kept]
        return self._draw_weighted(weights, ids)

    def _draw_weighted(self, weights: NDArray[np.float64], ids: NDArray[np.integer[Any]]) -> int:
        """Draw from what top-k and top-p have left."""
        if self.params.min_p > 0.0:
            # The largest weight is exp(0) = 1, so a ratio to it is the weight itself.
            kept = np.flatnonzero(weights >= self.params.min_p)
            weights, ids = weights[kept], ids[kept]
        cumulative = np.cumsum(weights)
        return int(ids[_place(cumulative, self._rng.random() * cumulative[-1])])


class TokenHistory:
    """The ids of a sequence so far, each once, and how often it was generated; grows token by token."""

    def __init__(self, prompt_ids: Sequence[int], generated_ids: Sequence[int] = ()) -> None:
        """`generated_ids` follow the prompt's; presence and frequency count those alone."""
        self._ids = np.unique(np.asarray(prompt_ids, np.int64))
        self._counts = np.zeros(len(self._ids), np.float32)
        self._size = len(self._ids)
        self._index = {int(token_id): i for i, token_id in enumerate(self._ids)}
        for token_id in generated_ids:
            self.append(token_id)

    @property
    def ids(self) -> NDArray[np.int64]:
        """Each id once, in no order that matters."""
        return self._ids[: self._size]

    @property
    def counts(self) -> NDArray[np.float32]:
        """How often each of `ids` was generated."""
        return self._counts[: self._size]

    def append(self, token_id: int) -> None:
        """Add a generated token."""
        index = self._index.setdefault(token_id, self._size)
        if index == self._size:
            if self._size == len(self._ids):
                self._ids = np.concatenate([self._ids, np.zeros(64 + self._size, np.int64)])
                self._counts = np.concatenate([self._counts, np.zeros(64 + self._size, np.float32)])
            self._ids[index] = token_id
            self._size += 1
        self._counts[index] += 1


def _penalize(logits: NDArray[np.float32], history: TokenHistory, params: SamplingParams) -> NDArray[np.float32]:
    """Penalize each id once, however often it occurs, then the generated ones: presence once, frequency each time.

    CTRL, arXiv:1909.05858, section 4.1; OpenAI's API reference.
    """
    if len(history.ids) == 0:
        return logits
    _check_ids(history.ids, logits, "context")
    logits = logits.copy()
    values = logits[history.ids]
    if params.repeat_penalty != 1.0:
        with np.errstate(over="ignore"):
            values = np.where(values < 0, values * params.repeat_penalty, values / params.repeat_penalty)
    if params.presence_penalty or params.frequency_penalty:
        counts = history.counts
        values = values - (params.frequency_penalty * counts + params.presence_penalty * (counts > 0))
    logits[history.ids] = values
    return logits


def _check_ids(ids: NDArray[np.int64], logits: NDArray[np.float32], what: str) -> None:
    if ids.min() < 0 or ids.max() >= logits.shape[0]:
        raise UsageError(f"sampling: {what} ids run from {ids.min()} to {ids.max()}: the logits have {logits.shape[0]}")


def _check_bias(logit_bias: Mapping[int, float]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the ids, ascending, and what is added to their logits."""
    for token_id, bias in logit_bias.items():
        if isinstance(token_id, bool) or not isinstance(token_id, numbers.Integral) or token_id < 0:
            raise UsageError(f"sampling: logit_bias has the id {token_id!r}: expected a whole number from 0")
        _check(f"logit_bias of {token_id}", bias, "a number up to 3e38, or -inf", lambda x: x <= _LARGEST_BIAS)
    ids = np.array(sorted(logit_bias), np.int64)
    with np.errstate(over="ignore"):  # to -inf
        return ids, np.array([logit_bias[int(i)] for i in ids], np.float32)


def _place(cumulative: NDArray[np.float64], drawn: float) -> int:
    """Return which of some weights, of which these are the sums so far, a number below their sum falls into."""
    place = np.searchsorted(cumulative, drawn, side="right")
    # Rounding can put it on the end itself; step back to the last one that has any weight.
    return int(min(place, np.searchsorted(cumulative, cumulative[-1], side="left")))


def _weights(logits: NDArray[np.float32], highest: float, temperature: float) -> NDArray[np.float64]:
    """Return exp((logit - highest) / temperature), `highest` being the largest."""
    # Subtracting before dividing keeps every score <= 0: a tiny temperature gives exp(-inf) = 0, no overflow.
    with np.errstate(over="ignore"):
        return np.exp((logits.astype(np.float64) - highest) / temperature)


def _place_in_row(logits: NDArray[np.float32], highest: float, temperature: float, drawn: float) -> int:
    """Do what `_place` does for a whole row and `drawn` of [0, 1): first by runs, so that few weights are made."""
    cumulative = np.cumsum(weigh_runs(logits, highest, temperature))
    target = drawn * float(cumulative[-1])
    run = _place(cumulative, target)
    before = float(cumulative[run - 1]) if run else 0.0
    start = run * RUN_TOKENS
    weights = _weights(logits[start : start + RUN_TOKENS], highest, temperature)
    return start + _place(np.cumsum(weights), target - before)


def _top_k(scores: NDArray[np.float32], k: int) -> NDArray[np.integer[Any]]:
    """Return the ids of the k highest scores, ascending; of equal scores the lower ids."""
    candidates = None
    if k <= (width := len(scores) // _PARTS):
        # The k-th of the largest of each part is no larger than the k-th of all, and few scores are as large.
        largest = scores[: width * _PARTS].reshape(_PARTS, width).max(axis=0)
        threshold = np.partition(largest, width - k)[width - k]
        if math.isfinite(threshold):
            candidates = find_at_least(scores, threshold)
            scores = scores[candidates]
    kept = _highest(scores, np.partition(scores, len(scores) - k)[len(scores) - k], k)
    return kept if candidates is None else candidates[kept]


def _nucleus(logits: NDArray[np.float32], highest: float, temperature: float, top_p: float) -> NDArray[np.integer[Any]]:
    """Return what `_top_p` would of a row's weights.

    Few of a large row come most likely first: a guess of how many, four times as many whenever they do not add up to
    top_p. Others come in their order.
    """
    guess, limit = _TOP_P_FIRST_GUESS, len(logits) // _PARTS
    wanted = top_p * float(weigh_runs(logits, highest, temperature).sum()) if guess <= limit else 0.0
    while guess <= limit:
        ids = _top_k(logits, guess)
        order = ids[np.argsort(-logits[ids], kind="stable")]
        cumulative = np.cumsum(_weights(logits[order], highest, temperature))
        if cumulative[-1] >= wanted:
            return order[: _num_kept(cumulative, wanted)]
        guess *= 4
    with np.errstate(over="ignore"):
        return _top_p(np.exp((logits - np.float32(highest)) / np.float32(temperature)), top_p)


def _top_p(weights: NDArray[np.floating], top_p: float) -> NDArray[np.intp]:
    """Return the ids whose more likely tokens add up to less than top_p (arXiv:1904.09751); of equal ones the lower ids.

    The weights alone are sorted, which is much faster than with their places.
    """
    wanted = top_p * float(weights.sum())
    descending = np.sort(weights)[::-1]
    count = _num_kept(np.cumsum(descending, dtype=np.float64), wanted)
    return _highest(weights, descending[count - 1], count)


def _num_kept(cumulative: NDArray[np.float64], wanted: float) -> int:
    """Return how many tokens stay: one if the tokens before it do not reach what is wanted, the first always."""
    return min(len(cumulative), int(np.searchsorted(cumulative, wanted, side="left")) + 1)


def _highest(scores: NDArray[np.floating], threshold: np.floating, count: int) -> NDArray[np.intp]:
    """Return the ids of `count` scores, of which `threshold` is the least, ascending; of equal scores the lower ids."""
    above = np.flatnonzero(scores > threshold)
    ties = np.flatnonzero(scores == threshold)[: count - above.shape[0]]
    return np.sort(np.concatenate([above, ties]))
