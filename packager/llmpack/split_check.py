"""Whether a model can be split over so many ranks with such groups of weights, and what would work where it cannot.

In: a ModelConfig, a Quantization and a number of ranks. Out: nothing, or an error that names the numbers.
"""

from __future__ import annotations

import math
from dataclasses import replace

from llmpack.weights import DEFAULT_GROUP_SIZES, GROUP_SIZES, MAX_SHARDS, Quantization
from llmrun.artifact import ROW_TILE, ModelConfig, UsageError


def choose_group_size(config: ModelConfig, quantization: Quantization, shards: int) -> Quantization:
    """Return the quantization with the first default group size that divides this split; unchanged where none does."""
    choices = [replace(quantization, group_size=size) for size in DEFAULT_GROUP_SIZES]
    return next((choice for choice in choices if _divides(config, shards, choice)), quantization)


def _divides(config: ModelConfig, shards: int, quantization: Quantization) -> bool:
    """Tell whether heads divide over the ranks, and group sizes every in_features per rank."""
    group_size = quantization.group_size_of("linear", 0) or 1
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    kv_fits = kv_heads % shards == 0 or shards % kv_heads == 0
    query_fits = heads % shards == 0 and heads * config.head_dim // shards % group_size == 0
    of_experts = quantization.group_size_of("experts", 0) or 1
    whole = math.lcm(of_experts, ROW_TILE)  # of an expert, which has tiles of its own (FORMAT 4.7)
    sizes = [(size, group_size if name == "down_proj" else whole) for name, size in _mlp_sizes(config).items()]
    mlps_fit = all(size % shards == 0 and size // shards % part == 0 for size, part in sizes)
    hidden_fits = config.hidden_size % (group_size if config.num_experts is None else math.lcm(group_size, whole)) == 0
    return kv_fits and query_fits and mlps_fit and hidden_fits


def _mlp_sizes(config: ModelConfig) -> dict[str, int]:
    """Return the intermediate sizes of a model's MLPs, by what has them."""
    sizes = {"down_proj": config.intermediate_size} if config.has_dense_layers else {}
    if config.moe_intermediate_size is not None:
        sizes[f"down_proj of an expert, of whole tiles of {ROW_TILE}"] = config.moe_intermediate_size
    return sizes


def check_split(config: ModelConfig, quantization: Quantization, shards: int, *, is_default: bool = False) -> None:
    """Refuse a split that does not divide, naming the numbers and what would work; is_default: of the group_size."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    group_size = quantization.group_size_of("linear", 0) or 1
    if _divides(config, shards, quantization):
        return

    def divides(shards: int, group_size: int) -> bool:
        return _divides(config, shards, replace(quantization, group_size=group_size))

    sizes = DEFAULT_GROUP_SIZES if is_default and group_size > 1 else (group_size,)
    shards_that_fit = [n for n in range(1, MAX_SHARDS + 1) if any(divides(n, size) for size in sizes)]
    sizes_that_fit = [size for size in GROUP_SIZES if divides(shards, size)] if group_size > 1 else []
    advice = []
    if sizes_that_fit:
        advice.append(f"--group-size {' or '.join(map(str, sizes_that_fit))} works")
    if shards_that_fit:
        advice.append(f"--shards {' or '.join(map(str, shards_that_fit))} works")
    if not advice and group_size > 1 and _divides(config, shards, Quantization("f16", 1)):
        advice.append("Use --quant f16 or f32")
    features = {"hidden": config.hidden_size, "o_proj": heads * config.head_dim / shards}
    features |= {what: size / shards for what, size in _mlp_sizes(config).items()}
    raise UsageError(
        f"--shards {shards} with group_size {group_size if group_size > 1 else 'none'} does not divide this model:"
        f" num_attention_heads {heads}, num_key_value_heads {kv_heads}, and in_features per rank"
        f" {', '.join(f'{size:g} ({what})' for what, size in features.items())}."
        f" {'; '.join(advice) or 'It cannot be packed'}.",
        code="E204",
    )
