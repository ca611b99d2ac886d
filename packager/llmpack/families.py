"""The families of models, by `model_type` in config.json: how they differ from Llama, and what absent keys mean there.

From transformers' configuration_*.py and modeling_*.py: Mistral, Qwen and Phi 3 may look back no further than a window, Qwen 2
and Seed-OSS have biases on q, k and v only, Qwen 3 norms on the heads of q and k; Phi 3 may rotate a part of each head alone;
Ministral 3 multiplies late queries; Granite multiplies the embedding, what is added to the residual stream, attention's
products and the logits by numbers of its own; SmolLM 3 rotates nothing in every fourth layer; Gemma 3 rotates by other angles
where attention slides, normalises what is added to the residual stream, has gelu in place of silu, and stores a norm's weight
less 1. Qwen 3 MoE, Mixtral and Granite MoE send a token through a few of a layer's many MLPs; so does gpt-oss, whose experts
are published in four bits and have biases and a SwiGLU that is cut off, and whose heads of attention may attend to nothing;
and so do GLM 4.5 and ERNIE 4.5, some of whose experts all tokens go through. GLM 4 and ERNIE 4.5 rotate neighbouring features.
Checkpoints of Gemma 3 and Mistral that see images are packed without what sees.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Experts:
    """How config.json describes layers of experts.

    Attributes:
        number: keys of how many there are; what is first there counts.
        size: the key of an expert's intermediate size.
        norm_topk_prob: where config.json does not say it, or may not.
        dense_layers: how config.json says which layers have one MLP for all tokens: none; each by its number, and all but
            every n-th ("listed"); the first ones; those outside a range, and all but every n-th in it.
        sizes: of `number`, `size` and `per_token` where config.json lacks them.
        per_token: the key of how many a token goes through.
        shared: the key of how many more all tokens go through, and the number where config.json lacks it; None: none.
        has_norm_topk_prob: whether config.json may say it.
        has_scaling_factor: whether config.json may say what their weights are multiplied by.
    """

    number: tuple[str, ...]
    size: str
    norm_topk_prob: bool
    dense_layers: Literal["none", "listed", "first", "outside"]
    sizes: tuple[int, int, int]
    per_token: str = "num_experts_per_tok"
    shared: tuple[str, int] | None = None
    has_norm_topk_prob: bool = False
    has_scaling_factor: bool = False


@dataclass(frozen=True)
class Family:
    """What a `model_type` stands for; the numbers are those of a config.json that lacks them.

    Attributes:
        sizes: others of config.json, which most families have to say.
        num_key_value_heads: None: as many as num_attention_heads.
        attention_bias: None: config.json says it.
        has_attention_bias: what it says where it does not.
        has_mlp_bias: whether config.json may say it.
        activation: the key of config.json, and what it must say.
        window: which layers of attention may look back no further than a window; "listed layers" are those of layer_types, or
            all where config.json lists none; "in turn": every other where it lists none; "where used": where
            use_sliding_window is true.
        has_window: whether there is one where config.json does not say it.
        has_partial_rotary: whether config.json may say that a part of each head alone is rotated.
        partial_rotary_factor: that part.
        original_max_position_embeddings: None: those of RoPE's settings, or max_position_embeddings.
        has_multipliers: whether config.json may say the four of Granite.
        has_no_rope_layers: whether config.json may say, or leave to transformers' rule, which layers do not rotate.
        has_local_rope: whether layers that slide rotate by settings of their own; by default every sixth does not slide.
        has_growing_queries: whether RoPE's settings may say that later queries are multiplied by more than 1 (Llama 4's).
        rope_parameters: None: the default type.
        stored_as: the architecture that config.json names, where it is another than `architecture`.
        experts: None: every layer has one MLP.
        has_clamped_swiglu: whether config.json says what gate and up of experts are cut off at.
        quant_method: that of a quantization_config whose weights are read; None: of none.
        has_optional_qk_norm: whether config.json may say that heads of q and of k are normalised.
        must_be: keys that change what is computed when they differ from these values, beside those of all families.
        is_hybrid: whether layers may be something else than attention and one MLP, whose size is shared_intermediate_size.
    """

    architecture: str
    max_position_embeddings: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    attention_bias: bool | None = None
    has_attention_bias: bool = False
    has_mlp_bias: bool = False
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rope_theta: float = 10000.0
    window: Literal["none", "all layers", "all layers where used", "listed layers", "in turn", "by layer"] = "none"
    has_window: bool = True
    has_partial_rotary: bool = False
    partial_rotary_factor: float = 1.0
    original_max_position_embeddings: int | None = None
    has_multipliers: bool = False
    has_no_rope_layers: bool = False
    is_hybrid: bool = False
    has_local_rope: bool = False
    has_growing_queries: bool = False
    rope_parameters: dict[str, Any] | None = None
    activation: tuple[str, str] = ("hidden_act", "silu")
    stored_as: str | None = None
    experts: Experts | None = None
    has_clamped_swiglu: bool = False
    quant_method: str | None = None
    has_optional_qk_norm: bool = False
    must_be: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Seeing:
    """A `model_type` of checkpoints that see images: the language model's settings are config.json's text_config.

    Attributes:
        languages: the `model_type`s that text_config may have, the first where it has none.
    """

    architecture: str
    languages: tuple[str, ...]


# With layer_types in config.json transformers takes a mistral for a ministral, which differs in that alone.
_MISTRAL = Family("MistralForCausalLM", 131072, num_key_value_heads=8, attention_bias=False, window="listed layers")
# GLM 4 of 2025, glm4, normalises what it adds to the residual stream as well; they differ in that alone.
_GLM = Family(
    "GlmForCausalLM",
    131072,
    num_key_value_heads=2,
    head_dim=128,
    has_attention_bias=True,
    rms_norm_eps=1.5625e-7,
    has_partial_rotary=True,
    partial_rotary_factor=0.5,
    sizes={
        **{"hidden_size": 4096, "intermediate_size": 13696, "num_hidden_layers": 40, "num_attention_heads": 32},
        **{"vocab_size": 151552},
    },
)
FAMILIES = {
    "llama": Family("LlamaForCausalLM", 2048, has_mlp_bias=True),
    "mistral": _MISTRAL,
    "ministral": dataclasses.replace(_MISTRAL, stored_as="MinistralForCausalLM"),
    "ministral3": Family(
        "Ministral3ForCausalLM",
        262144,
        num_key_value_heads=8,
        head_dim=128,
        attention_bias=False,
        rms_norm_eps=1e-5,
        window="all layers",
        has_window=False,
        has_growing_queries=True,
        rope_parameters={
            **{"rope_type": "yarn", "rope_theta": 1000000.0, "factor": 16.0, "original_max_position_embeddings": 16384},
            **{"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1},
        },
    ),
    "qwen2": Family("Qwen2ForCausalLM", 32768, num_key_value_heads=32, attention_bias=True, window="by layer"),
    "qwen3": Family("Qwen3ForCausalLM", 32768, num_key_value_heads=32, head_dim=128, window="by layer"),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        32768,
        num_key_value_heads=4,
        window="all layers where used",
        experts=Experts(
            ("num_experts", "num_local_experts"),
            "moe_intermediate_size",
            False,
            dense_layers="listed",
            sizes=(128, 768, 8),
            has_norm_topk_prob=True,
        ),
        sizes={"intermediate_size": 6144},
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        131072,
        num_key_value_heads=8,
        attention_bias=False,
        rms_norm_eps=1e-5,
        rope_theta=1000000.0,
        window="all layers",
        has_window=False,
        experts=Experts(
            ("num_local_experts", "num_experts"), "intermediate_size", True, dense_layers="none", sizes=(8, 14336, 2)
        ),
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        4096,
        attention_bias=False,
        rms_norm_eps=1e-5,
        window="all layers",
        has_window=False,
        has_partial_rotary=True,
        original_max_position_embeddings=4096,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        32768,
        num_key_value_heads=4,
        has_mlp_bias=True,
        tie_word_embeddings=True,
        rope_theta=2000000.0,
        has_no_rope_layers=True,
    ),
    "seed_oss": Family(
        "SeedOssForCausalLM",
        524288,
        num_key_value_heads=8,
        head_dim=128,
        has_attention_bias=True,
        has_mlp_bias=True,
        sizes={
            **{"hidden_size": 4096, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 80},
            **{"vocab_size": 155136},
        },
    ),
    "granite": Family("GraniteForCausalLM", 2048, has_mlp_bias=True, has_multipliers=True),
    "granitemoe": Family(
        "GraniteMoeForCausalLM",
        2048,
        has_multipliers=True,
        experts=Experts(("num_local_experts",), "intermediate_size", True, dense_layers="none", sizes=(8, 11008, 2)),
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        131072,
        num_key_value_heads=8,
        head_dim=64,
        has_attention_bias=True,
        rms_norm_eps=1e-5,
        rope_theta=150000.0,
        window="in turn",
        rope_parameters={
            **{"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False},
            **{"beta_fast": 32.0, "beta_slow": 1.0},
        },
        experts=Experts(
            ("num_local_experts", "num_experts"),
            "intermediate_size",
            True,
            dense_layers="none",
            sizes=(128, 2880, 4),
        ),
        has_clamped_swiglu=True,
        quant_method="mxfp4",
        sizes={
            **{"hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 36, "num_attention_heads": 64},
            **{"vocab_size": 201088, "sliding_window": 128},
        },
    ),
    "glm": _GLM,
    "glm4": dataclasses.replace(_GLM, architecture="Glm4ForCausalLM"),
    "glm4_moe": Family(
        "Glm4MoeForCausalLM",
        131072,
        num_key_value_heads=8,
        rms_norm_eps=1e-5,
        has_partial_rotary=True,
        partial_rotary_factor=0.5,
        has_optional_qk_norm=True,
        must_be={"n_group": (1, None), "topk_group": (1, None)},
        experts=Experts(
            ("n_routed_experts", "num_local_experts"),
            "moe_intermediate_size",
            True,
            dense_layers="first",
            sizes=(128, 1408, 8),
            shared=("n_shared_experts", 1),
            has_norm_topk_prob=True,
            has_scaling_factor=True,
        ),
        sizes={
            **{"hidden_size": 4096, "intermediate_size": 10944, "num_hidden_layers": 46, "num_attention_heads": 96},
            **{"vocab_size": 151552},
        },
    ),
    "ernie4_5": Family(
        "Ernie4_5ForCausalLM",
        131072,
        num_key_value_heads=2,
        head_dim=128,
        attention_bias=False,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_theta=500000.0,
        must_be={"use_bias": (False, None)},
        sizes={
            **{"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 18, "num_attention_heads": 16},
            **{"vocab_size": 103424},
        },
    ),
    "ernie4_5_moe": Family(
        "Ernie4_5_MoeForCausalLM",
        131072,
        num_key_value_heads=4,
        attention_bias=False,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_theta=500000.0,
        must_be={"use_bias": (False, None), "moe_norm_min": (1e-12, None)},
        experts=Experts(
            ("moe_num_experts", "num_experts"),
            "moe_intermediate_size",
            True,
            dense_layers="outside",
            sizes=(64, 1536, 6),
            per_token="moe_k",
            shared=("moe_num_shared_experts", 2),
        ),
        sizes={
            **{"hidden_size": 2560, "intermediate_size": 12288, "num_hidden_layers": 28, "num_attention_heads": 20},
            **{"vocab_size": 103424},
        },
    ),
    "granitemoehybrid": Family("GraniteMoeHybridForCausalLM", 2048, has_multipliers=True, is_hybrid=True),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        131072,
        num_key_value_heads=4,
        head_dim=256,
        tie_word_embeddings=True,
        rope_theta=1000000.0,
        window="by layer",
        has_local_rope=True,
        activation=("hidden_activation", "gelu_pytorch_tanh"),
        sizes={
            **{"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8},
            **{"vocab_size": 262208, "query_pre_attn_scalar": 256},
        },
    ),
}
SEEING = {
    "gemma3": Seeing("Gemma3ForConditionalGeneration", ("gemma3_text",)),
    "mistral3": Seeing("Mistral3ForConditionalGeneration", ("mistral", "ministral3")),
}
