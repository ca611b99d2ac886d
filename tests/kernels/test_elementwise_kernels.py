"""Norms, SwiGLU and the choice of the largest logits, against float64 (FORMAT.md 5.2 to 5.4, 8.4)."""

from __future__ import annotations

import numpy as np
import pytest
from interpreter import launch

from llmpack import kernel_plan
from llmpack.kernel_plan import KernelSpec
from llmpack_ops import reference

HALF_ROUNDING = 2.0**-11  # of a result to float16
FLOAT_SUM = 1e-6  # a few float32 roundings, relative to the result
SMALLEST_HALF = 2.0**-25  # half of the last place of the smallest float16


def spec_of(op: str, hidden: int = 64, intermediate: int = 64) -> KernelSpec:
    return next(s for s in kernel_plan.elementwise(hidden, intermediate) if s.op == op)


def assert_half(y: np.ndarray, exact: np.ndarray) -> None:
    error = np.abs(y.astype(np.float64) - exact)
    assert (error <= (HALF_ROUNDING + FLOAT_SUM) * np.abs(exact) + SMALLEST_HALF).all()


@pytest.mark.parametrize("hidden", [2, 64, 100, 257], ids=["smallest", "power_of_two", "even", "odd"])
@pytest.mark.parametrize("rows", [1, 3])
def test_norms(hidden: int, rows: int) -> None:
    rng = np.random.default_rng([hidden, rows])
    residual = (rng.standard_normal((rows, hidden)) * 1e4).astype(
        np.float32
    )  # beyond what float16 could hold when squared
    weight = rng.standard_normal(hidden).astype(np.float32)
    y = np.zeros((rows, hidden), np.float16)
    launch(spec_of("rms_norm", hidden), x=residual, weight=weight, y=y, epsilon=1e-5)
    assert_half(y, reference.rms_norm(residual, weight, 1e-5))

    x = rng.standard_normal((rows, hidden)).astype(np.float16)
    exact, total = reference.add_rms_norm(x, residual, weight, 1e-5)
    launch(spec_of("add_rms_norm", hidden), x=x, residual=residual, weight=weight, y=y, epsilon=1e-5)
    np.testing.assert_allclose(residual, total, rtol=2.0**-24)
    assert_half(y, exact)


def test_norm_of_zeros_is_zero() -> None:
    y = np.ones((1, 64), np.float16)
    x = np.zeros((1, 64), np.float32)
    launch(spec_of("rms_norm"), x=x, weight=np.ones(64, np.float32), y=y, epsilon=1e-5)
    assert (y == 0).all()


@pytest.mark.parametrize("intermediate", [1, 1024, 1500], ids=["smallest", "one_block", "odd_tail"])
def test_swiglu(intermediate: int) -> None:
    gate_up = (np.random.default_rng(intermediate).standard_normal((2, 2 * intermediate)) * 4).astype(np.float16)
    y = np.full((2, intermediate), 7, np.float16)
    launch(spec_of("swiglu", intermediate=intermediate), gate_up=gate_up, y=y)
    assert_half(y, reference.swiglu(gate_up))


def test_swiglu_of_every_size_of_gate_saturates() -> None:
    gate = np.array([-65504, -100, -20, -0.0, 0, 1e-4, 20, 65504], np.float16)
    y = np.zeros((1, 8), np.float16)
    launch(spec_of("swiglu", intermediate=8), gate_up=np.concatenate([gate, np.full(8, 2, np.float16)])[None], y=y)
    exact = np.clip(reference.swiglu(np.concatenate([gate, np.full(8, 2, np.float16)])[None]), -65504, 65504)
    assert_half(y, exact)


def largest(logits: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    rows, vocab_size = logits.shape
    first, last = [s for s in kernel_plan.sampling(vocab_size) if s.constants["k"] == k]
    parts = -(-vocab_size // first.constants["chunk"])
    keys = np.zeros((rows, parts, k), np.int64)
    values, ids = np.zeros((rows, k), np.float32), np.zeros((rows, k), np.int32)
    launch(first, logits=logits, keys=keys)
    launch(last, keys=keys, values=values, ids=ids)
    return values, ids


@pytest.mark.parametrize("k", kernel_plan.TOP_K)
@pytest.mark.parametrize("vocab_size", [64, 2048, 5000], ids=["one_chunk", "full_chunk", "odd_tail"])
def test_the_largest_logits_in_order(k: int, vocab_size: int) -> None:
    logits = (np.random.default_rng(vocab_size).standard_normal((2, vocab_size)) * 10).astype(np.float32)
    values, ids = largest(logits, k)
    expected = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_array_equal(values, np.take_along_axis(logits, expected, 1))


@pytest.mark.parametrize("k", kernel_plan.TOP_K)
def test_equal_logits_come_in_order_of_ids(k: int) -> None:
    logits = np.zeros((1, 4500), np.float32)
    logits[0, ::2] = -0.0
    logits[0, 4400] = np.inf
    logits[0, :3] = -np.inf
    _, ids = largest(logits, k)
    np.testing.assert_array_equal(ids[0], [4400, *range(3, 2 + k)][:k])
