"""The logits of a short sequence, computed from the packed bytes themselves: what `selfcheck.json` holds.

In: the finished weights.bin of every rank. Out: logits in float64, through the numpy reference of each operator, with the
sums over ranks that the subgraphs do. It shares no code with the kernels or the graphs, so agreement on a box shows that
packing, splitting, layout, kernels and collectives are right together. Weights are read as in `packed_rank.py`, a few tiles at
a time.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np

from llmpack.native import VECTORS
from llmpack.packed_rank import PackedRank
from llmpack.rope import attention_scale, of_layer, query_growth, rope_frequencies, rotation_scale
from llmpack.weights import CORRECTION_BIAS, HEAD, heads_per_rank
from llmpack_ops import reference
from llmrun.artifact import LARGEST_LOGIT, IncompatibleError, ModelConfig

NUM_IDS = VECTORS  # of a sequence, or of two side by side: one with activations as they are, one with rounded ones
# Largest allowed |difference|, as a share of the logits' root mean square, with its reason. Bounds per operator are in
# FORMAT 5.1; through a whole model only their accumulation can be stated, from the models in tests/e2e (see there). What
# 8-bit activations add up to depends on the model's depth and on the size of its weights, so it is computed as well.
_TOLERANCE = {
    "f32": 2e-4,  # float32 sums in another order
    "f16": 2e-2,  # and keys and values in float16
    "q8": 0.15,  # and activations in 8 bits
    "q4": 0.15,
}
# Router's logits so close that rounding may send a token to the other expert, by scheme: of float32, of float16 activations.
_NEAR_TIE = {"f32": 1e-4, "f16": 5e-3, "q8": 5e-3, "q4": 5e-3}
_ROUNDINGS = 3.0  # times what rounding activations changes: a kernel's own float32 sums round some the other way
_LARGEST = float(np.finfo(np.float32).max)  # of what kernels compute with
_TOO_LARGE = "no machine runs this model in float32: its weights are damaged, or were made for another type"


def forward(
    config: ModelConfig,
    ranks: list[PackedRank],
    kv_dtype: str,
    ids: np.ndarray,
    *,
    has_rounded: bool = False,
    near_tie: float | None = None,
) -> np.ndarray:
    """Run the split model over one sequence, and maybe over the same again, with what a machine may do otherwise.

    Args:
        config: the architecture.
        ranks: every rank's weights.
        kv_dtype: "float16" or "float32": keys and values are rounded to it, as in the cache.
        ids: [T] token ids.
        has_rounded: append the sequence with activations rounded to 8 bits; see `round_activations`.
        near_tie: append the sequence with experts chosen otherwise where the logits of the last one chosen and of the next are
            no further apart.

    Returns:
        logits of every position, [T times 1 to 3, vocab_size], float64.
    Raises:
        IncompatibleError: keys or values are beyond what the cache can hold, or a norm's input beyond what float32 can square.
    """
    num_tokens, num_sequences = len(ids), 1 + has_rounded + (near_tie is not None)
    is_rounded = np.repeat([False, has_rounded, False][:num_sequences], num_tokens)
    is_swapped = np.repeat(np.arange(num_sequences) == num_sequences - 1, num_tokens) & (near_tie is not None)
    num_heads, num_kv_heads = heads_per_rank(config, len(ranks))
    positions = np.tile(np.arange(num_tokens), num_sequences)
    empty = np.zeros((num_sequences, num_tokens, num_kv_heads, config.head_dim), kv_dtype)
    sequences = {
        "slot_mapping": np.arange(num_sequences * num_tokens),
        "query_start": np.arange(num_sequences + 1) * num_tokens,
        "seq_lens": np.full(num_sequences, num_tokens),
        "block_table": np.arange(num_sequences)[:, None],
    }

    largest_norm = math.sqrt(_LARGEST) * config.residual_multiplier  # graphs hold the stream divided by it

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        if not (np.linalg.norm(x, axis=1) < largest_norm).all():
            raise IncompatibleError(f"{name}: its input's squares are beyond float32's range; {_TOO_LARGE}.")
        return reference.rms_norm(x, ranks[0].vector(name), config.rms_norm_eps)

    def product(rank: PackedRank, name: str, x: np.ndarray, rows: np.ndarray | None = None, **part: Any) -> np.ndarray:
        group_size = rank.weights[name, False].group_size
        if group_size is not None:
            rounds = (is_rounded if rows is None else is_rounded[rows])[:, None]
            x = np.where(rounds, round_activations(x, group_size), x)
        return rank.matmul(name, x, **part)

    def project(rank: PackedRank, name: str, x: np.ndarray, *, has_bias: bool) -> np.ndarray:
        y = product(rank, name, x)
        return y + rank.vector(name, is_bias=True) if has_bias else y

    def mlp(i: int, x: np.ndarray) -> np.ndarray:
        """Return what all ranks give together, and a bias."""
        total = np.zeros_like(x)
        for rank in ranks:
            gate_up = project(rank, f"model.layers.{i}.mlp.gate_up_proj", x, has_bias=config.mlp_bias)
            total = total + product(rank, f"model.layers.{i}.mlp.down_proj", gate(gate_up))
        return total + ranks[0].vector(f"model.layers.{i}.mlp.down_proj", is_bias=True) if config.mlp_bias else total

    def moe(i: int, x: np.ndarray) -> np.ndarray:
        """Return the same of a layer of experts; only those that a token goes through are read."""
        name, total = f"model.layers.{i}.mlp", np.zeros_like(x)
        logits = project(ranks[0], f"{name}.gate", x, has_bias=config.has_expert_biases)
        k, act = config.num_experts_per_tok or 0, reference.swiglu
        if config.swiglu_limit is not None:
            act = partial(reference.clamped_swiglu, alpha=config.swiglu_alpha or 1.0, limit=config.swiglu_limit)
        scores: dict[str, Any] = {"sigmoid_scoring": config.sigmoid_scoring}
        if config.has_correction_bias:
            bias = np.tile(ranks[0].vector(f"{name}.gate.{CORRECTION_BIAS}", is_bias=True), (len(x), 1))
            _, p = reference.route(logits, config.num_experts or 0, norm_topk_prob=False, **scores)
            order = p.astype(np.float32) + bias
            # A score changes by a quarter of what its logit changes by, at most.
            bias[is_swapped] = (swap_near_ties(order, k, (near_tie or 0.0) / 4) - p)[is_swapped]
            scores["e_score_correction_bias"] = bias
        else:
            logits[is_swapped] = swap_near_ties(logits[is_swapped], k, near_tie or 0.0)
        experts, weights = reference.route(
            logits,
            k,
            norm_topk_prob=config.norm_topk_prob,
            num_shared_experts=config.num_shared_experts or 0,
            routed_scaling_factor=config.routed_scaling_factor,
            **scores,
        )
        used = np.unique(experts)
        for expert in used:
            rows, slots = np.nonzero(experts == expert)
            part = {"part": (int(expert), config.num_all_experts), "compares": expert in (used[0], used[-1])}
            share = weights[rows, slots][:, None]
            for rank in ranks:
                hidden = product(rank, f"{name}.experts.gate_up_proj", x[rows], rows, **part)
                if config.has_expert_biases:
                    hidden = hidden + rank.vector(f"{name}.experts.gate_up_proj", is_bias=True)[expert]
                total[rows] += share * product(rank, f"{name}.experts.down_proj", act(hidden), rows, **part)
            if config.has_expert_biases:
                total[rows] += share * ranks[0].vector(f"{name}.experts.down_proj", is_bias=True)[expert]
        return total

    gate = {"silu": reference.swiglu, "gelu_pytorch_tanh": reference.geglu}[config.activation]
    x = np.tile(ranks[0].embedding(ids), (num_sequences, 1)) * config.embedding_multiplier
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        normed, total = norm(f"{layer}.input_layernorm", x), np.zeros_like(x)
        for rank in ranks:
            qkv = project(rank, f"{layer}.self_attn.qkv_proj", normed, has_bias=config.attention_bias)
            if config.has_qk_norm:
                weights = (ranks[0].vector(f"{layer}.self_attn.{name}") for name in ("q_norm", "k_norm"))
                sizes = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "epsilon": config.rms_norm_eps}
                qkv = reference.qk_norm(qkv, *weights, **sizes)
            with np.errstate(over="ignore", invalid="ignore"):
                attended, _, _ = reference.paged_attention(
                    qkv, _cos_sin(config, i, positions), empty, empty, **sequences,
                    num_heads=num_heads, num_kv_heads=num_kv_heads, scale=attention_scale(config, i),
                    window=config.window_of(i), **(query_growth(config) or {}),
                    sinks=rank.vector(f"{layer}.self_attn.sinks", is_bias=True) if config.has_sinks else None,
                )  # fmt: skip
            if not np.isfinite(attended).all():
                advice = "--kv-dtype f32 can hold more" if kv_dtype == "float16" else _TOO_LARGE
                raise IncompatibleError(
                    f"{layer}.self_attn: its keys or values are beyond {kv_dtype}'s range; {advice}."
                )
            total = total + product(rank, f"{layer}.self_attn.o_proj", attended)
        if config.has_output_bias:
            total = total + ranks[0].vector(f"{layer}.self_attn.o_proj", is_bias=True)
        if config.has_post_norms:
            total = norm(f"{layer}.post_attention_layernorm", total)
        x = x + total * config.residual_multiplier
        normed = norm(f"{layer}.{'pre_feedforward' if config.has_post_norms else 'post_attention'}_layernorm", x)
        total = moe(i, normed) if config.is_sparse(i) else mlp(i, normed)
        if config.has_post_norms:
            total = norm(f"{layer}.post_feedforward_layernorm", total)
        x = x + total * config.residual_multiplier
    normed = norm("model.norm", x)
    logits = np.concatenate([product(rank, HEAD, normed) for rank in ranks], axis=1)[:, : config.vocab_size]
    return logits / config.logits_scaling


def _cos_sin(config: ModelConfig, layer: int, positions: np.ndarray) -> np.ndarray:
    """Return a layer's table for positions [T]: [T, head_dim]."""
    config = of_layer(config, layer)
    angles = positions[:, None] * rope_frequencies(config).astype(np.float64) * config.rotates(layer)
    scale = rotation_scale(config) if config.rotates(layer) else None
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1) * (1 if scale is None else scale)


def round_activations(x: np.ndarray, group_size: int) -> np.ndarray:
    """Round each row to 8 bits, with one step for `group_size` features, as a product may (FORMAT 5.1)."""
    groups = x.reshape(len(x), -1, group_size)
    steps = np.abs(groups).max(axis=2, keepdims=True, initial=0.0) / 127
    return (np.rint(groups / np.where(steps > 0, steps, 1)) * steps).reshape(x.shape)


def swap_near_ties(logits: np.ndarray, num_chosen: int, near_tie: float) -> np.ndarray:
    """Exchange, in each row, the last of the `num_chosen` largest with the next where they differ by `near_tie` at most."""
    if num_chosen >= logits.shape[1]:
        return logits
    order, rows = np.argsort(-logits, axis=1, kind="stable"), np.arange(len(logits))
    last, following = order[:, num_chosen - 1], order[:, num_chosen]
    near = logits[rows, last] - logits[rows, following] <= near_tie
    swapped = logits.copy()
    swapped[rows[near], last[near]] = logits[rows[near], following[near]] - near_tie
    swapped[rows[near], following[near]] = logits[rows[near], last[near]] + near_tie
    return swapped


def selfcheck(
    config: ModelConfig,
    ranks: list[PackedRank],
    scheme: str,
    kv_dtype: str,
    num_ids: int = NUM_IDS,
) -> dict[str, Any]:
    """Return the members of selfcheck.json (FORMAT 6.1); the ids are spread over the vocabulary by a fixed rule.

    Raises:
        IncompatibleError: as `forward`, or logits are beyond what a reader takes.
    """
    is_rounded = scheme in ("q8", "q4")
    length = max(1, num_ids // 2) if is_rounded else num_ids
    ids = (np.arange(1, length + 1, dtype=np.int64) * 2654435761) % config.vocab_size
    near_tie = _NEAR_TIE[scheme] if config.num_experts is not None else None
    rows = forward(config, ranks, kv_dtype, ids, has_rounded=is_rounded, near_tie=near_tie)
    ends = rows[length - 1 :: length]
    logits = ends[0]
    if not np.abs(logits).max() < LARGEST_LOGIT:
        raise IncompatibleError(
            f"{HEAD}: found a logit of {np.abs(logits).max():.2g}, expected less than {LARGEST_LOGIT:g}: its weights are"
            " damaged, or were made for another type."
        )
    scale = float(np.sqrt(np.mean(logits**2)))
    share = max(_TOLERANCE[scheme], _TOLERANCE["f16"] if kv_dtype == "float16" else 0.0)
    rounding = float(np.abs(ends[1] - logits).max()) if is_rounded else 0.0
    choosing = float(np.abs(ends[-1] - logits).max()) if near_tie is not None else 0.0
    tolerance = round(max(share * scale, _ROUNDINGS * rounding, 1e-3) + choosing, 4)
    return {"ids": ids.tolist(), "logits": [round(float(v), 4) + 0.0 for v in logits], "tolerance": tolerance}
