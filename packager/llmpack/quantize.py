"""Group-wise weights -> (quantized, scales): the truth that the operator library's packing repeats bit for bit.

In: a float32 matrix, in slices of any number of rows (each row is on its own). Out: unsigned integers, and one
float16 scale for each `group_size` input features. Every step is one IEEE operation per element and sums run in the order of
the input features, so the result is the same on every machine (FORMAT 2.6). No calibration data is used. `pack` itself calls
`custom_ops/pack`, which a test compares with this.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# The numbers that a quantized weight stands for, in units of its scale (FORMAT 4.3). Those of q4 lie closer where weights are
# many: llama.cpp's IQ4_NL levels, halved, so that offset by 64 they are 7-bit numbers, whose products with 8-bit activations
# saturate on no instruction set.
LEVELS = np.array([-64, -52, -42, -32, -24, -18, -11, -5, 0, 6, 12, 19, 26, 34, 44, 56], np.float32)
MIDDLES = (LEVELS[1:] + LEVELS[:-1]) / np.float32(2)  # exact; a weight on a middle becomes the lower level
ZERO_POINT = {"q6": 32, "q8": 128}
# Twice the numbers of OCP's E2M1, so that they are integers, and the middles of the positive ones.
MXFP4_LEVELS = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)
_MXFP4_MIDDLES = (MXFP4_LEVELS[1:8] + MXFP4_LEVELS[:7]) / np.float32(2)
_MXFP4_LEAST = np.float32(2.0**-24)  # the smallest scale: float16's

# Steps to try for a group, as its entry of largest magnitude divided by the step: -64 keeps that entry exactly, whatever its
# sign; others trade its exactness for that of the rest; positive ones turn the codebook around (a negative scale).
# tests/benchmarks/LOG.md has the measurements that chose these.
CANDIDATES = {
    "q4": np.array([-64, -66, -62, -68, -72, -56, 60, 56], np.float32),
    "q6": np.array([-32, -33, -31], np.float32),
}
_TINY = np.float32(2.0**-20)  # groups below this are as coarse as float16's subnormal scales: nothing is searched
_COARSE = np.float32(2.0**-22)  # scales below this are less than four of float16's smallest steps
_HUGE = np.float32(2.0**19)  # groups from here on are refused: a scale of q4 or q6 might not fit float16


def quantize_q4(
    weight: np.ndarray, group_size: int, candidates: np.ndarray = CANDIDATES["q4"]
) -> tuple[np.ndarray, np.ndarray]:
    """Quantize a matrix to 4 bits by a codebook of 16 uneven levels, one scale per group of input features.

    For each candidate step each weight takes the nearest level, and the step is refitted to these levels by least squares;
    the refitted step that leaves the least squared error is rounded to float16 (away from zero where that is coarse), and each
    weight takes its level once more.

    Args:
        weight: [num_rows, in_features], float32.
        group_size: input features that share a scale; divides in_features.
        candidates: float32, largest entry / step, each of magnitude 4 or more.

    Returns:
        quantized: [num_rows, in_features], uint8 in 0..15.
        scales: [num_rows, in_features / group_size], float16, of either sign; weight ~ LEVELS[quantized] * scales.

    Raises:
        OverflowError: a weight is too large for float16 scales.
    """
    groups = _groups(weight, group_size)
    scales = _to_float16(_search(groups, candidates, LEVELS[0], lambda x: LEVELS[_nearest(x)]))
    return _nearest(groups * _inverse(scales)).astype(np.uint8).reshape(len(weight), -1), scales


def quantize_q6(
    weight: np.ndarray, group_size: int, candidates: np.ndarray = CANDIDATES["q6"]
) -> tuple[np.ndarray, np.ndarray]:
    """Quantize a matrix to 6 bits, one scale per group: weight ~ (quantized - 32) * scales, quantized in 0..63.

    Searched as in `quantize_q4`, whose shapes, dtypes and errors it has.
    """
    groups = _groups(weight, group_size)
    scales = _search(
        groups, candidates, np.float32(-32), lambda x: np.rint(np.clip(x, np.float32(-32), np.float32(31)))
    )
    return _round(groups, _to_float16(scales), ZERO_POINT["q6"], 0, 63)


def quantize_q8(weight: np.ndarray, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Quantize a matrix to 8 bits, one scale per group: weight ~ (quantized - 128) * scales, quantized in 1..255.

    Shapes, dtypes and errors as for `quantize_q4`.
    """
    groups = _groups(weight, group_size)
    return _round(groups, _to_float16(np.abs(groups).max(axis=2) / np.float32(127)), ZERO_POINT["q8"], 1, 255)


def quantize_mxfp4(weight: np.ndarray, group_size: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Quantize a matrix to OCP's MXFP4: one power of two per group; weight ~ MXFP4_LEVELS[quantized] * scales.

    The power is an eighth of the largest that is no larger than the group's largest magnitude, so numbers that were MXFP4
    before stay exactly what they were (but below 2^-24, float16's smallest scale); others take the nearest level, on a middle
    the smaller one. Shapes, dtypes and errors as for `quantize_q4`, and no scale is negative.
    """
    groups = _groups(weight, group_size)
    largest = np.abs(groups).max(axis=2)
    power = (largest.view(np.int32) & 0x7F800000) - (3 << 23)  # bits of a float32
    power = np.maximum(power, _MXFP4_LEAST.view(np.int32)).astype(np.int32).view(np.float32)
    scales = _to_float16(np.where(largest > 0, power, np.float32(0)))
    levels = groups * _inverse(scales)
    codes = np.searchsorted(_MXFP4_MIDDLES, np.abs(levels), side="left") + 8 * (levels < 0)
    return codes.astype(np.uint8).reshape(len(weight), -1), scales


def _nearest(x: np.ndarray) -> np.ndarray:
    """Return the index of the level nearest to x: how many middles lie below it."""
    return np.searchsorted(MIDDLES, x, side="left")


def _search(
    groups: np.ndarray, candidates: np.ndarray, outermost: np.float32, to_levels: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Return the step of each group that leaves the least squared error: that is, the largest <w, q>^2 / <q, q>."""
    low, high = groups.min(axis=2), groups.max(axis=2)
    extreme = np.where(-low >= high, low, high)
    if (np.abs(extreme) >= _HUGE).any():
        raise OverflowError("a scale is beyond float16's range")
    searched = np.abs(extreme) >= _TINY
    unit = np.where(searched, extreme, np.float32(1))
    best_gain, best_step = np.full_like(unit, -1), np.zeros_like(unit)
    for candidate in candidates:
        levels = to_levels(groups * (candidate / unit)[..., None])
        products, squares = np.zeros_like(unit), np.zeros_like(unit)
        for k in range(groups.shape[2]):
            products += groups[..., k] * levels[..., k]
            squares += levels[..., k] * levels[..., k]
        step = np.divide(products, squares, out=np.zeros_like(unit), where=searched)
        gain = products * step
        best_step = np.where(gain > best_gain, step, best_step)
        best_gain = np.maximum(gain, best_gain)
    return np.where(searched, best_step, extreme / outermost)


def _groups(weight: np.ndarray, group_size: int) -> np.ndarray:
    num_rows, in_features = weight.shape
    return np.asarray(weight, np.float32).reshape(num_rows, in_features // group_size, group_size)


def _to_float16(scales: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        # Adding 0 makes one zero of the two: which of them is the largest depends on the order of comparisons.
        rounded = (scales + np.float32(0)).astype(np.float16)
    if not np.isfinite(rounded).all():
        raise OverflowError("a scale is beyond float16's range")
    # Rounded to nearest, a coarse scale would cut off a group's largest weights, and half a step would be no scale at all.
    is_short = (np.abs(rounded.astype(np.float32)) < np.abs(scales)) & (np.abs(scales) < _COARSE)
    return (rounded.view(np.uint16) + is_short).view(np.float16)


def _inverse(scales: np.ndarray) -> np.ndarray:
    """Return 1 / scale of each group, 0 where the scale is 0: such a group becomes all zero. [num_rows, groups, 1]."""
    unit = scales.astype(np.float32)[..., None]
    return np.divide(np.float32(1), unit, out=np.zeros_like(unit), where=unit != 0)


def _round(groups: np.ndarray, scales: np.ndarray, zero: int, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
    """Round each group in units of its (already rounded) scale."""
    steps = groups * _inverse(scales)
    np.rint(steps, out=steps)
    steps += np.float32(zero)
    np.clip(steps, low, high, out=steps)
    return steps.astype(np.uint8).reshape(groups.shape[0], -1), scales
