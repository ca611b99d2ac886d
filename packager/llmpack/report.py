"""What was packed, or would be: parameters, bytes, bits per weight, memory of each rank.

In: plans (no weights are read). Out: a plain dict for programs and lines for people.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from llmpack.weights import DEFAULT_GROUP_SIZES, QUANTIZED, Quantization, RankWeight, Role, num_bytes
from llmrun.artifact import KvCacheSpec, ModelConfig

_NAMES: dict[Role, str] = {
    **{"linear": "projections", "experts": "experts", "router": "routers"},
    **{"head": "head", "embedding": "embedding", "norm": "norms", "bias": "biases"},
}
_OF_EXPERTS = ("experts", "router")
_ACTIVATION_ROWS = 512  # tokens of one prefill step, for the estimate of working memory


def bits_per_weight(plans: list[list[RankWeight]]) -> float:
    """Return the bits that a weight costs on average of those that tokens read: all matrices but routers, with scales."""
    return _bits(w for plan in plans for w in plan if w.row.role in ("linear", "experts", "head"))


def bits_per_weight_of_file(plans: list[list[RankWeight]]) -> float:
    """Return the bits that a weight costs on average of all that the files hold; what several ranks hold counts for each."""
    return _bits(w for plan in plans for w in plan if not w.is_shared)


def _bits(weights: Iterable[RankWeight]) -> float:
    bits = count = 0
    for weight in weights:
        bits += 8 * sum(item.num_bytes for item in weight.initializers)
        count += weight.num_rows * weight.num_columns
    return round(bits / count, 4)


def bytes_by_role(plan: list[RankWeight]) -> dict[str, int]:
    """Return the bytes that a rank holds of each role that the model has; a head that is the embedding counts as that."""
    has_experts = any(weight.row.role in _OF_EXPERTS for weight in plan)
    held: dict[str, int] = {role: 0 for role in _NAMES if has_experts or role not in _OF_EXPERTS}
    for weight in (w for w in plan if not w.is_shared):
        held[weight.row.role] += sum(item.num_bytes for item in weight.initializers)
    return held


def bytes_per_token(config: ModelConfig, plan: list[RankWeight]) -> int:
    """Return the bytes of weights that a rank reads to decode one token.

    Of an embedding it reads a row, unless that is the head too, and of experts those that the token goes through.
    """
    of_all = of_experts = 0
    for weight in (w for w in plan if w.row.role != "embedding"):
        size = sum(item.num_bytes for item in weight.initializers)
        if weight.row.role == "experts" or weight.row.num_experts is not None:
            of_experts += size
        else:
            of_all += size
    return of_all + of_experts * config.num_all_experts_per_tok // (config.num_all_experts or 1)


def summarise(
    config: ModelConfig,
    quantization: Quantization,
    plans: list[list[RankWeight]],
    kv_cache: KvCacheSpec,
    max_seq_len: int,
    *,
    is_group_size_default: bool,
) -> dict[str, Any]:
    """Return the figures of an artifact; all sizes in bytes."""
    hidden, vocab = config.hidden_size, config.vocab_size
    query, key_value = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    layer = hidden * (2 * query + 2 * key_value + (4 if config.has_post_norms else 2))
    layer += 2 * config.head_dim * config.has_qk_norm + config.num_attention_heads * config.has_sinks
    layer += (query + 2 * key_value) * config.attention_bias + hidden * config.has_output_bias
    dense = 3 * hidden * config.intermediate_size + (2 * config.intermediate_size + hidden) * config.mlp_bias
    inner, num_experts = config.moe_intermediate_size or 0, config.num_experts or 0
    expert = 3 * hidden * inner + (2 * inner + hidden) * config.has_expert_biases
    num_sparse = sum(map(config.is_sparse, range(config.num_hidden_layers)))
    router = num_experts * (hidden + config.has_expert_biases + config.has_correction_bias)
    mlps = (config.num_hidden_layers - num_sparse) * dense + num_sparse * (config.num_all_experts * expert + router)
    unused = num_sparse * (num_experts - (config.num_experts_per_tok or 0)) * expert
    embeddings = vocab * hidden * (1 if config.tie_word_embeddings else 2)
    parameters = config.num_hidden_layers * layer + mlps + embeddings + hidden
    inner = config.intermediate_size if config.has_dense_layers else config.moe_intermediate_size or 0
    widest = max(2 * inner // len(plans), 4 * hidden)
    ranks = []
    for rank, plan in enumerate(plans):
        weights = num_bytes(plan)
        cache = kv_cache.bytes_per_token * max_seq_len
        work = 4 * (_ACTIVATION_ROWS * (widest + 4 * hidden) + 2 * vocab)
        ranks.append(
            {
                "rank": rank,
                "weight_bytes": weights,
                "weight_bytes_per_token": bytes_per_token(config, plan),
                "weight_bytes_by_role": bytes_by_role(plan),
                "kv_cache_bytes": cache,
                "activation_bytes": work,
                "total_bytes": weights + cache + work,
            }
        )
    return {
        "parameters": parameters,
        "parameters_per_token": parameters - unused,
        "scheme": quantization.scheme,
        "group_size": quantization.group_size if quantization.scheme in QUANTIZED else None,
        "is_group_size_default": is_group_size_default,
        "bits_per_weight": bits_per_weight(plans),
        "bits_per_weight_of_file": bits_per_weight_of_file(plans),
        "max_seq_len": max_seq_len,
        "shards": len(plans),
        "ranks": ranks,
    }


def lines(summary: dict[str, Any]) -> list[str]:
    """Return the same, and `notes` about what was done otherwise than the files say, for people."""
    group = f", group_size {summary['group_size']}" if summary["group_size"] else ""
    of_all, of_token = summary["parameters"], summary["parameters_per_token"]
    parameters = f"{of_all:,} parameters" + (f", {of_token:,} of them for a token" if of_token < of_all else "")
    text = [
        f"{parameters}, {summary['scheme']}{group}: {summary['bits_per_weight']:g} bits per weight that a token reads,"
        f" {summary['bits_per_weight_of_file']:g} of all; max_seq_len {summary['max_seq_len']}"
    ]
    if summary["group_size"] not in (None, DEFAULT_GROUP_SIZES[0]) and summary["is_group_size_default"]:
        text.append(f"  group_size {DEFAULT_GROUP_SIZES[0]} does not divide every in_features per rank")
    for rank in summary["ranks"]:
        text.append(
            f"rank {rank['rank']}: {_size(rank['weight_bytes'])} weights + {_size(rank['kv_cache_bytes'])} KV cache (one full"
            f" sequence) + {_size(rank['activation_bytes'])} activations = {_size(rank['total_bytes'])}"
        )
        held = ", ".join(f"{_NAMES[role]} {_size(size)}" for role, size in rank["weight_bytes_by_role"].items() if size)
        text.append(f"  of the weights: {held}")
    return text + [f"note: {note}" for note in summary["notes"]]


def _size(num_bytes_: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes_ >= size:
            return f"{num_bytes_ / size:.2f} {unit}"
    return f"{num_bytes_} B"
