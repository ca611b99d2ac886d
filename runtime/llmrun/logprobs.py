"""Log-probabilities of tokens, as the model gives them: before constraint, bias, penalties and temperature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmrun.rows import Likeliest

__all__ = ["TokenLogprobs", "likeliest_logprobs", "token_logprobs"]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """One token's natural log-probability, and the most likely tokens of its position, likeliest first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def token_logprobs(logits: NDArray[np.float32], token_ids: Sequence[int], num_top: int) -> list[TokenLogprobs]:
    """Return what each row of logits says of the token that followed.

    Args:
        logits: [len(token_ids), vocab_size], float32, finite.
        token_ids: the token of each row.
        num_top: how many alternatives; equal logits are ordered by id.
    """
    results = []
    for row, token_id in zip(logits, token_ids, strict=True):
        # In float64 and relative to the highest: the sum of 128k terms keeps all digits that float32 logits have.
        scores = row.astype(np.float64)
        scores -= scores.max()
        scores -= np.log(np.exp(scores).sum())
        top: tuple[tuple[int, float], ...] = ()
        if num_top > 0:
            least = np.partition(row, row.shape[0] - num_top)[row.shape[0] - num_top] if num_top < len(row) else -np.inf
            ids = np.flatnonzero(row >= least)
            ids = ids[np.argsort(-row[ids], kind="stable")][:num_top]
            top = tuple((int(i), float(scores[i])) for i in ids)
        results.append(TokenLogprobs(int(token_id), float(scores[token_id]), top))
    return results


def likeliest_logprobs(rows: Likeliest, token_ids: Sequence[int], num_top: int) -> list[TokenLogprobs]:
    """Do the same where only the likeliest tokens of each row are known: `num_top` or more, what followed among them."""
    results = []
    for logits, ids, weight_sum, token_id in zip(rows.logits, rows.ids, rows.weight_sums, token_ids, strict=False):
        scores = logits.astype(np.float64) - float(logits[0]) - np.log(weight_sum)
        known = {int(i): float(score) for i, score in zip(ids, scores, strict=True)}
        results.append(TokenLogprobs(int(token_id), known[int(token_id)], tuple(known.items())[:num_top]))
    return results
