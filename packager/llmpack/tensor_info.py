"""Where a tensor of a checkpoint lies, and how it is read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies; `dtype` as safetensors names it, `offset` in bytes from the start of the file.

    Attributes:
        scales: of a matrix in MXFP4 (dtype "MXFP4"), whose `offset` is that of its blocks; None: no such matrix.
        is_transposed: the last two axes of `shape` are exchanged in the file.
        is_vector: all its axes count rows, as those of one vector.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    scales: TensorInfo | None = None
    is_transposed: bool = False
    is_vector: bool = False
