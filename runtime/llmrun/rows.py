"""Logits of a step's rows as a session gives them: whole, by the likeliest tokens of each, or both.

A GPU sends 520 bytes a row where whole rows are not asked for: its likeliest tokens, as FORMAT.md 8.4 records them
(`top_k_last`), and what log-probabilities need of the others. Here are records, decoding and merging; nothing chooses a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Likeliest", "Rows", "merge_candidates"]

_ID_MASK = 0x7FFFFFFF


@dataclass(frozen=True)
class Likeliest:
    """The likeliest tokens of some rows.

    Attributes:
        logits: [rows, k], float32, the largest first.
        ids: [rows, k]; of equal logits the lower id comes first.
        weight_sums: [rows], float64: the sum over the vocabulary of exp(logit - the row's largest); NaN if a logit of the row
            is NaN or infinite.
    """

    logits: NDArray[np.float32]
    ids: NDArray[np.int64]
    weight_sums: NDArray[np.float64]

    def __getitem__(self, rows: slice) -> Likeliest:
        """Return some of the rows."""
        return Likeliest(self.logits[rows], self.ids[rows], self.weight_sums[rows])


class Rows:
    """What a step says of each of its rows; one of the two is always there.

    Attributes:
        whole: [rows, vocab_size], float32; None unless the plan asked for whole rows.
        likeliest: None from a session that knows whole rows only.
    """

    __slots__ = ("_first_ids", "likeliest", "whole")

    def __init__(
        self,
        whole: NDArray[np.float32] | None = None,
        likeliest: Likeliest | None = None,
        first_ids: Sequence[int] | None = None,
    ) -> None:
        """`first_ids`: if they are known already."""
        self.whole, self.likeliest, self._first_ids = whole, likeliest, first_ids

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.logits if self.likeliest is None else self.likeliest.ids)

    def __getitem__(self, rows: slice) -> Rows:
        """Return some of the rows."""
        return Rows(
            None if self.whole is None else self.whole[rows],
            None if self.likeliest is None else self.likeliest[rows],
            None if self._first_ids is None else self._first_ids[rows],
        )

    @property
    def logits(self) -> NDArray[np.float32]:
        """The whole rows, which the plan must have asked for."""
        assert self.whole is not None
        return self.whole

    @property
    def first_ids(self) -> Sequence[int]:
        """The likeliest token of each whole row, the lowest of equal ones; -1 if a logit of the row is NaN or infinite."""
        if self._first_ids is None:
            self._first_ids = [_first_id(row) for row in self.logits]
        return self._first_ids

    @property
    def are_finite(self) -> bool:
        """Whether no logit of any row is NaN or infinite."""
        if self.likeliest is not None:
            return all(map(math.isfinite, self.likeliest.weight_sums.tolist()))
        return -1 not in self.first_ids


def _first_id(row: NDArray[np.float32]) -> int:
    # A NaN is the smallest and the largest of all. A ufunc would take 100 us where weights have just passed through the
    # caches, and these take 30.
    at = int(row.argmax())
    return at if math.isfinite(row.item(at)) and math.isfinite(row.item(row.argmin())) else -1


def merge_candidates(records: Sequence[NDArray[np.int64]], vocab_size: int) -> Likeliest:
    """Join what the ranks found among their own columns of the logits.

    Args:
        records: one [rows, k + 1] from each rank: candidates as `top_k_last` writes them, and the bits of the sum.
        vocab_size: a small vocabulary has fewer tokens than k.
    """
    every = np.stack(records)
    keys, shares = every[..., :-1], every[..., -1].astype(np.int32).view(np.float32).astype(np.float64)
    count = min(keys.shape[-1], vocab_size)
    merged = np.concatenate(keys, axis=1)
    if len(records) > 1:
        merged = -np.sort(-merged, axis=1)
    logits = _logits(merged[:, :count])
    # A rank without a token of the vocabulary has sum 0, and no largest logit.
    with np.errstate(invalid="ignore", over="ignore"):
        parts = shares * np.exp(_logits(keys[..., 0]).astype(np.float64) - logits[:, 0])
    weight_sums = np.where(shares == 0, 0.0, parts).sum(axis=0)
    return Likeliest(logits, _ID_MASK - (merged[:, :count] & _ID_MASK), weight_sums)


def _logits(keys: NDArray[np.int64]) -> NDArray[np.float32]:
    bits = (keys >> 32).astype(np.int32)
    return (bits ^ ((bits >> 31) & _ID_MASK)).view(np.float32)
