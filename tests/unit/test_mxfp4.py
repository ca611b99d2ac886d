"""MXFP4: what OCP's specification says of its numbers, and that numbers that had it before stay what they were."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpack.quantize import quantize_mxfp4
from llmpack_ops.reference import LEVELS, dequantize


def e2m1(code):
    """A sign, two bits of exponent with a bias of 1, one bit of mantissa (OCP Microscaling Formats 1.0, 5.3.3)."""
    exponent, mantissa = code >> 1 & 3, code & 1
    magnitude = (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2
    return -magnitude if code & 8 else magnitude


E2M1 = np.array([e2m1(code) for code in range(16)])


def test_levels_are_twice_those_of_e2m1():
    np.testing.assert_array_equal(LEVELS["mxfp4"], 2 * E2M1)


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 1 << 20), most=st.integers(0, 7), exponent=st.integers(-18, 12))
def test_what_was_mxfp4_stays_what_it_was(seed, most, exponent):
    """Whichever of the eight magnitudes is a group's largest: the exponent may change, and no number does."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, most + 1, (7, 96)) | rng.integers(0, 2, (7, 96)) << 3
    scales = 2.0 ** (exponent + rng.integers(-2, 3, (7, 3)))
    weight = (E2M1[codes] * np.repeat(scales, 32, axis=1)).astype(np.float32)
    np.testing.assert_array_equal(dequantize(*quantize_mxfp4(weight), "mxfp4"), weight)


def test_others_take_the_nearest_level():
    weight = np.random.default_rng(1).standard_normal((40, 256)).astype(np.float32)
    quantized, scales = quantize_mxfp4(weight)
    assert quantized.max() < 16
    steps = np.repeat(scales.astype(np.float64), 32, axis=1)
    assert np.array_equal(np.log2(scales.astype(np.float64)) % 1, np.zeros(scales.shape))
    largest = np.abs(weight).reshape(40, 8, 32).max(axis=2) / scales
    assert (largest >= 8).all()
    assert (largest < 16).all()
    nearest = np.abs(LEVELS["mxfp4"] * steps[..., None] - weight[..., None]).min(axis=2)
    np.testing.assert_allclose(np.abs(dequantize(quantized, scales, "mxfp4") - weight), nearest)


@pytest.mark.parametrize("size", [0.0, 1e-9, 2.0**-25])
def test_numbers_below_the_smallest_scale(size):
    quantized, scales = quantize_mxfp4(np.full((1, 32), size, np.float32))
    np.testing.assert_array_equal(scales, np.float16(2.0**-24 if size else 0))
    assert (np.abs(dequantize(quantized, scales, "mxfp4") - size) <= 2.0**-25).all()


def test_what_float16_cannot_hold_is_refused():
    with pytest.raises(OverflowError, match="a scale is beyond float16's range"):
        quantize_mxfp4(np.full((1, 32), 2.0**19, np.float32))
