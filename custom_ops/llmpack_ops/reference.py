"""Numpy truth of every operator of FORMAT.md section 5, computed in float64.

Input: arrays as the operators get them, except weights, which are *logical*: [out_features, in_features], as they
are before `layout` puts them in the order that a kernel reads. Output: float64, so that a test compares a kernel with the exact
result and not with another rounding. The quantization of activations (5.1) is not imitated: the reference is exact, and
`activation_quantization_bound` says how far a kernel may be from it.

Nothing here is fast, and nothing here shares code with the kernels or the packager.

Symbols: T tokens, B sequences, H query heads, KV key-value heads, D head_dim.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
Array = NDArray[Any]


# What a quantized number stands for, in units of its scale (FORMAT.md 4.3).
LEVELS: dict[str, NDArray[np.int64]] = {
    "q4": np.array([-64, -52, -42, -32, -24, -18, -11, -5, 0, 6, 12, 19, 26, 34, 44, 56]),
    "q6": np.arange(64) - 32,
    "q8": np.arange(256) - 128,
    "mxfp4": np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12]),
}


def dequantize(quantized: Array, scales: Array, storage: str) -> Float64:
    """Restore the weights that quantized numbers stand for (FORMAT.md 4.3).

    Args:
        quantized: [out_features, in_features], uint8.
        scales: [out_features, in_features / group_size], float16.
        storage: "q4", "q6", "q8" or "mxfp4".
    Returns:
        [out_features, in_features]: level of the number * scale.
    Raises:
        ValueError: the number of scales does not divide in_features, or the rows differ.
    """
    rows, in_features = quantized.shape
    if scales.shape[0] != rows or in_features % scales.shape[1]:
        raise ValueError(f"scales {scales.shape} do not fit quantized {quantized.shape}")
    group_size = in_features // scales.shape[1]
    return LEVELS[storage][quantized] * np.repeat(scales.astype(np.float64), group_size, axis=1)


def embedding(ids: Array, weight: Array) -> Float64:
    """Return rows ids [T] of weight [num_embeddings, hidden_size], dequantized: [T, hidden_size] (5.8)."""
    return weight.astype(np.float64)[ids]


def matmul(x: Array, weight: Array) -> Float64:
    """Multiply x [tokens, in_features] with the transpose of weight [out_features, in_features] (5.1)."""
    return x.astype(np.float64) @ weight.astype(np.float64).T


def activation_quantization_bound(x: Array, weight: Array, group_size: int) -> Float64:
    """Bound the distance of y from `matmul(x, weight)` when x is quantized to 8 bits (5.1), float32 rounding apart.

    A quantized activation is at most half a step, absmax / 254, from the true one.

    Args:
        x: [tokens, in_features].
        weight: [out_features, in_features], dequantized.
        group_size: input features that share a step.
    Returns:
        [tokens, out_features], in the units of y.
    """
    tokens, in_features = x.shape
    groups = in_features // group_size
    absmax = np.abs(x.astype(np.float64)).reshape(tokens, groups, group_size).max(axis=2, initial=0.0)
    size = np.abs(weight.astype(np.float64)).reshape(len(weight), groups, group_size).sum(axis=2)
    return absmax / 254.0 @ size.T


def rms_norm(x: Array, weight: Array, epsilon: float) -> Float64:
    """Divide x [T, hidden_size] by its root mean square, times weight [hidden_size] (5.2)."""
    x64 = x.astype(np.float64)
    return x64 / np.sqrt((x64**2).mean(axis=1, keepdims=True) + epsilon) * weight.astype(np.float64)


def add_rms_norm(x: Array, residual: Array, weight: Array, epsilon: float) -> tuple[Float64, Float64]:
    """Return `rms_norm` of x + residual, and that sum; both [T, hidden_size] (5.3)."""
    total = x.astype(np.float64) + residual.astype(np.float64)
    return rms_norm(total, weight, epsilon), total


def rms_norm_add_rms_norm(
    x: Array, x_weight: Array, residual: Array, weight: Array, epsilon: float
) -> tuple[Float64, Float64]:
    """Return `add_rms_norm` of x with `rms_norm` by a weight of its own, and the sum; both [T, hidden_size] (5.15)."""
    return add_rms_norm(rms_norm(x, x_weight, epsilon), residual, weight, epsilon)


def qk_norm(
    qkv: Array, q_weight: Array, k_weight: Array, *, num_heads: int, num_kv_heads: int, epsilon: float
) -> Float64:
    """Return qkv [T, (H + 2 KV) D] with `rms_norm` of each head of q and of k, by weights [D] of their own (5.13)."""
    dim = len(q_weight)
    heads = qkv.astype(np.float64).reshape(-1, dim)
    which = np.arange(len(heads)) % (num_heads + 2 * num_kv_heads)
    is_q, is_k = which < num_heads, (which >= num_heads) & (which < num_heads + num_kv_heads)
    heads[is_q] = rms_norm(heads[is_q], q_weight, epsilon)
    heads[is_k] = rms_norm(heads[is_k], k_weight, epsilon)
    return heads.reshape(qkv.shape)


def swiglu(gate_up: Array) -> Float64:
    """Return silu(gate) * up, [T, F], where gate is the first half of the columns of gate_up [T, 2 F] (5.4)."""
    gate, up = np.split(gate_up.astype(np.float64), 2, axis=1)
    # e^-|g| cannot overflow; both branches are the logistic function.
    e = np.exp(-np.abs(gate))
    return gate * np.where(gate >= 0, 1.0, e) / (1.0 + e) * up


def clamped_swiglu(gate_up: Array, alpha: float, limit: float) -> Float64:
    """Return gate * sigmoid(alpha * gate) * (up + 1) in the same way, both cut off at `limit`, up at -limit too (5.16)."""
    gate, up = np.split(gate_up.astype(np.float64), 2, axis=1)
    gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return swiglu(np.concatenate([alpha * gate, up + 1], axis=1)) / alpha


def geglu(gate_up: Array) -> Float64:
    """Return gelu(gate) * up in the same way, of gelu's approximation by tanh (5.14)."""
    gate, up = np.split(gate_up.astype(np.float64), 2, axis=1)
    return gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) / 2 * up


def rotate(heads: Array, cos_sin: Array) -> Float64:
    """Rotate heads [T, heads, D] by cos_sin [T, D]; element j is paired with j + D / 2 (5.5)."""
    half = heads.shape[2] // 2
    cos, sin = (part.astype(np.float64)[:, None, :] for part in (cos_sin[:, :half], cos_sin[:, half:]))
    a, b = heads[..., :half].astype(np.float64), heads[..., half:].astype(np.float64)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=2)


def paged_attention(
    qkv: Array,
    cos_sin: Array,
    key_cache: Array,
    value_cache: Array,
    slot_mapping: Array,
    query_start: Array,
    seq_lens: Array,
    block_table: Array,
    sinks: Array | None = None,
    *,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    window: int | None = None,
    llama_4_scaling_beta: float = 0.0,
    original_max_position_embeddings: int = 1,
) -> tuple[Float64, Array, Array]:
    """Rotate, write into the cache, and compute causal grouped-query attention (5.5).

    Args:
        qkv: [T, (H + 2 KV) * D].
        cos_sin: [T, D], cos for the first D / 2 columns, sin for the others.
        key_cache: [num_blocks, block_size, KV, D] as in gpu.onnx (`positions_first` makes it of the others), float32 or
            float16; not changed.
        value_cache: of the same shape and type; not changed.
        slot_mapping: [T], `block * block_size + offset`, negative: not written.
        query_start: [B + 1], first token of each sequence, and T.
        seq_lens: [B], length of each sequence with this step's tokens.
        block_table: [B, max_blocks], cache blocks of each sequence in order.
        sinks: [H], a score of each head more, whose value is zero; None: there is none.
        num_heads: H.
        num_kv_heads: KV.
        scale: factor of the scores.
        window: positions that a token sees at most, its own among them; None: all.
        llama_4_scaling_beta: how queries grow along a sequence; 0: not.
        original_max_position_embeddings: positions from one step of that growth to the next.
    Returns:
        out [T, H * D], and the two caches after the step, of their own type.
    """
    tokens, head_dim = cos_sin.shape
    heads = qkv.reshape(tokens, num_heads + 2 * num_kv_heads, head_dim)
    q, k, v = np.split(heads, [num_heads, num_heads + num_kv_heads], axis=1)
    key_cache, value_cache = key_cache.copy(), value_cache.copy()
    flat_keys = key_cache.reshape(-1, num_kv_heads, head_dim)
    flat_values = value_cache.reshape(-1, num_kv_heads, head_dim)
    written = slot_mapping >= 0
    # The kernel rotates in float32 before it rounds to the cache's type; so does this, for equal roundings.
    flat_keys[slot_mapping[written]] = rotate(k, cos_sin)[written].astype(np.float32)
    flat_values[slot_mapping[written]] = v[written]

    q64 = rotate(q, cos_sin)
    block_size = key_cache.shape[1]
    out = np.zeros((tokens, num_heads, head_dim))
    for b, length in enumerate(seq_lens):
        first, end = query_start[b], query_start[b + 1]
        if first == end:
            continue  # its row of the block table may hold anything
        positions = np.arange(length)
        slots = block_table[b][positions // block_size].astype(np.int64) * block_size + positions % block_size
        keys = np.repeat(flat_keys[slots].astype(np.float64), num_heads // num_kv_heads, axis=1)
        values = np.repeat(flat_values[slots].astype(np.float64), num_heads // num_kv_heads, axis=1)
        for token in range(first, end):
            end_seen = length - (end - token) + 1
            seen = slice(max(0, end_seen - (window or end_seen)), end_seen)
            growth = 1 + llama_4_scaling_beta * np.log1p((end_seen - 1) // original_max_position_embeddings)
            scores = np.einsum("hd,phd->hp", q64[token] * growth, keys[seen]) * scale
            if sinks is not None:
                scores = np.concatenate([scores, sinks.astype(np.float64)[:, None]], axis=1)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            out[token] = np.einsum("hp,phd->hd", weights[:, : end_seen - seen.start], values[seen])
    return out.reshape(tokens, num_heads * head_dim), key_cache, value_cache


def positions_first(key_cache: Array, value_cache: Array) -> tuple[Array, Array]:
    """View the caches of a graph for the CPU (3.2) as [num_blocks, block_size, KV, D]."""
    return key_cache.transpose(0, 3, 1, 2), value_cache.transpose(0, 2, 1, 3)


def route(
    router_logits: Array,
    num_experts_per_tok: int,
    *,
    norm_topk_prob: bool,
    sigmoid_scoring: bool = False,
    e_score_correction_bias: Array | None = None,
    routed_scaling_factor: float = 1.0,
    num_shared_experts: int = 0,
) -> tuple[NDArray[np.int64], Float64]:
    """Choose each token's experts (5.16).

    Args:
        router_logits: [T, num_experts].
        num_experts_per_tok: how many of them a token gets.
        norm_topk_prob: whether the weights of those chosen sum to 1, `routed_scaling_factor` apart.
        sigmoid_scoring: whether an expert's score is the logistic function of its logit, not the softmax over all experts.
        e_score_correction_bias: [num_experts], added to the scores to choose, not to weigh; None: logits choose.
        routed_scaling_factor: of the weights of those chosen.
        num_shared_experts: how many experts more, numbered from num_experts on, every token goes through.

    Returns:
        (experts, weights), both [T, num_experts_per_tok + num_shared_experts]: those chosen in rising order, of equal ones the
        lower, then those shared, in rising order too, whose weights are 1.
    """
    tokens, num_experts = router_logits.shape
    logits = router_logits.astype(np.float64)
    highest = logits.max(axis=1, keepdims=True)
    if sigmoid_scoring:
        scores = np.where(np.isfinite(highest), np.exp(-np.logaddexp(0.0, -logits)), np.nan)
    else:
        odds = np.exp(logits - highest)
        scores = odds / odds.sum(axis=1, keepdims=True)
    order = router_logits
    if e_score_correction_bias is not None:
        order = scores.astype(np.float32) + e_score_correction_bias.astype(np.float32)
    experts = np.sort(np.argsort(-order, axis=1, kind="stable")[:, :num_experts_per_tok], axis=1)
    weights = np.take_along_axis(scores, experts, axis=1) * routed_scaling_factor
    if norm_topk_prob:
        weights /= np.maximum(np.take_along_axis(scores, experts, axis=1).sum(axis=1, keepdims=True), 1e-20)
    shared = np.tile(num_experts + np.arange(num_shared_experts), (tokens, 1))
    return np.concatenate([experts, shared], axis=1), np.concatenate([weights, np.ones(shared.shape)], axis=1)


def moe(
    x: Array,
    router_logits: Array,
    gate_up: Array,
    down: Array,
    num_experts_per_tok: int,
    *,
    norm_topk_prob: bool,
    gate_up_bias: Array | None = None,
    down_bias: Array | None = None,
    clamp: tuple[float, float] | None = None,
    sigmoid_scoring: bool = False,
    e_score_correction_bias: Array | None = None,
    routed_scaling_factor: float = 1.0,
) -> Float64:
    """Send each token through its experts, MLPs with SwiGLU, and sum what they give by weight (5.16).

    Args:
        x: [T, hidden_size].
        router_logits: [T, num_experts].
        gate_up: [A, 2 intermediate_size, hidden_size], dequantized; gate first. Those after num_experts are shared experts.
        down: [A, hidden_size, intermediate_size], dequantized.
        num_experts_per_tok: how many a token gets of those that are not shared.
        norm_topk_prob: as `route` has it, and so the last three.
        gate_up_bias: [A, 2 intermediate_size], of the gates and the ups.
        down_bias: [A, hidden_size].
        clamp: alpha and limit of `clamped_swiglu`, in place of SwiGLU.
        sigmoid_scoring: how experts are scored.
        e_score_correction_bias: [num_experts], what chooses beside the scores.
        routed_scaling_factor: of the weights of those chosen.

    Returns:
        [T, hidden_size].
    """
    y = np.zeros(x.shape)
    experts, weights = route(
        router_logits,
        num_experts_per_tok,
        norm_topk_prob=norm_topk_prob,
        sigmoid_scoring=sigmoid_scoring,
        e_score_correction_bias=e_score_correction_bias,
        routed_scaling_factor=routed_scaling_factor,
        num_shared_experts=len(gate_up) - router_logits.shape[1],
    )
    for token, slot in np.ndindex(experts.shape):
        expert = experts[token, slot]
        row = matmul(x[token : token + 1], gate_up[expert])
        row = row if gate_up_bias is None else row + gate_up_bias[expert]
        row = swiglu(row) if clamp is None else clamped_swiglu(row, *clamp)
        z = matmul(row, down[expert])[0]
        y[token] += weights[token, slot] * (z if down_bias is None else z + down_bias[expert])
    return y


def all_reduce(parts: list[Array]) -> NDArray[np.float32]:
    """Sum the ranks' float32 arrays, added in float32 in rank order (5.6): the exact bits of every rank."""
    total = parts[0].astype(np.float32)
    for part in parts[1:]:
        total = total + part
    return total


def all_gather(parts: list[Array], out_features: int) -> Array:
    """Put the ranks' columns [R, C] side by side, cut to out_features columns (5.7): the exact bits of every rank."""
    return np.concatenate(parts, axis=1)[:, :out_features]
