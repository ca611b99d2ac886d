"""A row of logits, read at the speed of memory: what its tokens weigh, and which are above a threshold.

The kernels are the operator library's. numpy makes several arrays of a row's size for the same and takes two to three times
as long (tests/benchmarks/LOG.md), which a batch pays for each of its sequences. Knows nothing of how tokens are chosen.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from llmrun.library import find_library

if TYPE_CHECKING:
    import ctypes

    from numpy.typing import NDArray

__all__ = ["RUN_TOKENS", "find_at_least", "weigh_runs"]

RUN_TOKENS = 256  # custom_ops/cpu/isa.h


@functools.cache
def _library() -> ctypes.CDLL:
    from llmrun.operators import load_library

    return load_library(find_library())


def weigh_runs(logits: NDArray[np.float32], highest: float, temperature: float) -> NDArray[np.float64]:
    """Return the sums of exp((logit - highest) / temperature) in runs of RUN_TOKENS, the last one maybe shorter.

    Args:
        logits: [n], contiguous, none of them NaN or +inf.
        highest: the largest.
        temperature: above 0, in float32 too.
    """
    sums = np.empty(-(-len(logits) // RUN_TOKENS), np.float64)
    _library().llmpack_ops_weigh_runs(logits.ctypes.data, len(logits), highest, 1 / temperature, sums.ctypes.data)
    return sums


def find_at_least(logits: NDArray[np.float32], threshold: np.float32) -> NDArray[np.int32]:
    """Return the places of the logits that are no less than a finite threshold, ascending; logits as for `weigh_runs`."""
    ids = np.empty(len(logits), np.int32)
    below = float(np.nextafter(threshold, np.float32(-np.inf)))
    count = _library().llmpack_ops_find_above(logits.ctypes.data, len(logits), below, ids.ctypes.data)
    return ids[:count].copy()
