"""config.json of a Hugging Face checkpoint -> ModelConfig; what is not supported is refused here, by key and value.

In: a model directory. Out: `ModelConfig`, in which every default is filled in and both spellings of RoPE settings
(`rope_scaling` with `rope_theta`; transformers 5's `rope_parameters`) are one. It reads no weights.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from llmpack.experts_reader import read_experts
from llmpack.families import FAMILIES, SEEING, Family
from llmpack.model_reader import Reader, read_json
from llmpack.rope_reader import read_ropes
from llmrun.artifact import IncompatibleError, IntegrityError, ModelConfig

_WINDOW, _MAX_WINDOW_LAYERS = 4096, 28  # sliding_window and max_window_layers where config.json does not say them
_SWIGLU_ALPHA, _SWIGLU_LIMIT = 1.702, 7.0  # the same of swiglu_alpha and swiglu_limit
# Keys that change what a model computes when they differ from these values; everything else in config.json is ignored.
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "attention_out_bias": (False, None),
    "logit_scale": (1.0, None),
    "num_local_experts": (None, 0, 1),
    "is_encoder_decoder": (False, None),
    "is_causal": (True, None),
    "use_bidirectional_attention": (False, None),
}
# The same of these, but in Granite, where each is 1 by default.
_MULTIPLIERS: dict[str, tuple[Any, ...]] = {
    "embedding_multiplier": (1.0, None),
    "residual_multiplier": (1.0, None),
    "attention_multiplier": (None,),
    "logits_scaling": (1.0, None),
}
_MAX_HEAD_DIM = 256  # of PagedAttention: custom_ops/cpu/isa.h


def read_config(model_dir: Path) -> ModelConfig:
    """Read and check config.json.

    Raises:
        UsageError: no config.json.
        IntegrityError: not JSON, or a number is missing or impossible.
        IncompatibleError: a model that llmpack does not support; names the key and the value.
    """
    path = model_dir / "config.json"
    raw, family = _language_model(read_json(path), path)
    if family.rope_parameters and raw.get("rope_parameters") is None and raw.get("rope_scaling") is None:
        raw = {**raw, "rope_parameters": family.rope_parameters}
    reader = Reader(raw, path)
    act_key, act = family.activation
    must_be = {act_key: (act, None), **_MUST_BE, **family.must_be}
    must_be |= {} if family.has_multipliers else _MULTIPLIERS
    if family.experts or family.is_hybrid:
        del must_be["num_local_experts"]
    for key, allowed in must_be.items():
        if raw.get(key) not in allowed:
            raise IncompatibleError(
                f"{path}: {key} is {raw[key]!r}, which is not supported; supported: {allowed[0]!r}."
            )
    if (quantization := raw.get("quantization_config")) is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        if method is None or method != family.quant_method:
            types = "f32, f16 and bf16" if family.quant_method is None else f"f32, f16, bf16 and {family.quant_method}"
            raise IncompatibleError(
                f"{path}: has a quantization_config (quant_method {method!r}); llmpack packs {types} weights: take the model"
                " that it was made from."
            )

    if family.is_hybrid:
        _check_hybrid(reader)

    hidden_size = reader.size("hidden_size", family.sizes.get("hidden_size"))
    num_hidden_layers = reader.size("num_hidden_layers", family.sizes.get("num_hidden_layers"))
    num_attention_heads = reader.size("num_attention_heads", family.sizes.get("num_attention_heads"))
    is_given = "num_key_value_heads" in raw  # null means num_attention_heads
    kv_default = num_attention_heads if is_given else family.num_key_value_heads or num_attention_heads
    num_key_value_heads = reader.size("num_key_value_heads", kv_default)
    if num_attention_heads % num_key_value_heads:
        raise IncompatibleError(
            f"{path}: num_attention_heads {num_attention_heads} is not a multiple of num_key_value_heads"
            f" {num_key_value_heads}."
        )
    if raw.get("head_dim", family.head_dim) is None and hidden_size % num_attention_heads:
        raise IncompatibleError(
            f"{path}: hidden_size {hidden_size} is not a multiple of num_attention_heads {num_attention_heads}, and"
            " there is no head_dim."
        )
    head_dim = reader.size("head_dim", family.head_dim or hidden_size // num_attention_heads)
    if head_dim % 2:
        raise IncompatibleError(f"{path}: head_dim {head_dim} is odd; rotary embeddings need pairs.")
    if head_dim > _MAX_HEAD_DIM:
        raise IncompatibleError(f"{path}: head_dim {head_dim}; llmpack packs heads of up to {_MAX_HEAD_DIM}.")
    max_position_embeddings = reader.size("max_position_embeddings", family.max_position_embeddings)
    intermediate = "shared_intermediate_size" if family.is_hybrid else "intermediate_size"
    dtype = str(raw.get("dtype") or raw.get("torch_dtype") or "float32")
    sliding_window, layer_types = _read_windows(reader, family, num_hidden_layers)
    rope, of_sliding = read_ropes(reader, family, head_dim, max_position_embeddings)
    config = ModelConfig(
        architecture=family.architecture,
        hidden_size=hidden_size,
        intermediate_size=reader.size(intermediate, family.sizes.get("intermediate_size")),
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=head_dim,
        vocab_size=reader.size("vocab_size", family.sizes.get("vocab_size")),
        max_position_embeddings=max_position_embeddings,
        rms_norm_eps=reader.positive("rms_norm_eps", family.rms_norm_eps),
        tie_word_embeddings=reader.flag("tie_word_embeddings", default=family.tie_word_embeddings),
        attention_bias=_has_attention_bias(reader, family),
        mlp_bias=family.has_mlp_bias and reader.flag("mlp_bias"),
        rope=rope,
        rope_local=None if sliding_window is None else of_sliding,
        dtype=dtype,
        sliding_window=sliding_window,
        layer_types=layer_types,
        no_rope_layers=_read_no_rope_layers(reader, num_hidden_layers) if family.has_no_rope_layers else None,
        use_qk_norm=family.has_optional_qk_norm and reader.flag("use_qk_norm"),
        **(read_experts(reader, family.experts, num_hidden_layers) if family.experts else {}),
        swiglu_alpha=reader.positive("swiglu_alpha", _SWIGLU_ALPHA) if family.has_clamped_swiglu else None,
        swiglu_limit=reader.positive("swiglu_limit", _SWIGLU_LIMIT) if family.has_clamped_swiglu else None,
        **_read_multipliers(reader, family, hidden_size, dtype),
    )
    # Qwen 3 Coder's config.json says so; transformers normalises in every Qwen 3, and in no Llama, whatever it says.
    if raw.get("use_qk_norm") not in (False, None) and not config.has_qk_norm:
        raise IncompatibleError(
            f"{path}: use_qk_norm is {raw['use_qk_norm']!r}, which is not supported; supported: False."
        )
    return config


def _language_model(raw: dict[str, Any], path: Path) -> tuple[dict[str, Any], Family]:
    """Return the settings of the language model, and its family; of those outside, what holds for all of a model's parts."""
    model_type = raw.get("model_type")
    known = {**FAMILIES, **SEEING}.get(model_type) if isinstance(model_type, str) else None
    if known is None:
        supported = ", ".join(map(repr, (*FAMILIES, *SEEING)))
        raise IncompatibleError(f"{path}: model_type is {model_type!r}; llmpack packs {supported}.")
    architecture = (isinstance(known, Family) and known.stored_as) or known.architecture
    architectures = raw.get("architectures") or [architecture]
    if architectures != [architecture]:
        raise IncompatibleError(f"{path}: architectures is {architectures}; llmpack packs {[architecture]}.")
    if isinstance(known, Family):
        return raw, known
    part = raw.get("text_config")
    if not isinstance(part, dict):
        raise IntegrityError(f"{path}: text_config is {part!r:.60}; expected an object.", code="E310")
    language = part.get("model_type", known.languages[0])
    if language not in known.languages:
        supported = ", ".join(map(repr, known.languages))
        raise IncompatibleError(f"{path}: text_config.model_type is {language!r:.60}; supported: {supported}.")
    common = ("dtype", "torch_dtype", "quantization_config")
    of_all = {key: raw[key] for key in common if key in raw and part.get(key) is None}
    # Not the part's own word, which transformers saves without heeding it.
    is_tied = True if raw.get("tie_word_embeddings") is None else raw["tie_word_embeddings"]
    return {**part, **of_all, "tie_word_embeddings": is_tied}, FAMILIES[language]


def _read_multipliers(reader: Reader, family: Family, hidden_size: int, dtype: str) -> dict[str, Any]:
    """Return those of ModelConfig: Granite's own, and what Gemma's code multiplies by without saying so."""
    if family.has_multipliers:
        return {key: reader.positive(key, 1.0) for key in _MULTIPLIERS}
    if family.architecture != "Gemma3ForCausalLM":
        return {}
    scalar = reader.positive("query_pre_attn_scalar", family.sizes["query_pre_attn_scalar"])
    return {
        "embedding_multiplier": _rounded(math.sqrt(hidden_size), dtype),
        "attention_multiplier": 1 / math.sqrt(scalar),
    }


def _rounded(number: float, dtype: str) -> float:
    """Round to a type of PyTorch's: the model was trained with the rounded number."""
    if dtype == "bfloat16":
        bits = int(np.float32(number).view(np.uint32))
        bits = bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000
        return float(np.uint32(bits).view(np.float32))
    return float(np.float16(number) if dtype == "float16" else np.float32(number))


def _read_no_rope_layers(reader: Reader, num_hidden_layers: int) -> tuple[int, ...] | None:
    """Return 1 for each layer that rotates, and 0 for each that does not; None: all do."""
    given = reader.raw.get("no_rope_layers")
    if given is None:
        interval = reader.size("no_rope_layer_interval", 4)
        given = [int((i + 1) % interval != 0) for i in range(num_hidden_layers)]
    if not isinstance(given, list) or len(given) < num_hidden_layers or any(flag not in (0, 1) for flag in given):
        raise IntegrityError(
            f"{reader.path}: no_rope_layers is {given!r:.100}; expected 0 or 1 for each of {num_hidden_layers} layers.",
            code="E310",
        )
    flags = tuple(map(int, given[:num_hidden_layers]))
    return None if all(flags) else flags


def _check_hybrid(reader: Reader) -> None:
    """Refuse what a hybrid model may have beside attention and one MLP in a layer; layers' kinds are checked as all models'."""
    for key, allowed in (("num_local_experts", 0), ("position_embedding_type", "rope")):
        if reader.raw.get(key) != allowed:
            raise IncompatibleError(
                f"{reader.path}: {key} is {reader.raw.get(key)!r}, which is not supported; supported: {allowed!r}."
            )
    if not reader.raw.get("layer_types"):
        raise IncompatibleError(f"{reader.path}: layer_types is missing; supported: 'attention' for every layer.")


def _has_attention_bias(reader: Reader, family: Family) -> bool:
    if family.attention_bias is not None:
        return family.attention_bias
    return reader.flag("attention_bias", default=family.has_attention_bias)


def _read_windows(reader: Reader, family: Family, num_hidden_layers: int) -> tuple[int | None, tuple[str, ...] | None]:
    """Return sliding_window and layer_types of ModelConfig."""
    raw, path = reader.raw, reader.path
    by_layer = family.window == "by layer" and (family.has_local_rope or reader.flag("use_sliding_window"))
    in_turn = family.window == "in turn"
    may_slide = by_layer or in_turn or family.window == "listed layers"
    kinds = ("full_attention", *(["sliding_attention"] * may_slide), *(["attention"] * family.is_hybrid))
    layer_types = raw.get("layer_types") or []
    supported = f"supported: {' and '.join(map(repr, kinds))} only"
    if not isinstance(layer_types, list):
        raise IncompatibleError(f"{path}: layer_types is {layer_types!r:.60}; {supported}.")
    for i, kind in enumerate(layer_types):
        if kind not in kinds:
            raise IncompatibleError(f"{path}: layer_types[{i}] is {kind!r:.60}; {supported}.")
    window = raw.get("sliding_window")
    if family.window == "none" and window is not None and raw.get("use_sliding_window") is not False:
        raise IncompatibleError(f"{path}: sliding_window is {window!r}, which is not supported; supported: None.")
    has_window = window is not None or ("sliding_window" not in raw and family.has_window)  # null is none
    if family.window == "all layers where used" and not reader.flag("use_sliding_window"):
        return None, None
    if family.window.startswith("all layers") or (family.window == "listed layers" and not layer_types):
        return (reader.size("sliding_window", _WINDOW), None) if has_window else (None, None)
    if family.has_local_rope and not layer_types:
        pattern = reader.size("sliding_window_pattern", 6)
        layer_types = [kinds[(i + 1) % pattern != 0] for i in range(num_hidden_layers)]
    elif by_layer and not layer_types:
        first = raw.get("max_window_layers")  # the layer from which on they slide
        first = _MAX_WINDOW_LAYERS if first is None else first
        if type(first) is not int or first < 0:
            raise IntegrityError(
                f"{path}: max_window_layers is {first!r}; expected an integer of at least 0.", code="E310"
            )
        kind_of = ("full_attention", "sliding_attention" if has_window else "full_attention")
        layer_types = [kind_of[i >= first] for i in range(num_hidden_layers)]
    elif in_turn and not layer_types:
        layer_types = [kinds[(i + 1) % 2] for i in range(num_hidden_layers)]
    if "sliding_attention" not in layer_types:
        return None, None
    if len(layer_types) != num_hidden_layers:
        found = f"layer_types has {len(layer_types)} entries"
        raise IntegrityError(f"{path}: {found}; expected one for each of {num_hidden_layers} layers.", code="E310")
    if not has_window:
        raise IntegrityError(f"{path}: sliding_window is null; expected the window of layers that slide.", code="E310")
    return reader.size("sliding_window", family.sizes.get("sliding_window", _WINDOW)), tuple(layer_types)
