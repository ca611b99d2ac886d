"""Checkpoints that tests share: the demo model, and random tiny models of every variant."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

DEMO = Path(__file__).parent / "checkpoints" / "demo"
HELDOUT = Path(__file__).parent / "checkpoints" / "heldout.txt"

# A model that 8 ranks can share: in_features per rank stay multiples of group_size 32.
TINY: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 259,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}

# Of the kind of Phi-4-mini: a part of each head is rotated, by LongRoPE.
PARTLY_ROTATED: dict[str, Any] = {
    "model_type": "phi3",
    "pad_token_id": 0,
    "num_attention_heads": 4,
    "original_max_position_embeddings": 32,
    "rope_parameters": {
        **{"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32},
        **{"partial_rotary_factor": 0.75, "short_factor": [1.0] * 24, "long_factor": [1 + i for i in range(24)]},
    },
}

# Of the kind of Ministral 3: queries from position 64 on are multiplied.
MINISTRAL: dict[str, Any] = {
    "model_type": "ministral3",
    "head_dim": 64,
    "rope_parameters": {
        **{"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 64},
        **{"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1},
    },
}

# The same within few positions.
GROWING: dict[str, Any] = {
    **MINISTRAL,
    "rope_parameters": {
        **MINISTRAL["rope_parameters"],
        **{"original_max_position_embeddings": 2, "llama_4_scaling_beta": 1.0},
    },
}

MULTIPLIERS: dict[str, Any] = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.3,
    "attention_multiplier": 0.09,
    "logits_scaling": 3.0,
}
GRANITE: dict[str, Any] = {"model_type": "granite", **MULTIPLIERS}
# Of the kind of Granite 4's plain transformers: gate and up stored together, and down under another name.
HYBRID_GRANITE: dict[str, Any] = {
    **{**GRANITE, "model_type": "granitemoehybrid", "num_local_experts": 0, "position_embedding_type": "rope"},
    **{"layer_types": ["full_attention"] * 2, "intermediate_size": 64, "shared_intermediate_size": 512},
}
# Of the kind of SmolLM3: a layer that does not know where a token stands.
SMOLLM: dict[str, Any] = {
    "model_type": "smollm3",
    "no_rope_layer_interval": 2,
    "num_hidden_layers": 4,
    "pad_token_id": 0,
}

# Of the kind of Qwen 3 30B-A3B: three of eight experts, whose weights do not sum to 1; the first layer has none.
QWEN_MOE: dict[str, Any] = {
    **{"model_type": "qwen3_moe", "num_hidden_layers": 3, "head_dim": 64, "mlp_only_layers": [0]},
    **{"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 256, "norm_topk_prob": False},
}
MIXTRAL: dict[str, Any] = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
# Experts that the checkpoint stores in one tensor.
GRANITE_MOE: dict[str, Any] = {
    **{**GRANITE, "model_type": "granitemoe", "num_local_experts": 6, "num_experts_per_tok": 2},
    "intermediate_size": 256,
}

# Of the kind of gpt-oss: layers slide in turn; transformers saves its experts with in_features first.
GPT_OSS: dict[str, Any] = {
    **{"model_type": "gpt_oss", "num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 256},
    **{"head_dim": 32, "sliding_window": 8, "num_hidden_layers": 4, "swiglu_limit": 1.5, "pad_token_id": 0},
    "rope_parameters": {
        **{"rope_type": "yarn", "rope_theta": 150000.0, "factor": 4.0, "original_max_position_embeddings": 32},
        **{"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
    },
}

# Of the kind of GLM 4: a part of each head is rotated, neighbouring features together; biases of q, k and v.
GLM: dict[str, Any] = {"model_type": "glm4", "head_dim": 64, "pad_token_id": 0}
# Of the kind of GLM 4.5: the first layer has no experts; of ten in the others two are every token's.
GLM_MOE: dict[str, Any] = {
    **{"model_type": "glm4_moe", "num_hidden_layers": 3, "head_dim": 64, "first_k_dense_replace": 1, "pad_token_id": 0},
    **{"n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 3, "moe_intermediate_size": 256},
    **{"attention_bias": True, "use_qk_norm": True, "routed_scaling_factor": 2.5},
}
ERNIE: dict[str, Any] = {"model_type": "ernie4_5", "head_dim": 64, "tie_word_embeddings": True}
# Of the kind of ERNIE 4.5 21B-A3B: the last layer has no experts either.
ERNIE_MOE: dict[str, Any] = {
    **{"model_type": "ernie4_5_moe", "num_hidden_layers": 4, "moe_layer_start_index": 1, "moe_layer_end_index": 2},
    **{"moe_num_experts": 6, "moe_num_shared_experts": 1, "moe_k": 2, "moe_intermediate_size": 256},
}

# Of the kind of Gemma 3: two layers of four slide, and rotate by angles of their own.
GEMMA: dict[str, Any] = {
    "model_type": "gemma3_text",
    "num_hidden_layers": 4,
    "head_dim": 64,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "query_pre_attn_scalar": 40,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
    "pad_token_id": 0,
}


def demo_with_template(folder: Path, chat_template: str) -> Path:
    """Copy the demo checkpoint with another chat template; return the folder."""
    shutil.copytree(DEMO, folder)
    (folder / "chat_template.jinja").write_text(chat_template)
    return folder


def make_checkpoint(
    folder: Path, *, dtype: str = "float32", seed: int = 0, model_type: str = "llama", **overrides: Any
) -> Path:
    """Write a random checkpoint with transformers itself: the independent program decides names and layout."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**TINY, **overrides}, bos_token_id=1, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        buffers = [(name, buffer) for name, buffer in model.named_buffers() if name.endswith("correction_bias")]
        for name, parameter in [*model.named_parameters(), *buffers]:
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
            elif name.endswith("sinks"):
                parameter.normal_(0, 1)
            elif "norm" in name:
                parameter.normal_(0 if model_type.startswith("gemma") else 1, 0.1)
            else:
                parameter.normal_(0, 0.08)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def store_a_head(folder: Path) -> Path:
    """Add an `lm_head.weight` of its own to a checkpoint whose embeddings are tied, as fine-tuning may; return the folder."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
    return folder
