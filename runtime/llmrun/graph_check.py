"""A rank's graph before it runs: whose it is, which operators it has, where its weights lie, what they write into.

In: the bytes of a verified `cpu.onnx`, then ONNX Runtime's session. Digests say that a file is the packager's, not that
the packager is honest, nor that nobody mixed two artifacts and wrote a manifest for the mixture (FORMAT 3.1, 3.4, 3.5, 5.5).
ONNX Runtime runs any operator it knows, lets an operator write into whatever its inputs are, and old releases follow
external data out of the directory. Standard library only: reads the few fields of onnx.proto that matter, and refuses
protobuf that two readers could read differently.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llmrun.errors import IncompatibleError, IntegrityError
from llmrun.manifest import OPS_DOMAIN, WEIGHT_ALIGNMENT

if TYPE_CHECKING:
    from llmrun.manifest import KvCacheSpec

_WITH_WEIGHTS = ("MatMulF32", "MatMulF16", "MatMulQ8", "MatMulQ6", "MatMulQ4", "EmbeddingQ8", "EmbeddingQ6")
_JOINED = (
    f"MatMul{storage}{following}"
    for storage in ("F32", "F16", "Q8", "Q4")
    for following in (
        *("SwiGLU", "GeGLU", "AddRMSNorm", "AllReduceAddRMSNorm"),
        *("RMSNormAddRMSNorm", "AllReduceRMSNormAddRMSNorm"),
    )
)
_ON_GPUS = (
    *("MatMulF16F32", "MatMulQ8F32", "MatMulQ6F32", "MatMulQ4F32", "EmbeddingF16", "RMSNormF16", "TopK"),
    *("RMSNormAddRMSNorm", "AllReduceRMSNormAddRMSNorm"),
)
_OPERATORS = {
    OPS_DOMAIN: {
        *(*_WITH_WEIGHTS, *_JOINED, *_ON_GPUS),
        *("MoEF32", "MoEF16", "MoEQ8", "MoEQ4", "MoEMXFP4"),
        *("RMSNorm", "AddRMSNorm", "SwiGLU", "GeGLU", "QKNorm", "PagedAttention"),
        *("AllReduce", "AllReduceAddRMSNorm", "AllGather"),
    },
    "": {"Gather", "Cast", "Mul", "Add", "Cos", "Sin", "Concat", "Unsqueeze"},
}
_OPSETS = (20, 21)  # versions of the default domain
# Field numbers of onnx.proto3.
_MODEL_GRAPH, _MODEL_OPSET, _MODEL_METADATA, _MODEL_TRAINING, _MODEL_FUNCTIONS = 7, 8, 14, 20, 25
_OPSET_DOMAIN, _OPSET_VERSION = 1, 2
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_SPARSE = 1, 5, 11, 15
_NODE_INPUT, _NODE_OP_TYPE, _NODE_ATTRIBUTE, _NODE_DOMAIN = 1, 4, 5, 7
_INPUT_NAME = 1
_ATTRIBUTE_HOLDS_MORE = {5, 6, 10, 11, 22, 23}  # tensors and graphs
_TENSOR_SHAPE, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_EXTERNAL_DATA, _TENSOR_LOCATION = 1, 2, 8, 13, 14
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_STORED_TYPES = {1: ("float32", 4), 2: ("uint8", 1), 10: ("float16", 2)}  # TensorProto.DataType: name, bytes
_FLOAT, _INT64 = 1, 7
_CACHES = ("key_cache.", "value_cache.")  # of a layer, inputs 2 and 3 of its PagedAttention

Fields = list[tuple[int, Any]]  # (field number, bytes or int), in the order of the file


class StoredTensor(NamedTuple):
    """An initializer of the graph: `dtype` is numpy's name; `offset` and `num_bytes` are its place in weights.bin."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class _Node(NamedTuple):
    domain: str
    op: str
    inputs: list[str]


def check_graph(path: Path, weights: Path, rank: int, shards: int, ops_version: int) -> list[StoredTensor]:
    """Check the file of a rank's graph, whose external data must lie in `weights`; the numbers are the manifest's.

    Returns:
        what lies there.
    Raises:
        IntegrityError: not an ONNX model, or its weights are elsewhere.
        IncompatibleError: another rank's graph, an operator that no graph of this format has, other versions of them, or one
            that would write into something else than its layer's cache.
    """
    try:
        model = _fields(path.read_bytes())
        if {_MODEL_TRAINING, _MODEL_FUNCTIONS} & {number for number, _ in model}:
            raise ValueError("it holds functions or training code")
        graph = _fields(_only(model, _MODEL_GRAPH))
        metadata = [_entry(value) for number, value in model if number == _MODEL_METADATA]
        versions = sorted(_opset(value) for number, value in model if number == _MODEL_OPSET)
        nodes = [_node(value) for number, value in graph if number == _GRAPH_NODE]
        inputs = [_text(_only(_fields(value), _INPUT_NAME)) for number, value in graph if number == _GRAPH_INPUT]
        stored = list(_stored_tensors(graph, weights, set(inputs)))
    except (ValueError, OSError) as error:
        raise IntegrityError(
            f"{path}: not a graph made by `pack`: {error}. Pack the model again.", code="E320"
        ) from None
    found = dict(metadata)
    if len(found) != len(metadata) or (found.get("rank"), found.get("shards")) != (str(rank), str(shards)):
        whose = f"rank {found.get('rank')!r} of {found.get('shards')!r}"
        raise IncompatibleError(
            f"{path}: the graph of {whose}, expected rank '{rank}' of '{shards}'. Folders of several ranks or artifacts are"
            " mixed: copy the artifact again.",
            code="E418",
        )
    if versions not in [[("", opset), (OPS_DOMAIN, ops_version)] for opset in _OPSETS]:
        expected = f"ONNX {' or '.join(map(str, _OPSETS))} and {OPS_DOMAIN} {ops_version}"
        raise IncompatibleError(
            f"{path}: its operators are those of {versions!r:.300}, expected those of {expected}. Pack the model again.",
            code="E419",
        )
    if strange := sorted(
        f"{node.domain}.{node.op}" for node in nodes if node.op not in _OPERATORS.get(node.domain, ())
    ):
        raise IncompatibleError(
            f"{path}: has the operator {strange[0]!r}, which no graph of this format has. Pack the model again.",
            code="E419",
        )
    if not _writes_into_caches(nodes, inputs):
        raise IncompatibleError(
            f"{path}: its attention writes into something else than the cache of its layer. Pack the model again.",
            code="E419",
        )
    return stored


def check_session(path: Path, session: Any, kv_cache: KvCacheSpec, widths: dict[str, int], *, is_gpu: bool) -> None:
    """Compare a session's caches and outputs (name: columns) with the manifest's, so that every step's memory fits the graph.

    Raises:
        IncompatibleError: they differ: the graph is another model's.
    """
    kind = {"float16": "tensor(float16)", "float32": "tensor(float)"}[kv_cache.dtype]
    expected = {
        f"{name}.{layer}": (kind, list(block))
        for layer in range(kv_cache.num_layers)
        for name, block in kv_cache.shapes(is_gpu).items()
    }
    found = {node.name: (node.type, node.shape[1:]) for node in session.get_inputs() if "_cache." in node.name}
    outputs = {node.name: node.shape[-1] for node in session.get_outputs()}
    if found != expected or outputs != widths:
        raise IncompatibleError(
            f"{path}: its KV cache or logits are not those of the manifest; it belongs to another model. Copy the artifact"
            " again.",
            code="E418",
        )


def _writes_into_caches(nodes: list[_Node], inputs: list[str]) -> bool:
    """Whether layer i's PagedAttention has `key_cache.i` and `value_cache.i`, inputs of the graph that nothing else reads.

    Any other value might lie in the weights, which are mapped read-only: ONNX Runtime's Unsqueeze copies nothing.
    """
    written = [node.inputs[2:4] for node in nodes if node.op == "PagedAttention"]
    expected = [[f"{cache}{layer}" for cache in _CACHES] for layer in range(len(written))]
    read = sorted(name for node in nodes for name in node.inputs if name.startswith(_CACHES))
    caches = sorted(name for pair in expected for name in pair)
    return written == expected and read == caches and set(caches) <= set(inputs)


def _stored_tensors(graph: Fields, weights: Path, inputs: set[str]) -> Iterator[StoredTensor]:
    size = weights.stat().st_size
    for number, value in graph:
        if number == _GRAPH_SPARSE:
            raise ValueError("it holds a sparse tensor")
        if number != _GRAPH_INITIALIZER:
            continue
        tensor = _fields(value)
        entries = [_entry(item) for number, item in tensor if number == _TENSOR_EXTERNAL_DATA]
        name, shape = _text(_only(tensor, _TENSOR_NAME)), tuple(_numbers(tensor, _TENSOR_SHAPE))
        if name in inputs:
            raise ValueError(f"{name!r:.100} is a weight and an input too")
        data_type = next(_numbers(tensor, _TENSOR_TYPE), 0)
        if not entries and all(number != _TENSOR_LOCATION for number, _ in tensor):
            is_axis = data_type == _INT64 and len(shape) == 1
            is_row = data_type == _FLOAT and len(shape) == 2 and shape[0] == 1
            if not is_axis and not is_row:
                raise ValueError(f"{name!r:.100}, of shape {list(shape)}, lies in it and not in {weights.name!r}")
            continue
        data = dict(entries)
        if len(data) != len(entries) or set(data) != {"location", "offset", "length"}:
            raise ValueError(f"external data is described by {sorted(data)!r:.100}")
        if data["location"] != weights.name:
            raise ValueError(f"external data lies in {data['location']!r:.100}, expected {weights.name!r}")
        if not all(data[key].isascii() and data[key].isdigit() and len(data[key]) < 20 for key in ("offset", "length")):
            raise ValueError("offset or length of external data is no number")
        offset, length = int(data["offset"]), int(data["length"])
        if offset % WEIGHT_ALIGNMENT or length == 0 or offset + length > size:
            raise ValueError(f"external data at {offset}, {length} bytes long, in a file of {size} bytes")
        dtype, item_bytes = _STORED_TYPES.get(data_type, ("", 0))
        if length != math.prod(shape) * item_bytes:
            raise ValueError(f"external data of {length} bytes for {name!r:.100}, of shape {list(shape)} and {dtype!r}")
        yield StoredTensor(name, dtype, shape, offset, length)


def _opset(data: bytes) -> tuple[str, int]:
    """Return (domain, version) of an OperatorSetIdProto."""
    fields = _fields(data)
    has_domain = any(number == _OPSET_DOMAIN for number, _ in fields)
    versions = [value for number, value in fields if number == _OPSET_VERSION]
    if len(versions) != 1 or not isinstance(versions[0], int):
        raise ValueError("a domain's version is no number")
    return _text(_only(fields, _OPSET_DOMAIN)) if has_domain else "", versions[0]


def _node(node: bytes) -> _Node:
    """Return what a NodeProto computes of which values; its attributes must be plain values."""
    fields = _fields(node)
    for number, value in fields:
        if number == _NODE_ATTRIBUTE and _ATTRIBUTE_HOLDS_MORE & {number for number, _ in _fields(value)}:
            raise ValueError("an attribute holds a tensor or a graph")
    has_domain = any(number == _NODE_DOMAIN for number, _ in fields)
    domain = _text(_only(fields, _NODE_DOMAIN)) if has_domain else ""
    inputs = [_text(value) for number, value in fields if number == _NODE_INPUT]
    return _Node(domain, _text(_only(fields, _NODE_OP_TYPE)), inputs)


def _entry(data: bytes) -> tuple[str, str]:
    """Return (key, value) of a StringStringEntryProto."""
    fields = _fields(data)
    return _text(_only(fields, _ENTRY_KEY)), _text(_only(fields, _ENTRY_VALUE))


def _only(fields: Fields, wanted: int) -> bytes:
    """Return the one message or text with this number; protobuf would merge several."""
    values = [value for number, value in fields if number == wanted]
    if len(values) != 1 or not isinstance(values[0], bytes):
        raise ValueError(f"field {wanted} occurs {len(values)} times, or is no text")
    return values[0]


def _numbers(fields: Fields, wanted: int) -> Iterator[int]:
    """Yield the numbers of a repeated field, packed (as proto3 writes them) or one by one."""
    for number, value in fields:
        if number == wanted and isinstance(value, int):
            yield value
        elif number == wanted:
            place = 0
            while place < len(value):
                item, place = _varint(value, place)
                yield item


def _text(data: bytes) -> str:
    if not isinstance(data, bytes):
        raise ValueError("a number stands where a text is expected")  # noqa: TRY004
    return data.decode("utf-8")


def _fields(data: bytes) -> Fields:
    """Return the fields of a message (protobuf.dev/programming-guides/encoding).

    Raises:
        ValueError: the bytes are no message.
    """
    if not isinstance(data, bytes):
        raise ValueError("a number stands where a message is expected")  # noqa: TRY004
    fields: Fields = []
    place, end = 0, len(data)
    while place < end:
        # Almost every tag and length is one byte, and there are thousands: no call for those.
        tag, place = (data[place], place + 1) if data[place] < 128 else _varint(data, place)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, place = _varint(data, place)
        elif wire in (1, 2, 5):
            if wire == 2:
                is_short = place < end and data[place] < 128
                length, place = (data[place], place + 1) if is_short else _varint(data, place)
            else:
                length = 8 if wire == 1 else 4
            if length > end - place:
                raise ValueError("it ends early")
            value = data[place : place + length]
            place += length
        else:
            raise ValueError(f"wire type {wire} at byte {place}")
        fields.append((number, value))
    return fields


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(data):
            raise ValueError("it ends early")
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise ValueError("a number of more than ten bytes")
