"""ONNX Runtime's own 4-bit decode: MatMulNBits and GroupQueryAttention, on one GPU, for a few layers of a published shape.

float16, block size 64, random weights. The graph stays below protobuf's 2 GB; layers are alike, so a step of the whole model
takes as many times longer. Needs onnxruntime-gpu; tests run it on the CPU provider with the tiny shape.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import onnx
import shapes
from onnx import TensorProto, helper, numpy_helper

LAYERS, PAST, BLOCK = 8, 512, 64


def build(name: str, layers: int) -> bytes:
    hidden, intermediate, _, heads, kv_heads, dim, _ = shapes.MODELS[name]
    rng = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    constants = [
        numpy_helper.from_array(np.ones(hidden, np.float16), "ones"),
        numpy_helper.from_array(np.array([[PAST]], np.int32), "seqlens_k"),
        numpy_helper.from_array(np.array(PAST + 1, np.int32), "total"),
    ]
    cache = [1, kv_heads, PAST + 64, dim]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT16, [1, 1, hidden])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT16, [1, 1, hidden])]

    def op(kind: str, given: list[str], made: list[str], domain: str = "com.microsoft", **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, given, made, made[0], domain=domain, **attributes))
        return made[0]

    def product(x: str, out: str, n: int, k: int) -> str:
        weight = rng.integers(0, 256, (n, k // BLOCK, BLOCK // 2), dtype=np.uint8)
        scales = np.full(n * k // BLOCK, 1 / (5 * math.sqrt(k)), np.float16)
        constants.extend([numpy_helper.from_array(weight, f"{out}.w"), numpy_helper.from_array(scales, f"{out}.s")])
        return op("MatMulNBits", [x, f"{out}.w", f"{out}.s"], [out], K=k, N=n, bits=4, block_size=BLOCK)

    x, residual = "x", ""
    for i in range(layers):
        if residual:
            normed = op(
                "SkipSimplifiedLayerNormalization", [x, residual, "ones"], [f"n{i}", "", "", f"r{i}"], epsilon=1e-5
            )
            residual = f"r{i}"
        else:
            normed, residual = op("SimplifiedLayerNormalization", [x, "ones"], [f"n{i}"], "", epsilon=1e-5, axis=-1), x
        qkv = product(normed, f"qkv{i}", (heads + 2 * kv_heads) * dim, hidden)
        for kind in ("key", "value"):
            inputs.append(helper.make_tensor_value_info(f"past_{kind}{i}", TensorProto.FLOAT16, cache))
            outputs.append(helper.make_tensor_value_info(f"present_{kind}{i}", TensorProto.FLOAT16, cache))
        given = [qkv, "", "", f"past_key{i}", f"past_value{i}", "seqlens_k", "total"]
        made = [f"a{i}", f"present_key{i}", f"present_value{i}"]
        attended = op("GroupQueryAttention", given, made, num_heads=heads, kv_num_heads=kv_heads)
        x = product(attended, f"o{i}", hidden, heads * dim)
        normed = op("SkipSimplifiedLayerNormalization", [x, residual, "ones"], [f"m{i}", "", "", f"s{i}"], epsilon=1e-5)
        residual = f"s{i}"
        gate, up = product(normed, f"g{i}", intermediate, hidden), product(normed, f"u{i}", intermediate, hidden)
        sigmoid = op("Sigmoid", [gate], [f"z{i}"], "")
        act = op("Mul", [op("Mul", [gate, sigmoid], [f"h{i}"], ""), up], [f"k{i}"], "")
        x = product(act, f"d{i}" if i < layers - 1 else "y", hidden, intermediate)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, "baseline", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def decode_seconds_per_layer(
    name: str, provider: str = "CUDAExecutionProvider", layers: int = LAYERS, repeats: int = 50
) -> float:
    """Return the mean seconds of a decode step, for one layer."""
    import onnxruntime

    _, _, _, _, kv_heads, dim, _ = shapes.MODELS[name]
    is_cuda = provider.startswith("CUDA")
    place = ("cuda", 0) if is_cuda else ("cpu", 0)
    options: dict[str, str] = {"enable_cuda_graph": "1"} if is_cuda else {}
    session = onnxruntime.InferenceSession(build(name, layers), providers=[(provider, options)])
    binding = session.io_binding()
    x = np.random.default_rng(1).standard_normal((1, 1, shapes.MODELS[name][0])).astype(np.float16)
    binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(x, *place))
    binding.bind_ortvalue_output("y", onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros_like(x), *place))
    empty = np.zeros((1, kv_heads, PAST + 64, dim), np.float16)
    for layer in range(layers):
        for kind in ("key", "value"):
            memory = onnxruntime.OrtValue.ortvalue_from_numpy(empty, *place)
            binding.bind_ortvalue_input(f"past_{kind}{layer}", memory)
            binding.bind_ortvalue_output(f"present_{kind}{layer}", memory)
    for _ in range(3):
        session.run_with_iobinding(binding)
    started = time.perf_counter()
    for _ in range(repeats):
        session.run_with_iobinding(binding)
    return (time.perf_counter() - started) / repeats / layers
