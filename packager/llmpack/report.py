"""What was packed, or would be: parameters, bytes, bits per weight, memory of each rank.

In: plans (no weights are read). Out: a plain dict for programs and lines for people.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from llmpack.weights import DEFAULT_GROUP_SIZES, QUANTIZED, Quantization, RankWeight, num_bytes
from llmrun.artifact import KvCacheSpec, ModelConfig

_NAMES = {"linear": "projections", "head": "head", "embedding": "embedding", "norm": "norms", "bias": "biases"}
_ACTIVATION_ROWS = 512  # tokens of one prefill step, for the estimate of working memory


def bits_per_weight(plans: list[list[RankWeight]]) -> float:
    """Return the bits that a weight costs on average of those that a token reads, projections and head, scales included."""
    return _bits(w for plan in plans for w in plan if w.row.role in ("linear", "head"))


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
    """Return the bytes that a rank holds of each role; a head that is the embedding counts as the embedding."""
    held: dict[str, int] = dict.fromkeys(("linear", "head", "embedding", "norm", "bias"), 0)
    for weight in (w for w in plan if not w.is_shared):
        held[weight.row.role] += sum(item.num_bytes for item in weight.initializers)
    return held


def bytes_per_token(plan: list[RankWeight]) -> int:
    """Return the bytes of weights that a rank reads to decode one token.

    Of an embedding it reads a row, unless that is the head too.
    """
    return sum(item.num_bytes for w in plan if w.row.role != "embedding" for item in w.initializers)


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
    layer = hidden * (2 * query + 2 * key_value + 3 * config.intermediate_size + (4 if config.has_post_norms else 2))
    layer += 2 * config.head_dim * config.has_qk_norm
    layer += (query + 2 * key_value) * config.attention_bias + hidden * config.has_output_bias
    layer += (2 * config.intermediate_size + hidden) * config.mlp_bias
    embeddings = vocab * hidden * (1 if config.tie_word_embeddings else 2)
    widest = max(2 * config.intermediate_size // len(plans), 4 * hidden)
    ranks = []
    for rank, plan in enumerate(plans):
        weights = num_bytes(plan)
        cache = kv_cache.bytes_per_token * max_seq_len
        work = 4 * (_ACTIVATION_ROWS * (widest + 4 * hidden) + 2 * vocab)
        ranks.append(
            {
                "rank": rank,
                "weight_bytes": weights,
                "weight_bytes_per_token": bytes_per_token(plan),
                "weight_bytes_by_role": bytes_by_role(plan),
                "kv_cache_bytes": cache,
                "activation_bytes": work,
                "total_bytes": weights + cache + work,
            }
        )
    return {
        "parameters": config.num_hidden_layers * layer + embeddings + hidden,
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
    text = [
        f"{summary['parameters']:,} parameters, {summary['scheme']}{group}: {summary['bits_per_weight']:g} bits per weight"
        f" that a token reads, {summary['bits_per_weight_of_file']:g} of all; max_seq_len {summary['max_seq_len']}"
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
