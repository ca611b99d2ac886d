"""One rank's graph for the CPU with operators joined (FORMAT 5.10 to 5.12): the same values, fewer of them between operators.

In: what `split.py` made. Out: the same graph, where SwiGLU, or AllReduce and AddRMSNorm, are part of the product before them. A
node costs about 3 us of ONNX Runtime's own while weights pass through the caches, and its result a way to memory and back.
Ensures: initializers, inputs and outputs are as before, and every result has the same bits.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx

from llmrun.artifact import ROW_TILE

_MATMULS = ("MatMulF32", "MatMulF16", "MatMulQ8", "MatMulQ4")


def cpu_graph(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph with its operators joined; `model` is not changed."""
    return _join(_join(model, _are_sum_and_norm), _are_product_and_next)


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
    joined.attribute.extend(second.attribute)
    joined.output[:] = second.output
    return joined


def _are_sum_and_norm(before: onnx.NodeProto, node: onnx.NodeProto) -> bool:
    return (before.op_type, node.op_type) == ("AllReduce", "AddRMSNorm")


def _are_product_and_next(before: onnx.NodeProto, node: onnx.NodeProto) -> bool:
    if before.op_type not in _MATMULS:
        return False
    if node.op_type == "SwiGLU":  # gate and up in whole tiles
        return next(a.i for a in before.attribute if a.name == "out_features") % (2 * ROW_TILE) == 0
    return node.op_type in ("AddRMSNorm", "AllReduceAddRMSNorm")
