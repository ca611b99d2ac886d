"""Experts with biases, a clamped SwiGLU and weights in mxfp4: how they are stored, and float64 truth (FORMAT.md 4.3, 5.16)."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from helpers import Projection, layout_q4, layout_scales, random_projection

# What gpt-oss has: swiglu_alpha, swiglu_limit.
SWIGLU = (1.702, 7.0)


def e2m1(codes: np.ndarray) -> np.ndarray:
    """Return what 4-bit codes stand for, by the bits of OCP Microscaling 1.0, 5.3.3: sign, two of the exponent, mantissa."""
    exponent, mantissa = codes >> 1 & 3, codes & 1
    size = np.where(exponent == 0, mantissa / 2, 2.0 ** (exponent - 1.0) * (1 + mantissa / 2))
    return np.where(codes >> 3 & 1, -size, size)


def mxfp4_projection(codes: np.ndarray, scales: np.ndarray) -> Projection:
    """`scales` are those stored, float16: half of those that the standard multiplies e2m1 with."""
    weight = e2m1(codes) * np.repeat(2 * scales.astype(np.float64), 32, axis=1)
    stored = {"weight": layout_q4(codes), "scales": layout_scales(scales)}
    return Projection("mxfp4", weight, stored, {"out_features": len(codes), "group_size": 32})


@lru_cache(maxsize=64)
def random_experts(storage: str, N: int, K: int, group_size: int = 32, seed: int = 0) -> Projection:
    """`helpers.random_projection`, of mxfp4 too."""
    if storage != "mxfp4":
        return random_projection(storage, N, K, group_size, seed)
    rng = np.random.default_rng([seed, N, K])
    scales = 2.0 ** rng.integers(-8, -3, (N, K // 32))
    return mxfp4_projection(rng.integers(0, 16, (N, K)).astype(np.uint8), scales.astype(np.float16))


def activation(gate: np.ndarray, up: np.ndarray, swiglu: tuple[float, float] | None) -> np.ndarray:
    """Return act of 5.16 in float64; `swiglu`: alpha and limit, None: silu(gate) * up."""
    if swiglu is None:
        return gate / (1 + np.exp(-gate)) * up
    alpha, limit = swiglu
    gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return gate / (1 + np.exp(-alpha * gate)) * (up + 1)


def moe(
    x: np.ndarray,
    experts: np.ndarray,
    weights: np.ndarray,
    gate_up: np.ndarray,
    down: np.ndarray,
    gate_up_bias: np.ndarray | None = None,
    down_bias: np.ndarray | None = None,
    swiglu: tuple[float, float] | None = None,
) -> np.ndarray:
    """Return y of 5.16 in float64; experts and their weights [T, k], gate_up [E, 2F, H], down [E, H, F]."""
    y, width = np.zeros(x.shape), down.shape[2]
    for t, i in np.ndindex(experts.shape):
        e = experts[t, i]
        sums = gate_up[e] @ x[t].astype(np.float64)
        if gate_up_bias is not None:
            sums = sums + gate_up_bias[e]
        z = down[e] @ activation(sums[:width], sums[width:], swiglu)
        y[t] += weights[t, i] * (z if down_bias is None else z + down_bias[e])
    return y
