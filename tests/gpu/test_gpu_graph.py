"""What a GPU's graph makes of a rank's graph, and that the plan has a kernel for every node of it."""

from __future__ import annotations

import dataclasses

import onnx
import pytest
import shapes

from llmpack.export import export
from llmpack.gpu_graph import gpu_graph
from llmpack.split import split
from llmrun.manifest import KvCacheSpec

CONFIG = shapes.config_of("dry")


def rank_graph(shards: int) -> onnx.ModelProto:
    """What `split.py` makes of a Llama."""
    logical = export(CONFIG, "float16", shapes.BLOCK_SIZE)
    return split(logical, CONFIG, shapes.weights_of(CONFIG, shards), 0, shards, "weights.bin")


def model_for_gpu(model: onnx.ModelProto, shards: int) -> onnx.ModelProto:
    kv_heads = CONFIG.num_key_value_heads // shards
    return gpu_graph(
        model, KvCacheSpec("float16", shapes.BLOCK_SIZE, CONFIG.num_hidden_layers, kv_heads, CONFIG.head_dim)
    )


def for_gpu(model: onnx.ModelProto, shards: int = 1) -> list[onnx.NodeProto]:
    """Return the nodes of llmpack's operators, after a check of the types of all values."""
    graph = model_for_gpu(model, shards).graph
    made = {name for node in graph.node for name in node.output}
    described = {info.name for info in (*graph.value_info, *graph.output)}
    assert described == made
    return [node for node in graph.node if node.domain]


def attributes(node: onnx.NodeProto) -> dict[str, object]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def test_gelu_in_place_of_silu() -> None:
    model = rank_graph(1)
    before = for_gpu(model)
    for node in model.graph.node:
        node.op_type = node.op_type.replace("SwiGLU", "GeGLU")
    assert [node.op_type.replace("GeGLU", "SwiGLU") for node in for_gpu(model)] == [node.op_type for node in before]
    for node in for_gpu(model):
        if node.op_type == "GeGLU":
            assert attributes(node) == {"in_features": CONFIG.intermediate_size}


def norm_what_is_added(model: onnx.ModelProto, epsilon: float = CONFIG.rms_norm_eps) -> None:
    """Put an RMSNorm before every AddRMSNorm, by a weight of its own."""
    nodes = []
    for node in model.graph.node:
        if node.op_type == "AddRMSNorm":
            x, normed, weight = node.input[0], f"{node.name}/normed", f"{node.name}/x_weight"
            model.graph.initializer.add(name=weight, dims=[CONFIG.hidden_size], data_type=onnx.TensorProto.FLOAT)
            info = onnx.helper.make_tensor_value_info(normed, onnx.TensorProto.FLOAT, ["T", CONFIG.hidden_size])
            model.graph.value_info.append(info)
            extra = {"domain": node.domain, "epsilon": epsilon}
            nodes.append(onnx.helper.make_node("RMSNorm", [x, weight], [normed], f"{node.name}/post", **extra))
            node.input[0] = normed
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_norm_of_what_is_added_is_part_of_the_norm_behind_it(shards: int) -> None:
    model = rank_graph(shards)
    before = {node.name: node for node in for_gpu(model, shards)}
    norm_what_is_added(model)
    after = for_gpu(model, shards)
    assert [node.name for node in after] == list(before)
    reduced = "AllReduce" if shards > 1 else ""
    changed = [node for node in after if node.op_type != before[node.name].op_type]
    assert len(changed) == 2 * CONFIG.num_hidden_layers
    for node in changed:
        x, *others = before[node.name].input
        assert (before[node.name].op_type, node.op_type) == (f"{reduced}AddRMSNorm", f"{reduced}RMSNormAddRMSNorm")
        assert list(node.input) == [x, f"{node.name}/x_weight", *others]
        assert attributes(node) == attributes(before[node.name])


def test_a_bias_stands_between_the_sum_of_the_ranks_and_its_norm() -> None:
    model = rank_graph(2)
    norm_what_is_added(model)
    nodes = []
    for node in model.graph.node:
        nodes.append(node)
        if node.op_type == "AllReduce":
            (bias, total), (value,) = (f"{node.name}/bias", f"{node.name}/sum"), node.output
            model.graph.initializer.add(name=bias, dims=[CONFIG.hidden_size], data_type=onnx.TensorProto.FLOAT)
            info = onnx.helper.make_tensor_value_info(total, onnx.TensorProto.FLOAT, ["T", CONFIG.hidden_size])
            model.graph.value_info.append(info)
            node.output[0] = total
            nodes.append(onnx.helper.make_node("Add", [total, bias], [value], f"{node.name}/add"))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    ops = [node.op_type for node in for_gpu(model, 2)]
    assert ops.count("AllReduce") == ops.count("RMSNormAddRMSNorm") == 2 * CONFIG.num_hidden_layers
    assert not [op for op in ops if op.startswith("AllReduce") and op != "AllReduce"]


def test_norms_that_cannot_be_joined_are_refused() -> None:
    """There is no kernel for a norm of float16 alone."""
    expected = r"/model/layers\.0/.*/post: RMSNorm has no counterpart on a GPU"
    model = rank_graph(1)
    norm_what_is_added(model, epsilon=0.5)
    with pytest.raises(ValueError, match=expected):
        for_gpu(model)
    model = rank_graph(1)
    norm_what_is_added(model)
    (normed,) = [
        node.output[0] for node in model.graph.node if node.name == "/model/layers.0/post_attention_layernorm/post"
    ]
    (up,) = [node for node in model.graph.node if node.name == "/model/layers.0/mlp/gate_up_proj"]
    up.input[0] = normed
    with pytest.raises(ValueError, match=expected):
        for_gpu(model)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_model_has_the_kernels_of_its_own_norms_and_activation(shards: int) -> None:
    llama = {"swiglu", "add_rms_norm", "all_reduce_add_rms_norm"}
    gemma = {"geglu", "norm_add_rms_norm", "all_reduce_norm_add_rms_norm"}
    for architecture, own in (("LlamaForCausalLM", llama), ("Gemma3ForCausalLM", gemma)):
        config = dataclasses.replace(CONFIG, architecture=architecture)
        planned = {spec.op for spec in shapes.specs_of(config, shards)}
        assert planned & (llama | gemma) == {op for op in own if shards > 1 or not op.startswith("all_reduce")}
        assert "rms_norm" in planned  # of the embedding's rows
        assert ("all_reduce" in planned) == (shards > 1)


MOE = dataclasses.replace(CONFIG, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True, moe_intermediate_size=256)


SHARING = {"num_shared_experts": 1, "sigmoid_scoring": 1, "routed_scaling_factor": 2.5}  # of the last layer


def give_experts(model: onnx.ModelProto, shards: int) -> None:
    """Put a router and its experts in the place of every MLP, as a rank's graph has them; in the last layer some are shared."""
    hidden, width = MOE.hidden_size, MOE.moe_intermediate_size // shards
    nodes = []
    for node in model.graph.node:
        parent, _, name = node.name.rpartition("/")
        if not parent.endswith("/mlp"):
            nodes.append(node)
        elif name == "down_proj":
            x, y = nodes[-1].output[0], node.output[0]  # of the norm
            logits, weights = f"{parent}/gate/y", f"{parent}/experts."
            info = onnx.helper.make_tensor_value_info(logits, onnx.TensorProto.FLOAT, ["T", MOE.num_experts])
            model.graph.value_info.append(info)
            inputs = [x, f"{parent}/gate.weight"]
            sizes = {"num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": 1, "intermediate_size": width}
            sizes |= {"out_features": hidden, "group_size": 64}
            extra = {"domain": node.domain}
            nodes.append(
                onnx.helper.make_node("MatMulF16", inputs, [logits], f"{parent}/gate", out_features=8, **extra)
            )
            inputs = [x, logits, *(weights + name for name in ("gate_up", "gate_up_scales", "down", "down_scales"))]
            if f".{MOE.num_hidden_layers - 1}/" in parent:
                inputs += ["", "", f"{weights}e_score_correction_bias"]
                sizes |= SHARING
            nodes.append(onnx.helper.make_node("MoEQ4", inputs, [y], f"{parent}/experts", **sizes, **extra))
    del model.graph.node[:]
    model.graph.node.extend(nodes)


@pytest.mark.parametrize("shards", [1, 2])
def test_experts_and_their_router(shards: int) -> None:
    """Logits of a router stay float32, as those of the head; what the experts give is joined with nothing before it."""
    model = rank_graph(shards)
    give_experts(model, shards)
    nodes = {node.name: node for node in for_gpu(model, shards)}
    for layer in range(MOE.num_hidden_layers):
        router, experts = (nodes[f"/model/layers.{layer}/mlp/{name}"] for name in ("gate", "experts"))
        assert router.op_type == "MatMulF16F32"
        assert attributes(router) == {"in_features": MOE.hidden_size, "out_features": 8}
        assert (experts.op_type, experts.input[1]) == ("MoEQ4", router.output[0])
        is_last = layer == MOE.num_hidden_layers - 1
        biases = ["", "", f"/model/layers.{layer}/mlp/experts.e_score_correction_bias"]
        assert list(experts.input[6:]) == (biases if is_last else [])  # as it is stored, in float32
        assert attributes(experts) == {
            **(SHARING if is_last else {}),
            "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": 1, "in_features": MOE.hidden_size,
            "intermediate_size": MOE.moe_intermediate_size // shards, "out_features": MOE.hidden_size, "group_size": 64,
        }  # fmt: skip
        reduced = [node for node in nodes.values() if node.input[0] == experts.output[0]]
        assert [node.op_type for node in reduced] == ["AllReduceAddRMSNorm" if shards > 1 else "AddRMSNorm"]
    types = {info.name: info.type.tensor_type.elem_type for info in model_for_gpu(model, shards).graph.value_info}
    assert types[router.output[0]] == onnx.TensorProto.FLOAT
    assert types[experts.output[0]] == onnx.TensorProto.FLOAT16


@pytest.mark.parametrize("shards", [1, 2])
def test_a_model_of_experts_has_their_kernels(shards: int) -> None:
    """And those of an MLP only where a layer has one."""
    experts = {"moe_route", "moe_sort", "moe_combine"}
    experts |= {f"moe_{part}_q4" for part in ("gate_up", "down", "grouped_gate_up", "grouped_down")}
    for config, own in (
        (CONFIG, {"swiglu"}),
        (MOE, experts),
        (dataclasses.replace(MOE, mlp_layer_types=("sparse", "dense")), {"swiglu"} | experts),
    ):
        specs = shapes.specs_of(config, shards)
        planned = {spec.op for spec in specs}
        assert planned & ({"swiglu"} | experts) == own
        router = {"in_features": 256, "out_features": 8, "y_bits": 32}
        routers = [spec for spec in specs if spec.op == "matmul_f16" and router.items() <= spec.constants.items()]
        assert bool(routers) == (own != {"swiglu"})
        for spec in specs:
            if spec.op.endswith("up_q4") and spec.op.startswith("moe"):
                assert spec.constants["intermediate_size"] == 256 // shards
