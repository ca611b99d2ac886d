"""Changing a packed graph behind right digests, and asking what is found."""

import onnx

from hostile.bad_input import list_again, refusal
from llmrun.artifact import OPS_VERSION
from llmrun.graph_check import check_graph

ASK = ("--ids", "-p", "[1, 5, 99]", "-n", "2")


def change_graph(artifact, change, rank=0):
    path = artifact / f"rank-{rank}/cpu.onnx"
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    list_again(artifact)


def graph_refusal(artifact, rank=0, shards=2):
    folder = artifact / f"rank-{rank}"
    return refusal(lambda: check_graph(folder / "cpu.onnx", folder / "weights.bin", rank, shards, OPS_VERSION))
