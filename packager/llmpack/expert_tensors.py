"""How gpt-oss stores its experts: matrices in MXFP4, or with their axes exchanged, and vectors side by side; ERNIE's vectors.

In: what the headers of a checkpoint say. Out: the same, as the table of weights takes it: matrices [num_experts, out_features,
in_features] under one name, whichever way they lie in the file; and their numbers as float32. From OCP's Microscaling Formats
1.0 and transformers' modeling_gpt_oss.py, which keeps in_features first in memory, and so does what it saves after training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from llmpack.tensor_info import TensorInfo

MXFP4 = "MXFP4"  # in place of what safetensors names
GROUP_SIZE, _GROUP_BYTES = 32, 16  # weights that share an exponent
_BLOCKS, _SCALES, _BIAS = "_blocks", "_scales", "_bias"
_STATICS = ".moe_statics.e_score_correction_bias"
_MATRICES = (".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
# Of a byte the two weights, the low half first; and of an exponent the power of two, or NaN.
_PAIRS = np.concatenate([_E2M1, -_E2M1])[np.stack([np.arange(256) & 15, np.arange(256) >> 4], axis=1)]
_POWERS = np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32(np.nan)).astype(np.float32)


def as_vectors(tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Return a checkpoint's tensors with ERNIE's correction biases, which it stores as matrices of one row, as vectors."""
    return {
        name: dataclasses.replace(info, shape=info.shape[1:])
        if name.endswith(_STATICS) and len(info.shape) == 2 and info.shape[0] == 1
        else info
        for name, info in tensors.items()
    }


def as_matrices(tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Return a checkpoint's tensors as they are read; those of no expert, and what fits nothing, as they are."""
    seen = dict(tensors)
    for name, info in tensors.items():
        root = name.removesuffix(_BLOCKS)
        if root != name and root.endswith(_MATRICES) and (matrix := _of_blocks(info, tensors.get(root + _SCALES))):
            seen[root] = matrix
            del seen[name], seen[root + _SCALES]
        elif name.endswith(_MATRICES) and len(info.shape) == 3:
            num_experts, num_columns, num_rows = info.shape
            seen[name] = dataclasses.replace(info, shape=(num_experts, num_rows, num_columns), is_transposed=True)
        elif name.removesuffix(_BIAS).endswith(_MATRICES):
            seen[name] = dataclasses.replace(info, is_vector=True)
    return seen


def _of_blocks(blocks: TensorInfo, scales: TensorInfo | None) -> TensorInfo | None:
    """Return the matrices [.., in_features] that blocks [.., in_features / 32, 16] and scales [.., in_features / 32] are."""
    if scales is None or (blocks.dtype, scales.dtype) != ("U8", "U8"):
        return None
    if len(blocks.shape) != 4 or blocks.shape[3] != _GROUP_BYTES or blocks.shape[:3] != scales.shape:
        return None
    *stack, num_groups, _ = blocks.shape
    return dataclasses.replace(blocks, dtype=MXFP4, shape=(*stack, num_groups * GROUP_SIZE), scales=scales)


def read_transposed(
    info: TensorInfo, rows: range, raw: np.ndarray, read: Callable[[TensorInfo, int, np.ndarray], None]
) -> None:
    """Read rows of matrices whose rows are columns in the file.

    Args:
        info: of an `is_transposed` tensor.
        rows: of all matrices, one after another; any step.
        raw: [len(rows), in_features]; filled.
        read: fills an array with a tensor's elements from a place on, which is counted in elements.
    """
    _, num_rows, num_columns = info.shape
    done = 0
    while done < len(rows):
        expert, first = divmod(rows[done], num_rows)
        count = min(len(rows) - done, -(-(num_rows - first) // rows.step))
        columns = np.empty((num_columns, (count - 1) * rows.step + 1), raw.dtype)
        for i, column in enumerate(columns):
            read(info, (expert * num_columns + i) * num_rows + first, column)
        raw[done : done + count] = columns[:, :: rows.step].T
        done += count


def decode(blocks: np.ndarray, scales: np.ndarray, out: np.ndarray) -> None:
    """Fill `out`, float32 [n, in_features], by blocks uint8 [n, in_features / 2] and scales uint8 [n, in_features / 32]."""
    np.take(
        _PAIRS, blocks, axis=0, out=out.reshape(*blocks.shape, 2), mode="clip"
    )  # all are below 256; else it is copied
    groups = out.reshape(*scales.shape, GROUP_SIZE)
    groups *= _POWERS[scales][..., None]
