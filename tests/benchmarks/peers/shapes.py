"""Random checkpoints of published shapes: where speed and memory are measured, the values of the weights do not matter.

Shapes follow each model's published config.json. Weights are N(0, 0.02) in float16, norms multiply by 1; no tokenizer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

_POOL = 1 << 24  # random numbers, of which each tensor takes a stretch of its own: sampling 7 billion takes minutes
_FILE_BYTES = 2 << 30
KV_BYTES = 2  # of a cached number: float16, in all programs measured here


@dataclass(frozen=True)
class Shape:
    """What config.json says of a model; names are its."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_position_embeddings: int

    @property
    def head_dim(self) -> int:
        """Features of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def kv_width(self) -> int:
        """Numbers that a layer's keys of one position have."""
        return self.head_dim * self.num_key_value_heads

    @property
    def kv_bytes_per_position(self) -> int:
        """Bytes of all layers' keys and values of one position, in float16."""
        return 2 * self.num_hidden_layers * self.kv_width * KV_BYTES

    @property
    def num_parameters(self) -> int:
        """Embedding and head included."""
        return sum(int(np.prod(shape)) for _, shape in self.tensors())

    def tensors(self) -> list[tuple[str, tuple[int, ...]]]:
        """Return name and shape of every tensor, in the order of the layers."""
        hidden, inner, query = self.hidden_size, self.intermediate_size, self.head_dim * self.num_attention_heads
        layer = [
            *self.norms(),
            ("self_attn.q_proj", (query, hidden)),
            ("self_attn.k_proj", (self.kv_width, hidden)),
            ("self_attn.v_proj", (self.kv_width, hidden)),
            ("self_attn.o_proj", (hidden, query)),
            *((f"{name}_proj", shape) for mlp in self.mlps() for name, shape in _projections(mlp, hidden, inner)),
            *self.routers(),
        ]
        layers = [
            (f"model.layers.{i}.{name}.weight", shape) for i in range(self.num_hidden_layers) for name, shape in layer
        ]
        vocabulary = (self.vocab_size, hidden)
        embedding, head = ("model.embed_tokens.weight", vocabulary), ("lm_head.weight", vocabulary)
        is_tied = self.config()["tie_word_embeddings"]
        return [embedding, *layers, ("model.norm.weight", (hidden,)), *([] if is_tied else [head])]

    def norms(self) -> list[tuple[str, tuple[int, ...]]]:
        """Return name and shape of a layer's norms."""
        return [("input_layernorm", (self.hidden_size,)), ("post_attention_layernorm", (self.hidden_size,))]

    def mlps(self) -> list[str]:
        """Return the names of a layer's MLPs."""
        return ["mlp"]

    def routers(self) -> list[tuple[str, tuple[int, ...]]]:
        """Return name and shape of what chooses among them."""
        return []

    def config(self) -> dict[str, Any]:
        """Return config.json."""
        return {
            **vars(self),
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "bos_token_id": 1,
            "eos_token_id": 2,
        }


def _projections(mlp: str, hidden: int, inner: int) -> list[tuple[str, tuple[int, int]]]:
    return [(f"{mlp}.gate", (inner, hidden)), (f"{mlp}.up", (inner, hidden)), (f"{mlp}.down", (hidden, inner))]


@dataclass(frozen=True)
class QwenMoeShape(Shape):
    """Qwen 3's mixtures of experts: `intermediate_size` is that of an expert; heads of 128 features, normalised."""

    num_experts: int
    num_experts_per_tok: int

    @property
    def head_dim(self) -> int:
        """Features of a head."""
        return 128

    def norms(self) -> list[tuple[str, tuple[int, ...]]]:
        """Return name and shape of a layer's norms."""
        return [*super().norms(), *((f"self_attn.{name}_norm", (self.head_dim,)) for name in "qk")]

    def mlps(self) -> list[str]:
        """Return the names of a layer's MLPs."""
        return [f"mlp.experts.{i}" for i in range(self.num_experts)]

    def routers(self) -> list[tuple[str, tuple[int, ...]]]:
        """Return name and shape of what chooses among them."""
        return [("mlp.gate", (self.num_experts, self.hidden_size))]

    def config(self) -> dict[str, Any]:
        """Return config.json."""
        own = {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "head_dim": self.head_dim,
            "moe_intermediate_size": self.intermediate_size,
            "norm_topk_prob": True,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
        }
        return {**super().config(), **own}


@dataclass(frozen=True)
class GemmaShape(Shape):
    """Gemma 3's: heads of 256 features, norms that are stored less 1, one layer of six without a window."""

    sliding_window: int

    @property
    def head_dim(self) -> int:
        """Features of a head."""
        return 256

    def norms(self) -> list[tuple[str, tuple[int, ...]]]:
        """Return name and shape of a layer's norms."""
        more = [("pre_feedforward_layernorm", (self.hidden_size,)), ("post_feedforward_layernorm", (self.hidden_size,))]
        return [*super().norms(), *more, *((f"self_attn.{name}_norm", (self.head_dim,)) for name in "qk")]

    def config(self) -> dict[str, Any]:
        """Return config.json."""
        own = {
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            "hidden_activation": "gelu_pytorch_tanh",
            "head_dim": self.head_dim,
            "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0,
            "sliding_window_pattern": 6,
            "tie_word_embeddings": True,
        }
        return {**{name: value for name, value in super().config().items() if name != "hidden_act"}, **own}


@dataclass(frozen=True)
class GptOssShape(Shape):
    """gpt-oss's: `intermediate_size` is that of an expert; experts in MXFP4, biases, sinks, every other layer with a window."""

    num_local_experts: int
    num_experts_per_tok: int
    sliding_window: int

    @property
    def head_dim(self) -> int:
        """Features of a head."""
        return 64

    @property
    def num_parameters(self) -> int:
        """Embedding and head included."""
        of_groups = {"_blocks": 2, "_scales": 0}  # weights of a byte
        sizes = ((int(np.prod(shape)), of_groups.get(name[-7:], 1)) for name, shape in self.tensors())
        return sum(size * weights for size, weights in sizes)

    def tensors(self) -> list[tuple[str, tuple[int, ...]]]:
        """Return name and shape of every tensor, in the order of the layers."""
        plain = [tensor for tensor in super().tensors() if ".experts." not in tensor[0]]
        experts, hidden, inner = self.num_local_experts, self.hidden_size, self.intermediate_size
        query = self.head_dim * self.num_attention_heads
        own: list[tuple[str, tuple[int, ...]]] = [
            *(
                (f"self_attn.{name}_proj.bias", (size,))
                for name, size in zip("qkvo", (query, self.kv_width, self.kv_width, hidden), strict=True)
            ),
            ("self_attn.sinks", (self.num_attention_heads,)),
            ("mlp.router.bias", (experts,)),
        ]
        for name, rows, columns in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
            root = f"mlp.experts.{name}"
            own += [
                (f"{root}_blocks", (experts, rows, columns // 32, 16)),
                (f"{root}_scales", (experts, rows, columns // 32)),
            ]
            own.append((f"{root}_bias", (experts, rows)))
        return [
            *plain,
            *((f"model.layers.{i}.{name}", size) for i in range(self.num_hidden_layers) for name, size in own),
        ]

    def mlps(self) -> list[str]:
        """Return the names of a layer's MLPs."""
        return ["mlp.experts.0"]

    def routers(self) -> list[tuple[str, tuple[int, ...]]]:
        """Return name and shape of what chooses among them."""
        return [("mlp.router", (self.num_local_experts, self.hidden_size))]

    def config(self) -> dict[str, Any]:
        """Return config.json."""
        own = {
            "architectures": ["GptOssForCausalLM"],
            "model_type": "gpt_oss",
            "head_dim": self.head_dim,
            "attention_bias": True,
            "rope_theta": 150000.0,
            "rope_scaling": {
                **{"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096},
                **{"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
            },
            "quantization_config": {"quant_method": "mxfp4"},
        }
        return {**super().config(), **own}


@dataclass(frozen=True)
class ErnieMoeShape(Shape):
    """ERNIE 4.5's mixtures: `intermediate_size` is that of the first layer; the others have experts, some of them shared."""

    moe_intermediate_size: int
    moe_num_experts: int
    moe_k: int
    moe_num_shared_experts: int

    def tensors(self) -> list[tuple[str, tuple[int, ...]]]:
        """Return name and shape of every tensor, in the order of the layers."""
        plain = [t for t in super().tensors() if ".mlp." not in t[0] or t[0].startswith("model.layers.0.")]
        hidden, inner = self.hidden_size, self.moe_intermediate_size
        experts = [(f"mlp.experts.{i}", inner) for i in range(self.moe_num_experts)]
        shared = ("mlp.shared_experts", inner * self.moe_num_shared_experts)
        projections = [part for mlp, size in (*experts, shared) for part in _projections(mlp, hidden, size)]
        own: list[tuple[str, tuple[int, ...]]] = [
            ("mlp.gate.weight", (self.moe_num_experts, hidden)),
            ("mlp.moe_statics.e_score_correction_bias", (1, self.moe_num_experts)),
            *((f"{name}_proj.weight", size) for name, size in projections),
        ]
        layers = range(1, self.num_hidden_layers)
        return [*plain, *((f"model.layers.{i}.{name}", size) for i in layers for name, size in own)]

    def config(self) -> dict[str, Any]:
        """Return config.json."""
        own = {
            "architectures": ["Ernie4_5_MoeForCausalLM"],
            "model_type": "ernie4_5_moe",
            "moe_layer_start_index": 1,
            "moe_layer_end_index": self.num_hidden_layers - 1,
            "moe_layer_interval": 1,
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
        }
        return {**super().config(), **own}


SHAPES = {
    "110m": Shape(768, 2048, 12, 12, 12, 32000, 2048),
    "tinyllama-1.1b": Shape(2048, 5632, 22, 32, 4, 32000, 2048),
    # Its vocabulary is four times as large: what every token costs beside the layers. Head untied, positions cut from 131,072.
    "llama-3.2-1b": Shape(2048, 8192, 16, 32, 8, 128256, 8192),
    # 262,144 tokens, and one key-value head. Positions cut from 32,768.
    "gemma-3-1b": GemmaShape(1152, 6912, 26, 4, 1, 262144, 8192, 512),
    # A sixth of Qwen 3 30B-A3B's layers; positions cut from 40,960. The head is as large as all that a token reads of them.
    "qwen3-30b-a3b-8-layers": QwenMoeShape(2048, 768, 8, 32, 4, 151936, 8192, 128, 8),
    # A sixth of gpt-oss 20B's layers; positions cut from 131,072.
    "gpt-oss-20b-4-layers": GptOssShape(2880, 2880, 4, 64, 8, 201088, 8192, 32, 4, 128),
    # A seventh of ERNIE 4.5 21B-A3B's layers; positions cut from 131,072.
    "ernie-4.5-21b-a3b-4-layers": ErnieMoeShape(2560, 12288, 4, 20, 4, 103424, 8192, 1536, 64, 6, 2),
    "llama-2-7b": Shape(4096, 11008, 32, 32, 32, 32000, 4096),
    # A quarter of its layers, for onnxruntime-genai, whose builder needs 54 GB of memory for all of them.
    "llama-2-7b-8-layers": Shape(4096, 11008, 8, 32, 32, 32000, 4096),
}


def write_checkpoint(shape: Shape, folder: Path) -> None:
    """Write a Hugging Face directory; config.json comes last, so that one with it is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    pool = (rng.standard_normal(_POOL, np.float32) * 0.02).astype(np.float16)
    where: dict[str, str] = {}
    pending: dict[str, np.ndarray] = {}

    def flush() -> None:
        name = f"model-{len(set(where.values())) + 1:05d}.safetensors"
        save_file(pending, folder / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(pending, name))
        pending.clear()

    config = shape.config()
    norm = 0 if config["model_type"] == "gemma3_text" else 1
    for name, size in shape.tensors():
        count = int(np.prod(size))
        if name.endswith(("_blocks", "_scales")):
            is_blocks = name.endswith("_blocks")
            pending[name] = rng.integers(0, 256, size, np.uint8) if is_blocks else np.full(size, 120, np.uint8)
            continue
        stretch = np.resize(np.roll(pool, int(rng.integers(_POOL))), count)
        of_vector = 0 if name.endswith(("bias", "sinks")) else norm
        pending[name] = np.full(size, of_vector, np.float16) if len(size) == 1 else stretch.reshape(size)
        if sum(tensor.nbytes for tensor in pending.values()) > _FILE_BYTES:
            flush()
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "config.json").write_text(json.dumps(config, indent=1))
