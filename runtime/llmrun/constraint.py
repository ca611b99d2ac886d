"""Structured output: what a grammar has to offer so that only tokens it allows are sampled.

A protocol only; the engine knows no grammar. One object serves one request, is used by one thread, and is asked before
each token: mask, then accept what was sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from llmrun.errors import InternalError

__all__ = ["Constraint", "allowed_tokens"]


class Constraint(Protocol):
    """Decides which tokens may come next."""

    def mask(self, tokens: Sequence[int]) -> NDArray[Any]:
        """Return the tokens that may follow.

        Args:
            tokens: ids generated so far, all of them accepted; not to be changed.
        Returns:
            bool, one for each id; or packed bits of any unsigned or signed integer type, where id i is bit i % width of
            element i // width (llguidance's bit mask as it is). Ids beyond its end are not allowed. It is read before
            the next call, so the memory may be used again.
        """
        ...

    def accept(self, token_id: int) -> None:
        """Take the token that was sampled; not called for the model's end token."""
        ...

    @property
    def is_done(self) -> bool:
        """Whether nothing can follow: the request then ends with "stop"."""
        ...


def allowed_tokens(mask: NDArray[Any], vocab_size: int) -> NDArray[np.bool_]:
    """Return a constraint's mask as bool [vocab_size].

    Raises:
        InternalError: the mask is neither bool nor an array of integers.
    """
    if mask.ndim != 1 or mask.dtype.kind not in "bui":
        raise InternalError(f"a constraint's mask has type {mask.dtype} and shape {mask.shape}: expected bool or bits.")
    if mask.dtype.kind != "b":
        little = np.ascontiguousarray(mask).astype(mask.dtype.newbyteorder("<"), copy=False)
        mask = np.unpackbits(little.view(np.uint8), count=vocab_size, bitorder="little")
        mask = mask.view(np.bool_)
    if mask.shape[0] >= vocab_size:
        return mask[:vocab_size]
    return np.concatenate([mask, np.zeros(vocab_size - mask.shape[0], np.bool_)])
