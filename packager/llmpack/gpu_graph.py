"""One rank's graph for the CPU -> the same rank's graph for a GPU (FORMAT 5.9): the same weights, other activations.

In: what `split.py` made. Out: a graph whose operators are the launcher's, with every number that chooses a kernel as an
attribute; float16 between the operators, float32 in the residual stream and all logits; AllReduce, and a norm of what is
added to the residual stream, joined with the norm behind them; each rank's own columns of the logits, which nobody gathers on
the device, and the likeliest tokens of them. Initializers stay as they are: both graphs map one weights.bin. Requires: no
weight is float32 but norms and biases. It knows no kernel and no chip.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container
from typing import Any

import onnx
from onnx import TensorProto, helper

from llmpack.kernel_plan import TOP_K
from llmrun.artifact import OPS_DOMAIN, KvCacheSpec

_MATMULS = ("MatMulF16", "MatMulQ8", "MatMulQ6", "MatMulQ4")
_MOES = ("MoEF16", "MoEQ8", "MoEQ4", "MoEMXFP4")
_FLOAT, _HALF = TensorProto.FLOAT, TensorProto.FLOAT16


def gpu_graph(model: onnx.ModelProto, kv_cache: KvCacheSpec) -> onnx.ModelProto:
    """Return the graph for a GPU.

    Args:
        model: a rank's graph for the CPU; not changed.
        kv_cache: its caches.

    Raises:
        ValueError: an operator that has no counterpart on a GPU.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    rank = int({entry.key: entry.value for entry in model.metadata_props}["rank"])
    rewrite = _Rewrite(result.graph, rank, kv_cache)
    nodes = rewrite.nodes()
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    rewrite.set_types()
    return result


class _Rewrite:
    def __init__(self, graph: onnx.GraphProto, rank: int, kv_cache: KvCacheSpec) -> None:
        self.graph, self.kv_cache = graph, kv_cache
        self.dims = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
        self.shapes = {info.name: _shape(info) for info in (*graph.value_info, *graph.input, *graph.output)}
        self.types: dict[str, int] = {}
        # One rank's head makes the logits; the columns of several are gathered behind it.
        self.head = next((n.input[0] for n in graph.node if n.op_type == "AllGather"), "logits")
        self.router_logits = {node.input[1] for node in graph.node if node.op_type in _MOES}
        # And what they are before a bias is added.
        added = [node.input for node in graph.node if node.op_type == "Add" and node.output[0] in self.router_logits]
        self.router_logits.update(*added)
        self.vocab_size, self.columns = self.shapes["logits"][-1], self.shapes[self.head][-1]
        self.first_id = rank * self.columns
        sums = {node.input[0]: node for node in graph.node if node.op_type == "AddRMSNorm"}
        normed = self._read_once("RMSNorm", sums)
        # What becomes part of the norm behind it, by the value between the two.
        self.normed = {name: node for name, node in normed.items() if _epsilon(node) == _epsilon(sums[name])}
        self.reduced = self._read_once("AllReduce", {*sums, *(node.input[0] for node in self.normed.values())})

    def _read_once(self, op: str, wanted: Container[str]) -> dict[str, onnx.NodeProto]:
        """Return the nodes that make a value of these which a single node reads, by that value."""
        reads = Counter(name for node in self.graph.node for name in node.input)
        made = {node.output[0]: node for node in self.graph.node if node.op_type == op}
        return {name: node for name, node in made.items() if name in wanted and reads[name] == 1}

    def nodes(self) -> list[onnx.NodeProto]:
        """Return the nodes in order, attributes completed."""
        nodes: list[onnx.NodeProto] = []
        for node in self.graph.node:
            nodes += self._lower(node)
        attributes = {"in_features": self.columns, "k": TOP_K, "first_id": self.first_id, "vocab_size": self.vocab_size}
        top = helper.make_node("TopK", ["logits"], ["top"], "/top_k", domain=OPS_DOMAIN, **attributes)
        rows = self.shapes["logits"][0]
        del self.graph.output[:]
        for name, kind, width in (("logits", _FLOAT, self.columns), ("top", TensorProto.INT64, TOP_K + 1)):
            self.graph.output.append(helper.make_tensor_value_info(name, kind, [rows, width]))
        return [*nodes, top]

    def set_types(self) -> None:
        """Give the caches their shapes and every intermediate value its type; those of removed nodes go."""
        caches = self.kv_cache.shapes(is_gpu=True)
        for value in self.graph.input:
            if (block := caches.get(value.name.partition(".")[0])) is not None:
                dims = value.type.tensor_type.shape.dim[1:]  # behind num_blocks
                for dim, size in zip(dims, block, strict=True):
                    dim.dim_value = size
        produced = {name for node in self.graph.node for name in node.output}
        outputs = {value.name for value in self.graph.output}
        del self.graph.value_info[:]
        for name in sorted(produced - outputs):
            kind = self.types.get(name, _FLOAT)
            self.graph.value_info.append(helper.make_tensor_value_info(name, kind, self.shapes[name]))

    def _lower(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        op, width = node.op_type, (self.shapes.get(node.input[0]) or [0])[-1]
        new = onnx.NodeProto()
        new.CopyFrom(node)
        if op == "AllGather" or node.output[0] in self.reduced or node.output[0] in self.normed:
            return []
        if op in ("AddRMSNorm", "RMSNorm"):
            return [self._norm(new, width)]
        if op in _MATMULS:
            is_head = node.output[0] == self.head
            is_float = is_head or node.output[0] in self.router_logits
            new.op_type = op + ("F32" if is_float else "")
            if is_head:
                new.output[0] = "logits"
            _set(new, in_features=width)
            self.types[new.output[0]] = _FLOAT if is_float else _HALF
        elif op in _MOES:
            _set(new, in_features=width)
            self.types[new.output[0]] = _HALF
        elif op in ("SwiGLU", "GeGLU"):
            _set(new, in_features=width // 2)
            self.types[new.output[0]] = _HALF
        elif op == "QKNorm":
            _set(new, head_dim=self.kv_cache.head_dim)
            self.types[new.output[0]] = _HALF
        elif op == "PagedAttention":
            _set(new, head_dim=self.kv_cache.head_dim, block_size=self.kv_cache.block_size)
            self.types[new.output[0]] = _HALF
        elif op == "AllReduce":
            _set(new, in_features=width)
            self.types[new.output[0]] = _HALF
        elif op in ("EmbeddingQ6", "EmbeddingQ8"):
            _set(new, in_features=self.shapes[new.output[0]][-1])
        elif op == "Gather" and node.input[1] == "input_ids":
            return [self._embedding(new)]
        elif op == "Cast" and node.input[0] in self.types and self.types[node.input[0]] == _FLOAT:
            return []  # of the embedding's rows, which are float32 here
        elif op == "Gather":
            self.types[new.output[0]] = self.types[new.input[0]]
        elif op == "Add" and node.output[0] in self.router_logits:
            self.types[new.output[0]] = _FLOAT
        elif op == "Add" or (op == "Mul" and self.types.get(new.input[0]) == _HALF):
            return self._in_half(new)
        elif op not in ("Cast", "Mul", "Cos", "Sin", "Concat", "Unsqueeze"):
            raise ValueError(f"{node.name}: operator {op} has no counterpart on a GPU")
        return [new]

    def _norm(self, node: onnx.NodeProto, width: int) -> onnx.NodeProto:
        _set(node, in_features=width)
        self.types[node.output[0]] = _HALF
        if node.op_type == "RMSNorm":
            if self.types.get(node.input[0]) == _HALF:
                raise ValueError(
                    f"{node.name}: RMSNorm has no counterpart on a GPU here: expected its input to be the residual stream, or"
                    " its result to be read by one AddRMSNorm of the same epsilon"
                )
            node.op_type = "RMSNormF16"
            return node
        for joined in (self.normed, self.reduced):
            if (before := joined.get(node.input[0])) is not None:
                node.op_type = before.op_type + node.op_type
                node.input[:] = [*before.input, *node.input[1:]]
        return node

    def _embedding(self, node: onnx.NodeProto) -> onnx.NodeProto:
        weight, ids = node.input
        (cast,) = [n for n in self.graph.node if n.op_type == "Cast" and n.input[0] == node.output[0]]
        self.types[node.output[0]] = _FLOAT  # marks the Cast as done
        width = self.dims[weight][1]
        return helper.make_node(
            "EmbeddingF16", [ids, weight], [cast.output[0]], node.name, domain=OPS_DOMAIN, in_features=width
        )

    def _in_half(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Add a bias, or multiply, in float16: the stored float32 values are rounded in front of it."""
        (place,) = [i for i, name in enumerate(node.input) if name in self.dims]
        rounded = f"{node.input[place]}.float16"
        cast = helper.make_node("Cast", [node.input[place]], [rounded], f"{node.name}/float16", to=_HALF)
        self.shapes[rounded] = self.dims[node.input[place]]
        self.types[rounded] = self.types[node.output[0]] = _HALF
        node.input[place] = rounded
        return [cast, node]


def _epsilon(node: onnx.NodeProto) -> float:
    return next(attribute.f for attribute in node.attribute if attribute.name == "epsilon")


def _shape(info: onnx.ValueInfoProto) -> list[Any]:
    return [dim.dim_param or dim.dim_value for dim in info.type.tensor_type.shape.dim]


def _set(node: onnx.NodeProto, **attributes: int) -> None:
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
