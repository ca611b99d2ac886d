"""No copies: initializers are used where the file is mapped, and in-place hints are honoured."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import helpers
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from llmrun.mpi_functions import Communicator

DOMAIN = "ai.llmpack"


def float_info(name: str, shape: tuple[int | str, ...]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def address_of(name: str) -> onnx.NodeProto:
    return helper.make_node("AddressOf", [name], [f"address of {name}"], domain="test.probe")


def model(graph: onnx.GraphProto) -> onnx.ModelProto:
    opsets = [helper.make_opsetid(d, v) for d, v in (("", 21), (DOMAIN, 1), ("test.probe", 1))]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def addresses(probe: Path, source: bytes | str, feeds: dict[str, np.ndarray], names: list[str]) -> list[int]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    # Nodes in the order of the graph: an address must be taken before the value's last use, or nothing may overwrite the value.
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    options.register_custom_ops_library(str(helpers.LIBRARY_PATH))
    options.register_custom_ops_library(str(probe))
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    pieces = session.run([f"address of {n}" for n in names], feeds)
    return [sum(int(p) << (16 * i) for i, p in enumerate(piece)) for piece in pieces]


def test_add_rms_norm_writes_over_its_inputs(probe: Path) -> None:
    def norm(*inputs: str, outputs: tuple[str, ...]) -> onnx.NodeProto:
        op = "RMSNorm" if len(outputs) == 1 else "AddRMSNorm"
        return helper.make_node(op, [*inputs, "weight"], outputs, domain=DOMAIN, epsilon=1e-5)

    inner = ["x", "residual", "y", "sum"]
    graph = helper.make_graph(
        [
            norm("tokens", outputs=("x",)),
            norm("tokens", outputs=("residual",)),
            address_of("x"),
            address_of("residual"),
            norm("x", "residual", outputs=("y", "sum")),
            address_of("y"),
            address_of("sum"),
            norm("y", "sum", outputs=("end", "end sum")),
        ],
        "in_place",
        [float_info("tokens", ("T", 64)), float_info("weight", (64,))],
        [
            *(float_info(n, ("T", 64)) for n in ("end", "end sum")),
            *(float_info(f"address of {n}", (4,)) for n in inner),
        ],
        value_info=[float_info(n, ("T", 64)) for n in inner],
    )
    feeds = {"tokens": np.ones((5, 64), np.float32), "weight": np.ones(64, np.float32)}
    x, residual, y, total = addresses(probe, model(graph).SerializeToString(), feeds, inner)
    assert y == x != 0
    assert total == residual != 0
    assert x != residual


EXCHANGE = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p, ctypes.c_int, ctypes.c_ssize_t] * 2, ctypes.c_ssize_t)
ERROR_STRING = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int))


@pytest.fixture
def world_of_one(library: ctypes.CDLL) -> Iterator[dict[str, int]]:
    """A communicator of one rank made of Python functions; the dictionary's `code` is what they return."""
    state = {"code": 0, "calls": 0}

    def exchange(send: int, count: int, _: int, receive: int, receive_count: int, byte_type: int, comm: int) -> int:
        assert (count, byte_type, comm) == (receive_count, 22, 11)
        state["calls"] += 1
        ctypes.memmove(receive, send, count)
        return state["code"]

    def error_string(code: int, text: int, length: object) -> int:
        words = f"words for {code}".encode()
        ctypes.memmove(text, words + b"\0", len(words) + 1)
        return 0

    functions = EXCHANGE(exchange), ERROR_STRING(error_string)
    pointers = [ctypes.cast(f, ctypes.c_void_p).value for f in functions]
    size = ctypes.sizeof(Communicator)
    one = Communicator(size, 0, 1, 0, 11, 22, pointers[0], pointers[0], pointers[1])
    assert library.llmpack_ops_set_communicator(ctypes.byref(one)) == 0
    yield state
    assert library.llmpack_ops_set_communicator(None) == 0


@pytest.mark.parametrize("tokens", [3, 900], ids=["small", "large"])
def test_all_reduce_writes_over_its_input(probe: Path, world_of_one: dict[str, int], tokens: int) -> None:
    graph = helper.make_graph(
        [
            helper.make_node("RMSNorm", ["x", "weight"], ["part"], domain=DOMAIN, epsilon=1e-5),
            address_of("part"),
            helper.make_node("AllReduce", ["part"], ["total"], domain=DOMAIN),
            address_of("total"),
            helper.make_node("RMSNorm", ["total", "weight"], ["y"], domain=DOMAIN, epsilon=1e-5),
        ],
        "in_place",
        [float_info("x", ("T", 64)), float_info("weight", (64,))],
        [float_info("y", ("T", 64)), float_info("address of part", (4,)), float_info("address of total", (4,))],
        value_info=[float_info(n, ("T", 64)) for n in ("part", "total")],
    )
    feeds = {"x": np.ones((tokens, 64), np.float32), "weight": np.ones(64, np.float32)}
    part, total = addresses(probe, model(graph).SerializeToString(), feeds, ["part", "total"])
    assert part == total != 0


def test_a_failing_collective_is_an_error_with_the_words_of_mpi(
    library: ctypes.CDLL, world_of_one: dict[str, int]
) -> None:
    node = helpers.Node("AllReduce", {"x": np.ones((2, 3), np.float32)})
    np.testing.assert_array_equal(node.run()[0], 1)
    world_of_one["code"] = 16
    expected = "AllReduce 'the_node': MPI_Allgather failed on rank 0 with code 16: words for 16."
    with pytest.raises(Exception, match=expected):
        node.run()
    begun, ended = ctypes.c_uint64(), ctypes.c_uint64()
    library.llmpack_ops_collective_state(begun, ended)
    assert begun.value == ended.value >= 2


def test_all_gather_of_too_few_columns_is_refused(world_of_one: dict[str, int]) -> None:
    node = helpers.Node("AllGather", {"x": np.ones((2, 3), np.float32)}, attributes={"out_features": 4})
    with pytest.raises(Exception, match="out_features is 4, expected at most 3, the columns of all ranks together"):
        node.run()
    assert world_of_one["calls"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"struct_size": 8}, "communicator struct has 8 bytes, expected "),
        ({"rank": 2}, "communicator has rank 2 of 2, expected 0 <= rank < size"),
        ({"size": 0}, "communicator has rank 0 of 0, expected 0 <= rank < size"),
        ({"alltoall": None}, "communicator lacks a function, expected allgather, alltoall and error_string"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_communicator_is_refused(library: ctypes.CDLL, change: dict[str, int | None], message: str) -> None:
    given = Communicator(ctypes.sizeof(Communicator), 0, 2, 0, 0, 0, 1, 1, 1)
    for name, value in change.items():
        setattr(given, name, value)
    assert library.llmpack_ops_set_communicator(ctypes.byref(given)) == -1
    assert message in library.llmpack_ops_last_error().decode()


def test_initializers_are_used_where_the_file_is_mapped(probe: Path, tmp_path: Path) -> None:
    projection = helpers.random_projection("q4", 256, 1024)
    with open(tmp_path / "weights.bin", "wb") as file:
        initializers = []
        for name, array in projection.initializers.items():
            file.seek(-file.tell() % 64, 1)
            tensor = onnx.TensorProto(name=name, data_type=helpers.ELEMENT_TYPES[array.dtype], dims=array.shape)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", "weights.bin"), ("offset", file.tell()), ("length", array.nbytes)):
                tensor.external_data.add(key=key, value=str(value))
            initializers.append(tensor)
            file.write(array.tobytes())
    names = list(projection.initializers)
    graph = helper.make_graph(
        [
            helper.make_node("MatMulQ4", ["x", *names], ["y"], domain=DOMAIN, **projection.attributes),
            *[address_of(n) for n in names],
        ],
        "mapped",
        [float_info("x", ("M", 1024))],
        [float_info("y", ("M", 256)), *[float_info(f"address of {n}", (4,)) for n in names]],
        initializers,
    )
    path = tmp_path / "cpu.onnx"
    path.write_bytes(model(graph).SerializeToString())

    options = onnxruntime.SessionOptions()
    for library in (helpers.LIBRARY_PATH, probe):
        options.register_custom_ops_library(str(library))
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    x = helpers.random_x(2, 1024)
    y, *pieces = session.run(None, {"x": x})
    mapped = [
        range(*(int(end, 16) for end in line.split()[0].split("-")))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith("weights.bin")
    ]
    for piece in pieces:
        address = sum(int(p) << (16 * i) for i, p in enumerate(piece))
        assert address % 64 == 0
        assert any(address in r for r in mapped)
    np.testing.assert_array_equal(y, projection.node(x).run()[0])
