"""config.json of a Hugging Face checkpoint -> ModelConfig; what is not supported is refused here, by key and value.

In: a model directory. Out: `ModelConfig`, in which every default is filled in and both spellings of RoPE settings
(`rope_scaling` with `rope_theta`; transformers 5's `rope_parameters`) are one. It reads no weights.

The families differ in a few points from Llama, and in what a key means that is not there (transformers' configuration_*.py):
Mistral, Qwen and Phi 3 may look back no further than a window, Qwen 2 has biases on q, k and v only, Qwen 3 norms on the
heads of q and k; Phi 3 may rotate a part of each head alone; Granite multiplies the embedding, what is added to the residual
stream, attention's products and the logits by numbers of its own; SmolLM 3 rotates nothing in every fourth layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmpack.model_reader import Reader, read_json
from llmrun.artifact import IncompatibleError, IntegrityError, ModelConfig


@dataclass(frozen=True)
class _Family:
    """What a `model_type` stands for; the numbers are those of a config.json that lacks them.

    Attributes:
        num_key_value_heads: None: as many as num_attention_heads.
        attention_bias: None: config.json says it.
        has_mlp_bias: whether config.json may say it.
        window: which layers of attention may look back no further than a window.
        has_window: whether there is one where config.json does not say it.
        has_partial_rotary: whether config.json may say that a part of each head alone is rotated.
        original_max_position_embeddings: None: those of RoPE's settings, or max_position_embeddings.
        has_multipliers: whether config.json may say the four of Granite.
        has_no_rope_layers: whether config.json may say, or leave to transformers' rule, which layers do not rotate.
        is_hybrid: whether layers may be something else than attention and one MLP, whose size is shared_intermediate_size.
    """

    architecture: str
    max_position_embeddings: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    attention_bias: bool | None = None
    has_mlp_bias: bool = False
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rope_theta: float = 10000.0
    window: Literal["none", "all layers", "by layer"] = "none"
    has_window: bool = True
    has_partial_rotary: bool = False
    original_max_position_embeddings: int | None = None
    has_multipliers: bool = False
    has_no_rope_layers: bool = False
    is_hybrid: bool = False


_FAMILIES = {
    "llama": _Family("LlamaForCausalLM", 2048, has_mlp_bias=True),
    "mistral": _Family("MistralForCausalLM", 131072, num_key_value_heads=8, attention_bias=False, window="all layers"),
    "qwen2": _Family("Qwen2ForCausalLM", 32768, num_key_value_heads=32, attention_bias=True, window="by layer"),
    "qwen3": _Family("Qwen3ForCausalLM", 32768, num_key_value_heads=32, head_dim=128, window="by layer"),
    "phi3": _Family(
        "Phi3ForCausalLM",
        4096,
        attention_bias=False,
        rms_norm_eps=1e-5,
        window="all layers",
        has_window=False,
        has_partial_rotary=True,
        original_max_position_embeddings=4096,
    ),
    "smollm3": _Family(
        "SmolLM3ForCausalLM",
        32768,
        num_key_value_heads=4,
        has_mlp_bias=True,
        tie_word_embeddings=True,
        rope_theta=2000000.0,
        has_no_rope_layers=True,
    ),
    "granite": _Family("GraniteForCausalLM", 2048, has_mlp_bias=True, has_multipliers=True),
    "granitemoehybrid": _Family("GraniteMoeHybridForCausalLM", 2048, has_multipliers=True, is_hybrid=True),
}
_WINDOW = 4096  # sliding_window where config.json does not say it
# Keys that change what a model computes when they differ from these values; everything else in config.json is ignored.
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", None),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logit_scale": (1.0, None),
    "num_local_experts": (None, 0, 1),
    "use_qk_norm": (False, None),
    "is_encoder_decoder": (False, None),
    "is_causal": (True, None),
}
# The same of these, but in Granite, where each is 1 by default.
_MULTIPLIERS: dict[str, tuple[Any, ...]] = {
    "embedding_multiplier": (1.0, None),
    "residual_multiplier": (1.0, None),
    "attention_multiplier": (None,),
    "logits_scaling": (1.0, None),
}
_MAX_HEAD_DIM = 256  # of PagedAttention: custom_ops/cpu/isa.h
# May stand beside rope_scaling, and transformers 5 takes that; 4 the one within.
_OUTSIDE = "original_max_position_embeddings"
_ROPE_NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _OUTSIDE),
    "yarn": ("factor", _OUTSIDE),
    "longrope": (_OUTSIDE,),
}
_OLD_LONGROPE = ("su", "yarn")  # what Phi 3 called it


def read_config(model_dir: Path) -> ModelConfig:
    """Read and check config.json.

    Raises:
        UsageError: no config.json.
        IntegrityError: not JSON, or a number is missing or impossible.
        IncompatibleError: a model that llmpack does not support; names the key and the value.
    """
    path = model_dir / "config.json"
    raw = read_json(path)
    reader = Reader(raw, path)
    model_type = raw.get("model_type")
    family = _FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        supported = ", ".join(map(repr, _FAMILIES))
        raise IncompatibleError(f"{path}: model_type is {model_type!r}; llmpack packs {supported}.")
    architectures = raw.get("architectures") or [family.architecture]
    if architectures != [family.architecture]:
        raise IncompatibleError(f"{path}: architectures is {architectures}; llmpack packs {[family.architecture]}.")
    for key, allowed in (_MUST_BE if family.has_multipliers else {**_MUST_BE, **_MULTIPLIERS}).items():
        if raw.get(key) not in allowed:
            raise IncompatibleError(
                f"{path}: {key} is {raw[key]!r}, which is not supported; supported: {allowed[0]!r}."
            )
    if (quantization := raw.get("quantization_config")) is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise IncompatibleError(
            f"{path}: has a quantization_config (quant_method {method!r}); llmpack packs f32, f16 and bf16 weights: take the"
            " model that it was made from."
        )

    if family.is_hybrid:
        _check_hybrid(reader)

    hidden_size = reader.size("hidden_size")
    num_hidden_layers = reader.size("num_hidden_layers")
    num_attention_heads = reader.size("num_attention_heads")
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
    return ModelConfig(
        architecture=family.architecture,
        hidden_size=hidden_size,
        intermediate_size=reader.size("shared_intermediate_size" if family.is_hybrid else "intermediate_size"),
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=head_dim,
        vocab_size=reader.size("vocab_size"),
        max_position_embeddings=max_position_embeddings,
        rms_norm_eps=reader.positive("rms_norm_eps", family.rms_norm_eps),
        tie_word_embeddings=reader.flag("tie_word_embeddings", default=family.tie_word_embeddings),
        attention_bias=reader.flag("attention_bias") if family.attention_bias is None else family.attention_bias,
        mlp_bias=family.has_mlp_bias and reader.flag("mlp_bias"),
        rope=_read_rope(reader, family, head_dim, max_position_embeddings),
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
        sliding_window=_read_window(reader, family, num_hidden_layers),
        no_rope_layers=_read_no_rope_layers(reader, num_hidden_layers) if family.has_no_rope_layers else None,
        **({key: reader.positive(key, 1.0) for key in _MULTIPLIERS} if family.has_multipliers else {}),
    )


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


def _read_window(reader: Reader, family: _Family, num_hidden_layers: int) -> int | None:
    """Return how many positions some layer looks back, its own among them; None: every layer to the first."""
    raw, path = reader.raw, reader.path
    by_layer = family.window == "by layer" and reader.flag("use_sliding_window")
    kinds = ("full_attention", *(["sliding_attention"] * by_layer), *(["attention"] * family.is_hybrid))
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
    first = raw.get("max_window_layers", 28)  # the layer from which on they slide, where layer_types does not say it
    slides = has_window and not (type(first) is int and first >= num_hidden_layers)
    is_used = by_layer and ("sliding_attention" in layer_types if layer_types else slides)
    if family.window == "all layers":
        is_used = has_window
    return reader.size("sliding_window", _WINDOW) if is_used else None


def _read_rope(reader: Reader, family: _Family, head_dim: int, max_position_embeddings: int) -> dict[str, Any]:
    """Return {"rope_type", "rope_theta", ...the type's numbers}, whichever spelling config.json uses.

    And `rotary_dim`, if it is less than `head_dim`: the features of each head that are rotated, the first ones.
    """
    raw, path = reader.raw, reader.path
    original = family.original_max_position_embeddings if raw.get(_OUTSIDE) is None else raw[_OUTSIDE]
    spellings = []
    for key in ("rope_parameters", "rope_scaling"):
        given = raw.get(key)
        if given is None:
            continue
        if not isinstance(given, dict):
            raise IncompatibleError(f"{path}: {key} is {given!r}; expected an object or null.")
        kind = given.get("rope_type", given.get("type", "default"))
        if family.architecture == "Phi3ForCausalLM" and kind in _OLD_LONGROPE:
            kind = "longrope"
        if not isinstance(kind, str) or kind not in _ROPE_NUMBERS:
            raise IncompatibleError(f"{path}: {key}.rope_type is {kind!r}; supported: {', '.join(_ROPE_NUMBERS)}.")
        inner = Reader(given, path, f"{key}.")
        rope: dict[str, Any] = {"rope_type": kind}
        rope["rope_theta"] = inner.positive("rope_theta", reader.positive("rope_theta", family.rope_theta))
        for number in _ROPE_NUMBERS[kind]:
            outside = original if number == _OUTSIDE else None
            # As transformers 5.
            default = max_position_embeddings if number == _OUTSIDE and outside is None else outside
            rope[number] = inner.positive(number, default)
            if given.get(number) is not None and outside not in (None, rope[number]):
                other = f"{number} {outside!r}" + " (the default)" * (raw.get(number) is None)
                raise IncompatibleError(f"{path}: {key}.{number} {given[number]} and {other} contradict each other.")
        if kind == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
            raise IntegrityError(
                f"{path}: {key}.high_freq_factor is {rope['high_freq_factor']:g}; expected more than low_freq_factor"
                f" {rope['low_freq_factor']:g}.",
                code="E310",
            )
        if kind == "yarn":
            _read_yarn(inner, rope)
        is_outside = given.get("partial_rotary_factor") is None
        rotary_dim = _read_rotary_dim(reader if is_outside else inner, family, head_dim)
        if kind == "longrope":
            _read_longrope(inner, rope, rotary_dim, max_position_embeddings)
        spellings.append({**rope, **_part(rotary_dim, head_dim)})
    if len(spellings) == 2 and spellings[0] != spellings[1]:
        one, other = spellings
        differing = [name for name in {**one, **other} if one.get(name) != other.get(name)]
        found = ", ".join(f"{name} {one.get(name)!r:.60} and {other.get(name)!r:.60}" for name in differing)
        raise IncompatibleError(f"{path}: rope_parameters and rope_scaling contradict each other: {found}.")
    if spellings:
        return spellings[0]
    rotary_dim = _read_rotary_dim(reader, family, head_dim)
    rope_theta = reader.positive("rope_theta", family.rope_theta)
    return {"rope_type": "default", "rope_theta": rope_theta, **_part(rotary_dim, head_dim)}


def _part(rotary_dim: int, head_dim: int) -> dict[str, int]:
    return {} if rotary_dim == head_dim else {"rotary_dim": rotary_dim}


def _read_rotary_dim(reader: Reader, family: _Family, head_dim: int) -> int:
    """Return how many features of each head are rotated."""
    share = reader.positive("partial_rotary_factor", 1.0)
    where = f"{reader.path}: {reader.prefix}partial_rotary_factor is {share:g}"
    if share != 1 and not family.has_partial_rotary:
        raise IncompatibleError(f"{where}, which is not supported; supported: 1.0.")
    rotary_dim = int(head_dim * min(share, 2.0))
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise IntegrityError(
            f"{where} of head_dim {head_dim}; expected a share that is an even number of features, from 2 to {head_dim}.",
            code="E310",
        )
    return rotary_dim


def _read_longrope(reader: Reader, rope: dict[str, Any], rotary_dim: int, max_position_embeddings: int) -> None:
    """Add LongRoPE's other numbers to `rope`: short_factor and long_factor, of each pair, and attention_factor."""
    for name in ("short_factor", "long_factor"):
        given = reader.raw.get(name)
        if not isinstance(given, list) or len(given) != rotary_dim // 2:
            found = f"a list of {len(given)}" if isinstance(given, list) else f"{given!r:.60}"
            raise IntegrityError(
                f"{reader.path}: {reader.prefix}{name} is {found}; expected {rotary_dim // 2} numbers.", code="E310"
            )
        own = Reader({f"{name}[{i}]": number for i, number in enumerate(given)}, reader.path, reader.prefix)
        rope[name] = [own.positive(key) for key in own.raw]
    original = rope[_OUTSIDE]
    factor = reader.positive("factor", max_position_embeddings / original)
    grown = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
    rope["attention_factor"] = reader.positive("attention_factor", grown)


def _read_yarn(reader: Reader, rope: dict[str, Any]) -> None:
    """Add YaRN's other numbers to `rope`: attention_factor, which may follow from others, beta_fast, beta_slow, truncate."""
    for beta, default in (("beta_fast", 32.0), ("beta_slow", 1.0)):
        rope[beta] = reader.positive(beta, default)
    if rope["rope_theta"] <= 1:
        raise IntegrityError(
            f"{reader.path}: rope_theta is {rope['rope_theta']:g}; expected more than 1 where rope_type is yarn.",
            code="E310",
        )
    rope["truncate"] = reader.flag("truncate", default=True)
    shares = [reader.positive(name, 0.0) if reader.raw.get(name) else 0.0 for name in ("mscale", "mscale_all_dim")]
    share, of_all = shares if all(shares) else (1.0, 0.0)
    growth = 0.1 * math.log(max(rope["factor"], 1.0))
    rope["attention_factor"] = reader.positive("attention_factor", (share * growth + 1) / (of_all * growth + 1))
