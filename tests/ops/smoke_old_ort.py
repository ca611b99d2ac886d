"""Run each operator once in the interpreter that runs this: python smoke_old_ort.py LIBRARY

For a release of ONNX Runtime other than the tests' own: it needs onnxruntime, onnx and numpy, and neither pytest nor mpi4py.
Expected results are the float64 reference's. Prints one line per operator; the exit code says whether all agree.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), *[str(HERE.parents[1] / folder) for folder in ("custom_ops", "runtime")]]

import helpers  # noqa: E402

from llmpack_ops import reference  # noqa: E402
from llmrun.operators import load_library  # noqa: E402


def compare(name: str, y: np.ndarray, exact: np.ndarray, atol: float | np.ndarray) -> None:
    worst = float(np.max(np.abs(y - exact) - atol))
    print(f"{name}: shape {list(y.shape)}, {'agrees' if worst <= 0 else f'off by {worst} beyond the tolerance'}")
    if not worst <= 0:
        sys.exit(1)


def attention(dtype: type, window: int | None, *, has_sinks: bool) -> None:
    rng = np.random.default_rng(3)
    caches = [rng.standard_normal(shape).astype(dtype) for shape in ((4, 2, 8, 16), (4, 2, 16, 8))]
    angles = rng.uniform(0, 6, (3, 4))
    inputs = {
        "qkv": rng.standard_normal((3, (4 + 2 * 2) * 8)).astype(np.float32),
        "cos_sin": np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32),
        "key_cache": caches[0],
        "value_cache": caches[1],
        "slot_mapping": np.array([3 * 16 + 1, 3 * 16 + 2, 1 * 16], np.int32),
        "query_start": np.array([0, 2, 3], np.int32),
        "seq_lens": np.array([19, 1], np.int32),
        "block_table": np.array([[0, 3], [1, -1]], np.int32),
        **({"sinks": np.array([-1, 0, 1, 2], np.float32)} if has_sinks else {}),
    }
    attributes = {"num_heads": 4, "num_kv_heads": 2, "scale": 0.25, **({} if window is None else {"window": window})}
    first = dict(zip(("key_cache", "value_cache"), reference.positions_first(*caches), strict=True))
    exact, keys, values = reference.paged_attention(**inputs | first, **attributes)
    node = helpers.Node("PagedAttention", inputs, ("out",), (), attributes)
    session = helpers.session(node.model())
    binding = session.io_binding()
    bound = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in inputs.items()}
    for name, value in bound.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("out")
    session.run_with_iobinding(binding)
    name = np.dtype(dtype).name + (f" of a window of {window}" if window else "") + " with sinks" * has_sinks
    compare(f"PagedAttention {name}", binding.get_outputs()[0].numpy(), exact, 1e-3)
    found = reference.positions_first(bound["key_cache"].numpy(), bound["value_cache"].numpy())
    atol = 4e-3 if dtype is np.float16 else 1e-6
    compare("  key_cache", found[0].astype(np.float64), keys.astype(np.float64), atol)
    compare("  value_cache", found[1], values, 0)


def main(path: str) -> None:
    helpers.LIBRARY_PATH = Path(path)
    print(f"onnxruntime {onnxruntime.__version__}, kernels {load_library(path).llmpack_ops_isa().decode()}")
    x = helpers.random_x(5, 64)
    for scheme in ("f32", "f16", "q8", "q6", "q4"):
        projection = helpers.random_projection(scheme, 35, 64)
        exact = reference.matmul(x, projection.weight)
        atol: float | np.ndarray = 1e-4
        if scheme in ("q8", "q6", "q4"):
            atol = atol + reference.activation_quantization_bound(x, projection.weight, 32)
        compare(f"MatMul{scheme.upper()}", projection.node(x).run(2)[0], exact, atol)
        if scheme != "q6":
            for gate in ("SwiGLU", "GeGLU"):
                gated = helpers.random_projection(scheme, 64, 64).node(x)
                expected = helpers.Node(gate, {"gate_up": gated.run()[0]}).run()[0]
                gated.op += gate
                compare(gated.op, gated.run(2)[0], expected, 0)
            product, others = projection.node(x), {"residual": helpers.random_x(5, 35, 3)}
            weight, epsilon, outputs = helpers.random_x(1, 35, 2)[0], {"epsilon": 1e-5}, ("y", "sum")
            added, x_weight = product.run()[0], helpers.random_x(1, 35, 4)[0]
            for norms in ({}, {"x_weight": x_weight}):
                if norms:
                    added = helpers.Node("RMSNorm", {"x": added, "weight": x_weight}, attributes=epsilon).run()[0]
                inputs = {"x": added, **others, "weight": weight}
                expected = helpers.Node("AddRMSNorm", inputs, outputs, attributes=epsilon).run()[0]
                op = f"{product.op}{'RMSNorm' * bool(norms)}AddRMSNorm"
                inputs = {**product.inputs, **norms, **others, "norm_weight": weight}
                attributes = {**(product.attributes or {}), **epsilon}
                normed = helpers.Node(op, inputs, outputs, product.initializers, attributes)
                compare(op, normed.run(2)[0], expected, 0)
    for scheme in ("f32", "f16", "q8", "q4"):
        logits = helpers.random_x(5, 6, 5)
        for mixture in (helpers.Mixture(scheme), helpers.Mixture(scheme, S=1, sigmoid=True, corrects=True)):
            expected, size = mixture.by_products(x, *mixture.route(logits))
            experts = mixture.node(x, logits)
            name = experts.op + " with a shared expert" * mixture.S
            compare(name, experts.run(2)[0], expected, helpers.TOLERANCES["routing"] * size)
    rows = helpers.random_projection("q6", 35, 64)
    ids = np.array([34, 0, 7], np.int32)
    embedding = helpers.Node(
        "EmbeddingQ6", {"ids": ids, **rows.initializers}, attributes={"num_embeddings": 35, "group_size": 32}
    )
    compare("EmbeddingQ6", embedding.run()[0], reference.embedding(ids, rows.weight), 0)
    weight, residual = helpers.random_x(1, 64, 2)[0], helpers.random_x(5, 64, 3)
    norm = helpers.Node("RMSNorm", {"x": x, "weight": weight}, attributes={"epsilon": 1e-5})
    compare("RMSNorm", norm.run()[0], reference.rms_norm(x, weight, 1e-5), 1e-5)
    inputs = {"x": x, "residual": residual, "weight": weight}
    y, total = helpers.Node("AddRMSNorm", inputs, ("y", "sum"), attributes={"epsilon": 1e-5}).run()
    exact_y, exact_total = reference.add_rms_norm(x, residual, weight, 1e-5)
    compare("AddRMSNorm", y, exact_y, 1e-5)
    compare("  sum", total, exact_total, 1e-6)
    sizes = {"num_heads": 2, "num_kv_heads": 1}
    given = {"qkv": x, "q_weight": x[0, : x.shape[1] // 4], "k_weight": x[1, : x.shape[1] // 4]}
    normed = helpers.Node("QKNorm", given, attributes={**sizes, "epsilon": 1e-5}).run()[0]
    compare("QKNorm", normed, reference.qk_norm(*given.values(), **sizes, epsilon=1e-5), 1e-5)
    compare("SwiGLU", helpers.Node("SwiGLU", {"gate_up": x}).run()[0], reference.swiglu(x), 1e-5)
    compare("GeGLU", helpers.Node("GeGLU", {"gate_up": x}).run()[0], reference.geglu(x), 1e-5)
    for dtype in (np.float32, np.float16):
        for window in (None, 3):
            for has_sinks in (False, True):
                attention(dtype, window, has_sinks=has_sinks)
    lone = {
        "AllReduce": helpers.Node("AllReduce", {"x": x}),
        "AllReduceAddRMSNorm": helpers.Node("AllReduceAddRMSNorm", inputs, ("y", "sum"), attributes={"epsilon": 1e-5}),
        "AllGather": helpers.Node("AllGather", {"x": x}, attributes={"out_features": 64}),
    }
    for op, lone_node in lone.items():
        try:
            lone_node.run()
            sys.exit(f"{op} ran without a communicator")
        except Exception as error:  # ONNX Runtime has a class per status code
            if "no communicator is set" not in str(error):
                raise
            print(f"{op}: asks for a communicator")


if __name__ == "__main__":
    main(sys.argv[1])
