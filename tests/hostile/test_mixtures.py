"""Artifacts whose digests are all right and whose parts do not belong together, or were not made by `pack` (FORMAT section 3).

What a digest cannot find, the graph says: whose it is (3.4), and what it is made of (`test_strange_graphs.py`). Two things no
file says, and `verify --deep` finds by computing: weights swapped without their graphs, and the folder of another model of
the same shape.
"""

import json
import random
import shutil

import onnx
import pytest
from onnx import helper

import llmrun.graph_check
from hostile.bad_input import assert_refused, check, list_again, read_members, refusal, write_members
from hostile.graphs import ASK, change_graph, graph_refusal
from llmrun import Engine
from llmrun.artifact import OPS_VERSION, IncompatibleError, IntegrityError, manifest_bytes, open_artifact
from llmrun.graph_check import check_graph
from models import make_checkpoint
from mpi.harness import run_alone, run_ranks

pytestmark = pytest.mark.timeout(120)


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


def test_3_4_metadata_twice(artifact):
    change_graph(artifact, lambda model: model.metadata_props.add(key="rank", value="0"))
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
    "data",
    [
        *(b"", b"\0", b"\x3a", b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", b"{}", b"x" * 99),
        b"\x3a\x02\x08\x05",  # a graph whose node is a number
        b"\x3a\x07\x0a\x05\x08\x05\x22\x01A",  # a node whose input is a number
        b"\x3a\x00\x42\x00",  # operators of no version
        b"\x3a\x00\x42\x04\x10\x14\x10\x15",  # of two
        b"\x3a\x00\x42\x03\x12\x01\x14",  # of a text
        b"\x3a" + b"\x80" * 10 + b"\0",  # a graph whose length takes eleven bytes
    ],
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


def test_3_1_a_graph_without_its_last_byte(artifact):
    path = artifact / "rank-0/cpu.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    assert graph_refusal(artifact).code == "E320"


@pytest.mark.parametrize("field", [b"\x99\x06" + b"\xff" * 8, b"\x9d\x06" + b"\xff" * 4], ids=["64", "32"])
def test_3_1_fields_that_nobody_knows_are_passed_over(artifact, field):
    path = artifact / "rank-0/cpu.onnx"
    path.write_bytes(path.read_bytes() + field)
    assert check_graph(path, artifact / "rank-0/weights.bin", 0, 2, OPS_VERSION)


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
