"""Quantized weights are near, better than by one step alone, and survive extremes; the oracle is float64 arithmetic."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpack.quantize import CANDIDATES, quantize_q4, quantize_q6, quantize_q8
from llmpack_ops.reference import LEVELS, dequantize

CASES = [(quantize_q4, "q4"), (quantize_q6, "q6"), (quantize_q8, "q8")]
SEARCHED = CASES[:2]


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


@pytest.mark.parametrize(("quantize", "storage"), SEARCHED)
def test_no_group_is_worse_than_with_the_step_that_keeps_its_largest_weight(quantize, storage):
    levels = LEVELS[storage]

    @settings(max_examples=50, deadline=None)
    @given(seed=st.integers(0, 1000), group_size=st.sampled_from([32, 64, 128]), exponent=st.integers(-5, 4))
    def check(seed, group_size, exponent):
        weight = random_weight(seed, exponent)
        groups = weight.astype(np.float64).reshape(5, -1, group_size)
        extreme = np.take_along_axis(groups, np.abs(groups).argmax(axis=2, keepdims=True), axis=2)
        step = extreme / levels[0]  # not yet rounded to float16: that can shift a weight to another level
        nearest = levels[np.abs((groups / step)[..., None] - levels).argmin(axis=3)]
        quantized, scales = quantize(weight, group_size)
        assert quantized.max() < len(levels)
        error = ((dequantize(quantized, scales, storage) - weight) ** 2).reshape(groups.shape).sum(axis=2)
        # The refitted scale is rounded to float16: 2**-11 relative, 2**-25 absolute, on weights of up to 64 steps.
        rounding = 2.0**-20 * (groups**2).sum(axis=2) + group_size * (64 * 2.0**-25) ** 2
        assert (error <= ((nearest * step - groups) ** 2).sum(axis=2) + rounding).all()

    check()


@pytest.mark.parametrize(("quantize", "storage", "gain"), [(quantize_q4, "q4", 0.97), (quantize_q6, "q6", 0.99)])
def test_search_pays_on_ordinary_weights(quantize, storage, gain):
    weight = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    plain, searched = (
        np.sqrt(np.mean((dequantize(*quantize(weight, 64, candidates), storage) - weight) ** 2))
        for candidates in (CANDIDATES[storage][:1], CANDIDATES[storage])
    )
    assert searched < gain * plain


def test_the_uneven_codebook_has_less_error_at_group_64_than_even_levels_at_32():
    """The reason of the format, on Gaussian weights: 4.25 bits against llama.cpp's Q4_0 at 4.5."""
    weight = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    groups = weight.reshape(64, -1, 32)
    step = np.take_along_axis(groups, np.abs(groups).argmax(axis=2, keepdims=True), axis=2) / -8
    even = (np.clip(np.rint(groups / step), -8, 7) * step).reshape(weight.shape)
    ours = dequantize(*quantize_q4(weight, 64), "q4")
    assert np.square(ours - weight).mean() < 0.95 * np.square(even - weight).mean()


@pytest.mark.parametrize(("quantize", "storage"), CASES)
def test_largest_weight_of_a_group_is_kept_whatever_its_sign(quantize, storage):
    weight = np.zeros((2, 32), np.float32)
    weight[0, 3], weight[1, 5] = 4.0, -4.0
    values = dequantize(*quantize(weight, 32), storage)
    np.testing.assert_allclose(values, weight, rtol=2**-11)


@pytest.mark.parametrize(("quantize", "storage"), CASES)
def test_zero_groups_stay_zero(quantize, storage):
    quantized, scales = quantize(np.zeros((3, 64), np.float32), 32)
    assert (LEVELS[storage][quantized] == 0).all()
    assert (scales == 0).all()


@pytest.mark.parametrize(("quantize", "storage"), CASES)
def test_tiny_groups_do_not_become_garbage(quantize, storage):
    weight = np.full((1, 32), 1e-9, np.float32)
    quantized, scales = quantize(weight, 32)
    assert np.abs(dequantize(quantized, scales, storage)).max() <= 1e-5


@pytest.mark.parametrize(
    ("quantize", "storage", "largest", "loss"),
    [
        (quantize_q4, "q4", 1e-6, 0.3),
        (quantize_q4, "q4", 2e-6, 0.15),
        (quantize_q6, "q6", 3e-7, 0.2),
        (quantize_q6, "q6", 8e-7, 0.08),
        (quantize_q8, "q8", 3e-7, 0.2),
        (quantize_q8, "q8", 3e-6, 0.02),
        (quantize_q8, "q8", 1e-5, 0.01),
    ],
)
def test_small_groups_lose_no_more_than_float16_must(quantize, storage, largest, loss):
    """Largest weight / levels is less than float16's smallest number, or little more: nearest would be zero, or too small."""
    weight = np.random.default_rng(0).standard_normal((64, 64))
    weight *= largest / np.abs(weight).max(axis=1, keepdims=True)
    values = dequantize(*quantize(weight.astype(np.float32), 64), storage)
    assert np.linalg.norm(values - weight) < loss * np.linalg.norm(weight)


@pytest.mark.parametrize(("quantize", "storage"), CASES)
def test_scales_beyond_float16_are_refused(quantize, storage):
    with pytest.raises(OverflowError, match="float16"):
        quantize(np.full((1, 32), 1e9, np.float32), 32)


@pytest.mark.parametrize(("quantize", "storage"), CASES)
def test_a_row_does_not_depend_on_its_neighbours(quantize, storage):
    weight = np.random.default_rng(1).standard_normal((16, 64)).astype(np.float32)
    whole, rows = quantize(weight, 32), [quantize(weight[i : i + 1], 32) for i in range(16)]
    assert np.array_equal(whole[0], np.concatenate([q for q, _ in rows]))
    assert np.array_equal(whole[1], np.concatenate([s for _, s in rows]))
