"""RoPE: a model's settings -> the angle of each pair per position, the scale of attention, which features are pairs, how far.

In: a ModelConfig, whose `rope` has every number (config.py). Out: numbers. The arithmetic is that of transformers'
modeling_rope_utils.py, in float64.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from llmrun.artifact import IncompatibleError, ModelConfig

_MAX_POSITIONS = (1 << 31) - 1  # int32 in the graph
# Features 2j and 2j + 1 are a pair.
_NEIGHBOURS = ("GlmForCausalLM", "Glm4ForCausalLM", "Ernie4_5ForCausalLM", "Ernie4_5_MoeForCausalLM")


def of_layer(config: ModelConfig, layer: int) -> ModelConfig:
    """Return the configuration whose `rope` is that of a layer."""
    local = config.rope_local
    return (
        config
        if local is None or not config.slides(layer)
        else dataclasses.replace(config, rope=local, rope_local=None)
    )


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Return the angle per position of each pair: [head_dim / 2], float32; 0 of those that are not rotated.

    `linear` divides all frequencies by its factor (position interpolation, arXiv 2306.15595); `llama3` divides the low ones
    and blends in between (Llama 3.1's published code), and so does `yarn`, between two pairs (arXiv 2309.00071). `longrope`
    divides each by a factor of its own (arXiv 2402.13753), of those that `for_sequences` has chosen.

    Raises:
        IncompatibleError: one of them is beyond float32.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        frequencies = _frequencies(config).astype(np.float32)
        frequencies = np.pad(frequencies, (0, config.head_dim // 2 - len(frequencies)))
    if not np.isfinite(frequencies).all():
        numbers = ", ".join(f"{name} {value}" for name, value in config.rope.items())
        raise IncompatibleError(f"config.json: RoPE's angles are beyond float32: {numbers}.")
    return frequencies


def _frequencies(config: ModelConfig) -> np.ndarray:
    rope, dim = config.rope, rotary_dim(config)
    frequencies = 1.0 / rope["rope_theta"] ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
    kind, factor = rope["rope_type"], rope.get("factor", 1.0)
    if kind == "longrope":
        return frequencies / np.array(rope["factors"])
    if kind == "default":
        return frequencies
    keep = np.zeros(len(frequencies))  # the share of each frequency as it is; the rest of it is divided
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    elif kind == "yarn":
        first, last = (_pair_that_turns(config, rope[beta]) for beta in ("beta_fast", "beta_slow"))
        if rope["truncate"]:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dim - 1)
        last = last + 0.001 if first == last else last
        keep = 1 - np.clip((np.arange(len(frequencies)) - first) / (last - first), 0.0, 1.0)
    return (1 - keep) * frequencies / factor + keep * frequencies


def _pair_that_turns(config: ModelConfig, times: float) -> float:
    """Return which pair turns so many times within the original positions; a real number."""
    rope = config.rope
    # The quotient itself may be beyond a float.
    log_wavelength = math.log(rope["original_max_position_embeddings"]) - math.log(times) - math.log(2 * math.pi)
    return rotary_dim(config) * log_wavelength / (2 * math.log(rope["rope_theta"]))


def rotary_dim(config: ModelConfig) -> int:
    """Return how many features of each head are rotated: the first ones, of which j and j + half of them are a pair."""
    return config.rope.get("rotary_dim", config.head_dim)


def order_of_features(config: ModelConfig) -> list[slice]:
    """Return the features of a head of q or k in the order in which j and j + head_dim / 2 are pairs (FORMAT 4.2).

    Attention's products are the same in any order that both have. Where all features are rotated, and those half a head
    apart are pairs, it is their own.
    """
    dim, size = rotary_dim(config), config.head_dim
    are_neighbours = config.architecture in _NEIGHBOURS
    if dim == size and not are_neighbours:
        return [slice(0, size)]
    middle = dim + (size - dim) // 2
    firsts, seconds = slice(0, dim // 2), slice(dim // 2, dim)
    if are_neighbours:
        firsts, seconds = slice(0, dim, 2), slice(1, dim, 2)
    order = [firsts, slice(dim, middle), seconds, slice(middle, size)]
    return [part for part in order if part.start < part.stop]


def for_sequences(config: ModelConfig, max_seq_len: int) -> tuple[ModelConfig, str]:
    """Return the configuration for sequences of such a length at most, and what a user should know of it, or nothing.

    LongRoPE has factors for short and for long sequences. transformers goes from one to the other in the midst of a sequence,
    and computes all of it again; an artifact has one, as vLLM and llama.cpp have.
    """
    rope, note = _of_length(config.rope, max_seq_len)
    if config.rope_local is None:
        return dataclasses.replace(config, rope=rope), note
    local, local_note = _of_length(config.rope_local, max_seq_len)
    return dataclasses.replace(config, rope=rope, rope_local=local), note or local_note


def _of_length(rope: dict[str, Any], max_seq_len: int) -> tuple[dict[str, Any], str]:
    if rope["rope_type"] != "longrope":
        return rope, ""
    original = int(rope["original_max_position_embeddings"])
    is_long = max_seq_len > original
    kept = {name: value for name, value in rope.items() if name not in ("short_factor", "long_factor")}
    note = f"longrope: packed for sequences beyond {original}; --max-seq-len {original} packs for those up to there"
    return {**kept, "factors": rope["long_factor" if is_long else "short_factor"]}, note * is_long


def attention_scale(config: ModelConfig, layer: int) -> float:
    """Return what a query's product with a key is multiplied by; YaRN's or LongRoPE's factor is of both, if all is rotated."""
    is_whole = rotary_dim(config) == config.head_dim and config.rotates(layer)
    factor = of_layer(config, layer).rope.get("attention_factor", 1.0) if is_whole else 1.0
    multiplier = config.attention_multiplier or 1 / math.sqrt(config.head_dim)
    return factor * factor * multiplier


def query_growth(config: ModelConfig) -> dict[str, Any] | None:
    """Return the attributes of attention that say how queries grow along a sequence (FORMAT 5.5); None: they do not.

    Raises:
        IncompatibleError: a number that no attribute can hold.
    """
    rope = config.rope
    if (beta := rope.get("llama_4_scaling_beta")) is None:
        return None
    if beta > float(np.finfo(np.float32).max) or np.float32(beta) == 0:
        raise IncompatibleError(f"config.json: RoPE's llama_4_scaling_beta {beta:g} is beyond float32.")
    original = rope["original_max_position_embeddings"]
    if original != int(original):
        raise IncompatibleError(
            f"config.json: RoPE's original_max_position_embeddings is {original:g}; expected a whole number where there is"
            " llama_4_scaling_beta."
        )
    return {"llama_4_scaling_beta": beta, "original_max_position_embeddings": min(int(original), _MAX_POSITIONS)}


def rotation_scale(config: ModelConfig) -> np.ndarray | None:
    """Return what cosines and sines are multiplied by: [head_dim], float32; None: nothing.

    Where a part of each head is rotated, the factor of `attention_scale` is of that part.

    Raises:
        IncompatibleError: the factor is beyond float32.
    """
    factor = config.rope.get("attention_factor", 1.0)
    if factor == 1 or rotary_dim(config) == config.head_dim:
        return None
    if factor > float(np.finfo(np.float32).max):
        raise IncompatibleError(f"config.json: RoPE's attention_factor {factor:g} is beyond float32.")
    is_rotated = np.arange(config.head_dim // 2) < rotary_dim(config) // 2
    return np.tile(np.where(is_rotated, factor, 1.0), 2).astype(np.float32)


def longest_sequence(config: ModelConfig) -> tuple[int, str]:
    """Return how many positions the model can tell apart, and which of its numbers says so."""
    limit, what = config.max_position_embeddings, f"max_position_embeddings {config.max_position_embeddings}"
    rope = config.rope
    if rope["rope_type"] == "yarn":  # Qwen's instructions add it and leave max_position_embeddings as it was
        stretched = int(min(rope["original_max_position_embeddings"] * rope["factor"], _MAX_POSITIONS))
        if stretched > limit:
            limit, what = stretched, f"{stretched}, YaRN's factor times original_max_position_embeddings"
    return limit, what
