"""Operators read and write nothing behind their tensors: each ends where a page begins that nobody may touch."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
import onnxruntime
import pytest
from helpers import TILE_ROWS, Mixture, Node, random_projection, random_x, session
from test_attention import ALL, Sequence, World
from test_moe import random_logits

from llmrun.job_options import ISAS

pytestmark = pytest.mark.parametrize("isa", ISAS, indirect=True)


def at_the_end_of_a_page(array: np.ndarray) -> np.ndarray:
    """A copy; the page behind it may not be touched."""
    end = -(-array.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = np.frombuffer(mmap.mmap(-1, end + mmap.PAGESIZE), np.uint8)
    no_access = 0  # PROT_NONE
    code = ctypes.CDLL(None).mprotect(
        ctypes.c_void_p(memory.ctypes.data + end), ctypes.c_size_t(mmap.PAGESIZE), no_access
    )
    assert code == 0
    placed = memory[end - array.nbytes : end].view(array.dtype).reshape(array.shape)
    placed[...] = array
    return placed


def check(node: Node) -> None:
    expected = node.run()
    node.initializers = ()
    made = session(node.model())
    binding = made.io_binding()
    given = {name: at_the_end_of_a_page(array) for name, array in node.inputs.items()}
    got = {name: at_the_end_of_a_page(array * 0) for name, array in zip(node.outputs, expected, strict=True)}
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in {**given, **got}.items()}
    for name in given:
        binding.bind_ortvalue_input(name, values[name])
    for name in got:
        binding.bind_ortvalue_output(name, values[name])
    made.run_with_iobinding(binding)
    for found, wanted in zip(got.values(), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("scheme", ["f32", "f16", "q8", "q6", "q4"])
@pytest.mark.parametrize("N", [1, 17, 160])
@pytest.mark.parametrize("M", [1, 3, 20])
def test_products(isa: str, scheme: str, N: int, M: int) -> None:
    check(random_projection(scheme, N, 96).node(random_x(M, 96)))


@pytest.mark.parametrize("scheme", ["f32", "f16", "q8", "q4"])
@pytest.mark.parametrize("M", [1, 3, 20])
def test_joined_products(isa: str, scheme: str, M: int) -> None:
    for gate in ("SwiGLU", "GeGLU"):
        node = random_projection(scheme, 32, 96).node(random_x(M, 96))
        node.op += gate
        check(node)
    projection = random_projection(scheme, 23, 96)
    attributes = {**projection.attributes, "epsilon": 1e-5}
    rest = {"residual": random_x(M, 23, 2), "norm_weight": random_x(1, 23, 3)[0]}
    for norms, inputs in (("AddRMSNorm", rest), ("RMSNormAddRMSNorm", {"x_weight": random_x(1, 23, 4)[0], **rest})):
        node = projection.node(random_x(M, 96))
        check(Node(f"{node.op}{norms}", {**node.inputs, **inputs}, ("y", "sum"), (), attributes))


@pytest.mark.parametrize("scheme", ["f32", "f16", "q8", "q4"])
@pytest.mark.parametrize("T", [1, 3, 40])
def test_mixtures_of_experts(isa: str, scheme: str, T: int) -> None:
    check(Mixture(scheme, 4, 3, S=T % 2, corrects=T > 1).node(random_x(T, 64), random_logits(T, 4)))


@pytest.mark.parametrize("scheme", ["q8", "q6"])
def test_embedding(isa: str, scheme: str) -> None:
    projection = random_projection(scheme, TILE_ROWS, 96)
    sizes = {"num_embeddings": TILE_ROWS, "group_size": projection.attributes["group_size"]}
    ids = np.array([TILE_ROWS - 1, 0], np.int32)
    check(Node(f"Embedding{scheme.upper()}", {"ids": ids, **projection.initializers}, attributes=sizes))


@pytest.mark.parametrize("columns", [1, 16, 23])
def test_elementwise(isa: str, columns: int) -> None:
    x, weight, epsilon = random_x(3, columns), random_x(1, columns, 2)[0], {"epsilon": 1e-5}
    check(Node("RMSNorm", {"x": x, "weight": weight}, attributes=epsilon))
    check(Node("AddRMSNorm", {"x": x, "residual": x, "weight": weight}, ("y", "sum"), attributes=epsilon))
    for gate in ("SwiGLU", "GeGLU"):
        check(Node(gate, {"gate_up": random_x(3, 2 * columns)}))


@pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=["f32", "f16"])
@pytest.mark.parametrize("head_dim", [2, 18, 72, 80, 128])
@pytest.mark.parametrize("heads", [(3, 3), (6, 2)], ids=["MHA", "GQA"])
@pytest.mark.parametrize("window", [1, 17, ALL])
def test_attention(isa: str, window: int, heads: tuple[int, int], head_dim: int, dtype: type) -> None:
    """The last position of the cache is read and written too, and the last sink read."""
    sinks = np.zeros(heads[0], np.float32) if window == 17 else None
    world = World(*heads, head_dim, 16, [Sequence(32, [0, 1])], dtype, window=window, sinks=sinks)
    for span in ((0, 0, 31), (0, 31, 32)):
        check(Node("PagedAttention", world.step([span]), ("out",), (), world.attributes()))
