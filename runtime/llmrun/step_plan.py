"""One step of the graph as rank 0 decides it and every rank runs it: the seven index inputs of FORMAT 3.2.

A plan is one int32 array, the message that rank 0 sends: kind, T, B, M, R, whether whole rows of logits are wanted, then
the inputs in the order of `FIELDS`.
"""

from __future__ import annotations

import array
import enum
import itertools
from collections.abc import Sequence

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
# Columns of the block table come in these steps, so that the shape of a step, and what is bound for it, mostly stays.
_TABLE_STEP = 8

Int32Array = np.ndarray[tuple[int, ...], np.dtype[np.int32]]


class MessageKind(enum.IntEnum):
    """First int32 of every message from rank 0."""

    STEP = 1  # a StepPlan
    SHUTDOWN = 2  # one int32: the exit code
    MIRROR = 3  # pickled result of a call that a user's script makes on every rank


STEP_KIND = int(MessageKind.STEP)  # a plain number is read three times as fast


class StepPlan:
    """Tokens of B sequences, one after the other; symbols as in FORMAT 3.2.

    Attributes:
        message: [6 + all fields'], of int32; a plan is sent, and copied, as one array.
        num_tokens, num_seqs, num_columns, num_rows: T, B, M, R.
        shape: these; plans of one shape have fields, and messages, of one shape.
    """

    __slots__ = ("message", "num_columns", "num_rows", "num_seqs", "num_tokens", "shape")

    def __init__(self, message: memoryview, shape: tuple[int, int, int, int]) -> None:
        self.message, self.shape = message, shape
        self.num_tokens, self.num_seqs, self.num_columns, self.num_rows = shape

    @classmethod
    def read(cls, message: Int32Array) -> StepPlan:
        """Return the plan of a message.

        Raises:
            ValueError: it is no plan's, or not whole.
        """
        kind, num_tokens, num_seqs, num_columns, num_rows, _ = message[:_HEADER].tolist()
        size = _HEADER + 3 * num_tokens + (num_seqs + 1) + num_seqs + num_seqs * num_columns + num_rows
        if kind != STEP_KIND or len(message) != size:
            raise ValueError(f"a step message of {len(message)} numbers, expected {size}")
        return cls(message.data, (num_tokens, num_seqs, num_columns, num_rows))

    @classmethod
    def of(
        cls,
        *,
        input_ids: Sequence[int],
        positions: Sequence[int],
        slot_mapping: Sequence[int],
        query_start: Sequence[int],
        seq_lens: Sequence[int],
        block_table: Sequence[Sequence[int]],
        logit_rows: Sequence[int],
    ) -> StepPlan:
        """Return the plan of these numbers; it asks for whole rows. Rows of `block_table` are filled up with zeros.

        Raises:
            ValueError: their shapes disagree.
        """
        num_tokens, num_seqs = len(input_ids), len(seq_lens)
        if (
            len(positions) != num_tokens
            or len(slot_mapping) != num_tokens
            or len(query_start) != num_seqs + 1
            or len(block_table) != num_seqs
        ):
            raise ValueError(f"step plan of {num_tokens} tokens and {num_seqs} sequences: shapes disagree")
        num_columns = -(-max(map(len, block_table)) // _TABLE_STEP) * _TABLE_STEP
        shape = (num_tokens, num_seqs, num_columns, len(logit_rows))
        # An array of the standard library: a decode step has some twenty numbers, and numpy's calls are what takes the time.
        message = array.array(
            "i", (STEP_KIND, *shape, 1, *input_ids, *positions, *slot_mapping, *query_start, *seq_lens)
        )
        for row in block_table:
            message.extend(row)
            message.extend(itertools.repeat(0, num_columns - len(row)))
        message.extend(logit_rows)
        return cls(memoryview(message), shape)

    def fields(self) -> dict[str, Int32Array]:
        """Return the graph's inputs, as views of the message.

        `input_ids`, `positions`, `slot_mapping`: [T]; `query_start`: [B + 1]; `seq_lens`: [B]; `block_table`: [B, M];
        `logit_rows`: [R].
        """
        sizes = (*(3 * [self.num_tokens]), self.num_seqs + 1, self.num_seqs, self.num_seqs * self.num_columns)
        parts = np.split(np.asarray(self.message)[_HEADER:], list(itertools.accumulate(sizes)))
        fields: dict[str, Int32Array] = dict(zip(FIELDS, parts, strict=True))
        fields["block_table"] = fields["block_table"].reshape(self.num_seqs, self.num_columns)
        return fields

    @property
    def asks_whole_rows(self) -> bool:
        """Whether somebody needs logits of the whole vocabulary, not only of the likeliest tokens.

        A session that has them in its memory gives them anyway.
        """
        return bool(self.message[_HEADER - 1])

    @asks_whole_rows.setter
    def asks_whole_rows(self, value: bool) -> None:
        self.message[_HEADER - 1] = int(value)

    @property
    def is_decode(self) -> bool:
        """True if each sequence has one token."""
        return self.num_tokens == self.num_seqs
