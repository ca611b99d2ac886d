"""Artifacts whose digests are all right and whose parts do not belong together, or were not made by `pack` (FORMAT section 3).

What a digest cannot find, the graph says: whose it is (3.4), which operators it has (3.5), where its weights lie (3.1), what
its attention writes into (5.5). Two things no file says, and `verify --deep` finds by computing: weights swapped without
their graphs, and the folder of another model of the same shape.
"""

import json
import math
import random
import shutil

import onnx
import pytest
from onnx import helper

import llmrun.graph_check
from hostile.bad_input import assert_refused, check, copy, list_again, read_members, refusal, write_members
from llmrun import Engine
from llmrun.artifact import OPS_VERSION, IncompatibleError, IntegrityError, manifest_bytes, open_artifact
from llmrun.graph_check import check_graph
from models import make_checkpoint
from mpi.harness import run_alone, run_ranks

pytestmark = pytest.mark.timeout(120)
ASK = ("--ids", "-p", "[1, 5, 99]", "-n", "2")


@pytest.fixture
def single(packed_tiny, tmp_path):
    return copy(packed_tiny(1, "q4"), tmp_path / "single")


@pytest.fixture(scope="module")
def smaller(packed, tmp_path_factory):
    """Another model: one layer instead of two."""
    folder = tmp_path_factory.mktemp("smaller") / "model"
    return packed(make_checkpoint(folder, seed=5, vocab_size=3072, num_hidden_layers=1), 2, "q4")


def swap_folders(artifact):
    (artifact / "rank-0").rename(artifact.parent / "spare")
    (artifact / "rank-1").rename(artifact / "rank-0")
    (artifact.parent / "spare").rename(artifact / "rank-1")
    list_again(artifact)


def swap_weights(artifact):
    one, other = (artifact / f"rank-{rank}/weights.bin" for rank in (0, 1))
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)
    list_again(artifact)


def take_folder(artifact, source, rank, source_rank):
    shutil.rmtree(artifact / f"rank-{rank}")
    shutil.copytree(source / f"rank-{source_rank}", artifact / f"rank-{rank}")
    list_again(artifact)


def change_graph(artifact, change, rank=0):
    path = artifact / f"rank-{rank}/cpu.onnx"
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    list_again(artifact)


def graph_refusal(artifact, rank=0, shards=2):
    folder = artifact / f"rank-{rank}"
    return refusal(lambda: check_graph(folder / "cpu.onnx", folder / "weights.bin", rank, shards, OPS_VERSION))


# 3.4: whose graph


@pytest.mark.mpi
def test_3_4_folders_of_two_ranks_swapped_and_listed_again(artifact):
    swap_folders(artifact)
    check(artifact)  # every digest is right
    outcome = run_alone(artifact, *ASK)
    assert_refused(outcome, 4, "rank-0/cpu.onnx", "the graph of rank '1' of '2'")


@pytest.mark.mpi
def test_3_4_under_mpirun_as_well(artifact):
    swap_folders(artifact)
    outcome = run_ranks(2, artifact, *ASK)
    assert outcome.code != 0
    assert len(outcome.errors) == 1, outcome.stderr
    assert "the graph of rank '1' of '2'" in outcome.errors[0]
    assert "Traceback" not in outcome.stderr
    assert outcome.leftovers == []


@pytest.mark.mpi
def test_3_4_graph_of_another_number_of_shards(artifact, single):
    take_folder(artifact, single, 0, 0)
    assert_refused(run_alone(artifact, *ASK), 4, "the graph of rank '0' of '1'")


@pytest.mark.parametrize("metadata", [{}, {"rank": "0"}, {"rank": "00", "shards": "2"}, {"rank": "0", "shards": "4"}])
def test_3_4_metadata_missing_or_wrong(artifact, metadata):
    change_graph(artifact, lambda model: (model.ClearField("metadata_props"), helper.set_model_props(model, metadata)))
    assert isinstance(graph_refusal(artifact), IncompatibleError)


@pytest.mark.mpi
def test_folder_of_another_model(artifact, smaller):
    take_folder(artifact, smaller, 1, 1)
    assert_refused(run_alone(artifact, *ASK), 4, "rank-1/cpu.onnx", "another model")


def test_graph_of_another_kv_cache(single):
    members = read_members(single)
    members["kv_cache"]["block_size"] = 32
    write_members(single, members)
    assert "another model" in str(refusal(lambda: Engine(single)))
    members["kv_cache"] |= {"block_size": 16, "dtype": "float32"}
    write_members(single, members)
    assert "another model" in str(refusal(lambda: Engine(single)))


def test_graph_of_another_vocabulary(single, packed, tmp_path):
    other = packed(make_checkpoint(tmp_path / "other", vocab_size=3104), 1, "q4")
    take_folder(single, other, 0, 0)
    assert "another model" in str(refusal(lambda: Engine(single)))


@pytest.mark.mpi
def test_weights_swapped_without_their_graphs_are_found_by_verify_deep(artifact):
    swap_weights(artifact)
    check(artifact)
    assert_refused(run_alone("verify", "--deep", artifact), 3, "logits differ")


# 3.5: operators


def add_node(model, *arguments, **attributes):
    model.graph.node.append(helper.make_node(*arguments, **attributes))


def loop_body():
    return helper.make_graph(
        [], "body", [helper.make_tensor_value_info("i", 7, [])], [helper.make_tensor_value_info("i", 7, [])]
    )


STRANGE_NODES = {
    "default-domain": (("Identity", ["logits"], ["z"]), {}),
    "loop": (("Loop", [], ["z"]), {"body": loop_body()}),
    "our-name-elsewhere": (("SwiGLU", ["logits"], ["z"]), {"domain": "com.microsoft"}),
    "unknown-of-ours": (("RunShell", ["logits"], ["z"]), {"domain": "ai.llmpack"}),
    "other-domain": (("Gather", ["logits"], ["z"]), {"domain": "ai.onnx.ml"}),
    "not-a-word": (("A\nllmrun: error[E101]: x", ["logits"], ["z"]), {}),
    "empty": (("", ["logits"], ["z"]), {}),
    "hidden-graph": (("Add", ["logits", "logits"], ["z"]), {"body": loop_body()}),
    "hidden-tensor": (("Cast", ["logits"], ["z"]), {"to": helper.make_tensor("t", 1, [1], [0.0])}),
}


@pytest.mark.parametrize("case", STRANGE_NODES)
def test_3_5_operators_that_no_graph_has(artifact, case):
    arguments, attributes = STRANGE_NODES[case]
    change_graph(artifact, lambda model: add_node(model, *arguments, **attributes))
    assert isinstance(graph_refusal(artifact), IncompatibleError | IntegrityError)


def test_3_5_functions_and_training_code(artifact):
    function = helper.make_function("d", "f", ["x"], ["y"], [], [helper.make_opsetid("", 21)])
    change_graph(artifact, lambda model: model.functions.append(function))
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
    {"offset": -64}, {"offset": 1 << 62}, {"offset": 1}, {"offset": "x"}, {"offset": ""}, {"offset": "\u0663"},
    {"length": -1}, {"length": 1 << 62}, {"length": "9" * 5000}, {"checksum": "x"}, {"another": "y"},
]  # fmt: skip


@pytest.mark.parametrize("entries", EXTERNAL, ids=lambda entries: repr(entries)[:30])
def test_3_1_external_data_elsewhere(artifact, entries):
    change_graph(artifact, lambda model: set_external(model, **entries))
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
    "older-of-ours": set_opset("ai.llmpack", 3),
    "newer-of-ours": set_opset("ai.llmpack", 5),
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
    write_members(single, {**members, "ops": {**members["ops"], "version": 3}})
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


@pytest.mark.mpi
def test_3_1_llmrun_refuses_a_graph_of_other_operators(single):
    change_graph(single, OPSETS["newer-of-ours"])
    assert_refused(run_alone(single, *ASK), 4, "rank-0/cpu.onnx", "('ai.llmpack', 5)")


# Parts that are no graph, no tokenizer, no self-check, with right digests


def test_3_1_a_graph_cut_or_changed_anywhere_gives_one_of_our_errors(artifact):
    path, weights = (artifact / "rank-0" / name for name in ("cpu.onnx", "weights.bin"))
    data = path.read_bytes()
    chooser = random.Random(3)
    for _ in range(300):
        place = chooser.randrange(len(data))
        changed = bytearray(data[:place] if chooser.random() < 0.3 else data)
        if len(changed) == len(data):
            changed[place] ^= 1 << chooser.randrange(8)
        path.write_bytes(changed)
        try:
            check_graph(path, weights, 0, 2, OPS_VERSION)
        except (IntegrityError, IncompatibleError):
            continue  # a changed name or number may be a graph still: what is in it is ONNX Runtime's to judge


@pytest.mark.parametrize(
    "data", [b"", b"\0", b"\x3a", b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", b"{}", b"x" * 99]
)
def test_3_1_not_a_graph(artifact, data):
    (artifact / "rank-0/cpu.onnx").write_bytes(data)
    assert graph_refusal(artifact).code == "E320"


@pytest.mark.parametrize("change", ["shape", "type", "length", "empty"])
def test_3_1_weights_of_another_size_than_their_shape(artifact, change):
    def lie(model):
        tensor = next(t for t in model.graph.initializer if t.name.endswith("down_proj.weight"))
        length = next(e for e in tensor.external_data if e.key == "length")
        if change == "shape":
            tensor.dims[0] += 1
        elif change == "type":
            tensor.data_type = onnx.TensorProto.INT64
        elif change == "empty":  # numpy makes no array of such a shape
            tensor.dims[:], length.value = [0, (1 << 63) - 1], "0"
        else:
            length.value = str(int(length.value) - 64)

    change_graph(artifact, lie)
    assert graph_refusal(artifact).code == "E320"


def test_3_1_a_sparse_tensor(artifact):
    change_graph(artifact, lambda model: model.graph.sparse_initializer.add())
    assert graph_refusal(artifact).code == "E320"


def test_3_1_protobuf_that_would_be_merged(artifact):
    path = artifact / "rank-0/cpu.onnx"
    path.write_bytes(path.read_bytes() * 2)
    assert graph_refusal(artifact).code == "E320"


PARTS = {
    "graph": ("rank-0/cpu.onnx", b"not a graph", 3, "not a graph made by"),
    "tokenizer": ("tokenizer/tokenizer.model", b"not a tokenizer", 3, "tokenizer.model"),
    "template-bytes": ("tokenizer/chat_template.jinja", b"\xff\xfe", 3, "tokenizer"),
}


@pytest.mark.parametrize("part", PARTS)
def test_llmrun_refuses_a_part_that_does_not_parse(single, part):
    name, data, code, words = PARTS[part]
    (single / name).write_bytes(data)
    list_again(single)
    assert_refused(run_alone(single, *ASK), code, words)


def test_llmrun_passes_on_what_onnxruntime_refuses_in_one_sentence(single):
    def change(model):  # allowed by FORMAT 3.5, but a Concat needs an axis
        next(node for node in model.graph.node if node.op_type == "Cos").op_type = "Concat"

    change_graph(single, change)
    assert_refused(run_alone(single, *ASK), 4, "onnxruntime")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "null", '{"ids": 1, "logits": 2, "tolerance": 3}', '{"ids": [1]}', "[" * 100_000],
    ids=lambda text: text[:12] or "empty",
)  # fmt: skip
def test_6_1_selfcheck_that_is_none(single, text):
    (single / "selfcheck.json").write_text(text)
    list_again(single)
    assert_refused(run_alone("verify", "--deep", single), 3, "selfcheck.json")


@pytest.mark.parametrize("text", ["", "{}", "[1]", '[{"text": 1, "ids": 2}]', '[{"text": "a", "ids": [1]}]'])
def test_golden_texts_that_are_none(single, text):
    (single / "tokenizer/golden.json").write_text(text)
    list_again(single)
    assert_refused(run_alone("verify", "--deep", single), 3)


# Negative controls


def test_control_without_the_graph_check_strangers_are_let_in(single, monkeypatch):
    change_graph(single, lambda model: helper.set_model_props(model, {"rank": "1", "shards": "2"}))
    assert isinstance(refusal(lambda: Engine(single)), IncompatibleError)
    monkeypatch.setattr(
        llmrun.graph_check, "check_graph", lambda graph, weights, *_: check_graph(graph, weights, 1, 2, OPS_VERSION)
    )
    with Engine(single) as engine:
        assert len(list(engine.generate_ids([1, 5], max_tokens=2, ignore_eos=True))) == 2


def test_control_the_lies_of_this_module_have_right_digests(artifact):
    swap_folders(artifact)
    check(artifact)
    members = json.loads((artifact / "manifest.json").read_text())
    digest = members.pop("manifest_sha256")
    assert manifest_bytes(members) == (artifact / "manifest.json").read_bytes()
    assert open_artifact(artifact).digest == digest
