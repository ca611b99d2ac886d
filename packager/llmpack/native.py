"""The operator library's packing functions (custom_ops/pack/pack.h) on numpy arrays.

In: arrays. Out: arrays filled in. The calls release the interpreter's lock, so threads run them side by side; each result is
the same bits on every machine. The library is loaded by the first call, not by the import.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np

from llmpack.quantize import CANDIDATES
from llmrun.artifact import ROW_TILE, IncompatibleError, InternalError
from llmrun.library import find_library

VECTORS = 8  # activation vectors side by side in `packed_product`

_TYPES = {"f32": 0, "f16": 1, "bf16": 2, "q8": 3, "q4": 4, "q6": 5, "mxfp4": 6}  # enum of pack.h
_BITS = {"q4": 4, "q6": 6, "mxfp4": 4}  # of a stored number, where it is no element of its array
_NOT_FINITE, _OVERFLOW = 1, 2


class _Rows(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_int32),
        ("source_type", ctypes.c_int32),
        ("storage", ctypes.c_int32),
        ("group_size", ctypes.c_int32),
        ("num_rows", ctypes.c_int64),
        ("num_columns", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("num_tiles", ctypes.c_int64),
        ("rows", ctypes.c_void_p),
        ("candidates", ctypes.c_void_p),
        ("num_candidates", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
    )


class _Product(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_int32),
        ("storage", ctypes.c_int32),
        ("group_size", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("num_tiles", ctypes.c_int64),
        ("num_columns", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
    )


class NotFiniteError(ValueError):
    """A source value is NaN or infinite."""


@functools.cache
def library() -> Any:
    """Return the loaded library.

    Raises:
        IncompatibleError: it is not there, or is older than this packager.
    """
    path = find_library()
    try:
        loaded = ctypes.CDLL(str(path))
        for name, struct in (("llmpack_ops_pack_rows", _Rows), ("llmpack_ops_packed_product", _Product)):
            function = getattr(loaded, name)
            function.restype, function.argtypes = ctypes.c_int, [ctypes.POINTER(struct)]
    except (OSError, AttributeError) as error:
        raise IncompatibleError(f"{path}: {error}. Install llmpack again.", code="E416") from None
    return loaded


def pack_rows(
    rows: np.ndarray,
    storage: str,
    group_size: int,
    weight: np.ndarray,
    scales: np.ndarray | None = None,
    *,
    is_bfloat16: bool = False,
    candidates: np.ndarray | None = None,
) -> None:
    """Quantize rows of a projection and lay them out in tiles (FORMAT 4.3).

    Args:
        rows: [num_rows, num_columns], float32, float16, or uint16 holding bfloat16; columns are contiguous.
        storage: "f32", "f16", "q8", "q6", "q4" or "mxfp4".
        group_size: input features that share a scale; not of f32 and f16.
        weight: array to fill, as FORMAT 4.3 has it; it holds at least num_rows, further rows become zero weights.
        scales: array to fill, likewise; None for f32 and f16.
        is_bfloat16: what uint16 rows must say.
        candidates: see `quantize_q4`; None: those of the storage.

    Raises:
        NotFiniteError: a value is NaN or infinite.
        OverflowError: a value or a scale does not fit float16.
    """
    num_rows, num_columns = rows.shape
    source = {"float32": "f32", "float16": "f16", "uint16": "bf16"}[rows.dtype.name]
    if (source == "bf16") != is_bfloat16 or (num_rows and num_columns > 1 and rows.strides[1] != rows.itemsize):
        raise TypeError(f"rows of {rows.dtype} with strides {rows.strides}")
    if not weight.flags.c_contiguous or (scales is not None and not scales.flags.c_contiguous):
        raise TypeError("weight and scales must be contiguous")
    if weight.size * 8 != weight.shape[0] * ROW_TILE * num_columns * _BITS.get(storage, 8):
        raise TypeError(f"weight {weight.shape} does not hold tiles of {num_columns} columns")
    candidates = CANDIDATES.get(storage, np.empty(0)) if candidates is None else candidates
    candidates = np.ascontiguousarray(candidates, np.float32)
    arguments = _Rows(
        ctypes.sizeof(_Rows), _TYPES[source], _TYPES[storage], group_size, num_rows, num_columns,
        rows.strides[0] // rows.itemsize if num_rows > 1 else num_columns, weight.shape[0], rows.ctypes.data,
        candidates.ctypes.data, len(candidates), weight.ctypes.data, None if scales is None else scales.ctypes.data,
    )  # fmt: skip
    code = library().llmpack_ops_pack_rows(ctypes.byref(arguments))
    if code == _NOT_FINITE:
        raise NotFiniteError("a value is NaN or infinite")
    if code == _OVERFLOW:
        raise OverflowError(f"a {'value' if scales is None else 'scale'} is beyond float16's range")
    if code:
        raise InternalError(f"llmpack_ops_pack_rows gave {code} for rows {rows.shape} as {storage}")


def packed_product(
    weight: np.ndarray, scales: np.ndarray | None, storage: str, group_size: int, x: np.ndarray
) -> np.ndarray:
    """Multiply tiles with activation vectors, in float64 and in a fixed order of sums.

    Args:
        weight: tiles as FORMAT 4.3 has them.
        scales: their scales; None for f32 and f16.
        storage: "f32", "f16", "q8", "q6", "q4" or "mxfp4".
        group_size: input features that share a scale.
        x: [num_columns, VECTORS], float64.

    Returns:
        [num_tiles * ROW_TILE, VECTORS], float64.
    """
    num_tiles, num_columns = weight.shape[0], len(x)
    if x.shape[1] != VECTORS or x.dtype != np.float64 or not x.flags.c_contiguous:
        raise TypeError(f"x {x.shape} of {x.dtype}")
    if weight.size * 8 != num_tiles * ROW_TILE * num_columns * _BITS.get(storage, 8):
        raise TypeError(f"weight {weight.shape} does not fit x {x.shape}")
    y = np.empty((num_tiles * ROW_TILE, VECTORS))
    arguments = _Product(
        ctypes.sizeof(_Product), _TYPES[storage], group_size, 0, num_tiles, num_columns, weight.ctypes.data,
        None if scales is None else scales.ctypes.data, x.ctypes.data, y.ctypes.data,
    )  # fmt: skip
    code = library().llmpack_ops_packed_product(ctypes.byref(arguments))
    if code:
        raise InternalError(f"llmpack_ops_packed_product gave {code} for {weight.shape} as {storage}")
    return y
