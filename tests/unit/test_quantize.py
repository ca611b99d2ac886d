"""Quantized weights are near, better than Q4_0's, and survive extremes; the oracle is float64 arithmetic."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpack.quantize import CANDIDATES, quantize_q4, quantize_q8

CASES = [(quantize_q4, 8, 0, 15), (quantize_q8, 128, 1, 255)]


def random_weight(seed, exponent):
    return (np.random.default_rng(seed).standard_normal((5, 256)) * 10.0**exponent / 4).astype(np.float32)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1000), group_size=st.sampled_from([32, 64, 128]), exponent=st.integers(-6, 5))
def test_every_8_bit_weight_is_within_half_a_step(seed, group_size, exponent):
    weight = random_weight(seed, exponent)
    quantized, scales = quantize_q8(weight, group_size)
    assert quantized.dtype == np.uint8
    assert scales.dtype == np.float16
    assert quantized.min() >= 1
    steps = np.repeat(scales.astype(np.float64), group_size, axis=1)
    error = np.abs((quantized.astype(np.float64) - 128) * steps - weight)
    # The scale itself is rounded to float16 (2**-11 relative, 2**-25 absolute where it is subnormal).
    assert (error <= 0.57 * np.abs(steps) + 128 * 2.0**-25).all()


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1000), group_size=st.sampled_from([32, 64, 128]), exponent=st.integers(-6, 4))
def test_no_4_bit_group_is_worse_than_by_the_rule_of_q4_0(seed, group_size, exponent):
    weight = random_weight(seed, exponent)
    groups = weight.astype(np.float64).reshape(5, -1, group_size)
    extreme = np.take_along_axis(groups, np.abs(groups).argmax(axis=2, keepdims=True), axis=2)
    step = extreme / -8  # not yet rounded to float16: that can shift a weight to another level, for better or worse
    levels = np.clip(np.rint(np.divide(groups, step, out=np.zeros_like(groups), where=step != 0)), -8, 7)
    quantized, scales = quantize_q4(weight, group_size)
    assert quantized.max() <= 15
    ours = (quantized.reshape(groups.shape) - 8.0) * scales.astype(np.float64)[..., None]
    error, error_of_q4_0 = ((ours - groups) ** 2).sum(axis=2), ((levels * step - groups) ** 2).sum(axis=2)
    # The refitted scale is rounded to float16: 2**-11 relative, 2**-25 absolute, on weights of up to 8 steps.
    assert (error <= error_of_q4_0 + 2.0**-20 * (groups**2).sum(axis=2) + group_size * (8 * 2.0**-25) ** 2).all()


def test_search_pays_on_ordinary_weights():
    weight = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    plain, searched = (quantize_q4(weight, 32, np.array(c, np.float32)) for c in ([-8], CANDIDATES))
    plain, searched = (
        np.sqrt(np.mean(((q - 8.0) * np.repeat(s.astype(np.float64), 32, axis=1) - weight) ** 2))
        for q, s in (plain, searched)
    )
    assert searched < 0.97 * plain


def test_largest_weight_of_a_group_is_kept_whatever_its_sign():
    weight = np.zeros((2, 32), np.float32)
    weight[0, 3], weight[1, 5] = 4.0, -4.0
    quantized, scales = quantize_q4(weight, 32)
    values = (quantized.astype(np.float64) - 8) * scales.astype(np.float64)
    assert values[0, 3] == 4.0
    assert values[1, 5] == -4.0


@pytest.mark.parametrize(("quantize", "zero", "low", "high"), CASES)
def test_zero_groups_stay_zero(quantize, zero, low, high):
    quantized, scales = quantize(np.zeros((3, 64), np.float32), 32)
    assert (quantized == zero).all()
    assert (scales == 0).all()


@pytest.mark.parametrize(("quantize", "zero", "low", "high"), CASES)
def test_tiny_groups_do_not_become_garbage(quantize, zero, low, high):
    weight = np.full((1, 32), 1e-9, np.float32)
    quantized, scales = quantize(weight, 32)
    assert np.abs((quantized.astype(np.float64) - zero) * scales[0, 0]).max() <= 1e-6


@pytest.mark.parametrize(("quantize", "zero", "low", "high"), CASES)
def test_scales_beyond_float16_are_refused(quantize, zero, low, high):
    with pytest.raises(OverflowError, match="float16"):
        quantize(np.full((1, 32), 1e9, np.float32), 32)


@pytest.mark.parametrize(("quantize", "zero", "low", "high"), CASES)
def test_a_row_does_not_depend_on_its_neighbours(quantize, zero, low, high):
    weight = np.random.default_rng(1).standard_normal((16, 64)).astype(np.float32)
    whole, rows = quantize(weight, 32), [quantize(weight[i : i + 1], 32) for i in range(16)]
    assert np.array_equal(whole[0], np.concatenate([q for q, _ in rows]))
    assert np.array_equal(whole[1], np.concatenate([s for _, s in rows]))
