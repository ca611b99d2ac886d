"""What a launch points to, in the stand-in driver's memory: arrays, and weights of which FORMAT 4.3's layout is undone.

Undone a second time, independently of the packager.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from llmpack_ops import reference

TAG = 1 << 62

Launch = dict[str, Any]  # parameter name -> value, constants, "grid"


def at(address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """View the stand-in's device memory."""
    import ctypes

    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * count).from_address(address & ~TAG), dtype).reshape(shape)


def half(values: np.ndarray) -> np.ndarray:
    return np.clip(values, -65504, 65504).astype(np.float16)


def untile(storage: str, n: int, k: int, p: Launch) -> np.ndarray:
    """Undo FORMAT 4.3: the weight [n, k] in float32."""
    tiles = -(-n // 16)
    if storage == "f16":
        return at(p["weight"], (tiles, k, 16), np.float16).transpose(0, 2, 1).reshape(-1, k)[:n].astype(np.float32)
    if storage in ("q4", "mxfp4"):
        b = at(p["weight"], (tiles, k // 8, 16, 4), np.uint8)
        q = np.concatenate([b & 15, b >> 4], axis=3)
    elif storage == "q6":
        b = at(p["weight"], (tiles, k // 16, 3, 16, 4), np.uint8)
        parts = [b[:, :, i] & 63 for i in range(3)]
        fourth = (b[:, :, 0] >> 6) | (b[:, :, 1] >> 6) << 2 | (b[:, :, 2] >> 6) << 4
        q = np.concatenate([*parts, fourth], axis=3)
    else:
        q = at(p["weight"], (tiles, k // 4, 16, 4), np.uint8)
    q = q.transpose(0, 2, 1, 3).reshape(-1, k)[:n]
    groups = k // p["group_size"]
    scales = at(p["scales"], (tiles, groups, 16), np.float16).transpose(0, 2, 1).reshape(-1, groups)[:n]
    return reference.dequantize(q, scales, storage).astype(np.float32)


_weights: dict[tuple, tuple[int, np.ndarray]] = {}  # by place: a checksum of the bytes, and what they stand for


def weight(storage: str, n: int, k: int, p: Launch) -> np.ndarray:
    """Return the weight [n, k] in float32; a place may hold another one later, as memory is given back and taken again."""
    key, tiles = (p["weight"], storage, n, k), -(-n // 16)
    sum_of = zlib.adler32(
        at(p["weight"], (tiles * k * {"f16": 32, "q8": 16, "q6": 12, "q4": 8, "mxfp4": 8}[storage],), np.uint8)
    )
    if storage != "f16":
        sum_of = zlib.adler32(at(p["scales"], (tiles * 16 * (k // p["group_size"]) * 2,), np.uint8), sum_of)
    if _weights.get(key, (None,))[0] != sum_of:
        _weights[key] = sum_of, untile(storage, n, k, p)
    return _weights[key][1]
