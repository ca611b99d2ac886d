"""Read, slice, fuse, quantize, lay out, write: every weight of every rank, some rows at a time on each core.

In: a checkpoint and every rank's plan. Out: every rank's weights.bin. A weight is cut into runs of whole row tiles; a thread
takes one run from the checkpoint's bytes to weights.bin's, so reading, packing and writing overlap, and memory is bounded by
`_ELEMENTS_AT_ONCE` per thread, whatever the size of the model. A run's result does not depend on any other's.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from llmpack.checkpoint import Checkpoint
from llmpack.native import NotFiniteError, pack_rows
from llmpack.sources import Place
from llmpack.weights import MATRICES, Block, RankWeight, num_bytes
from llmpack.write import Staging
from llmrun.artifact import ROW_TILE, IncompatibleError, InternalError

_ELEMENTS_AT_ONCE = 1 << 20
_MAX_THREADS = 8

Write = Callable[[int, np.ndarray], None]


def write_weights(
    checkpoint: Checkpoint,
    places: dict[str, Place],
    plans: list[list[RankWeight]],
    staging: Staging,
    on_progress: Callable[[str, int, int], None],
) -> None:
    """Write every rank's weights.bin.

    Args:
        checkpoint: where tensors are read from.
        places: source name in the weight table -> where it is read.
        plans: every rank's weights.
        staging: where files are written to.
        on_progress: called with ("weights", bytes done, bytes in all).

    Raises:
        IntegrityError: a file ends early or a value is not finite; names the tensor.
        IncompatibleError: a value does not fit the scheme's types; names the tensor.
    """
    total = sum(num_bytes(plan) for plan in plans)
    done = 0
    num_threads = min(len(os.sched_getaffinity(0)), _MAX_THREADS)
    for rank, plan in enumerate(plans):
        with staging.create(f"rank-{rank}/weights.bin", num_bytes(plan)) as write:
            worker = _Worker(checkpoint, places, write)
            pool = ThreadPoolExecutor(num_threads)
            try:
                # Few runs wait at a time: an error or Ctrl-C then has little to finish.
                waiting: deque[Future[int]] = deque()
                for run in _runs(plan):
                    waiting.append(pool.submit(worker.pack, run))
                    if len(waiting) > 2 * num_threads:
                        done += waiting.popleft().result()
                        on_progress("weights", done, total)
                for future in waiting:
                    done += future.result()
                on_progress("weights", done, total)
            finally:
                pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class _Run:
    """Rows first to last of a weight; first is a multiple of ROW_TILE, and so is last unless it is the weight's end."""

    weight: RankWeight
    first: int
    last: int


def _runs(plan: list[RankWeight]) -> Iterator[_Run]:
    for weight in plan:
        if weight.is_shared:
            continue
        step = max(ROW_TILE, _ELEMENTS_AT_ONCE // weight.num_columns // ROW_TILE * ROW_TILE)
        for first in range(0, weight.num_rows, step):
            yield _Run(weight, first, min(first + step, weight.num_rows))


class _Worker:
    """What a thread does with a run; `pack` may be called from any number of threads."""

    def __init__(self, checkpoint: Checkpoint, places: dict[str, Place], write: Write) -> None:
        self.checkpoint, self.places, self.write = checkpoint, places, write
        self._memory = threading.local()

    def pack(self, run: _Run) -> int:
        """Take a run from the checkpoint to weights.bin; return the bytes written."""
        weight = run.weight
        try:
            arrays = self._tiles(run) if weight.row.role in MATRICES or weight.group_size else (self._plain_rows(run),)
        except NotFiniteError:
            for name, block in self._pieces(run):  # one of these names the tensor
                self.checkpoint.read(name, block.rows, block.columns)
            raise InternalError(f"{weight.row.name}: not finite, yet every source is") from None
        except OverflowError as error:
            raise IncompatibleError(f"{', '.join(weight.row.sources)}: {error}; --quant f32 can hold it.") from None
        for item, array in zip(weight.initializers, arrays, strict=True):
            # Of projections the outermost axis counts tiles.
            per_row = item.num_bytes // (item.shape[0] * ROW_TILE if len(item.shape) > 2 else weight.num_rows)
            self.write(item.offset + run.first * per_row, array)
        return sum(array.nbytes for array in arrays)

    def _pieces(self, run: _Run) -> list[tuple[str, Block]]:
        """Return (tensor, block of it) for the rows of a run; rows of padding have none."""
        pieces, start = [], 0
        for block in run.weight.blocks:
            first, last = max(run.first, start), min(run.last, start + block.num_rows)
            if first < last:
                place, step = self.places[block.source], block.rows.step or 1
                first, last = (
                    place.first_row + (block.rows.start + (row - start) * step) * place.step for row in (first, last)
                )
                columns = slice(*(place.first_column + column for column in (block.columns.start, block.columns.stop)))
                pieces.append((place.tensor, Block(block.source, slice(first, last, step * place.step), columns)))
            start += block.num_rows
        return pieces

    def _tiles(self, run: _Run) -> tuple[np.ndarray, ...]:
        weight, pieces = run.weight, self._pieces(run)
        num_tiles = -(-(run.last - run.first) // ROW_TILE)
        arrays = tuple(
            self._array(item.name.rpartition(".")[2], item.dtype, (num_tiles, *item.shape[1:]))
            for item in weight.initializers
        )
        kinds = {(*self._kind(name), b.columns.start, b.columns.stop) for name, b in pieces}
        is_bfloat16 = False
        if len(kinds) == 1:
            rows, is_bfloat16 = self._raw_rows(pieces), self._kind(pieces[0][0])[0] == "BF16"
        elif pieces:
            rows = np.concatenate([self.checkpoint.read(name, b.rows, b.columns) for name, b in pieces])
        else:
            rows = np.empty((0, weight.num_columns), np.float32)
        pack_rows(rows, weight.storage, weight.group_size or 0, *arrays, is_bfloat16=is_bfloat16)
        return arrays

    def _kind(self, tensor: str) -> tuple[str, int]:
        """Return what pieces must have in common to be read into one array: type and width."""
        return self.checkpoint.tensors[tensor].dtype, self.checkpoint.layout(tensor)[0]

    def _raw_rows(self, pieces: list[tuple[str, Block]]) -> np.ndarray:
        """Read sources of one kind into one array, whole rows of them, and return the columns wanted."""
        width, dtype = self.checkpoint.layout(pieces[0][0])
        raw = self._array("source", dtype, (sum(block.num_rows for _, block in pieces), width))
        at = 0
        for name, block in pieces:
            self.checkpoint.read_rows(name, block.rows, raw[at : at + block.num_rows])
            at += block.num_rows
        return raw[:, pieces[0][1].columns]

    def _plain_rows(self, run: _Run) -> np.ndarray:
        rows = np.concatenate([self.checkpoint.read(name, b.rows, b.columns) for name, b in self._pieces(run)])
        if run.weight.storage == "f32":
            return rows.astype(np.float32) + np.float32(run.weight.row.offset)
        with np.errstate(over="ignore"):
            rows = rows.astype(np.float16, copy=False)
        if not np.isfinite(rows).all():
            raise OverflowError("a value is beyond float16's range")
        return rows

    def _array(self, purpose: str, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        """Return memory that this thread uses again: fresh pages for each run cost as much as packing it."""
        size = int(np.prod(shape)) * dtype.itemsize
        held = getattr(self._memory, purpose, None)
        if held is None or len(held) < size:
            held = np.empty(size, np.uint8)
            setattr(self._memory, purpose, held)
        return held[:size].view(dtype).reshape(shape)
