"""RMSNorm, AddRMSNorm, QKNorm, SwiGLU and GeGLU against float64 (FORMAT.md 5.2 to 5.4, 5.13, 5.14)."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import TOLERANCES, Node, random_x
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmpack_ops import reference

EPSILON = 1e-5
SIZES = [1, 2, 15, 16, 17, 64, 2048, 4099]


def assert_close(y: np.ndarray, exact: np.ndarray, tolerance: float) -> None:
    assert y.shape == exact.shape
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, exact, rtol=tolerance, atol=tolerance * 1e-3)


def rms_norm(x: np.ndarray, weight: np.ndarray, threads: int = 1) -> np.ndarray:
    return Node("RMSNorm", {"x": x, "weight": weight}, initializers=("weight",), attributes={"epsilon": EPSILON}).run(
        threads
    )[0]


def add_rms_norm(x: np.ndarray, residual: np.ndarray, weight: np.ndarray, threads: int = 1) -> list[np.ndarray]:
    inputs = {"x": x, "residual": residual, "weight": weight}
    return Node("AddRMSNorm", inputs, ("y", "sum"), ("weight",), {"epsilon": EPSILON}).run(threads)


def qk_norm(x: np.ndarray, q: np.ndarray, k: np.ndarray, heads: int, kv_heads: int, threads: int = 1) -> np.ndarray:
    sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "epsilon": EPSILON}
    inputs = {"qkv": x, "q_weight": q, "k_weight": k}
    return Node("QKNorm", inputs, initializers=("q_weight", "k_weight"), attributes=sizes).run(threads)[0]


def glu(op: str, gate_up: np.ndarray, threads: int = 1) -> np.ndarray:
    return Node(op, {"gate_up": gate_up}).run(threads)[0]


GLU = {"SwiGLU": reference.swiglu, "GeGLU": reference.geglu}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_rms_norm(isa: str, tokens: int, size: int) -> None:
    x, weight = random_x(tokens, size), random_x(1, size, 2)[0]
    assert_close(rms_norm(x, weight), reference.rms_norm(x, weight, EPSILON), TOLERANCES["norm"])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_add_rms_norm(isa: str, tokens: int, size: int) -> None:
    x, residual, weight = random_x(tokens, size), random_x(tokens, size, 3), random_x(1, size, 2)[0]
    y, total = add_rms_norm(x, residual, weight)
    np.testing.assert_array_equal(total, x + residual)
    # Compared with the norm of the rounded sum: where x and residual cancel, little but rounding is left of the exact one.
    assert_close(y, reference.rms_norm(total, weight, EPSILON), TOLERANCES["norm"])
    exact_y, exact_total = reference.add_rms_norm(x, residual, weight, EPSILON)
    np.testing.assert_allclose(total, exact_total, atol=1e-6)
    np.testing.assert_allclose(y, exact_y, atol=1e-5)


@pytest.mark.parametrize("dim", [2, 16, 80, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 2)], ids=["one_head", "grouped"])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_qk_norm(isa: str, tokens: int, heads: int, kv_heads: int, dim: int) -> None:
    x = random_x(tokens, (heads + 2 * kv_heads) * dim) * 30
    q, k = random_x(1, dim, 2)[0], random_x(1, dim, 3)[0]
    y = qk_norm(x, q, k, heads, kv_heads)
    exact = reference.qk_norm(x, q, k, num_heads=heads, num_kv_heads=kv_heads, epsilon=EPSILON)
    assert_close(y, exact, TOLERANCES["norm"])
    values = (heads + kv_heads) * dim
    np.testing.assert_array_equal(y[:, values:], x[:, values:])
    for head, weight in ((0, q), (heads, k)):  # the operators' and the reference's norms agree, head by head
        one = x[:, head * dim : (head + 1) * dim]
        np.testing.assert_array_equal(y[:, head * dim : (head + 1) * dim], rms_norm(one, weight))


def test_rms_norm_of_zeros_is_zero(isa: str) -> None:
    assert not rms_norm(np.zeros((2, 33), np.float32), np.ones(33, np.float32)).any()


@pytest.mark.parametrize("op", GLU)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_glu(isa: str, tokens: int, size: int, op: str) -> None:
    gate_up = random_x(tokens, 2 * size)
    y, exact = glu(op, gate_up), GLU[op](gate_up)
    assert y.dtype == np.float32
    # Of a gate far below 0, gelu's tails cancel in float64 too: both are nearly 0.
    np.testing.assert_allclose(y, exact, rtol=TOLERANCES["swiglu"] * 4, atol=1e-7)


def test_geglu_is_that_of_torch(isa: str) -> None:
    torch = pytest.importorskip("torch")
    gate_up = random_x(4, 600) * 3
    gate, up = (torch.from_numpy(part.astype(np.float64)) for part in np.split(gate_up, 2, axis=1))
    exact = torch.nn.functional.gelu(gate, approximate="tanh") * up
    np.testing.assert_allclose(glu("GeGLU", gate_up), exact.numpy(), rtol=TOLERANCES["swiglu"] * 4, atol=1e-6)


@pytest.mark.parametrize("op", GLU)
def test_glu_of_every_size_of_gate(isa: str, op: str) -> None:
    gates = np.concatenate([np.linspace(-200, 200, 40001), [-88.8, -87.0, 0.0, -0.0, 88.8, 3e38, -3e38, 1e-40]])
    gate_up = np.stack([gates, np.ones_like(gates)]).T.astype(np.float32).reshape(-1, 2)
    y = glu(op, gate_up)
    with np.errstate(over="ignore"):
        exact = GLU[op](gate_up)
    atol = 1e-35 if op == "SwiGLU" else 1e-6
    np.testing.assert_allclose(y, exact, rtol=TOLERANCES["swiglu"], atol=atol)


@pytest.mark.parametrize("op", GLU)
@pytest.mark.parametrize("column", [0, 16, 40])
def test_nan_stays_in_its_token(isa: str, column: int, op: str) -> None:
    x, weight = random_x(4, 41), np.ones(41, np.float32)
    gate_up = random_x(4, 82)
    x[2, column] = gate_up[2, column] = np.nan
    y, total = add_rms_norm(x, np.ones_like(x), weight)
    assert np.isnan(y[2]).all()
    assert np.isnan(total[2]).sum() == 1
    gated = glu(op, gate_up)
    assert np.isnan(gated[2, column])
    assert np.isnan(gated).sum() == 1
    assert np.isfinite(np.delete(y, 2, 0)).all()


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tokens=st.integers(1, 60), size=st.integers(1, 1200))
def test_threads_and_batch_give_the_same_bits(isa: str, tokens: int, size: int) -> None:
    x, residual, weight = random_x(tokens, size), random_x(tokens, size, 3), random_x(1, size, 2)[0]
    one, two = add_rms_norm(x, residual, weight, 1), add_rms_norm(x, residual, weight, 2)
    alone = add_rms_norm(x[-1:], residual[-1:], weight)
    for a, b, c in zip(one, two, alone, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a[-1:], c)
    np.testing.assert_array_equal(one[0], rms_norm(one[1], weight))
    heads = random_x(tokens, 4 * size)
    q, k = random_x(1, size, 2)[0][:256], random_x(1, size, 3)[0][:256]
    heads = heads[:, : 4 * len(q)].copy()
    np.testing.assert_array_equal(qk_norm(heads, q, k, 2, 1, 1), qk_norm(heads, q, k, 2, 1, 2))
    np.testing.assert_array_equal(qk_norm(heads, q, k, 2, 1)[-1:], qk_norm(heads[-1:], q, k, 2, 1))
    gate_up = random_x(tokens, 2 * size)
    for op in GLU:
        np.testing.assert_array_equal(glu(op, gate_up, 1), glu(op, gate_up, 2))
        np.testing.assert_array_equal(glu(op, gate_up)[-1:], glu(op, gate_up[-1:]))
