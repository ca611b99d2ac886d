"""Runs a rank's gpu.onnx without a GPU build of ONNX Runtime: our operators through mini_ort.cpp, what remains by hand.

The few standard operators of the graph are the table of angles, which the host computes from `positions` (numpy), the choice of
logit rows (copies within the device) and the addition of a bias (refused: no model here has one). Every intermediate value has
memory of its own; `sum` shares the residual's, as ONNX Runtime's planner does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from device import Device
from onnx import TensorProto, helper, numpy_helper

DTYPES = {
    TensorProto.FLOAT: np.float32,
    TensorProto.FLOAT16: np.float16,
    TensorProto.INT32: np.int32,
    TensorProto.UINT8: np.uint8,
    TensorProto.INT64: np.int64,
}
STEP = ("input_ids", "positions", "slot_mapping", "query_start", "seq_lens", "block_table", "logit_rows")

MISSING = -1  # in the place of an input without a name


class MiniOrt:
    """The library of operators, registered."""

    def __init__(self, mini: Path, operators: Path, provider: str = "CUDAExecutionProvider") -> None:
        self.library = ctypes.CDLL(str(mini))
        for name in ("mini_node", "mini_plan"):
            getattr(self.library, name).restype = ctypes.c_void_p
        self.library.mini_error.restype = ctypes.c_char_p
        self._provider = provider.encode()
        self.check(self.library.mini_load(str(operators).encode()))

    def check(self, code: int) -> None:
        if code != 0:
            raise RuntimeError(self.library.mini_error().decode())

    def node(
        self, op: str, name: str = "", num_inputs: int = 0, missing: Iterable[int] = (), **attributes: float
    ) -> ctypes.c_void_p:
        """Make a node; num_inputs: 0 for the inputs that every node of the operator has; missing: those without a name."""
        count = len(attributes)
        names = (ctypes.c_char_p * count)(*(key.encode() for key in attributes))
        kinds = (ctypes.c_int * count)(*(isinstance(value, int) for value in attributes.values()))
        values = (ctypes.c_double * count)(*attributes.values())
        bits = ctypes.c_uint64(sum(1 << index for index in missing))
        made = self.library.mini_node(
            op.encode(), self._provider, name.encode(), num_inputs, bits, count, names, kinds, values
        )
        if made is None:
            raise RuntimeError(self.library.mini_error().decode())
        return ctypes.c_void_p(made)

    def counts(self, node: ctypes.c_void_p) -> tuple[list[int], list[int]]:
        """Return the element types of the inputs and of the outputs."""
        num = [self.library.mini_counts(node, what) for what in (0, 1)]
        return tuple(
            [self.library.mini_counts(node, base + i) for i in range(n)]
            for base, n in zip((100, 200), num, strict=True)
        )  # type: ignore[return-value]

    def call(
        self, node: ctypes.c_void_p, inputs: Sequence[tuple | None], outputs: Sequence[tuple], stream: Any
    ) -> None:
        """Run a node once; each tensor is (type, shape, address), or None for an input that is missing."""
        plan = Plan(self)
        given = [MISSING if t is None else plan.value(*t) for t in inputs]
        plan.add(node, given, [plan.value(*t) for t in outputs])
        plan.run(stream)


class Plan:
    """Calls with their tensors, ready to run again and again."""

    def __init__(self, ort: MiniOrt) -> None:
        self._ort, self._plan, self.length = ort, ctypes.c_void_p(ort.library.mini_plan()), 0

    def __del__(self) -> None:
        self._ort.library.mini_plan_free(self._plan)

    def value(self, kind: int, shape: tuple[int, ...], address: int) -> int:
        dims = (ctypes.c_int64 * len(shape))(*shape)
        return self._ort.library.mini_plan_value(self._plan, kind, len(shape), dims, ctypes.c_void_p(address))

    def add(self, node: ctypes.c_void_p, inputs: list[int], outputs: list[int]) -> None:
        self.length += 1
        pack = [(ctypes.c_int * len(side))(*side) for side in (inputs, outputs)]
        self._ort.library.mini_plan_call(self._plan, node, len(inputs), pack[0], len(outputs), pack[1])

    def run(self, stream: Any, first: int = 0, last: int | None = None) -> None:
        self._ort.check(
            self._ort.library.mini_plan_run(self._plan, first, self.length if last is None else last, stream)
        )


class GpuModel:
    """A rank's graph on the device, with its weights and a KV cache."""

    def __init__(
        self,
        graph: Path,
        ort: MiniOrt,
        device: Device,
        num_blocks: int,
        weights: Callable[[str], np.ndarray] | None = None,
    ) -> None:
        """`weights`: initializer by name; None: from the file beside the graph."""
        model = onnx.load(str(graph), load_external_data=False)
        self.ort, self.device, self.graph = ort, device, model.graph
        self.infos = {v.name: v for v in (*model.graph.value_info, *model.graph.input, *model.graph.output)}
        self.tensors: dict[str, tuple[int, tuple[int, ...], int]] = {}
        self.constants: dict[str, np.ndarray] = {}
        data = np.memmap(graph.parent / "weights.bin", np.uint8, "r") if weights is None else None
        for tensor in model.graph.initializer:
            if tensor.data_location != TensorProto.EXTERNAL:
                self.constants[tensor.name] = numpy_helper.to_array(tensor)
                continue
            place = {entry.key: entry.value for entry in tensor.external_data}
            if data is not None:
                start, length = int(place["offset"]), int(place["length"])
                array = data[start : start + length]
            else:
                assert weights is not None
                array = weights(tensor.name)
            self.tensors[tensor.name] = (tensor.data_type, tuple(tensor.dims), device.put(array))
        for value in model.graph.input:
            if "_cache." in value.name:
                shape = (num_blocks, *(d.dim_value for d in value.type.tensor_type.shape.dim[1:]))
                kind = value.type.tensor_type.elem_type
                num_bytes = int(np.prod(shape)) * np.dtype(DTYPES[kind]).itemsize
                address = device.allocate(num_bytes)
                device.clear(address, num_bytes)
                self.tensors[value.name] = (kind, shape, address)
        self.nodes = [(node, None if node.domain == "" else self._own(node)) for node in model.graph.node]
        (top,) = [_attributes(node) for node in model.graph.node if node.op_type == "TopK"]
        self.vocab_size, self.first_id = top["vocab_size"], top["first_id"]

    def _own(self, node: onnx.NodeProto) -> ctypes.c_void_p:
        missing = [i for i, name in enumerate(node.input) if not name]
        return self.ort.node(node.op_type, node.name, len(node.input), missing, **_attributes(node))

    def close(self) -> None:
        """Free weights and cache."""
        for _, _, address in self.tensors.values():
            self.device.free(address)
        self.tensors = {}

    def step(self, feeds: dict[str, np.ndarray]) -> Step:
        """Lay out a step of these shapes; `feeds` as in FORMAT 3.2."""
        return Step(self, feeds)


class Step:
    """A step's calls for fixed shapes."""

    def __init__(self, model: GpuModel, feeds: dict[str, np.ndarray]) -> None:
        self.model, device = model, model.device
        self.num_tokens, self.rows = len(feeds["input_ids"]), len(feeds["logit_rows"])
        symbols = {"T": self.num_tokens, "R": self.rows}
        self._owned: list[int] = []
        self._tensors = dict(model.tensors)
        self._plan = Plan(model.ort)
        self._breaks: list[tuple[int, Callable[[], None]]] = []
        self._angles: list[onnx.NodeProto] = []
        self._feeds = feeds
        for name in STEP:
            self._make(name, TensorProto.INT32, feeds[name].shape)
        for node, kernel in model.nodes:
            if kernel is None:
                self._by_hand(node)
                continue
            for i, name in enumerate(node.output):
                info = model.infos[name].type.tensor_type
                shape = tuple(symbols[d.dim_param] if d.dim_param else d.dim_value for d in info.shape.dim)
                if node.op_type.endswith("AddRMSNorm") and i == 1:
                    self._tensors[name] = self._tensors[node.input[-2]]
                else:
                    self._make(name, info.elem_type, shape)
            inputs, outputs = ([self._value(name) for name in side] for side in (node.input, node.output))
            self._plan.add(kernel, inputs, outputs)
        self.feed(feeds)
        device.synchronize()

    def feed(self, feeds: dict[str, np.ndarray]) -> None:
        """Copy the step's inputs to the device; `logit_rows` must stay."""
        for name in STEP:
            self.model.device.write(self._tensors[name][2], feeds[name].astype(np.int32))
        values: dict[str, np.ndarray] = {**self.model.constants, "positions": feeds["positions"]}
        for node in self._angles:
            values[node.output[0]] = _standard(node, [values[name] for name in node.input])
            if node.output[0] in self._tensors:
                self.model.device.write(self._tensors[node.output[0]][2], values[node.output[0]])

    def run(self) -> None:
        """Launch everything; returns before the device is done."""
        done = 0
        for place, action in [*self._breaks, (self._plan.length, lambda: None)]:
            self._plan.run(self.model.device.stream, done, place)
            action()
            done = place

    def output(self, name: str) -> np.ndarray:
        kind, shape, address = self._tensors[name]
        return self.model.device.read(address, shape, DTYPES[kind])

    def close(self) -> None:
        for address in self._owned:
            self.model.device.free(address)
        self._owned = []

    def _make(self, name: str, kind: int, shape: tuple[int, ...]) -> None:
        address = self.model.device.allocate(int(np.prod(shape)) * np.dtype(DTYPES[kind]).itemsize)
        self._owned.append(address)
        self._tensors[name] = (kind, tuple(shape), address)

    def _value(self, name: str) -> int:
        return self._plan.value(*self._tensors[name]) if name else MISSING

    def _place_constant(self, name: str) -> None:
        """Put a constant of the graph on the device."""
        if name in self.model.constants and name not in self._tensors:
            value = self.model.constants[name]
            self._make(name, TensorProto.FLOAT, value.shape)
            self.model.device.write(self._tensors[name][2], value)

    def _by_hand(self, node: onnx.NodeProto) -> None:
        if node.op_type == "Gather" and node.input[1] == "logit_rows":
            kind, (_, width), source = self._tensors[node.input[0]]
            self._make(node.output[0], kind, (self.rows, width))
            target, row_bytes = self._tensors[node.output[0]][2], width * np.dtype(DTYPES[kind]).itemsize
            rows = [int(row) for row in self._feeds["logit_rows"]]

            def copy() -> None:
                for i, row in enumerate(rows):
                    self.model.device.copy_within(target + i * row_bytes, source + row * row_bytes, row_bytes)

            self._breaks.append((self._plan.length, copy))
            return
        if "rotary_emb" not in node.name:
            for name in node.input:
                self._place_constant(name)
        if node.op_type == "Cast" and "rotary_emb" not in node.name:  # of a bias, or of a multiplier
            _, shape, source = self._tensors[node.input[0]]
            self._make(node.output[0], TensorProto.FLOAT16, shape)
            rounded = self.model.device.read(source, shape, np.float32).astype(np.float16)
            self.model.device.write(self._tensors[node.output[0]][2], rounded)
            return
        if node.op_type in ("Add", "Mul") and "rotary_emb" not in node.name:
            operation = {"Add": np.add, "Mul": np.multiply}[node.op_type]
            kind, shape, x = self._tensors[node.input[0]]
            other_kind, width, other = self._tensors[node.input[1]]
            assert other_kind == kind
            self._make(node.output[0], kind, shape)
            y = self._tensors[node.output[0]][2]

            def compute() -> None:
                self.model.device.synchronize()
                parts = (
                    self.model.device.read(x, shape, DTYPES[kind]),
                    self.model.device.read(other, width, DTYPES[kind]),
                )
                self.model.device.write(y, operation(*parts))

            self._breaks.append((self._plan.length, compute))
            return
        if "rotary_emb" not in node.name:
            raise NotImplementedError(f"{node.name}: {node.op_type}")
        self._angles.append(node)
        if node.op_type == "Concat" or node.name.endswith("/scaled"):
            width = self.model.infos[node.output[0]].type.tensor_type.shape.dim[1].dim_value
            self._make(node.output[0], TensorProto.FLOAT, (self.num_tokens, width))


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _standard(node: onnx.NodeProto, inputs: list[np.ndarray]) -> np.ndarray:
    """Compute one standard operator of the table of angles, in float32."""
    match node.op_type:
        case "Cast":
            return inputs[0].astype(np.float32)
        case "Unsqueeze":
            return np.expand_dims(inputs[0], tuple(inputs[1]))
        case "Mul":
            return inputs[0] * inputs[1]
        case "Cos":
            return np.cos(inputs[0])
        case "Sin":
            return np.sin(inputs[0])
        case "Concat":
            return np.concatenate(inputs, axis=1)
    raise NotImplementedError(node.op_type)
