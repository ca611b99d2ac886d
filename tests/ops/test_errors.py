"""Every documented error of every operator, with its sentence."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from helpers import Node, random_projection, random_x, session

ZEROS = np.zeros


def message(node: Node) -> str:
    with pytest.raises(Exception, match="the_node") as caught:  # ONNX Runtime has a class per status code
        node.run()
    return str(caught.value)


def assert_fails(node: Node, expected: str) -> None:
    assert f"{node.op} 'the_node': {expected}." in message(node)


def matmul(
    op: str, x: tuple[int, ...], weight: np.ndarray, scales: np.ndarray | None = None, **attributes: Any
) -> Node:
    inputs = {"x": ZEROS(x, np.float32), "weight": weight}
    if scales is not None:
        inputs["scales"] = scales
    return Node(op, inputs, initializers=tuple(inputs)[1:], attributes=attributes)


U8, F16, F32 = np.uint8, np.float16, np.float32

MATMUL_CASES = {
    "x has three axes": (
        matmul("MatMulF32", (1, 2, 8), ZEROS((1, 8, 16), F32), out_features=16),
        "input x has shape [1, 2, 8], expected [any, any] = [tokens, in_features]",
    ),
    "weight of another in_features": (
        matmul("MatMulF32", (2, 8), ZEROS((1, 9, 16), F32), out_features=16),
        "input weight has shape [1, 9, 16], expected [1, 8, 16] = [ceil(out_features / 16), in_features, 16]",
    ),
    "a tile too few": (
        matmul("MatMulF16", (2, 8), ZEROS((1, 8, 16), F16), out_features=17),
        "input weight has shape [1, 8, 16], expected [2, 8, 16] = [ceil(out_features / 16), in_features, 16]",
    ),
    "out_features is not positive": (
        matmul("MatMulF16", (2, 8), ZEROS((1, 8, 16), F16), out_features=0),
        "attribute out_features is 0, expected a positive number",
    ),
    "out_features is missing": (
        matmul("MatMulF16", (2, 8), ZEROS((1, 8, 16), F16)),
        "attribute out_features is missing or no integer, expected an integer",
    ),
    "group_size is missing": (
        matmul("MatMulQ4", (2, 32), ZEROS((1, 4, 16, 4), U8), ZEROS((1, 1, 16), F16), out_features=16),
        "attribute group_size is missing or no integer, expected an integer",
    ),
    "group_size is odd": (
        matmul("MatMulQ4", (2, 32), ZEROS((1, 4, 16, 4), U8), ZEROS((1, 1, 16), F16), out_features=16, group_size=16),
        "attribute group_size is 16, expected 32, 64 or 128",
    ),
    "in_features is no multiple of group_size": (
        matmul("MatMulQ8", (2, 96), ZEROS((1, 24, 16, 4), U8), ZEROS((1, 1, 16), F16), out_features=16, group_size=64),
        "input x has 96 in_features, expected a multiple of group_size 64, at least once",
    ),
    "no in_features": (
        matmul("MatMulQ4", (40, 0), ZEROS((1, 0, 16, 4), U8), ZEROS((1, 0, 16), F16), out_features=16, group_size=32),
        "input x has 0 in_features, expected a multiple of group_size 32, at least once",
    ),
    "q8 weight for q4": (
        matmul("MatMulQ4", (2, 32), ZEROS((1, 8, 16, 4), U8), ZEROS((1, 1, 16), F16), out_features=16, group_size=32),
        "input weight has shape [1, 8, 16, 4], expected [1, 4, 16, 4] = [ceil(out_features / 16), in_features / 8, 16, 4]",
    ),
    "q4 weight for q8": (
        matmul("MatMulQ8", (2, 32), ZEROS((1, 4, 16, 4), U8), ZEROS((1, 1, 16), F16), out_features=16, group_size=32),
        "input weight has shape [1, 4, 16, 4], expected [1, 8, 16, 4] = [ceil(out_features / 16), in_features / 4, 16, 4]",
    ),
    "gate and up end within a tile": (
        matmul("MatMulF32SwiGLU", (2, 8), ZEROS((3, 8, 16), F32), out_features=48),
        "attribute out_features is 48, expected a multiple of 32: gate and up in whole tiles",
    ),
    "gate and up of GeGLU end within a tile": (
        matmul("MatMulF16GeGLU", (2, 8), ZEROS((1, 8, 16), F16), out_features=16),
        "attribute out_features is 16, expected a multiple of 32: gate and up in whole tiles",
    ),
    "too few scales of gate and up": (
        matmul(
            "MatMulQ4SwiGLU", (2, 32), ZEROS((2, 4, 16, 4), U8), ZEROS((1, 1, 16), F16), out_features=32, group_size=32
        ),
        "input scales has shape [1, 1, 16], expected [2, 1, 16] = [ceil(out_features / 16), in_features / group_size, 16]",
    ),
    "too few scales": (
        matmul("MatMulQ8", (2, 64), ZEROS((1, 16, 16, 4), U8), ZEROS((1, 1, 16), F16), out_features=16, group_size=32),
        "input scales has shape [1, 1, 16], expected [1, 2, 16] = [ceil(out_features / 16), in_features / group_size, 16]",
    ),
}


def embedding(
    op: str,
    weight: tuple[int, ...],
    num_embeddings: int,
    scales: tuple[int, ...] = (1, 1, 16),
    ids: tuple[int, ...] = (1,),
) -> Node:
    inputs = {"ids": ZEROS(ids, np.int32), "weight": ZEROS(weight, U8), "scales": ZEROS(scales, F16)}
    return Node(op, inputs, attributes={"num_embeddings": num_embeddings, "group_size": 32})


MATMUL_CASES |= {
    f"{op} of {number}": (
        embedding(op, weight, number),
        f"attribute num_embeddings is {number}, expected at most 2147483647",
    )
    for op, weight in (("EmbeddingQ8", (1, 8, 16, 4)), ("EmbeddingQ6", (1, 2, 3, 16, 4)))
    for number in (2**31, 2**63 - 16, 2**63 - 1)  # rounded up to whole tiles the last wraps around
}


MATMUL_CASES |= {
    "a tile too few of an embedding": (
        embedding("EmbeddingQ8", (1, 8, 16, 4), 17, (2, 1, 16)),
        "input weight has shape [1, 8, 16, 4], expected [2, 8, 16, 4] = [ceil(out_features / 16), in_features / 4, 16, 4]",
    ),
    "too few scales of an embedding": (
        embedding("EmbeddingQ6", (2, 2, 3, 16, 4), 17),
        "input scales has shape [1, 1, 16], expected [2, 1, 16] = [ceil(out_features / 16), in_features / group_size, 16]",
    ),
    "scales of an embedding have two axes": (
        embedding("EmbeddingQ8", (1, 8, 16, 4), 16, (1, 16)),
        "input scales has shape [1, 16], expected [any, any, 16] = [ceil(num_embeddings / 16), groups, 16]",
    ),
    "ids have two axes": (
        embedding("EmbeddingQ6", (1, 2, 3, 16, 4), 16, ids=(1, 1)),
        "input ids has shape [1, 1], expected [any] = [tokens]",
    ),
}


@pytest.mark.parametrize("case", MATMUL_CASES)
def test_matmul(case: str) -> None:
    assert_fails(*MATMUL_CASES[case])


def test_wrong_types_are_refused_when_the_model_loads() -> None:
    node = matmul(
        "MatMulQ4", (2, 32), ZEROS((1, 4, 16, 4), np.int32), ZEROS((1, 1, 16), F16), out_features=16, group_size=32
    )
    assert re.search("[Tt]ype", message(node))


def qk_norm(**changes):
    inputs = {"qkv": random_x(2, 32), "q_weight": random_x(1, 8)[0], "k_weight": random_x(1, 8)[0], **changes}
    return Node("QKNorm", inputs, attributes={"num_heads": 2, "num_kv_heads": 1, "epsilon": 1e-5})


def add_rms_norm(op: str, residual: np.ndarray) -> Node:
    inputs = {"x": random_x(2, 8), "residual": residual, "weight": random_x(1, 8)[0]}
    return Node(op, inputs, ("y", "sum"), attributes={"epsilon": 1e-5})


def product_and_norm(op: str, residual: tuple[int, int], norm_weight: int, x_weight: int | None = None) -> Node:
    inputs = {"x": random_x(2, 8), "weight": ZEROS((1, 8, 16), F32)}
    if x_weight is not None:
        inputs["x_weight"] = ZEROS(x_weight, F32)
    inputs |= {"residual": ZEROS(residual, F32), "norm_weight": ZEROS(norm_weight, F32)}
    return Node(op, inputs, ("y", "sum"), ("weight",), {"out_features": 16, "epsilon": 1e-5})


ELEMENTWISE_CASES = {
    "RMSNorm weight": (
        Node("RMSNorm", {"x": random_x(2, 8), "weight": random_x(1, 9)[0]}, attributes={"epsilon": 1e-5}),
        "input weight has shape [9], expected [8] = [hidden_size]",
    ),
    "RMSNorm x": (
        Node("RMSNorm", {"x": random_x(1, 8)[0], "weight": random_x(1, 8)[0]}, attributes={"epsilon": 1e-5}),
        "input x has shape [8], expected [any, any] = [tokens, hidden_size]",
    ),
    "RMSNorm x of more axes than are ever read": (
        Node("RMSNorm", {"x": ZEROS((1,) * 9, F32), "weight": random_x(1, 1)[0]}, attributes={"epsilon": 1e-5}),
        "input x has 9 axes, expected at most 8",
    ),
    "RMSNorm epsilon": (
        Node("RMSNorm", {"x": random_x(2, 8), "weight": random_x(1, 8)[0]}),
        "attribute epsilon is missing or no float, expected a float",
    ),
    "AddRMSNorm residual": (
        add_rms_norm("AddRMSNorm", residual=random_x(3, 8)),
        "input residual has shape [3, 8], expected [2, 8] = [tokens, hidden_size]",
    ),
    "QKNorm weights": (
        qk_norm(k_weight=random_x(1, 9)[0]),
        "input k_weight has shape [9], expected [8] = [head_dim]",
    ),
    "QKNorm heads": (
        qk_norm(qkv=random_x(2, 33)),
        "input qkv has shape [2, 33], expected [any, 32] = [tokens, (num_heads + 2 * num_kv_heads) * head_dim]",
    ),
    "QKNorm wide heads": (
        qk_norm(q_weight=random_x(1, 257)[0]),
        "input q_weight has 257 values (head_dim), expected up to 256",
    ),
    "SwiGLU odd": (Node("SwiGLU", {"gate_up": random_x(2, 7)}), "input gate_up has 7 columns, expected an even number"),
    "GeGLU odd": (Node("GeGLU", {"gate_up": random_x(2, 7)}), "input gate_up has 7 columns, expected an even number"),
    "GeGLU axes": (
        Node("GeGLU", {"gate_up": random_x(1, 8)[0]}),
        "input gate_up has shape [8], expected [any, any] = [tokens, 2 * intermediate_size]",
    ),
    "SwiGLU axes": (
        Node("SwiGLU", {"gate_up": random_x(1, 8)[0]}),
        "input gate_up has shape [8], expected [any, any] = [tokens, 2 * intermediate_size]",
    ),
    "AllReduce alone": (
        Node("AllReduce", {"x": random_x(2, 8)}),
        "no communicator is set, expected llmpack_ops_set_communicator before the first run",
    ),
    "AllReduceAddRMSNorm alone": (
        add_rms_norm("AllReduceAddRMSNorm", residual=random_x(2, 8)),
        "no communicator is set, expected llmpack_ops_set_communicator before the first run",
    ),
    "AllReduceAddRMSNorm residual": (
        add_rms_norm("AllReduceAddRMSNorm", residual=random_x(3, 8)),
        "input residual has shape [3, 8], expected [2, 8] = [tokens, hidden_size]",
    ),
    "MatMulF32AddRMSNorm residual": (
        product_and_norm("MatMulF32AddRMSNorm", (2, 8), 16),
        "input residual has shape [2, 8], expected [2, 16] = [tokens, hidden_size]",
    ),
    "MatMulF32AddRMSNorm weight": (
        product_and_norm("MatMulF32AddRMSNorm", (2, 16), 8),
        "input norm_weight has shape [8], expected [16] = [hidden_size]",
    ),
    "MatMulF32AllReduceAddRMSNorm alone": (
        product_and_norm("MatMulF32AllReduceAddRMSNorm", (2, 16), 16),
        "no communicator is set, expected llmpack_ops_set_communicator before the first run",
    ),
    "MatMulF32RMSNormAddRMSNorm residual": (
        product_and_norm("MatMulF32RMSNormAddRMSNorm", (3, 16), 16, 16),
        "input residual has shape [3, 16], expected [2, 16] = [tokens, hidden_size]",
    ),
    "MatMulF32RMSNormAddRMSNorm first weight": (
        product_and_norm("MatMulF32RMSNormAddRMSNorm", (2, 16), 16, 8),
        "input x_weight has shape [8], expected [16] = [hidden_size]",
    ),
    "MatMulF32RMSNormAddRMSNorm second weight": (
        product_and_norm("MatMulF32RMSNormAddRMSNorm", (2, 16), 17, 16),
        "input norm_weight has shape [17], expected [16] = [hidden_size]",
    ),
    "MatMulF32AllReduceRMSNormAddRMSNorm alone": (
        product_and_norm("MatMulF32AllReduceRMSNormAddRMSNorm", (2, 16), 16, 16),
        "no communicator is set, expected llmpack_ops_set_communicator before the first run",
    ),
    "MatMulF32AllReduceRMSNormAddRMSNorm first weight": (
        product_and_norm("MatMulF32AllReduceRMSNormAddRMSNorm", (2, 16), 16, 8),
        "input x_weight has shape [8], expected [16] = [hidden_size]",
    ),
    "AllGather alone": (
        Node("AllGather", {"x": random_x(2, 8)}, attributes={"out_features": 8}),
        "no communicator is set, expected llmpack_ops_set_communicator before the first run",
    ),
    "AllGather out_features": (
        Node("AllGather", {"x": random_x(2, 8)}, attributes={"out_features": -3}),
        "attribute out_features is -3, expected a positive number",
    ),
}


@pytest.mark.parametrize("case", ELEMENTWISE_CASES)
def test_elementwise_and_collectives(case: str) -> None:
    assert_fails(*ELEMENTWISE_CASES[case])


def test_an_error_leaves_the_session_usable() -> None:
    projection = random_projection("q4", 16, 32)
    inputs = {"x": random_x(1, 32), **projection.initializers}
    s = session(Node("MatMulQ4", inputs, attributes=projection.attributes).model(any_shape=True))
    good = s.run(None, inputs)
    with pytest.raises(Exception, match="input weight has shape"):
        s.run(None, inputs | {"x": random_x(1, 64)})
    np.testing.assert_array_equal(s.run(None, inputs)[0], good[0])
