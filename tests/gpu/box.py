"""What a process with a (stand-in) GPU does in the tests: open the launcher, build models, check that nothing was violated."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import numpy as np
from device import Device
from executor import STEP, GpuModel, MiniOrt

BLOCK_SIZE = 16


class Gpu(ctypes.Structure):
    """`LlmpackGpu`, member by member."""

    _fields_ = (
        ("struct_size", ctypes.c_int32),
        ("vendor", ctypes.c_int32),
        ("device", ctypes.c_int32),
        ("max_sequences", ctypes.c_int32),
        ("max_rows", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("kernels", ctypes.c_char_p),
    )


def open_gpu(
    operators: Any, kernels: Path, *, vendor: int = 0, device: int = 0, max_sequences: int = 8, max_rows: int = 512
) -> None:
    """Open the launcher; raises RuntimeError with the library's sentence."""
    given = Gpu(ctypes.sizeof(Gpu), vendor, device, max_sequences, max_rows, 0, os.fsencode(kernels))
    if operators.llmpack_ops_gpu_open(ctypes.byref(given)) != 0:
        raise RuntimeError(last_error(operators))


def last_error(operators: Any) -> str:
    operators.llmpack_ops_last_error.restype = ctypes.c_char_p
    return operators.llmpack_ops_last_error().decode("utf-8", "replace")


def load_operators(path: Path) -> Any:
    from llmrun.operators import load_library

    return load_library(path)


def feeds(
    sequences: list[list[int]], lengths: list[int], max_blocks: int, rows: list[int] | None = None
) -> dict[str, np.ndarray]:
    """The inputs of a step: the last tokens of sequences that are then `lengths` long; blocks in a scrambled order."""
    ids, positions, slots, starts, table = [], [], [], [0], []
    for i, (own, length) in enumerate(zip(sequences, lengths, strict=True)):
        blocks = [(i * max_blocks + j) ^ 1 for j in range(max_blocks)]
        at = np.arange(length - len(own), length)
        ids += own
        positions += at.tolist()
        slots += [blocks[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in at]
        starts.append(len(ids))
        table.append(blocks)
    wanted = [end - 1 for end in starts[1:]] if rows is None else rows
    values = (ids, positions, slots, starts, lengths, table, wanted)
    return {name: np.asarray(value, np.int32) for name, value in zip(STEP, values, strict=True)}


def logits_of(model: GpuModel, ids: list[int], chunk: int) -> np.ndarray:
    """A rank's columns of the logits after each id, run in chunks over one sequence."""
    parts = []
    max_blocks = -(-len(ids) // BLOCK_SIZE) + 1
    for begin in range(0, len(ids), chunk):
        own = ids[begin : begin + chunk]
        step = model.step(feeds([own], [begin + len(own)], max_blocks, list(range(len(own)))))
        step.run()
        parts.append(step.output("logits"))
        check_top(parts[-1], step, model.first_id, model.vocab_size)
        step.close()
    return np.concatenate(parts)


def check_top(logits: np.ndarray, step: Any, first_id: int, vocab_size: int) -> None:
    """Compare the record of the likeliest tokens with a rank's own columns of the logits."""
    from llmrun.rows import merge_candidates

    known = logits[:, : max(0, vocab_size - first_id)]
    found = merge_candidates([step.output("top")], vocab_size)
    order = np.argsort(-known, axis=1, kind="stable")[:, : found.ids.shape[1]]
    width = order.shape[1]
    assert (found.ids[:, :width] == order + first_id).all()
    assert (found.logits[:, :width] == np.take_along_axis(known, order, 1)).all()
    sums = np.exp(known.astype(np.float64) - known.max(axis=1, keepdims=True)).sum(axis=1)
    assert np.allclose(found.weight_sums, sums, rtol=1e-5)


__all__ = [
    "Device",
    "GpuModel",
    "MiniOrt",
    "check_top",
    "feeds",
    "last_error",
    "load_operators",
    "logits_of",
    "open_gpu",
]
