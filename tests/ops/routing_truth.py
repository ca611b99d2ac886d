"""What FORMAT.md 5.16 says of a token's experts, those that all tokens share among them, in float64."""

from __future__ import annotations

import numpy as np

from llmpack_ops import reference


def route(
    logits: np.ndarray,
    chosen: int,
    *,
    is_normed: bool,
    num_shared: int = 0,
    is_sigmoid: bool = False,
    correction_bias: np.ndarray | None = None,
    factor: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Return experts and weights [T, chosen + num_shared] by logits [T, num_experts] and biases [num_experts], float32."""
    rows, number = logits.shape
    exact = logits.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        odds = 1 / (1 + np.exp(-exact)) if is_sigmoid else np.exp(exact - exact.max(axis=1, keepdims=True))
    p = odds if is_sigmoid else odds / odds.sum(axis=1, keepdims=True)
    order = logits if correction_bias is None else p.astype(np.float32) + correction_bias
    experts = np.sort(np.argsort(-order, axis=1, kind="stable")[:, :chosen], axis=1)
    weights = np.take_along_axis(p, experts, axis=1)
    if is_normed:
        weights = weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-20)
    weights[~np.isfinite(logits.max(axis=1))] = np.nan
    shared = np.broadcast_to(number + np.arange(num_shared), (rows, num_shared))
    return np.hstack([experts, shared]), np.hstack([factor * weights, np.ones((rows, num_shared))])


def moe(x: np.ndarray, experts: np.ndarray, weights: np.ndarray, gate_up: np.ndarray, down: np.ndarray) -> np.ndarray:
    """Return y [T, H] of x [T, H] by `route`'s experts and weights; gate_up [experts, 2 F, H], down [experts, H, F]."""
    y = np.zeros(x.shape)
    for token, own in enumerate(experts):
        h = reference.swiglu(gate_up[own] @ x[token].astype(np.float64))  # [slots, F]
        y[token] = weights[token] @ np.einsum("snk,sk->sn", down[own], h)
    return y
