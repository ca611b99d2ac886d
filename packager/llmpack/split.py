"""Logical graph -> the subgraph of one rank, joined to the others by AllReduce and AllGather.

In: the logical graph of `export.py` and one rank's weights. Out: the ONNX model that the rank runs, its initializers
declared as external data of `weights.bin` (no values). Requires: every weight of a `Linear` or `MoE` is a source of exactly one
row of the weight table. Ensures: only operators that FORMAT 3.5 allows, per-rank shapes on every value, no `Linear` left.
It does not read, quantize or lay out weights, and it does not optimise.

Passes, in order: fuse (q, k, v -> qkv; gate, up -> gate_up), lower (`Linear` and `MoE` -> those of their storage), join
(collectives), localise (heads per rank), type (shape and type of every value).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper

from llmpack.weights import MATRICES, Initializer, RankWeight, heads_per_rank
from llmrun.artifact import OPS_DOMAIN, ModelConfig

_MATMUL = {"f32": "MatMulF32", "f16": "MatMulF16", "q8": "MatMulQ8", "q6": "MatMulQ6", "q4": "MatMulQ4"}
_MOE = {"f32": "MoEF32", "f16": "MoEF16", "q8": "MoEQ8", "q4": "MoEQ4", "mxfp4": "MoEMXFP4"}
_EMBEDDING = {"q8": "EmbeddingQ8", "q6": "EmbeddingQ6"}
# Row counts of values, by the axis they follow; the rest of a shape is computed.
_ROWS_ALL, _ROWS_CHOSEN = "T", "R"


def split(
    logical: onnx.ModelProto,
    config: ModelConfig,
    weights: list[RankWeight],
    rank: int,
    shards: int,
    weights_file: str,
) -> onnx.ModelProto:
    """Return one rank's graph.

    Args:
        logical: the graph of the whole model.
        config: the architecture.
        weights: the rank's weights, in any order.
        rank: which rank; recorded as the graph's `rank` property.
        shards: number of ranks.
        weights_file: file name of the external data, beside the graph.
    """
    graph: Any = gs.import_onnx(logical)  # its own annotations are narrower than what it accepts
    passes = _Passes(graph, config, weights, shards)
    passes.fuse()
    passes.lower_and_join()
    passes.lower_experts()
    passes.localise()
    passes.lower_embedding()
    graph.cleanup().toposort()
    passes.type_values()
    model = _with_external_data(gs.export_onnx(graph, do_type_check=False), logical, weights, weights_file)
    helper.set_model_props(model, {"rank": str(rank), "shards": str(shards)})
    return model


class _Passes:
    """The passes over one rank's graph; each changes `self.graph` in place."""

    def __init__(self, graph: Any, config: ModelConfig, weights: list[RankWeight], shards: int) -> None:
        self.graph, self.config, self.shards = graph, config, shards
        self.matrices = {w.row.sources: w for w in weights if w.row.role in MATRICES}
        self.row_of = {source: w for w in self.matrices.values() for source in w.row.sources}
        self.vectors = {w.row.name: w for w in weights if w.row.role == "bias"}
        self.embedding = next(w for w in weights if w.row.role == "embedding")
        # One for each name: a tied head and the embedding may be the same initializer, and graphsurgeon warns of two.
        self.placeholders: dict[str, Any] = {}

    def fuse(self) -> None:
        """Replace the `Linear`s that share a row of the weight table by one; its consumers take the fused value."""
        linears = {node.inputs[1].name: node for node in self.graph.nodes if node.op == "Linear"}
        for weight in (w for w in self.matrices.values() if w.row.role != "experts"):
            parts = [linears[source] for source in weight.row.sources]
            if len(parts) == 1:
                continue
            fused: Any = gs.Variable(weight.row.name, np.float32)
            path = parts[0].name.rpartition("/")[0] + "/" + weight.row.name.rpartition(".")[2]
            inputs = [
                parts[0].inputs[0],
                *(part.inputs[1] for part in parts),
                *(i for p in parts for i in p.inputs[2:]),
            ]
            at = self.graph.nodes.index(parts[0])
            node: Any = gs.Node("Linear", path, inputs=inputs, outputs=[fused], domain=OPS_DOMAIN)
            self.graph.nodes.insert(at, node)
            (consumer,) = {id(c): c for part in parts for c in part.outputs[0].outputs}.values()
            consumer.inputs = [fused, *consumer.inputs[len(parts) :]]
            for part in parts:
                part.inputs.clear()
                part.outputs.clear()
                self.graph.nodes.remove(part)

    def lower_and_join(self) -> None:
        """Replace each `Linear` by MatMul [+ collective] [+ bias]."""
        for node in [node for node in self.graph.nodes if node.op == "Linear"]:
            weight = self.row_of[node.inputs[1].name]
            count = len(weight.row.sources)
            x, has_bias, final = node.inputs[0], len(node.inputs) > 1 + count, node.outputs[0]
            chain: list[Any] = [self._matmul(node.name, weight, x)]
            if self.shards > 1 and weight.row.split == "row":
                chain.append(gs.Node("AllReduce", f"{node.name}/all_reduce", domain=OPS_DOMAIN))
            if self.shards > 1 and weight.row.split == "vocab":
                attributes: dict[str, object] = {"out_features": self.config.vocab_size}
                chain.append(gs.Node("AllGather", f"{node.name}/all_gather", attributes, domain=OPS_DOMAIN))
            if has_bias:
                bias = self.vectors[weight.row.name].initializers[0]
                chain.append(gs.Node("Add", f"{node.name}/bias", inputs=[self._placeholder(bias)]))
            for before, after in pairwise(chain):
                value: Any = gs.Variable(f"{weight.row.name}.{before.op}", np.float32)
                before.outputs = [value]
                after.inputs.insert(0, value)
            at = self.graph.nodes.index(node)
            node.outputs.clear()
            node.inputs.clear()
            self.graph.nodes.remove(node)
            chain[-1].outputs = [final]
            self.graph.nodes[at:at] = chain

    def lower_experts(self) -> None:
        """Replace each `MoE` by that of its storage [+ AllReduce]."""
        for node in [node for node in self.graph.nodes if node.op == "MoE"]:
            x, logits, *sources = node.inputs
            matrices = [name for name in (source.name for source in sources) if name in self.row_of]
            gate_up, down = self.row_of[matrices[0]], self.row_of[matrices[-1]]
            sizes: dict[str, object] = {
                "intermediate_size": down.num_columns,
                "out_features": self.config.hidden_size,
            }
            if down.group_size is not None:
                sizes["group_size"] = down.group_size
            vectors = [self.vectors[name] for name in (gate_up.row.name, down.row.name) if name in self.vectors]
            stored = [item for weight in (gate_up, down, *vectors) for item in weight.initializers]
            inputs = [self._placeholder(item) for item in stored]
            correction = self.vectors.get(sources[-1].name)
            if correction is not None:
                absent: Any = [gs.Variable.empty() for _ in range(2 - len(vectors))]  # of the two biases before it
                inputs += [*absent, self._placeholder(correction.initializers[0])]
            node.op, node.inputs = _MOE[down.storage], [x, logits, *inputs]
            node.attrs.update(sizes)
            if self.shards > 1:
                partial: Any = gs.Variable(f"{down.row.name}.{node.op}", np.float32)
                reduce: Any = gs.Node("AllReduce", f"{node.name}/all_reduce", inputs=[partial], domain=OPS_DOMAIN)
                final = node.outputs[0]
                node.outputs = [partial]
                reduce.outputs = [final]
                self.graph.nodes.insert(self.graph.nodes.index(node) + 1, reduce)

    def _matmul(self, name: str, weight: RankWeight, x: Any) -> Any:
        attributes: dict[str, object] = {"out_features": weight.num_rows}
        if weight.group_size is not None:
            attributes["group_size"] = weight.group_size
        placeholders = [self._placeholder(item) for item in weight.initializers]
        return gs.Node(_MATMUL[weight.storage], name, attributes, inputs=[x, *placeholders], domain=OPS_DOMAIN)

    def _placeholder(self, item: Initializer) -> Any:
        if item.name not in self.placeholders:
            self.placeholders[item.name] = gs.Variable(item.name, item.dtype, list(item.shape))
        return self.placeholders[item.name]

    def localise(self) -> None:
        """Put per-rank numbers of heads into attention and caches."""
        num_heads, num_kv_heads = heads_per_rank(self.config, self.shards)
        for node in self.graph.nodes:
            if node.op in ("QKNorm", "PagedAttention"):
                node.attrs.update(num_heads=num_heads, num_kv_heads=num_kv_heads)
        for value in self.graph.inputs:
            if value.name.startswith(("key_cache.", "value_cache.")):
                value.shape = [value.shape[0], num_kv_heads, *value.shape[2:]]

    def lower_embedding(self) -> None:
        """Drop the whole-model weights from the inputs; look tokens up as the embedding is stored; norms keep their names."""
        self.graph.inputs = [value for value in self.graph.inputs if value.outputs]
        (embed,) = [node for node in self.graph.nodes if node.name == "/model/embed_tokens"]
        if self.embedding.storage == "f16":
            embed.inputs[0].dtype = self.embedding.initializers[0].dtype
            return
        (cast,) = embed.outputs[0].outputs  # the rows are float32 already
        rows, final = embed.outputs[0], cast.outputs[0]
        cast.outputs.clear()
        self.graph.nodes.remove(cast)
        for node in list(final.outputs):
            node.inputs = [rows if value is final else value for value in node.inputs]
        if self.embedding.group_size is not None:
            embed.op, embed.domain = _EMBEDDING[self.embedding.storage], OPS_DOMAIN
            embed.attrs = {"num_embeddings": self.embedding.num_rows, "group_size": self.embedding.group_size}
            placeholders = [self._placeholder(item) for item in self.embedding.initializers]
            weight = embed.inputs[0]
            embed.inputs = [embed.inputs[1], *placeholders]
            self.graph.inputs = [value for value in self.graph.inputs if value is not weight]

    def type_values(self) -> None:
        """Give every intermediate value its type and shape (FORMAT 3.3): ORT reuses memory only where it knows them."""
        head_dim, hidden = self.config.head_dim, self.config.hidden_size
        num_heads, _ = heads_per_rank(self.config, self.shards)
        rows = _ROWS_ALL
        for node in self.graph.nodes:
            width = list(node.inputs[0].shape or [0])[-1]
            if node.name == "/model/logit_rows":
                rows = _ROWS_CHOSEN
            if node.op.startswith(("MatMul", "MoE")) or node.op == "AllGather":
                width = node.attrs["out_features"]
            elif node.op == "PagedAttention":
                width = num_heads * head_dim
            elif node.op in ("SwiGLU", "GeGLU"):
                width //= 2
            elif node.name == "/model/embed_tokens":
                width = hidden
            elif node.name.startswith("/model/rotary_emb/"):
                width = {"column": 1, "cos_sin": head_dim, "scaled": head_dim}.get(
                    node.name.rpartition("/")[2], head_dim // 2
                )
            for value in node.outputs:
                value.shape = [rows] if node.name == "/model/rotary_emb/positions" else [rows, width]
                value.dtype = node.inputs[0].dtype if node.op == "Gather" else np.float32


def _with_external_data(
    model: onnx.ModelProto, logical: onnx.ModelProto, weights: list[RankWeight], weights_file: str
) -> onnx.ModelProto:
    """Declare the placeholders as initializers at their place in weights.bin; restore the header of the logical model."""
    items = {item.name: item for weight in weights for item in weight.initializers}
    for item in items.values():
        tensor = model.graph.initializer.add(name=item.name, dims=item.shape)
        tensor.data_type = helper.np_dtype_to_tensor_dtype(item.dtype)
        tensor.data_location = TensorProto.EXTERNAL
        location = {"location": weights_file, "offset": str(item.offset), "length": str(item.num_bytes)}
        for key, value in location.items():
            tensor.external_data.add(key=key, value=value)
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in stored]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    infos = [value for value in model.graph.value_info if value.name not in stored]
    del model.graph.value_info[:]
    model.graph.value_info.extend(infos)
    model.ir_version, model.producer_name = logical.ir_version, logical.producer_name
    del model.opset_import[:]
    model.opset_import.extend(logical.opset_import)
    return model
