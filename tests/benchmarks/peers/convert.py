"""Write a GGUF in F16 from a Hugging Face directory. Runs in the peers' environment.

    python convert.py HF_DIR OUT.gguf

The vocabulary is that of vocabulary.json (`vocabulary.py` writes it); without that file there is none.

llama.cpp's own convert_hf_to_gguf.py does the same through torch and wants a tokenizer; this takes less time and memory, which
is in llama.cpp's favour.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from gguf import GGUFWriter, RopeScalingType
from safetensors import safe_open

WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA_LAYER = {
    **LAYER,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}

QWEN_MOE_LAYER = {
    **LAYER,
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",
    "experts.gate_proj": "ffn_gate_exps",
    "experts.up_proj": "ffn_up_exps",
    "experts.down_proj": "ffn_down_exps",
}
GPT_OSS_LAYER = {
    **LAYER,
    "post_attention_layernorm": "post_attention_norm",
    "self_attn.sinks": "attn_sinks",
    "mlp.router": "ffn_gate_inp",
    "experts.gate_proj": "ffn_gate_exps",
    "experts.up_proj": "ffn_up_exps",
    "experts.down_proj": "ffn_down_exps",
}
ERNIE_MOE_LAYER = {
    **LAYER,
    "mlp.gate": "ffn_gate_inp",
    "mlp.moe_statics": "exp_probs_b",
    **{f"experts.{part}_proj": f"ffn_{part}_exps" for part in ("gate", "up", "down")},
    **{f"mlp.shared_experts.{part}_proj": f"ffn_{part}_shexp" for part in ("gate", "up", "down")},
}
# By model_type: the architecture, and the names of a layer's tensors.
KINDS = {
    "llama": ("llama", LAYER),
    "gemma3_text": ("gemma3", GEMMA_LAYER),
    "qwen3_moe": ("qwen3moe", QWEN_MOE_LAYER),
    "gpt_oss": ("gpt-oss", GPT_OSS_LAYER),
    "ernie4_5_moe": ("ernie4_5-moe", ERNIE_MOE_LAYER),
}
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float16)


def main(source: Path, target: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    kind = config["model_type"]
    is_gemma = kind == "gemma3_text"
    head_dim = config.get("head_dim", config["hidden_size"] // heads)
    architecture, layers = KINDS[kind]
    writer = GGUFWriter(target, architecture)
    if is_gemma:
        writer.add_sliding_window(config["sliding_window"])
    if kind == "qwen3_moe":
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if kind == "gpt_oss":
        writer.add_sliding_window(config["sliding_window"])
        writer.add_expert_count(config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["intermediate_size"])
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(config["rope_scaling"]["factor"])
        writer.add_rope_scaling_orig_ctx_len(config["rope_scaling"]["original_max_position_embeddings"])
    if kind == "ernie4_5_moe":
        writer.add_expert_count(config["moe_num_experts"])
        writer.add_expert_used_count(config["moe_k"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
        writer.add_expert_shared_count(config["moe_num_shared_experts"])
        writer.add_expert_shared_feed_forward_length(config["moe_num_shared_experts"] * config["moe_intermediate_size"])
        writer.add_interleave_moe_layer_step(config["moe_layer_interval"])
        writer.add_leading_dense_block_count(config["moe_layer_start_index"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    add_vocabulary(writer, source / "vocabulary.json")
    writer.add_file_type(1)
    num_experts = config.get("num_experts", config.get("moe_num_experts"))
    tensors = apart(tensors_of(source, None)) if kind == "gpt_oss" else tensors_of(source, num_experts)
    for name, value in tensors:
        if name.endswith(".e_score_correction_bias"):
            name, value = name.replace("e_score_correction_bias", "bias"), value[0]
        if is_gemma:
            value = value + 1 if value.ndim == 1 else value
        elif kind == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            value = neighbouring_pairs(value, kv_heads if "k_proj" in name else heads)
        is_small = value.ndim == 1 or name.endswith((".mlp.gate.weight", ".mlp.router.weight", ".bias"))
        dtype = np.float32 if is_small else np.float16
        writer.add_tensor(gguf_name(name, layers), np.ascontiguousarray(value, dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors_of(source: Path, num_experts: int | None) -> Iterator[tuple[str, np.ndarray]]:
    """Return every tensor with its name; those of a layer's experts as one, which is called like them but for the number."""
    stacks: dict[str, list[np.ndarray]] = {}
    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, "np") as file:
            for name in sorted(file.keys(), key=lambda name: [part.zfill(6) for part in name.split(".")]):
                layer, is_expert, rest = name.partition("mlp.experts.")
                if not is_expert or num_experts is None:
                    yield name, file.get_tensor(name)
                    continue
                stack = f"{layer}experts.{rest.partition('.')[2]}"
                stacks.setdefault(stack, []).append(file.get_tensor(name))
                if len(stacks[stack]) == num_experts:
                    yield stack, np.stack(stacks.pop(stack))


def apart(tensors: Iterator[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    """Return those of gpt-oss with gate and up apart, and numbers for what stands in MXFP4."""
    blocks: dict[str, np.ndarray] = {}
    for name, value in tensors:
        layer, is_expert, rest = name.partition("mlp.experts.")
        if not is_expert:
            yield name, value
            continue
        matrix, _, part = rest.rpartition("_")
        if part == "blocks":
            blocks[layer + matrix] = value
            continue
        if part == "scales":
            codes = blocks.pop(layer + matrix)
            pairs = np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:2], -1, 32)
            value = (E2M1[pairs] * np.float16(2.0) ** (value[..., None].astype(np.float16) - 127)).reshape(
                *codes.shape[:2], -1
            )
        kind = "bias" if part == "bias" else "weight"
        if matrix == "gate_up_proj":
            yield f"{layer}experts.gate_proj.{kind}", value[:, ::2]
            yield f"{layer}experts.up_proj.{kind}", value[:, 1::2]
        else:
            yield f"{layer}experts.{matrix}.{kind}", value


def add_vocabulary(writer: GGUFWriter, path: Path) -> None:
    if not path.exists():
        writer.add_tokenizer_model("no_vocab")
        return
    pieces = json.loads(path.read_text())
    writer.add_tokenizer_model("llama")
    writer.add_token_list([piece["text"] for piece in pieces])
    writer.add_token_scores([piece["score"] for piece in pieces])
    writer.add_token_types([piece["type"] for piece in pieces])  # SentencePiece's numbers are GGUF's
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def gguf_name(name: str, layers: dict[str, str]) -> str:
    if name in WHOLE:
        return WHOLE[name]
    _, _, layer, rest = name.split(".", 3)
    kind = "bias" if rest.endswith(".bias") else "weight"
    return f"blk.{layer}.{layers[rest.removesuffix(f'.{kind}')]}.{kind}"


def neighbouring_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates neighbouring rows of a head, Hugging Face row i with row i + head_dim / 2."""
    return rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
