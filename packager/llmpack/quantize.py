"""Group-wise weights -> (quantized, scales), symmetric: the truth that the operator library's packing repeats bit for bit.

In: a float32 matrix, in slices of any number of rows (each row is on its own). Out: unsigned integers around a fixed zero
point, and one float16 scale for each `group_size` input features. Every step is one IEEE operation per element and sums run
in the order of the input features, so the result is the same on every machine (FORMAT 2.6). No calibration data is used.
`pack` itself calls `custom_ops/pack`, which a test compares with this.
"""

from __future__ import annotations

import numpy as np

ZERO_POINT = {"q4": 8, "q8": 128}

# Steps that q4 tries for a group, as its largest entry divided by the step: -8 uses all 16 levels whatever the sign of that
# entry (the rule of llama.cpp's Q4_0); others trade its exactness for that of the rest. tests/benchmarks/LOG.md has the
# measurements that chose these.
CANDIDATES = np.array([-8.0, -7.7, -7.4, -7.1, -6.8, -6.5, -8.3, -8.6], np.float32)
_TINY = np.float32(2.0**-20)  # groups below this are as coarse as float16's subnormal scales: nothing is searched
_HUGE = np.float32(2.0**19)  # no scale of such a group fits float16


def quantize_q4(
    weight: np.ndarray, group_size: int, candidates: np.ndarray = CANDIDATES
) -> tuple[np.ndarray, np.ndarray]:
    """Quantize a matrix to unsigned 4-bit, one scale per group of input features.

    For each candidate step the weights are rounded, and the step is refitted to the rounded weights by least squares; the
    refitted step that leaves the least squared error is rounded to float16, and the weights are rounded to it once more.

    Args:
        weight: [num_rows, in_features], float32.
        group_size: input features that share a scale; divides in_features.
        candidates: float32, largest entry / step, each of magnitude 4 or more.

    Returns:
        quantized: [num_rows, in_features], uint8 in 0..15, zero point 8.
        scales: [num_rows, in_features / group_size], float16; weight ~ (quantized - 8) * scales.

    Raises:
        OverflowError: a scale does not fit float16.
    """
    groups = _groups(weight, group_size)
    low, high = groups.min(axis=2), groups.max(axis=2)
    extreme = np.where(-low >= high, low, high)
    if (np.abs(extreme) >= _HUGE).any():
        raise OverflowError("a scale is beyond float16's range")
    return _round(groups, _to_float16(_search(groups, extreme, candidates)), ZERO_POINT["q4"], 0, 15)


def quantize_q8(weight: np.ndarray, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Quantize a matrix to 8-bit, one scale per group: weight ~ (quantized - 128) * scales, quantized in 1..255.

    Shapes, dtypes and errors as for `quantize_q4`.
    """
    groups = _groups(weight, group_size)
    return _round(groups, _to_float16(np.abs(groups).max(axis=2) / np.float32(127)), ZERO_POINT["q8"], 1, 255)


def _search(groups: np.ndarray, extreme: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Return the step of each group that leaves the least squared error: that is, the largest <w, q>^2 / <q, q>."""
    searched = np.abs(extreme) >= _TINY
    unit = np.where(searched, extreme, np.float32(1))
    best_gain, best_step = np.full_like(unit, -1), np.zeros_like(unit)
    for candidate in candidates:
        levels = groups * (candidate / unit)[..., None]
        np.clip(levels, np.float32(-8), np.float32(7), out=levels)
        np.rint(levels, out=levels)
        products, squares = np.zeros_like(unit), np.zeros_like(unit)
        for k in range(groups.shape[2]):
            products += groups[..., k] * levels[..., k]
            squares += levels[..., k] * levels[..., k]
        step = np.divide(products, squares, out=np.zeros_like(unit), where=searched)
        gain = products * step
        best_step = np.where(gain > best_gain, step, best_step)
        best_gain = np.maximum(gain, best_gain)
    return np.where(searched, best_step, extreme / np.float32(-8))


def _groups(weight: np.ndarray, group_size: int) -> np.ndarray:
    num_rows, in_features = weight.shape
    return np.asarray(weight, np.float32).reshape(num_rows, in_features // group_size, group_size)


def _to_float16(scales: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        # Adding 0 makes one zero of the two: which of them is the largest depends on the order of comparisons.
        rounded = (scales + np.float32(0)).astype(np.float16)
    if not np.isfinite(rounded).all():
        raise OverflowError("a scale is beyond float16's range")
    return rounded


def _round(groups: np.ndarray, scales: np.ndarray, zero: int, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
    """Round each group in units of its (already rounded) scale; a group whose scale is zero becomes all zero."""
    unit = scales.astype(np.float32)[..., None]
    steps = groups * np.divide(np.float32(1), unit, out=np.zeros_like(unit), where=unit != 0)
    np.rint(steps, out=steps)
    steps += np.float32(zero)
    np.clip(steps, low, high, out=steps)
    return steps.astype(np.uint8).reshape(groups.shape[0], -1), scales
