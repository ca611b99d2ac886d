"""One rank's graph for the CPU with operators joined (FORMAT 5.10 to 5.15): the same values, fewer of them between operators.

In: what `split.py` made. Out: the same graph, where what follows a product is part of it: SwiGLU or GeGLU, or AddRMSNorm with
AllReduce and RMSNorm before it where these are there. A node costs about 3 us of ONNX Runtime's own while weights pass through
the caches, and its result a way to memory and back.
Ensures: initializers, inputs and outputs are as before, and every result has the same bits.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx

from llmrun.artifact import ROW_TILE, InternalError

_MATMULS = ("MatMulF32", "MatMulF16", "MatMulQ8", "MatMulQ4")


def cpu_graph(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph with its operators joined; `model` is not changed."""
    makers = {name: node.op_type for node in model.graph.node for name in node.output}

    def are_norms(before: onnx.NodeProto, node: onnx.NodeProto) -> bool:
        """Tell whether they norm what a product of all ranks adds to the residual stream; not one with a bias."""
        is_whole = makers.get(before.input[0]) in ("AllReduce", *_MATMULS)
        return is_whole and (before.op_type, node.op_type) == ("RMSNorm", "AddRMSNorm")

    return _join(_join(_join(model, are_norms), _are_sum_and_norm), _are_product_and_next)


def _join(model: onnx.ModelProto, can_join: Callable[[onnx.NodeProto, onnx.NodeProto], bool]) -> onnx.ModelProto:
    """Join each node with the one that makes its first input, where nothing else reads that and `can_join` says so."""
    graph = model.graph
    consumers = [name for node in graph.node for name in node.input] + [value.name for value in graph.output]
    makers = {node.output[0]: node for node in graph.node if consumers.count(node.output[0]) == 1}
    # By the value between the two.
    pairs = {
        node.input[0]: (makers[node.input[0]], node)
        for node in graph.node
        if node.input[0] in makers and can_join(makers[node.input[0]], node)
    }
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:], result.graph.value_info[:]
    result.graph.value_info.extend(value for value in graph.value_info if value.name not in pairs)
    for node in graph.node:
        if node.output[0] in pairs:
            continue
        result.graph.node.append(_joined(*pairs[node.input[0]]) if node.input[0] in pairs else node)
    return result


def _joined(first: onnx.NodeProto, second: onnx.NodeProto) -> onnx.NodeProto:
    """Return both as one, which stands in the second one's place."""
    joined = onnx.NodeProto()
    joined.CopyFrom(first)
    joined.op_type = first.op_type + second.op_type
    joined.input.extend(second.input[1:])
    own = {attribute.name: attribute for attribute in first.attribute}
    for attribute in second.attribute:
        if own.setdefault(attribute.name, attribute) != attribute:
            raise InternalError(f"{first.name} and {second.name} differ in {attribute.name}")
    del joined.attribute[:]
    joined.attribute.extend(own.values())
    joined.output[:] = second.output
    return joined


def _are_sum_and_norm(before: onnx.NodeProto, node: onnx.NodeProto) -> bool:
    return before.op_type == "AllReduce" and node.op_type in ("AddRMSNorm", "RMSNormAddRMSNorm")


def _are_product_and_next(before: onnx.NodeProto, node: onnx.NodeProto) -> bool:
    if before.op_type not in _MATMULS:
        return False
    if node.op_type in ("SwiGLU", "GeGLU"):  # gate and up in whole tiles
        return next(a.i for a in before.attribute if a.name == "out_features") % (2 * ROW_TILE) == 0
    return node.op_type.endswith("AddRMSNorm")
