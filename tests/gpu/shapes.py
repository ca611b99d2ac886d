"""Published shapes as graphs for one GPU, with weights nobody trained: what the benchmark runs; node by node."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from llmpack.kernel_plan import TOP_K, KernelSpec, collectives, norms, plan_kernels
from llmpack.weights import Quantization, RankWeight, heads_per_rank, plan_rank
from llmrun.manifest import OPS_DOMAIN, ModelConfig

BLOCK_SIZE = 16
# hidden_size, intermediate_size, layers, heads, kv heads, head_dim, vocabulary
MODELS = {
    "7b": (4096, 11008, 32, 32, 32, 128, 32000),
    "13b": (5120, 13824, 40, 40, 40, 128, 32000),
    "34b": (8192, 22016, 48, 64, 8, 128, 32000),
    "70b": (8192, 28672, 80, 64, 8, 128, 32000),
    "dry": (256, 512, 2, 8, 4, 32, 512),
    "30b-a3b": (2048, 6144, 48, 32, 4, 128, 151936),
    "dry-gemma": (256, 512, 2, 8, 4, 32, 512),
    "dry-moe": (256, 512, 2, 8, 4, 32, 512),
}
# num_experts, num_experts_per_tok, moe_intermediate_size
EXPERTS = {"30b-a3b": (128, 8, 768), "dry-moe": (8, 2, 128)}
WINDOW = 7  # of every other layer of a Gemma
NO_WINDOW = 2**31 - 1  # FORMAT 5.5
QUANTIZATION = Quantization("q4", 64)
STEP = ("input_ids", "positions", "slot_mapping", "query_start", "seq_lens", "logit_rows")


def config_of(name: str, layers: int | None = None) -> ModelConfig:
    hidden, intermediate, depth, heads, kv_heads, head_dim, vocabulary = MODELS[name]
    number, chosen, moe_intermediate = EXPERTS.get(name, (None, None, None))
    return ModelConfig(
        architecture="Gemma3ForCausalLM" if name.endswith("gemma") else "LlamaForCausalLM",
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers or depth,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        attention_bias=False,
        mlp_bias=False,
        rope={"rope_type": "default", "rope_theta": 10000.0},
        dtype="float16",
        num_experts=number,
        num_experts_per_tok=chosen,
        norm_topk_prob=True,
        moe_intermediate_size=moe_intermediate,
    )


def weights_of(config: ModelConfig, shards: int = 1) -> list[RankWeight]:
    return plan_rank(config, QUANTIZATION, shards, 0)


def specs_of(config: ModelConfig, shards: int = 1) -> list[KernelSpec]:
    return plan_kernels(config, weights_of(config, shards), shards, BLOCK_SIZE)


def collectives_of(model: str, shards: int) -> list[KernelSpec]:
    """Return the kernels of every collective at the width of a model, and of the norms behind what is too long for one."""
    hidden, found = MODELS[model][0], {}
    for form in (False, True):
        for spec in (*norms(hidden, has_post_norms=form), *collectives(hidden, shards, has_post_norms=form)):
            found[spec.op] = spec
    return list(found.values())


def products(name: str, shards: int) -> dict[str, tuple[int, int]]:
    """Return {matrix: (out_features, in_features)} of one rank's projections."""
    weights = weights_of(config_of(name, 1), shards)
    found = [(w.row.name.rpartition(".")[2], (w.num_rows, w.num_columns)) for w in weights if w.row.role == "linear"]
    return dict(found)


def write_graph(config: ModelConfig, path: Path) -> None:
    """Write the graph of one rank alone; its external data is described and not there."""
    weights = {w.row.name: w for w in weights_of(config)}
    nodes: list[onnx.NodeProto] = []
    infos: list[onnx.ValueInfoProto] = []
    hidden, dim = config.hidden_size, config.head_dim
    heads, kv_heads = heads_per_rank(config, 1)
    half, full = TensorProto.FLOAT16, TensorProto.FLOAT

    def add(
        op: str,
        inputs: list[str],
        *outputs: tuple[str, int, int],
        rows: str = "T",
        domain: str = OPS_DOMAIN,
        name: str = "",
        **attributes: float,
    ) -> str:
        nodes.append(
            helper.make_node(op, inputs, [o[0] for o in outputs], name or outputs[0][0], domain=domain, **attributes)
        )
        infos.extend(
            helper.make_tensor_value_info(o, kind, [rows, width])
            for o, kind, width in outputs
            if o not in ("logits", "top")
        )
        return outputs[0][0]

    def product(weight: str, x: str, output: str, rows: str = "T", suffix: str = "") -> str:
        w = weights[weight]
        attributes = {"in_features": w.num_columns, "out_features": w.num_rows, "group_size": w.group_size or 0}
        kind = full if suffix else half
        inputs = [x, *(i.name for i in w.initializers)]
        return add(f"MatMul{w.storage.upper()}{suffix}", inputs, (output, kind, w.num_rows), rows=rows, **attributes)  # type: ignore[arg-type]

    def experts(parent: str, x: str, i: int) -> str:
        logits = product(f"{parent}.gate", x, f"r{i}", suffix="F32")
        gate_up, down = (weights[f"{parent}.experts.{name}_proj"] for name in ("gate_up", "down"))
        inputs = [x, logits, *(item.name for w in (gate_up, down) for item in w.initializers)]
        names = ("num_experts", "num_experts_per_tok", "norm_topk_prob")
        attributes = {name: int(getattr(config, name)) for name in names}
        attributes |= {"intermediate_size": config.moe_intermediate_size, "group_size": gate_up.group_size or 0}
        attributes |= {"in_features": hidden, "out_features": hidden}
        return add(f"MoE{gate_up.storage.upper()}", inputs, (f"d{i}", half, hidden), **attributes)

    embedding = weights["model.embed_tokens"]
    x = add(
        "EmbeddingQ6",
        ["input_ids", *(i.name for i in embedding.initializers)],
        ("rows", full, hidden),
        in_features=hidden,
        num_embeddings=config.vocab_size,
        group_size=embedding.group_size or 0,
    )
    frequencies = (1e4 ** (-np.arange(0, dim, 2) / dim)).astype(np.float32)[None]
    constants = [
        onnx.numpy_helper.from_array(frequencies, "frequencies"),
        onnx.numpy_helper.from_array(np.array([1]), "axis"),
    ]
    for op, inputs, output, width, extra in (
        ("Cast", ["positions"], "float", 1, {"to": full}),
        ("Unsqueeze", ["float", "axis"], "column", 1, {}),
        ("Mul", ["column", "frequencies"], "angles", dim // 2, {}),
        ("Cos", ["angles"], "cos", dim // 2, {}),
        ("Sin", ["angles"], "sin", dim // 2, {}),
        ("Concat", ["cos", "sin"], "cos_sin", dim, {"axis": 1}),
    ):
        add(op, inputs, (output, full, width), domain="", name=f"/model/rotary_emb/{output}", **extra)  # type: ignore[arg-type]
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT32, [None]) for name in STEP]
    inputs.append(helper.make_tensor_value_info("block_table", TensorProto.INT32, [None, None]))
    residual, epsilon = x, config.rms_norm_eps
    norms_made = 0

    def add_and_norm(x: str, post_norm: str, norm: str) -> str:
        nonlocal residual, norms_made
        norms_made += 1
        first = [f"{post_norm}.weight"] if config.has_post_norms else []
        y = add(
            "RMSNormAddRMSNorm" if first else "AddRMSNorm",
            [x, *first, residual, f"{norm}.weight"],
            (f"n{norms_made}", half, hidden),
            (f"s{norms_made}", full, hidden),
            epsilon=epsilon,
            in_features=hidden,
        )
        residual = f"s{norms_made}"
        return y

    sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim}
    layer = y = ""
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        for kind in ("key", "value"):
            inputs.append(helper.make_tensor_value_info(f"{kind}_cache.{i}", half, [None, BLOCK_SIZE, kv_heads, dim]))
        norm = f"{layer}.input_layernorm"
        if i == 0:
            y = add(
                "RMSNormF16", [residual, f"{norm}.weight"], ("n0", half, hidden), epsilon=epsilon, in_features=hidden
            )
        else:
            y = add_and_norm(x, f"model.layers.{i - 1}.post_feedforward_layernorm", norm)
        qkv = product(f"{layer}.self_attn.qkv_proj", y, f"qkv{i}")
        if config.has_qk_norm:
            inputs_of_norm = [qkv, *(f"{layer}.self_attn.{part}_norm.weight" for part in "qk")]
            width = (heads + 2 * kv_heads) * dim
            qkv = add("QKNorm", inputs_of_norm, (f"qk{i}", half, width), epsilon=epsilon, **sizes)
        attended = add(
            "PagedAttention",
            [
                qkv,
                "cos_sin",
                f"key_cache.{i}",
                f"value_cache.{i}",
                "slot_mapping",
                "query_start",
                "seq_lens",
                "block_table",
            ],
            (f"a{i}", half, heads * dim),
            **sizes,
            block_size=BLOCK_SIZE,
            scale=1 / math.sqrt(dim),
            window=WINDOW if config.has_post_norms and i % 2 == 0 else NO_WINDOW,
        )
        x = product(f"{layer}.self_attn.o_proj", attended, f"o{i}")
        post_norm = f"{layer}.post_attention_layernorm"
        y = add_and_norm(x, post_norm, f"{layer}.pre_feedforward_layernorm" if config.has_post_norms else post_norm)
        if config.is_sparse(i):
            x = experts(f"{layer}.mlp", y, i)
            continue
        gate_up = product(f"{layer}.mlp.gate_up_proj", y, f"g{i}")
        op = "SwiGLU" if config.activation == "silu" else "GeGLU"
        act = add(op, [gate_up], (f"w{i}", half, config.intermediate_size), in_features=config.intermediate_size)
        x = product(f"{layer}.mlp.down_proj", act, f"d{i}")
    y = add_and_norm(x, f"{layer}.post_feedforward_layernorm", "model.norm")
    chosen = add(
        "Gather", [y, "logit_rows"], ("chosen", half, hidden), rows="R", domain="", name="/model/logit_rows", axis=0
    )
    product("lm_head", chosen, "logits", "R", "F32")
    attributes = {"in_features": config.vocab_size, "k": TOP_K, "first_id": 0, "vocab_size": config.vocab_size}
    add("TopK", ["logits"], ("top", TensorProto.INT64, TOP_K + 1), rows="R", **attributes)
    results = (("logits", full, config.vocab_size), ("top", TensorProto.INT64, TOP_K + 1))
    outputs = [helper.make_tensor_value_info(name, kind, ["R", width]) for name, kind, width in results]
    for w in weights.values():
        for item in w.initializers:
            tensor = onnx.TensorProto(
                name=item.name, dims=item.shape, data_type=helper.np_dtype_to_tensor_dtype(item.dtype)
            )
            tensor.data_location = TensorProto.EXTERNAL
            constants.append(tensor)
    graph = helper.make_graph(nodes, "benchmark", inputs, outputs, constants, value_info=infos)
    path.write_bytes(helper.make_model(graph).SerializeToString())


def random_weights(config: ModelConfig) -> Weights:
    return Weights(config)


class Weights:
    """Random numbers of the right size; large arrays repeat one piece, which a GPU's memory does not know."""

    def __init__(self, config: ModelConfig) -> None:
        self._items = {i.name: (i, w) for w in weights_of(config) for i in w.initializers}
        self._rng = np.random.default_rng(0)
        self._bytes = self._rng.integers(0, 256, 1 << 24, dtype=np.uint8)

    def __call__(self, name: str) -> np.ndarray:
        item, weight = self._items[name]
        if item.dtype == np.uint8:
            return np.resize(self._bytes, item.num_bytes)
        if weight.storage == "f16":  # a router
            return self._rng.standard_normal(item.shape).astype(np.float16)
        if item.dtype == np.float16:  # scales: rows of about unit length
            level = 32 if weight.storage == "q4" else 19
            scale = 1 / (level * math.sqrt(weight.num_columns))
            return np.full(item.shape, scale, np.float16)
        return np.ones(item.shape, np.float32)
