"""One step of the graph as rank 0 decides it and every rank runs it: the seven index inputs of FORMAT 3.2.

In the messages between ranks a plan is one int32 array: kind, T, B, M, R, whether whole rows of logits are wanted, then the
inputs in the order of `FIELDS`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np

FIELDS = (
    "input_ids",
    "positions",
    "slot_mapping",
    "query_start",
    "seq_lens",
    "block_table",
    "logit_rows",
)
_HEADER = 6

Int32Array = np.ndarray[tuple[int, ...], np.dtype[np.int32]]


class MessageKind(enum.IntEnum):
    """First int32 of every message from rank 0."""

    STEP = 1  # a StepPlan
    SHUTDOWN = 2  # one int32: the exit code
    MIRROR = 3  # pickled result of a call that a user's script makes on every rank


@dataclass(frozen=True)
class StepPlan:
    """Tokens of B sequences, one after the other; symbols as in FORMAT 3.2.

    `input_ids`, `positions`, `slot_mapping`: [T]; `query_start`: [B + 1]; `seq_lens`: [B]; `block_table`: [B, M];
    `logit_rows`: [R]. All int32. `whole_rows`: whether somebody needs logits of the whole vocabulary, not only of the likeliest
    tokens; a session that has them in its memory gives them anyway.
    """

    input_ids: Int32Array
    positions: Int32Array
    slot_mapping: Int32Array
    query_start: Int32Array
    seq_lens: Int32Array
    block_table: Int32Array
    logit_rows: Int32Array
    whole_rows: bool = True

    def __post_init__(self) -> None:
        """Check that the shapes agree."""
        num_tokens, num_seqs = len(self.input_ids), len(self.seq_lens)
        if (
            len(self.positions) != num_tokens
            or len(self.slot_mapping) != num_tokens
            or len(self.query_start) != num_seqs + 1
            or self.block_table.shape[:1] != (num_seqs,)
            or self.block_table.ndim != 2
        ):
            raise ValueError(f"step plan of {num_tokens} tokens and {num_seqs} sequences: shapes disagree")

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.input_ids)

    @property
    def is_decode(self) -> bool:
        """True if each sequence has one token."""
        return len(self.input_ids) == len(self.seq_lens)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(T, B, M, R)."""
        return (len(self.input_ids), *self.block_table.shape, len(self.logit_rows))  # type: ignore[return-value]

    def pack(self) -> Int32Array:
        """Return the plan as one int32 array."""
        header = np.array([MessageKind.STEP, *self.shape, self.whole_rows], np.int32)
        return np.concatenate([header, *(getattr(self, name).ravel() for name in FIELDS)])

    @classmethod
    def unpack(cls, message: Int32Array) -> StepPlan:
        """Return the plan that `pack` packed."""
        num_tokens, num_seqs, num_columns, num_rows, whole_rows = (int(n) for n in message[1:_HEADER])
        sizes = [num_tokens] * 3 + [num_seqs + 1, num_seqs, num_seqs * num_columns, num_rows]
        if message[0] != MessageKind.STEP or len(message) != _HEADER + sum(sizes):
            raise ValueError(f"a step message of {len(message)} numbers, expected {_HEADER + sum(sizes)}")
        parts = dict(zip(FIELDS, np.split(message[_HEADER:], np.cumsum(sizes)[:-1].astype(int)), strict=True))
        parts["block_table"] = parts["block_table"].reshape(num_seqs, num_columns)
        return cls(**parts, whole_rows=bool(whole_rows))
