"""Published shapes, for kernels at their real sizes: no checkpoint is needed to compile."""

from __future__ import annotations

from llmpack.kernel_plan import KernelSpec, plan_kernels
from llmpack.weights import check_options, plan_rank
from llmrun.artifact import ModelConfig

# hidden_size, intermediate_size, num_attention_heads, num_key_value_heads, vocab_size; head_dim is 128.
SHAPES = {
    "llama-2-7b": (4096, 11008, 32, 32, 32000),
    "llama-2-13b": (5120, 13824, 40, 40, 32000),
    "codellama-34b": (8192, 22016, 64, 8, 32000),
    "llama-2-70b": (8192, 28672, 64, 8, 32000),
    "llama-3-8b": (4096, 14336, 32, 8, 128256),
}
BLOCK_SIZE = 16

# What a target's compiler is given: bytes of shared memory that one program may have.
SHARED_MEMORY_LIMITS = {
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
    "gfx90a": 64 << 10,
    "gfx942": 64 << 10,
    "gfx1100": 64 << 10,
    "gfx1201": 64 << 10,
}


def config_of(shape: str) -> ModelConfig:
    hidden, intermediate, heads, kv_heads, vocab_size = SHAPES[shape]
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return ModelConfig(
        "LlamaForCausalLM", hidden, intermediate, 1, heads, kv_heads, 128, vocab_size, 4096, 1e-5, False, False, False,
        rope, "float16",
    )  # fmt: skip


def specs_of(shape: str, shards: int, scheme: str = "q4", group_size: int = 64) -> list[KernelSpec]:
    config = config_of(shape)
    weights = plan_rank(config, check_options(scheme, group_size, shards), shards, 0)
    return plan_kernels(config, weights, shards, BLOCK_SIZE)
