"""Published shapes, for kernels at their real sizes: no checkpoint is needed to compile."""

from __future__ import annotations

import dataclasses

from llmpack.kernel_plan import plan_kernels
from llmpack.kernel_spec import KernelSpec
from llmpack.weights import check_options, plan_rank
from llmrun.artifact import ModelConfig

# hidden_size, intermediate_size, num_attention_heads, num_key_value_heads, vocab_size; head_dim is 128, and gpt-oss's 64.
SHAPES = {
    "llama-2-7b": (4096, 11008, 32, 32, 32000),
    "llama-2-13b": (5120, 13824, 40, 40, 32000),
    "codellama-34b": (8192, 22016, 64, 8, 32000),
    "llama-2-70b": (8192, 28672, 64, 8, 32000),
    "llama-3-8b": (4096, 14336, 32, 8, 128256),
    "mixtral-8x7b": (4096, 14336, 32, 8, 32000),
    "qwen-3-30b-a3b": (2048, 6144, 32, 4, 151936),
    "granite-3.1-1b-a400m": (1024, 512, 16, 8, 49155),
    "gpt-oss-20b": (2880, 2880, 64, 8, 201088),
}
# num_experts, num_experts_per_tok, moe_intermediate_size
EXPERTS = {
    "mixtral-8x7b": (8, 2, 14336),
    "qwen-3-30b-a3b": (128, 8, 768),
    "granite-3.1-1b-a400m": (32, 8, 512),
    "gpt-oss-20b": (32, 4, 2880),
}
BLOCK_SIZE = 16


def config_of(shape: str) -> ModelConfig:
    hidden, intermediate, heads, kv_heads, vocab_size = SHAPES[shape]
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    number, chosen, moe_intermediate = EXPERTS.get(shape, (None, None, None))
    config = ModelConfig(
        "LlamaForCausalLM", hidden, intermediate, 1, heads, kv_heads, 128, vocab_size, 4096, 1e-5, False, False, False,
        rope, "float16",
    )  # fmt: skip
    if is_gpt_oss(shape):
        config = dataclasses.replace(
            config,
            architecture="GptOssForCausalLM",
            head_dim=64,
            attention_bias=True,
            swiglu_alpha=1.702,
            swiglu_limit=7.0,
        )
    return dataclasses.replace(
        config,
        num_experts=number,
        num_experts_per_tok=chosen,
        norm_topk_prob=True,
        moe_intermediate_size=moe_intermediate,
    )


def is_gpt_oss(shape: str) -> bool:
    return shape.startswith("gpt-oss")


def specs_of(shape: str, shards: int, scheme: str = "q4", group_size: int = 64) -> list[KernelSpec]:
    config = config_of(shape)
    quantization = dataclasses.replace(check_options(scheme, group_size, shards), has_mxfp4=is_gpt_oss(shape))
    weights = plan_rank(config, quantization, shards, 0)
    return plan_kernels(config, weights, shards, BLOCK_SIZE)
