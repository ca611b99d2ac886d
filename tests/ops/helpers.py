"""One-node models, weights in kernel layout, and tolerances for the operator tests.

The layout is written here a second time, straight from FORMAT.md 4.3 and independent of the packager, so that a
misreading of that clause in either place turns a test red.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from llmpack_ops import VERSION, reference
from llmrun.operators import load_library

if TYPE_CHECKING:  # programs that tests start find this file, not that package
    from emulated.emulator import Emulator


ROOT = Path(__file__).parents[2]
TILE_ROWS = 16

# Set by conftest.py. EMULATOR: where nodes run in place of this machine's ONNX Runtime.
LIBRARY_PATH = Path()
EMULATOR: Emulator | None = None

ELEMENT_TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(np.int32): TensorProto.INT32,
    np.dtype(np.int64): TensorProto.INT64,
}

# Largest difference from the float64 reference, relative to the size of what is summed (see each test).
TOLERANCES = {
    # A sum of K products in float32, in 2 chains of K / 2: the error grows like sqrt(K) * 2^-24 for random signs; 4096 terms.
    "matmul": 2e-5,
    # Integer dot products are exact; what remains is one float32 sum over at most 128 groups.
    "quantized_matmul": 4e-6,
    # A sum of squares in 16 lanes, one square root, two products.
    "norm": 2e-6,
    # e^x within 2 units in the last place (2.4e-7), one division, two products.
    "swiglu": 2e-6,
    # A difference of logits of up to 40, rounded, is an error of 2.4e-6 in its exponential; a division and k additions follow.
    "routing": 5e-6,
    # Scores are sums of up to 256 products, and an error of a score becomes a relative error of its weight. The
    # reference reads the same cache, so its type adds nothing.
    "attention": 1e-5,
}


def find_library() -> Path:
    """The installed library beside llmrun's modules, or else the build folder's."""
    spec = importlib.util.find_spec("llmrun")
    folders = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    for folder in [*folders, ROOT / ".build/ops"]:
        if (path := folder / "libllmpack_ops.so").is_file():
            return path
    raise FileNotFoundError(
        f"libllmpack_ops.so is neither beside llmrun nor in {ROOT / '.build/ops'}: build custom_ops"
    )


@dataclass
class Node:
    """One operator with the arrays it gets. `initializers` are stored in the model, the other inputs are fed.

    `optional`: the inputs that it may lack, in order, after all others.
    """

    op: str
    inputs: dict[str, np.ndarray]
    outputs: tuple[str, ...] = ("y",)
    initializers: tuple[str, ...] = ()
    attributes: dict[str, Any] | None = None
    name: str = "the_node"
    optional: tuple[str, ...] = ()

    @property
    def input_names(self) -> list[str]:
        """As a node has them: empty for one that is missing before another."""
        names = [name for name in self.inputs if name not in self.optional]
        names += [name if name in self.inputs else "" for name in self.optional]
        while not names[-1]:
            names.pop()
        return names

    def model(self, any_shape: bool = False) -> bytes:
        values = {
            n: helper.make_tensor_value_info(n, ELEMENT_TYPES[a.dtype], None if any_shape else a.shape)
            for n, a in self.inputs.items()
        }
        node = helper.make_node(
            self.op,
            self.input_names,
            list(self.outputs),
            name=self.name,
            domain="ai.llmpack",
            **(self.attributes or {}),
        )
        graph = helper.make_graph(
            [node],
            "one_node",
            [v for n, v in values.items() if n not in self.initializers],
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in self.outputs],
            [onnx.numpy_helper.from_array(self.inputs[n], n) for n in self.initializers],
        )
        return serialize(graph)

    def run(self, threads: int = 1) -> list[np.ndarray]:
        if EMULATOR is not None:
            inputs = {name or f"missing {i}": self.inputs.get(name) for i, name in enumerate(self.input_names)}
            attributes = self.attributes or {}
            return EMULATOR.run(self.op, inputs, len(self.outputs), attributes, name=self.name, threads=threads)
        feeds = {n: a for n, a in self.inputs.items() if n not in self.initializers}
        return session(self.model(), threads).run(None, feeds)


def serialize(graph: onnx.GraphProto) -> bytes:
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("ai.llmpack", VERSION)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def session(model: bytes | str, threads: int = 1, cores: Sequence[int] = ()) -> onnxruntime.InferenceSession:
    """A session with the library; of one thread, it still cuts loops into ranges, as for ONNX Runtime's threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4  # errors arrive as exceptions
    options.register_custom_ops_library(str(LIBRARY_PATH))
    with operators_on(threads if threads > 1 else 0, cores):
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@contextlib.contextmanager
def subnormals_flushed() -> Iterator[None]:
    """This thread takes subnormal floats for 0, as torch.set_flush_denormal and libraries with -ffast-math make it; on x86."""
    libm = ctypes.CDLL("libm.so.6")
    before, flushing = (ctypes.c_uint32 * 8)(), (ctypes.c_uint32 * 8)()  # fenv_t, whose last word is MXCSR
    libm.fegetenv(before)
    libm.fegetenv(flushing)
    flushing[7] |= 0x8040  # FTZ, DAZ
    libm.fesetenv(flushing)
    try:
        assert np.float32(1e-40) * np.float32(1) == 0
        yield
    finally:
        libm.fesetenv(before)


@contextlib.contextmanager
def operators_on(threads: int, cores: Sequence[int] = ()) -> Iterator[None]:
    """Sessions made meanwhile compute on that many threads; without cores they do not spin: tests share the machine."""
    library = load_library(LIBRARY_PATH)
    assert library.llmpack_ops_use_threads(threads, (ctypes.c_int32 * len(cores))(*cores) if cores else None) == 0
    try:
        yield
    finally:
        library.llmpack_ops_use_threads(0, None)


def tile_rows(rows: np.ndarray, fill: int = 0) -> np.ndarray:
    """[N, ...] to [ceil(N / 16), 16, ...], the last tile filled up."""
    missing = -len(rows) % TILE_ROWS
    padded = np.concatenate([rows, np.full((missing, *rows.shape[1:]), fill, rows.dtype)])
    return padded.reshape(-1, TILE_ROWS, *rows.shape[1:])


def layout_float(weight: np.ndarray) -> np.ndarray:
    """[N, K] to [ceil(N / 16), K, 16]."""
    return np.ascontiguousarray(tile_rows(weight).transpose(0, 2, 1))


layout_scales = layout_float


def layout_q8(quantized: np.ndarray) -> np.ndarray:
    """[N, K] to [ceil(N / 16), K / 4, 16, 4]."""
    tiles = tile_rows(quantized, 128)
    return np.ascontiguousarray(tiles.reshape(len(tiles), TILE_ROWS, -1, 4).transpose(0, 2, 1, 3))


def layout_q4(quantized: np.ndarray) -> np.ndarray:
    """[N, K] in 0..15 to [ceil(N / 16), K / 8, 16, 4]: byte j is q[j] | q[4 + j] << 4 of eight input features."""
    tiles = tile_rows(quantized, 8)
    eights = tiles.reshape(len(tiles), TILE_ROWS, -1, 8)
    return np.ascontiguousarray((eights[..., :4] | eights[..., 4:] << 4).transpose(0, 2, 1, 3))


def layout_q6(quantized: np.ndarray) -> np.ndarray:
    """[N, K] in 0..63 to [ceil(N / 16), K / 16, 3, 16, 4]: three bytes hold features j, 4 + j, 8 + j; 12 + j is in all."""
    tiles = tile_rows(quantized, 32)
    first, second, third, last = np.moveaxis(tiles.reshape(len(tiles), TILE_ROWS, -1, 4, 4), 3, 0)
    parts = [first | last << 6, second | last >> 2 << 6, third | last >> 4 << 6]
    return np.ascontiguousarray(np.stack(parts).transpose(1, 3, 0, 2, 4))


LAYOUTS = {"q8": layout_q8, "q6": layout_q6, "q4": layout_q4, "mxfp4": layout_q4}
# Integers that a scheme stores, lowest and highest.
RANGES = {"q8": (1, 255), "q6": (0, 63), "q4": (0, 15), "mxfp4": (0, 15)}


@dataclass
class Projection:
    """A matrix product of one scheme: its node, and the logical weight that the reference multiplies with."""

    scheme: str
    weight: np.ndarray  # [N, K], as float64
    initializers: dict[str, np.ndarray]
    attributes: dict[str, int]
    sum_of_levels: np.ndarray | float = 0.0  # [N], of their magnitudes

    def node(self, x: np.ndarray) -> Node:
        return Node(
            f"MatMul{self.scheme.upper()}",
            {"x": x, **self.initializers},
            ("y",),
            tuple(self.initializers),
            self.attributes,
        )


def quantized_projection(scheme: str, quantized: np.ndarray, scales: np.ndarray) -> Projection:
    from llmpack_ops.reference import LEVELS, dequantize

    group_size = quantized.shape[1] // scales.shape[1]
    return Projection(
        scheme,
        dequantize(quantized, scales, scheme),
        {"weight": LAYOUTS[scheme](quantized), "scales": layout_scales(scales)},
        {"out_features": len(quantized), "group_size": group_size},
        np.abs(LEVELS[scheme][quantized]).sum(axis=1),
    )


@lru_cache(maxsize=64)
def random_projection(scheme: str, N: int, K: int, group_size: int = 32, seed: int = 0) -> Projection:
    rng = np.random.default_rng([seed, N, K, group_size])
    if scheme in ("f32", "f16"):
        weight = rng.standard_normal((N, K)).astype(np.float32 if scheme == "f32" else np.float16)
        return Projection(scheme, weight.astype(np.float64), {"weight": layout_float(weight)}, {"out_features": N})
    low, high = RANGES[scheme]
    quantized = rng.integers(low, high + 1, (N, K)).astype(np.uint8)
    scales = rng.uniform(0.001, 0.1, (N, K // group_size)).astype(np.float16)
    if scheme != "q8":
        scales *= rng.choice(np.array([-1, 1], np.float16), scales.shape)
    return quantized_projection(scheme, quantized, scales)


def random_x(M: int, K: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng([seed, M, K]).standard_normal((M, K)).astype(np.float32)


@dataclass(frozen=True)
class Mixture:
    """A mixture of E experts of F features each, k of them for each token of H features, and of S more that tokens share.

    `biases`: how many of gate_up's and down's there are. `clamp`: swiglu_alpha and swiglu_limit. `corrects`: whether scores
    have a bias; `scaling`: routed_scaling_factor.
    """

    scheme: str
    E: int = 6
    k: int = 2
    H: int = 64
    F: int = 32
    group_size: int = 32
    norms: bool = True
    biases: int = 0
    clamp: tuple[float, float] | None = None
    S: int = 0
    sigmoid: bool = False
    corrects: bool = False
    scaling: float = 1.0

    @property
    def A(self) -> int:
        return self.E + self.S

    @property
    def routing(self) -> dict[str, Any]:
        """What `reference.route` and `reference.moe` take."""
        return {
            "norm_topk_prob": self.norms,
            "sigmoid_scoring": self.sigmoid,
            "e_score_correction_bias": random_x(1, self.E, 11)[0] / 4 if self.corrects else None,
            "routed_scaling_factor": self.scaling,
        }

    def route(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return reference.route(logits, self.k, **self.routing, num_shared_experts=self.S)

    @property
    def stored_biases(self) -> dict[str, np.ndarray]:
        shapes = {"gate_up_bias": (self.A, 2 * self.F), "down_bias": (self.A, self.H)}
        return {name: 3 * random_x(*shapes[name], seed=3) for name in list(shapes)[: self.biases]}

    @property
    def gate_up(self) -> Projection:
        """Those of all experts, one after another; `down` likewise."""
        return random_projection(self.scheme, self.A * 2 * self.F, self.H, self.group_size)

    @property
    def down(self) -> Projection:
        return random_projection(self.scheme, self.A * self.H, self.F, self.group_size, seed=7)

    def node(self, x: np.ndarray, logits: np.ndarray) -> Node:
        stored = {
            name if part == "weight" else f"{name}_{part}": array
            for name, projection in (("gate_up", self.gate_up), ("down", self.down))
            for part, array in projection.initializers.items()
        } | self.stored_biases
        if self.corrects:
            stored["e_score_correction_bias"] = self.routing["e_score_correction_bias"]
        attributes: dict[str, Any] = {
            **self.down.attributes,
            "num_experts": self.E,
            "num_experts_per_tok": self.k,
            "norm_topk_prob": int(self.norms),
            "intermediate_size": self.F,
            "out_features": self.H,
        }
        if self.clamp is not None:
            attributes |= zip(("swiglu_alpha", "swiglu_limit"), self.clamp, strict=True)
        # What is as if it were not there is left out, as in graphs of older versions.
        attributes |= {"num_shared_experts": self.S} if self.S else {}
        attributes |= {"sigmoid_scoring": 1} if self.sigmoid else {}
        attributes |= {"routed_scaling_factor": self.scaling} if self.scaling != 1 else {}
        inputs = {"x": x, "router_logits": logits, **stored}
        optional = ("gate_up_bias", "down_bias", "e_score_correction_bias")
        return Node(f"MoE{self.scheme.upper()}", inputs, ("y",), tuple(stored), attributes, optional=optional)

    def expert(self, e: int) -> tuple[Projection, Projection]:
        """One expert's gate_up and down."""

        def one_of(projection: Projection) -> Projection:
            stored = {name: np.split(array, self.A)[e] for name, array in projection.initializers.items()}
            weight = np.split(projection.weight, self.A)[e]
            return Projection(self.scheme, weight, stored, {**projection.attributes, "out_features": len(weight)})

        return one_of(self.gate_up), one_of(self.down)

    def by_products(self, x: np.ndarray, experts: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What the operators of products make of it, and the size of what is summed; experts and weights [T, k + S]."""
        total, size = np.zeros((len(x), self.H)), np.zeros((len(x), self.H))
        for e in np.unique(experts):
            tokens, slots = np.nonzero(experts == e)
            gate_up, down = self.expert(int(e))
            first = gate_up.node(x[tokens])
            first.op += "SwiGLU"
            (z,) = down.node(first.run()[0]).run()
            total[tokens] += weights[tokens, slots][:, None] * z
            size[tokens] += weights[tokens, slots][:, None] * np.abs(z)
        return total, size
