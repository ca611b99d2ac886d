"""What a GPU's graph makes of a rank's graph, and that the plan has a kernel for every node of it."""

from __future__ import annotations

import dataclasses

import onnx
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


def for_gpu(model: onnx.ModelProto, shards: int = 1) -> list[onnx.NodeProto]:
    """Return the nodes of llmpack's operators, after a check of the types of all values."""
    kv_heads = CONFIG.num_key_value_heads // shards
    cache = KvCacheSpec("float16", shapes.BLOCK_SIZE, CONFIG.num_hidden_layers, kv_heads, CONFIG.head_dim)
    graph = gpu_graph(model, cache).graph
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


def test_a_model_has_the_kernel_of_its_own_activation() -> None:
    planned = {spec.op for spec in shapes.specs_of(CONFIG)}
    assert {"swiglu", "geglu"} & planned == {"swiglu"}
    planned = {spec.op for spec in shapes.specs_of(dataclasses.replace(CONFIG, architecture="Gemma3ForCausalLM"))}
    assert {"swiglu", "geglu"} & planned == {"geglu"}
