"""ONNX Runtime's own 4-bit model: MatMulNBits and GroupQueryAttention, on one GPU, for a published shape.

float16, block size 64, random weights, cache of PROMPT tokens in place; decode of one token and prefill of PROMPT, with and
without CUDA graphs. A graph must stay below protobuf's 2 GB, and layers are alike: the step of a whole model is that of one
layer with the head, and as many times what each further layer adds. Needs onnxruntime-gpu; tests run it on the CPU provider
with the tiny shape.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import onnx
import shapes
from onnx import TensorProto, helper, numpy_helper

PROMPT, BLOCK = 512, 64
MOST_BYTES = 1.5e9


def build(name: str, layers: int, num_tokens: int, past: int) -> bytes:
    """Return the graph of a few layers and the head, for a step of `num_tokens` after `past`."""
    hidden, intermediate, _, heads, kv_heads, dim, vocabulary = shapes.MODELS[name]
    rng = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    constants = [
        numpy_helper.from_array(np.ones(hidden, np.float16), "ones"),
        numpy_helper.from_array(np.array([[past + num_tokens - 1]], np.int32), "seqlens_k"),
        numpy_helper.from_array(np.array(past + num_tokens, np.int32), "total"),
        numpy_helper.from_array(np.array([num_tokens - 1], np.int64), "last"),
    ]
    cache = [1, kv_heads, PROMPT + 64, dim]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT16, [1, num_tokens, hidden])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT16, [1, 1, vocabulary])]

    def op(kind: str, given: list[str], made: list[str], domain: str = "com.microsoft", **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, given, made, made[0], domain=domain, **attributes))
        return made[0]

    def product(x: str, out: str, n: int, k: int) -> str:
        weight = rng.integers(0, 256, (n, k // BLOCK, BLOCK // 2), dtype=np.uint8)
        scales = np.full(n * k // BLOCK, 1 / (5 * math.sqrt(k)), np.float16)
        constants.extend([numpy_helper.from_array(weight, f"{out}.w"), numpy_helper.from_array(scales, f"{out}.s")])
        return op("MatMulNBits", [x, f"{out}.w", f"{out}.s"], [out], K=k, N=n, bits=4, block_size=BLOCK)

    def norm(x: str, residual: str, out: str) -> tuple[str, str]:
        if not residual:
            return op("SimplifiedLayerNormalization", [x, "ones"], [out], "", epsilon=1e-5, axis=-1), x
        made = [out, "", "", f"{out}.sum"]
        op("SkipSimplifiedLayerNormalization", [x, residual, "ones"], made, epsilon=1e-5)
        return out, f"{out}.sum"

    x, residual = "x", ""
    for i in range(layers):
        normed, residual = norm(x, residual, f"n{i}")
        qkv = product(normed, f"qkv{i}", (heads + 2 * kv_heads) * dim, hidden)
        for kind in ("key", "value"):
            inputs.append(helper.make_tensor_value_info(f"past_{kind}{i}", TensorProto.FLOAT16, cache))
            outputs.append(helper.make_tensor_value_info(f"present_{kind}{i}", TensorProto.FLOAT16, cache))
        given = [qkv, "", "", f"past_key{i}", f"past_value{i}", "seqlens_k", "total"]
        made = [f"a{i}", f"present_key{i}", f"present_value{i}"]
        attended = op("GroupQueryAttention", given, made, num_heads=heads, kv_num_heads=kv_heads)
        x = product(attended, f"o{i}", hidden, heads * dim)
        normed, residual = norm(x, residual, f"m{i}")
        gate, up = product(normed, f"g{i}", intermediate, hidden), product(normed, f"u{i}", intermediate, hidden)
        act = op("Mul", [op("Mul", [gate, op("Sigmoid", [gate], [f"z{i}"], "")], [f"h{i}"], ""), up], [f"k{i}"], "")
        x = product(act, f"d{i}", hidden, intermediate)
    normed, _ = norm(x, residual, "final")
    product(op("Gather", [normed, "last"], ["chosen"], "", axis=1), "logits", vocabulary, hidden)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, "baseline", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def most_layers(name: str) -> int:
    """Return how many layers one graph holds, at least two."""
    per_layer = sum(n * k for n, k in shapes.products(name, 1).values()) * (0.5 + 2 / BLOCK)
    return max(2, min(8, shapes.MODELS[name][2], int(MOST_BYTES / per_layer)))


def seconds(
    model: bytes, name: str, layers: int, num_tokens: int, provider: str, repeats: int, *, graph: bool
) -> float:
    """Return the mean seconds of a step; the cache is shared by past and present."""
    import onnxruntime

    if provider.startswith("CUDA"):  # NVIDIA's libraries, where pip has put them
        onnxruntime.preload_dlls()
    hidden, _, _, _, kv_heads, dim, vocabulary = shapes.MODELS[name]
    place = ("cuda", 0) if provider.startswith("CUDA") else ("cpu", 0)
    session = onnxruntime.InferenceSession(model, providers=[(provider, {"enable_cuda_graph": "1"} if graph else {})])
    if session.get_providers()[0] != provider:
        raise RuntimeError(f"onnxruntime has not loaded its {provider}")
    binding = session.io_binding()
    x = np.random.default_rng(1).standard_normal((1, num_tokens, hidden)).astype(np.float16)
    binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(x, *place))
    logits = np.zeros((1, 1, vocabulary), np.float16)
    binding.bind_ortvalue_output("logits", onnxruntime.OrtValue.ortvalue_from_numpy(logits, *place))
    empty = np.zeros((1, kv_heads, PROMPT + 64, dim), np.float16)
    for layer in range(layers):
        for kind in ("key", "value"):
            memory = onnxruntime.OrtValue.ortvalue_from_numpy(empty, *place)
            binding.bind_ortvalue_input(f"past_{kind}{layer}", memory)
            binding.bind_ortvalue_output(f"present_{kind}{layer}", memory)
    for _ in range(2):
        session.run_with_iobinding(binding)
    started = time.perf_counter()
    for _ in range(repeats):
        session.run_with_iobinding(binding)
    return (time.perf_counter() - started) / repeats


def tokens_per_s(name: str, provider: str, repeats: int = 30) -> dict[str, float]:
    """Return what a whole model would do, under the names of hardware.py's own figures."""
    few, many, depth = 1, most_layers(name), shapes.MODELS[name][2]
    ways = {"eager": False, "graph": True} if provider.startswith("CUDA") else {"eager": False}
    prompt = PROMPT if provider.startswith("CUDA") else 16
    found = {}
    for what, num_tokens, past in (("decode", 1, PROMPT), ("prefill", prompt, 0)):
        models = {layers: build(name, layers, num_tokens, past) for layers in (few, many)}
        for way, graph in ways.items():
            count = repeats if what == "decode" else max(2, repeats // 6)
            one, all_ = (
                seconds(model, name, layers, num_tokens, provider, count, graph=graph)
                for layers, model in models.items()
            )
            whole = one + (depth - few) * max(all_ - one, 1e-9) / (many - few)
            found[f"{what}_tokens_per_s_{way}"] = num_tokens / whole
    return found


if __name__ == "__main__":
    import sys

    print(tokens_per_s(*sys.argv[1:3]))
