"""Graphs with right digests, not by `pack`: strange operators (3.5), caches that are none (5.5), weights elsewhere (3.1)."""

import math
import os

import onnx
import pytest
from onnx import helper

from hostile.bad_input import assert_refused, read_members, write_members
from hostile.graphs import ASK, change_graph, graph_refusal
from llmrun import Engine
from llmrun.artifact import OPS_VERSION, IncompatibleError, IntegrityError
from llmrun.graph_check import check_graph
from mpi.harness import run_alone

pytestmark = pytest.mark.timeout(120)


# 3.5: operators


def add_node(model, *arguments, **attributes):
    model.graph.node.append(helper.make_node(*arguments, **attributes))


def loop_body():
    return helper.make_graph(
        [], "body", [helper.make_tensor_value_info("i", 7, [])], [helper.make_tensor_value_info("i", 7, [])]
    )


TENSOR = helper.make_tensor("t", onnx.TensorProto.FLOAT, [1], [0.0])
SPARSE = helper.make_sparse_tensor(TENSOR, helper.make_tensor("i", onnx.TensorProto.INT64, [1], [0]), [1])
STRANGE_NODES = {
    "default-domain": (("Identity", ["logits"], ["z"]), {}),
    "loop": (("Loop", [], ["z"]), {"body": loop_body()}),
    "our-name-elsewhere": (("SwiGLU", ["logits"], ["z"]), {"domain": "com.microsoft"}),
    "unknown-of-ours": (("RunShell", ["logits"], ["z"]), {"domain": "ai.llmpack"}),
    "other-domain": (("Gather", ["logits"], ["z"]), {"domain": "ai.onnx.ml"}),
    "not-a-word": (("A\nllmrun: error[E101]: x", ["logits"], ["z"]), {}),
    "empty": (("", ["logits"], ["z"]), {}),
    "hidden-graph": (("Add", ["logits", "logits"], ["z"]), {"body": loop_body()}),
    "hidden-graphs": (("Add", ["logits", "logits"], ["z"]), {"body": [loop_body()]}),
    "hidden-tensor": (("Cast", ["logits"], ["z"]), {"to": TENSOR}),
    "hidden-tensors": (("Cast", ["logits"], ["z"]), {"to": [TENSOR]}),
    "hidden-sparse": (("Cast", ["logits"], ["z"]), {"to": SPARSE}),
    "hidden-sparses": (("Cast", ["logits"], ["z"]), {"to": [SPARSE]}),
}


@pytest.mark.parametrize("case", STRANGE_NODES)
def test_3_5_operators_that_no_graph_has(artifact, case):
    arguments, attributes = STRANGE_NODES[case]
    change_graph(artifact, lambda model: add_node(model, *arguments, **attributes))
    assert isinstance(graph_refusal(artifact), IncompatibleError | IntegrityError)


def test_3_5_functions_and_training_code(artifact):
    function = helper.make_function("d", "f", ["x"], ["y"], [], [helper.make_opsetid("", 21)])
    training = onnx.TrainingInfoProto(algorithm=loop_body())
    for change in (lambda model: model.functions.append(function), lambda model: model.training_info.append(training)):
        change_graph(artifact, lambda model: (model.ClearField("functions"), model.ClearField("training_info")))
        change_graph(artifact, change)
        assert "functions" in str(graph_refusal(artifact))


@pytest.mark.parametrize("case", ["loop", "not-a-word"])
def test_3_5_llmrun_refuses_with_one_sentence(single, case):
    arguments, attributes = STRANGE_NODES[case]
    change_graph(single, lambda model: add_node(model, *arguments, **attributes))
    assert_refused(run_alone(single, *ASK), 3 if case == "loop" else 4)


# 5.5: what attention writes into


def cache_in_weights(model, name, shape):
    """Add an initializer that lies where weights.bin begins, for layer 0's PagedAttention to write into."""
    length = 2 * math.prod(shape)
    tensor = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT16, dims=shape, data_location=1)
    for key, value in (("location", "weights.bin"), ("offset", "0"), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    model.graph.initializer.append(tensor)


def attention_inputs(model, layer=0):
    return [node for node in model.graph.node if node.op_type == "PagedAttention"][layer].input


def weights_that_are_inputs(model):
    for place, name in ((2, "k"), (3, "v")):
        cache = next(value for value in model.graph.input if value.name == attention_inputs(model)[place])
        shape = [4, *(size.dim_value for size in cache.type.tensor_type.shape.dim[1:])]
        cache_in_weights(model, name, shape)
        model.graph.input.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT16, shape))
        attention_inputs(model)[place] = name


def weights_behind_unsqueeze(model):
    model.graph.initializer.append(helper.make_tensor("axes", onnx.TensorProto.INT64, [1], [0]))
    for place, name in ((2, "k"), (3, "v")):
        cache = next(value for value in model.graph.input if value.name == attention_inputs(model)[place])
        shape = [size.dim_value for size in cache.type.tensor_type.shape.dim[1:]]
        cache_in_weights(model, name, shape)
        attention_inputs(model)[place] = f"{name}4"
        model.graph.value_info.append(helper.make_tensor_value_info(f"{name}4", onnx.TensorProto.FLOAT16, [1, *shape]))
        model.graph.node.insert(0, helper.make_node("Unsqueeze", [name, "axes"], [f"{name}4"]))


def cache_of_another_layer(model):
    attention_inputs(model, 1)[2] = "key_cache.0"


def cache_that_another_node_reads(model):
    model.graph.initializer.append(helper.make_tensor("axes", onnx.TensorProto.INT64, [1], [0]))
    add_node(model, "Unsqueeze", ["key_cache.0", "axes"], ["z"])


def keys_for_values(model):
    attention_inputs(model)[2:4] = attention_inputs(model)[3:1:-1]


def cache_that_is_no_input(model):
    del model.graph.input[[value.name for value in model.graph.input].index("key_cache.0")]


WRITTEN = [
    weights_behind_unsqueeze, cache_of_another_layer, cache_that_another_node_reads, keys_for_values,
    cache_that_is_no_input,
]  # fmt: skip


@pytest.mark.parametrize("change", WRITTEN, ids=lambda change: change.__name__)
def test_5_5_attention_that_writes_elsewhere(artifact, change):
    change_graph(artifact, change)
    error = graph_refusal(artifact)
    assert (type(error), error.code) == (IncompatibleError, "E419")


def test_3_1_weights_that_are_inputs_too(artifact):
    change_graph(artifact, weights_that_are_inputs)
    assert graph_refusal(artifact).code == "E320"


@pytest.mark.parametrize(
    ("change", "code"), [(weights_that_are_inputs, 3), (weights_behind_unsqueeze, 4)], ids=["inputs", "unsqueeze"]
)
def test_5_5_llmrun_refuses_with_one_sentence(single, change, code):
    change_graph(single, change)
    assert_refused(run_alone(single, *ASK), code, "rank-0/cpu.onnx")


# 3.1: weights


def set_external(model, **entries):
    tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    for entry in tensor.external_data:
        entry.value = str(entries.pop(entry.key, entry.value))
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)


EXTERNAL = [
    {"location": "../rank-1/weights.bin"}, {"location": "/etc/passwd"}, {"location": "cpu.onnx"}, {"location": ""},
    {"location": "./weights.bin"}, {"location": "*/_ORT_MEM_ADDR_/*"}, {"location": "weights.bin\0"},
    {"offset": -64}, {"offset": 1 << 62}, {"offset": 1}, {"offset": "x"}, {"offset": ""}, {"offset": "\u0660"},
    {"offset": "0" * 30}, {"length": -1}, {"length": 1 << 62}, {"length": "9" * 5000}, {"checksum": "x"}, {"another": "y"},
]  # fmt: skip


@pytest.mark.parametrize("entries", EXTERNAL, ids=lambda entries: repr(entries)[:30])
def test_3_1_external_data_elsewhere(artifact, entries):
    change_graph(artifact, lambda model: set_external(model, **entries))
    assert graph_refusal(artifact).code == "E320"


def test_3_1_weights_end_where_their_file_does(artifact):
    weights, graph = artifact / "rank-0/weights.bin", onnx.load(artifact / "rank-0/cpu.onnx", load_external_data=False)
    places = [{e.key: e.value for e in tensor.external_data} for tensor in graph.graph.initializer]
    end = max(int(place["offset"]) + int(place["length"]) for place in places if place)
    os.truncate(weights, end)
    assert check_graph(artifact / "rank-0/cpu.onnx", weights, 0, 2, OPS_VERSION)
    os.truncate(weights, end - 1)
    assert graph_refusal(artifact).code == "E320"


def test_3_1_external_data_described_twice(artifact):
    def change(model):
        tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
        tensor.external_data.add(key="location", value="weights.bin")

    change_graph(artifact, change)
    assert graph_refusal(artifact).code == "E320"


@pytest.mark.parametrize("entries", EXTERNAL[:2], ids=lambda entries: repr(entries)[:30])
def test_3_1_llmrun_refuses_with_one_sentence(single, entries):
    change_graph(single, lambda model: set_external(model, **entries))
    assert_refused(run_alone(single, *ASK), 3, "external data lies in", entries["location"])


def set_opset(domain, version):
    def change(model):
        for opset in model.opset_import:
            if opset.domain == domain:
                opset.version = version

    return change


OPSETS = {
    "older": set_opset("", 19),
    "newer": set_opset("", 22),
    "older-of-ours": set_opset("ai.llmpack", OPS_VERSION - 1),
    "newer-of-ours": set_opset("ai.llmpack", OPS_VERSION + 1),
    "one-more": lambda model: model.opset_import.append(helper.make_opsetid("com.microsoft", 1)),
    "one-twice": lambda model: model.opset_import.append(helper.make_opsetid("", 20)),
    "none": lambda model: model.ClearField("opset_import"),
}


@pytest.mark.parametrize("case", OPSETS)
def test_3_1_operators_of_other_versions_than_the_manifest_says(artifact, case):
    change_graph(artifact, OPSETS[case])
    error = graph_refusal(artifact)
    assert (type(error), error.code) == (IncompatibleError, "E419")


def test_3_1_operators_of_an_older_version_run_where_the_manifest_says_so_too(single):
    change_graph(single, OPSETS["older-of-ours"])
    members = read_members(single)
    write_members(single, {**members, "ops": {**members["ops"], "version": OPS_VERSION - 1}})
    with Engine(single) as engine:
        assert len(list(engine.generate_ids([1, 5], max_tokens=2, ignore_eos=True))) == 2


def test_3_1_graphs_of_opset_21_run_as_well(single):
    change_graph(single, set_opset("", 21))
    with Engine(single) as engine:
        assert len(list(engine.generate_ids([1, 5], max_tokens=2, ignore_eos=True))) == 2


@pytest.mark.parametrize("role", ["model.norm.weight", "qkv_proj.weight", "qkv_proj.scales"])
def test_3_1_weights_in_the_graph_itself(artifact, role):
    def change(model):
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name.endswith(role))
        tensor.CopyFrom(
            helper.make_tensor(tensor.name, tensor.data_type, tensor.dims, bytes(stored_bytes(tensor)), raw=True)
        )

    def stored_bytes(tensor):
        return next(int(entry.value) for entry in tensor.external_data if entry.key == "length")

    change_graph(artifact, change)
    error = graph_refusal(artifact)
    assert error.code == "E320"
    assert role in str(error)


IN_THE_GRAPH = {
    "two-rows": helper.make_tensor("a", onnx.TensorProto.FLOAT, [2, 8], bytes(64), raw=True),
    "row-of-another-type": helper.make_tensor("a", onnx.TensorProto.FLOAT16, [1, 8], bytes(16), raw=True),
    "axes-in-two-dimensions": helper.make_tensor("a", onnx.TensorProto.INT64, [1, 1], [0]),
    "elsewhere-nowhere": onnx.TensorProto(
        name="a", data_type=onnx.TensorProto.INT64, dims=[1], data_location=onnx.TensorProto.EXTERNAL
    ),
}


@pytest.mark.parametrize("case", IN_THE_GRAPH)
def test_3_1_what_is_in_the_graph_is_an_axis_or_a_row(artifact, case):
    change_graph(artifact, lambda model: model.graph.initializer.append(IN_THE_GRAPH[case]))
    assert graph_refusal(artifact).code == "E320"


@pytest.mark.mpi
def test_3_1_llmrun_refuses_a_graph_of_other_operators(single):
    change_graph(single, OPSETS["newer-of-ours"])
    assert_refused(run_alone(single, *ASK), 4, "rank-0/cpu.onnx", f"('ai.llmpack', {OPS_VERSION + 1})")
