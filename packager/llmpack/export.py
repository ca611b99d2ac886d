"""ModelConfig -> one logical ONNX graph of the whole model: weights by name, not by value.

In: a ModelConfig. Out: an ONNX model whose weights are graph inputs named as in the checkpoint. It knows nothing of ranks,
quantization or layouts: each projection is one `Linear (x [T, in_features], weight [out_features, in_features]) ->
[T, out_features]` with the checkpoint's own matrix, and `PagedAttention` (or `QKNorm` before it), `SwiGLU` or `GeGLU` and `MoE`
take their operands apart (q, k, v; gate, up; each expert's). `split.py` turns it into what a rank runs.

The arithmetic is that of transformers' modeling_llama.py, modeling_qwen3.py, modeling_phi3.py, modeling_smollm3.py,
modeling_gemma3.py, modeling_glm4.py, modeling_qwen3_moe.py, modeling_mixtral.py, modeling_gpt_oss.py, modeling_glm4_moe.py,
modeling_ernie4_5_moe.py, modeling_granitemoe.py and modeling_granite.py, the last two's rearranged as in multipliers.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from llmpack.multipliers import embedding_scale, logit_scale, norm_epsilon
from llmpack.rope import attention_scale, of_layer, query_growth, rope_frequencies, rotation_scale
from llmpack.weights import CORRECTION_BIAS, source_shape
from llmrun.artifact import OPS_DOMAIN, OPS_VERSION, KvCacheSpec, ModelConfig

# The newest whose every operator that a graph of ours uses the GPU providers of ONNX Runtime 1.22 have, ROCm's last: they know
# Cast up to 19 and Unsqueeze up to 13, and an operator of a newer version would stay on the CPU.
OPSET = 20
IR_VERSION = 10
MAX_SIZE = (1 << 31) - 1  # of an attribute; as a window it hides nothing
STEP_INPUTS = {
    "input_ids": ["T"],
    "positions": ["T"],
    "slot_mapping": ["T"],
    "query_start": ["B + 1"],
    "seq_lens": ["B"],
    "block_table": ["B", "M"],
    "logit_rows": ["R"],
}


def export(config: ModelConfig, kv_dtype: str, block_size: int) -> onnx.ModelProto:
    """Build the logical graph.

    Args:
        config: the architecture.
        kv_dtype: "float16" or "float32", element type of the caches.
        block_size: tokens in one cache block.

    Returns:
        an ONNX model; nodes are named like modules: `/model/layers.0/self_attn/q_proj`.
    """
    graph = _Graph(config)
    hidden = graph.embed()
    tables = graph.rope_tables()
    kv_heads = config.num_key_value_heads  # of all ranks
    spec = KvCacheSpec(kv_dtype, block_size, config.num_hidden_layers, kv_heads, config.head_dim)
    act = {"silu": "SwiGLU", "gelu_pytorch_tanh": "GeGLU"}[config.activation]
    residual = None
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        caches = graph.caches(i, spec)
        normed, residual = graph.norm(f"{layer}.input_layernorm", hidden, residual)
        q, k, v = (
            graph.linear(f"{layer}.self_attn.{p}", normed, config.attention_bias)
            for p in ("q_proj", "k_proj", "v_proj")
        )
        heads = [q, k, v]
        if config.has_qk_norm:
            heads = [graph.qk_norm(f"{layer}.self_attn", heads)]
        attention = graph.attention(i, heads, tables[graph.table_of(i)], caches)
        hidden = graph.linear(f"{layer}.self_attn.o_proj", attention, config.has_output_bias)
        before_mlp = "post_attention_layernorm"
        if config.has_post_norms:
            hidden, _ = graph.norm(f"{layer}.post_attention_layernorm", hidden, None)
            before_mlp = "pre_feedforward_layernorm"
        normed, residual = graph.norm(f"{layer}.{before_mlp}", hidden, residual)
        if config.is_sparse(i):
            hidden = graph.experts(f"{layer}.mlp", normed)
        else:
            gate, up = (graph.linear(f"{layer}.mlp.{p}", normed, config.mlp_bias) for p in ("gate_proj", "up_proj"))
            activated = graph.op(act, f"{layer}.mlp.act_fn", [gate, up])
            hidden = graph.linear(f"{layer}.mlp.down_proj", activated, config.mlp_bias)
        if config.has_post_norms:
            hidden, _ = graph.norm(f"{layer}.post_feedforward_layernorm", hidden, None)
    normed, _ = graph.norm("model.norm", hidden, residual)
    chosen = graph.standard("Gather", "model.logit_rows", [normed, "logit_rows"], axis=0)
    graph.linear("lm_head", graph.times("model.logit_rows", chosen, logit_scale(config)), False, output="logits")
    return graph.finish()


class _Graph:
    """Collects nodes, inputs and small constants; every method returns the name of a value."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs = [
            helper.make_tensor_value_info(name, TensorProto.INT32, shape) for name, shape in STEP_INPUTS.items()
        ]

    def _node(self, op: str, name: str, inputs: list[str], outputs: list[str], domain: str, **attributes: Any) -> None:
        path = "/" + name.replace(".", "/")
        for number in (str(i) for i in range(self.config.num_hidden_layers)):
            path = path.replace(f"/layers/{number}/", f"/layers.{number}/")
        self.nodes.append(helper.make_node(op, inputs, outputs, name=path, domain=domain, **attributes))

    def op(self, op: str, name: str, inputs: list[str], output: str | None = None, **attributes: Any) -> str:
        output = output or name
        self._node(op, name, inputs, [output], OPS_DOMAIN, **attributes)
        return output

    def standard(self, op: str, name: str, inputs: list[str], **attributes: Any) -> str:
        self._node(op, name, inputs, [name], "", **attributes)
        return name

    def weight(self, name: str) -> str:
        shape = source_shape(self.config, name)
        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return name

    def constant(self, name: str, value: np.ndarray) -> str:
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def embed(self) -> str:
        rows = self.standard(
            "Gather", "model.embed_tokens", [self.weight("model.embed_tokens.weight"), "input_ids"], axis=0
        )
        hidden = self.standard("Cast", "model.embed_tokens.float32", [rows], to=TensorProto.FLOAT)
        return self.times("model.embed_tokens", hidden, embedding_scale(self.config))

    def times(self, name: str, x: str, scale: float) -> str:
        """Multiply by a number; no node where that is 1."""
        if scale == 1:
            return x
        factor = self.constant(f"{name}.scale", np.array([[scale]], np.float32))
        return self.standard("Mul", f"{name}.scaled", [x, factor])

    def table_of(self, layer: int) -> str:
        """Return the key of a layer's table: layers that do not rotate share one, and those that slide may have their own."""
        if not self.config.rotates(layer):
            return "identity"
        return "local" if self.config.rope_local is not None and self.config.slides(layer) else ""

    def rope_tables(self) -> dict[str, str]:
        """Cos and sin of every token's angles, [T, head_dim], once per step for all layers of one `table_of`."""
        name = "model.rotary_emb"
        axis = self.constant(f"{name}.axis", np.array([1], np.int64))
        positions = self.standard("Cast", f"{name}.positions", ["positions"], to=TensorProto.FLOAT)
        column = self.standard("Unsqueeze", f"{name}.column", [positions, axis])
        tables: dict[str, str] = {}
        for key, layer in {self.table_of(i): i for i in range(self.config.num_hidden_layers)}.items():
            config, part = of_layer(self.config, layer), f"{name}.{key}".rstrip(".")
            cos_sin = tables[key] = self._cos_sin(part, column, rope_frequencies(config) * (key != "identity"))
            if key != "identity" and (scale := rotation_scale(config)) is not None:
                factors = self.constant(f"{part}.scale", scale[None, :])
                tables[key] = self.standard("Mul", f"{part}.scaled", [cos_sin, factors])
        return tables

    def _cos_sin(self, name: str, positions: str, frequencies: np.ndarray) -> str:
        inv_freq = self.constant(f"{name}.inv_freq", frequencies[None, :])
        angles = self.standard("Mul", f"{name}.angles", [positions, inv_freq])
        cos = self.standard("Cos", f"{name}.cos", [angles])
        sin = self.standard("Sin", f"{name}.sin", [angles])
        return self.standard("Concat", f"{name}.cos_sin", [cos, sin], axis=1)

    def caches(self, layer: int, spec: KvCacheSpec) -> list[str]:
        blocks = {f"{name}.{layer}": block for name, block in spec.shapes(is_gpu=False).items()}
        cache_type = {"float16": TensorProto.FLOAT16, "float32": TensorProto.FLOAT}[spec.dtype]
        self.inputs += [
            helper.make_tensor_value_info(name, cache_type, ["num_blocks", *block]) for name, block in blocks.items()
        ]
        return list(blocks)

    def norm(self, name: str, x: str, residual: str | None) -> tuple[str, str]:
        """RMSNorm of x, or of x + residual; return (normed, the sum so far)."""
        weight = self.weight(f"{name}.weight")
        epsilon = norm_epsilon(self.config)
        if residual is None:
            return self.op("RMSNorm", name, [x, weight], epsilon=epsilon), x
        total = f"{name}.residual"
        self._node("AddRMSNorm", name, [x, residual, weight], [name, total], OPS_DOMAIN, epsilon=epsilon)
        return name, total

    def linear(self, name: str, x: str, has_bias: bool, output: str | None = None) -> str:
        bias = [self.weight(f"{name}.bias")] if has_bias else []
        return self.op("Linear", name, [x, self.weight(f"{name}.weight"), *bias], output)

    def experts(self, mlp: str, x: str) -> str:
        """Send each token through those of a layer's experts that the router chooses."""
        config, numbers = self.config, range(self.config.num_all_experts)
        logits = self.linear(f"{mlp}.gate", x, config.has_expert_biases)
        roots = [f"{mlp}.experts.{i}" for i in numbers]
        gate_up = [f"{root}.{name}" for root in roots for name in ("gate_proj", "up_proj")]
        matrices = [*gate_up, *(f"{root}.down_proj" for root in roots)]
        kinds = ("weight", "bias") if config.has_expert_biases else ("weight",)
        attributes: dict[str, Any] = {
            "num_experts": config.num_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
            "norm_topk_prob": int(config.norm_topk_prob),
        }
        if config.swiglu_limit is not None:
            attributes |= {"swiglu_alpha": config.swiglu_alpha, "swiglu_limit": config.swiglu_limit}
        if config.num_shared_experts:
            attributes["num_shared_experts"] = config.num_shared_experts
        if config.sigmoid_scoring:
            attributes["sigmoid_scoring"] = 1
        if config.routed_scaling_factor != 1:
            attributes["routed_scaling_factor"] = float(config.routed_scaling_factor)
        weights = [self.weight(f"{matrix}.{kind}") for kind in kinds for matrix in matrices]
        if config.has_correction_bias:
            weights.append(self.weight(f"{mlp}.gate.{CORRECTION_BIAS}"))
        return self.op("MoE", f"{mlp}.experts", [x, logits, *weights], **attributes)

    def qk_norm(self, name: str, heads: list[str]) -> str:
        """RMSNorm of each head of q and of k; return q, k and v side by side."""
        weights = [self.weight(f"{name}.{norm}.weight") for norm in ("q_norm", "k_norm")]
        config = self.config
        attributes = {"num_heads": config.num_attention_heads, "num_kv_heads": config.num_key_value_heads}
        return self.op("QKNorm", f"{name}.qk_norm", [*heads, *weights], None, epsilon=config.rms_norm_eps, **attributes)

    def attention(self, layer: int, heads: list[str], cos_sin: str, caches: list[str]) -> str:
        name = f"model.layers.{layer}.self_attn.attention"
        inputs = [*heads, cos_sin, *caches, "slot_mapping", "query_start", "seq_lens", "block_table"]
        config = self.config
        if config.has_sinks:
            inputs.append(self.weight(f"model.layers.{layer}.self_attn.sinks"))
        attributes = {"num_heads": config.num_attention_heads, "num_kv_heads": config.num_key_value_heads}
        attributes |= query_growth(config) or {}
        attributes["window"] = min(config.window_of(layer) or MAX_SIZE, MAX_SIZE)
        return self.op("PagedAttention", name, inputs, None, scale=attention_scale(config, layer), **attributes)

    def finish(self) -> onnx.ModelProto:
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["R", self.config.vocab_size])
        graph = helper.make_graph(self.nodes, "llama", self.inputs, [logits], self.constants)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(OPS_DOMAIN, OPS_VERSION)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="llmpack")
