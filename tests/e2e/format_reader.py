"""A second reader of artifacts: it knows artifacts/FORMAT.md, whose clauses it names, and no module of ours.

Plain numpy in float64, one sequence in one step, every rank in turn. Only `cpu.onnx`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import sentencepiece
import tokenizers
from numpy.typing import NDArray

Array = NDArray[Any]
CHUNK_BYTES = 67_108_864
LEVELS = np.array([-64, -52, -42, -32, -24, -18, -11, -5, 0, 6, 12, 19, 26, 34, 44, 56], np.float64)
TWICE_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float64)
# A joined operator is called after its parts, in order (5.10 to 5.12).
PART = re.compile(
    r"MatMul(?:F32|F16|Q8|Q6|Q4)|MoE(?:F32|F16|Q8|Q4|MXFP4)|Embedding(?:Q8|Q6)|AddRMSNorm|RMSNorm|QKNorm|SwiGLU|GeGLU|AllReduce|"
    r"AllGather|PagedAttention"
)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest once every byte of the artifact is known to be the one that was packed (1.2 to 1.4, 2.2)."""
    text = (folder / "manifest.json").read_bytes()
    manifest = json.loads(text)
    assert canonical(manifest) == text
    digest = manifest.pop("manifest_sha256")
    assert hashlib.sha256(canonical(manifest)).hexdigest() == digest
    assert (manifest["format"], manifest["format_version"][0]) == ("llmpack", 1)
    found = {path for path in folder.rglob("*") if not path.is_dir()}
    assert all(stat.S_ISREG(os.lstat(path).st_mode) for path in found)
    assert {str(path.relative_to(folder)) for path in found} == {"manifest.json", *manifest["files"]}
    for name, entry in manifest["files"].items():
        data = (folder / name).read_bytes()
        chunks = [data[start : start + CHUNK_BYTES] for start in range(0, len(data), CHUNK_BYTES)]
        assert entry["size"] == len(data), name
        assert entry["chunks"] == [hashlib.sha256(chunk).hexdigest() for chunk in chunks], name
    return manifest


def canonical(manifest: dict[str, Any]) -> bytes:
    """Return a manifest's bytes (2.2)."""
    return (json.dumps(manifest, sort_keys=True, indent=1) + "\n").encode()


def untile(kind: str, tiles: Array, scales: Array | None, num_rows: int, group_size: int | None) -> Array:
    """Return a matrix [N, K] as its tiles hold it (4.3); the rows that fill up the last one must be zero."""
    count = -(-num_rows // 16)
    assert tiles.shape[0] == count
    if kind in ("F32", "F16"):
        matrix = tiles.astype(np.float64).transpose(0, 2, 1)
    else:
        if kind == "Q8":
            assert tiles.min() >= 1
            values = tiles.transpose(0, 2, 1, 3).astype(np.float64) - 128
        elif kind == "Q6":
            low, high = tiles & 63, tiles >> 6
            last = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4
            values = np.concatenate([low, last[:, :, None]], 2).transpose(0, 3, 1, 2, 4).astype(np.float64) - 32
        else:
            levels = {"Q4": LEVELS, "MXFP4": TWICE_E2M1}[kind]
            values = levels[np.stack([tiles & 15, tiles >> 4], 3)].transpose(0, 2, 1, 3, 4)
        assert scales is not None
        assert group_size is not None
        matrix = values.reshape(count, 16, -1)
        matrix = matrix * np.repeat(scales.astype(np.float64).transpose(0, 2, 1), group_size, 2)
    matrix = matrix.reshape(16 * count, -1)
    assert not matrix[num_rows:].any()
    return matrix[:num_rows]


class Rank:
    """One rank's graph, its initializers by name, and its matrices by the name of their tiles."""

    def __init__(self, folder: Path, manifest: dict[str, Any], rank: int) -> None:
        entry = manifest["ranks"][rank]
        self.model = onnx.load(str(folder / entry["graphs"]["cpu"]), load_external_data=False)
        self.nodes = self.model.graph.node
        data = (folder / entry["weights"]).read_bytes()
        metadata = {prop.key: prop.value for prop in self.model.metadata_props}
        assert {"rank": str(rank), "shards": str(manifest["shards"])}.items() <= metadata.items()  # 3.4
        opsets = {opset.domain: opset.version for opset in self.model.opset_import}
        assert opsets.keys() == {"", "ai.llmpack"}  # 3.1
        assert opsets[""] in (20, 21)
        assert opsets["ai.llmpack"] == manifest["ops"]["version"]
        assert entry["weight_bytes"] == len(data)
        self.tensors: dict[str, Array] = {}
        is_used, is_read = np.zeros(len(data), bool), np.zeros(len(data), np.float64)  # the part that a token reads
        by_a_token = {name for node in self.nodes if not reads_embedding(node) for name in node.input}
        for tensor in self.model.graph.initializer:
            if not tensor.external_data:
                constant = self.tensors[tensor.name] = onnx.numpy_helper.to_array(tensor)
                assert constant.dtype == (np.int64 if constant.ndim == 1 else np.float32)  # 3.1
                assert constant.ndim == 1 or constant.shape in _of_constants(manifest["model"])
                continue
            where = {item.key: item.value for item in tensor.external_data}
            start, size = int(where["offset"]), int(where["length"])
            values = np.frombuffer(data[start : start + size], onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
            self.tensors[tensor.name] = values.reshape(tensor.dims)
            is_used[start : start + size] = True
            if tensor.name in by_a_token:
                is_read[start : start + size] = _part_of_experts(manifest["model"], tensor.name)
            assert start % 64 == 0  # 4.1
        assert len(data) % 64 == 0
        assert sum(entry["weight_bytes_by_role"].values()) == is_used.sum()
        assert abs(entry["weight_bytes_per_token"] - is_read.sum()) < 1e-3  # 2.5
        assert not np.frombuffer(data, np.uint8)[~is_used].any()
        self.matrices = {}
        for node in self.nodes:
            if (found := re.match("(?:MatMul|Embedding)(F32|F16|Q8|Q6|Q4)", node.op_type)) is not None:
                scales = self.tensors[node.input[2]] if found[1].startswith("Q") else None
                sizes = attributes(node)
                num_rows = sizes["out_features" if "out_features" in sizes else "num_embeddings"]
                tiles = self.tensors[node.input[1]]
                self.matrices[node.input[1]] = untile(found[1], tiles, scales, num_rows, sizes.get("group_size"))
            if node.op_type.startswith("MoE"):
                self._add_experts(node)

    def _add_experts(self, node: onnx.NodeProto) -> None:
        """Add the matrices of all experts, those of one kind one after another (4.7)."""
        sizes, kind = attributes(node), node.op_type.removeprefix("MoE")
        rows = {"gate_up": 2 * sizes["intermediate_size"], "down": sizes["out_features"]}
        stored: list[Array | None] = [
            self.tensors[name] for name in node.input[2:] if name.endswith((".weight", ".scales"))
        ]
        if len(stored) == 2:
            stored = [stored[0], None, stored[1], None]
        names = [name for name in node.input[2:] if name.endswith(".weight")]
        for i, (name, count) in enumerate(zip(names, rows.values(), strict=True)):
            number = sizes["num_experts"] + sizes.get("num_shared_experts", 0)
            tiles, scales, num_rows = self.tensors[name], stored[2 * i + 1], number * count
            self.matrices[name] = untile(kind, tiles, scales, num_rows, sizes.get("group_size"))


def _of_constants(model: dict[str, Any]) -> list[tuple[int, int]]:
    """Return the shapes of the frequencies, of the factors of a part of each head, and of multipliers (3.1)."""
    dim = model["head_dim"]
    multipliers = {model[name] for name in ("embedding_multiplier", "residual_multiplier", "logits_scaling")}
    return [(1, dim // 2)] + [(1, dim)] * ("rotary_dim" in model["rope"]) + [(1, 1)] * (multipliers != {1})


def _part_of_experts(model: dict[str, Any], name: str) -> float:
    """Return the part of an initializer that a token reads."""
    shared = model["num_shared_experts"] or 0
    chosen, number = model["num_experts_per_tok"] or 0, model["num_experts"] or 1
    return (chosen + shared) / (number + shared) if ".experts." in name else 1


def reads_embedding(node: onnx.NodeProto) -> bool:
    """Tell whether a node looks rows of the embedding up (4.5)."""
    return node.op_type.startswith("Embedding") or "model.embed_tokens.weight" in node.input[:1]


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """Return a node's attributes by name."""
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def compute(ranks: list[Rank], manifest: dict[str, Any], ids: list[int]) -> Array:
    """Return the logits after each of `ids`: [T, vocab_size] (sections 3 and 5)."""
    steps = {"input_ids": np.array(ids), "positions": np.arange(len(ids)), "logit_rows": np.arange(len(ids))}
    values = [{**rank.tensors, **steps} for rank in ranks]
    for nodes in zip(*(rank.nodes for rank in ranks), strict=True):
        outputs = _run(ranks, manifest, nodes, values)
        for node, known, found in zip(nodes, values, outputs, strict=True):
            known.update(zip(node.output, found, strict=True))
    assert all(np.array_equal(known["logits"], values[0]["logits"]) for known in values)
    return values[0]["logits"]


def _run(
    ranks: list[Rank], manifest: dict[str, Any], nodes: tuple[onnx.NodeProto, ...], values: list[dict[str, Array]]
) -> list[tuple[Array, ...]]:
    """Return the outputs of one node on each rank."""
    assert len({(node.op_type, *node.output) for node in nodes}) == 1
    names = [list(node.input) for node in nodes]
    if nodes[0].domain == "":
        operator = DEFAULT_DOMAIN[nodes[0].op_type]
        return [
            (operator(attributes(node), *(known[name] for name in node.input)),)
            for node, known in zip(nodes, values, strict=True)
        ]
    parts = PART.findall(nodes[0].op_type)
    assert "".join(parts) == nodes[0].op_type
    x: list[Any] = [known[name.pop(0)] for known, name in zip(values, names, strict=True)]
    sizes = attributes(nodes[0])
    for part in parts:
        if part == "AllReduce":
            x = [sum(x)] * len(x)
        elif part == "AllGather":
            x = [np.concatenate(x, 1)[:, : sizes["out_features"]]] * len(x)
        elif part.startswith(("MatMul", "Embedding")):
            matrices = [rank.matrices[name.pop(0)] for rank, name in zip(ranks, names, strict=True)]
            if "Q" in part:
                for name in names:
                    name.pop(0)  # the scales, which are in the matrix
            is_product = part.startswith("MatMul")
            x = [y @ w.T if is_product else w[y] for y, w in zip(x, matrices, strict=True)]
        elif part.startswith("MoE"):
            x = [
                _experts(y, *_of_experts(rank, known, name), sizes)
                for y, rank, known, name in zip(x, ranks, values, names, strict=True)
            ]
        elif part in ("SwiGLU", "GeGLU"):
            x = [_glu(y, part) for y in x]
        elif part == "QKNorm":
            x = [_qk_norm(y, known[n[0]], known[n[1]], sizes) for y, known, n in zip(x, values, names, strict=True)]
        elif part == "PagedAttention":
            x = [
                _attend(y, known[name[0]], [known[sinks] for sinks in name[7:]], sizes, manifest)
                for y, known, name in zip(x, values, names, strict=True)
            ]
        else:
            rest = [
                [known[name.pop(0)] for _ in range(1 + (part == "AddRMSNorm"))]
                for known, name in zip(values, names, strict=True)
            ]
            x = [_norm(y, *given, epsilon=sizes["epsilon"]) for y, given in zip(x, rest, strict=True)]
    return [y if isinstance(y, tuple) else (y,) for y in x]


def _norm(x: Array, *given: Array, epsilon: float) -> Any:
    """5.2 of a weight, or 5.3 of a residual and a weight."""
    *residual, weight = given
    total = x + sum(residual)
    y = total / np.sqrt(np.mean(total * total, axis=-1, keepdims=True) + epsilon) * weight
    return (y, total) if residual else y


def _qk_norm(qkv: Array, q_weight: Array, k_weight: Array, sizes: dict[str, Any]) -> Array:
    """5.13: 5.2 of every head of q and of k."""
    num_heads, num_kv_heads, dim = sizes["num_heads"], sizes["num_kv_heads"], len(q_weight)
    q, k, v = np.split(qkv, [num_heads * dim, (num_heads + num_kv_heads) * dim], axis=1)
    q, k = (
        _norm(x.reshape(len(x), -1, dim), weight, epsilon=sizes["epsilon"]).reshape(x.shape)
        for x, weight in ((q, q_weight), (k, k_weight))
    )
    return np.concatenate([q, k, v], axis=1)


def _glu(gate_up: Array, name: str) -> Array:
    """5.4, 5.14."""
    gate, up = np.split(gate_up, 2, axis=1)
    if name == "GeGLU":
        return gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) / 2 * up
    return gate / (1 + np.exp(-gate)) * up


def _of_experts(
    rank: Rank, known: dict[str, Array], names: list[str]
) -> tuple[Array, Array, Array, list[Array], Array | float]:
    """Return the router's logits, the matrices gate_up and down of all experts, their biases, and the correction (5.16)."""
    logits, *weights = names
    gate_up, down = (rank.matrices[name] for name in weights if name.endswith(".weight"))
    biases = [known[name] for name in weights if name.endswith(".bias")]
    corrections = [known[name] for name in weights if name.endswith(".e_score_correction_bias")]
    return known[logits], gate_up, down, biases, sum(corrections)


def _experts(
    x: Array,
    logits: Array,
    gate_up: Array,
    down: Array,
    biases: list[Array],
    correction: Array | float,
    sizes: dict[str, Any],
) -> Array:
    """5.16."""
    num_experts, num_shared = sizes["num_experts"], sizes.get("num_shared_experts", 0)
    number = num_experts + num_shared
    of_gate_up, of_down = [*biases, *[np.zeros((number, 1))] * 2][:2]
    y = np.zeros_like(x)
    odds = np.exp(logits - logits.max(1, keepdims=True))
    scores = odds / odds.sum(1, keepdims=True)
    if sizes.get("sigmoid_scoring"):
        scores = 1 / (1 + np.exp(-logits))
    gate_ups, downs = np.split(gate_up, number), np.split(down, number)
    for row, (score, order) in enumerate(zip(scores, scores + correction, strict=True)):
        chosen = sorted(range(num_experts), key=lambda expert: (-order[expert], expert))
        chosen = chosen[: sizes["num_experts_per_tok"]]
        total = sum(score[chosen]) if sizes["norm_topk_prob"] else 1
        shares = {expert: score[expert] / total * sizes.get("routed_scaling_factor", 1) for expert in chosen}
        for expert, share in {**shares, **dict.fromkeys(range(num_experts, number), 1.0)}.items():
            hidden = x[row : row + 1] @ gate_ups[expert].T + of_gate_up[expert]
            hidden = _cut_off(hidden, sizes) if "swiglu_limit" in sizes else _glu(hidden, "SwiGLU")
            y[row] += share * ((hidden @ downs[expert].T)[0] + of_down[expert])
    return y


def _cut_off(gate_up: Array, sizes: dict[str, Any]) -> Array:
    """5.16, with `swiglu_limit`."""
    gate, up = np.split(gate_up, 2, axis=1)
    gate = np.minimum(gate, sizes["swiglu_limit"])
    up = np.clip(up, -sizes["swiglu_limit"], sizes["swiglu_limit"])
    return gate / (1 + np.exp(-sizes["swiglu_alpha"] * gate)) * (up + 1)


def _attend(qkv: Array, cos_sin: Array, sinks: list[Array], sizes: dict[str, Any], manifest: dict[str, Any]) -> Array:
    """5.5 of one whole sequence: each token sees itself and what is before it, within the window."""
    num_heads, num_kv_heads = sizes["num_heads"], sizes["num_kv_heads"]
    dim = cos_sin.shape[1]
    half = dim // 2
    cos, sin = cos_sin[:, None, :half], cos_sin[:, None, half:]
    heads = qkv.reshape(len(qkv), num_heads + 2 * num_kv_heads, dim)
    first, second = heads[..., :half], heads[..., half:]
    rotated = np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    stored = [rotated[:, num_heads : num_heads + num_kv_heads].astype(np.float32), heads[:, num_heads + num_kv_heads :]]
    keys, values = (
        np.repeat(x.astype(manifest["kv_cache"]["dtype"]).astype(np.float64), num_heads // num_kv_heads, 1)
        for x in stored
    )
    growth = np.ones(len(qkv))
    if "llama_4_scaling_beta" in sizes:
        steps = np.arange(len(qkv)) // sizes["original_max_position_embeddings"]
        growth += sizes["llama_4_scaling_beta"] * np.log(1 + steps)
    queries = rotated[:, :num_heads] * growth[:, None, None]
    scores = np.einsum("qhd,khd->hqk", queries, keys) * sizes["scale"]
    sees = np.tri(len(qkv)) - np.tri(len(qkv), k=-min(sizes["window"], len(qkv)))
    scores += np.where(sees, 0, -np.inf)
    highest = scores.max(-1, keepdims=True)
    shares = np.exp(scores - highest)
    shares /= shares.sum(-1, keepdims=True) + sum(np.exp(sink[:, None, None] - highest) for sink in sinks)
    return np.einsum("hqk,khd->qhd", shares, values).reshape(len(qkv), num_heads * dim)


def encode_golden(folder: Path, manifest: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """Return the ids of each golden text, and those that the tokenizer's file gives it (6.2)."""
    tokenizer = manifest["tokenizer"]
    vectors = json.loads((folder / tokenizer["golden"]).read_text())
    file = str(folder / tokenizer["file"])
    if tokenizer["kind"] == "sentencepiece":
        found = [sentencepiece.SentencePieceProcessor(model_file=file).encode(vector["text"]) for vector in vectors]
    else:
        library = tokenizers.Tokenizer.from_file(file)
        library.encode_special_tokens = True
        library.no_truncation()
        library.no_padding()
        found = [library.encode(vector["text"], add_special_tokens=False).ids for vector in vectors]
    for vector in vectors:
        assert vector.keys() == {"text", "ids"}
        assert not set(tokenizer["special_tokens"].values()) & set(vector["ids"])
    return [(vector["ids"], ids) for vector, ids in zip(vectors, found, strict=True)]


DEFAULT_DOMAIN: dict[str, Callable[..., Array]] = {
    "Gather": lambda _, table, at: table[at],
    "Cast": lambda _, x: x.astype(np.float64),
    "Unsqueeze": lambda _, x, axes: np.expand_dims(x, tuple(axes)),
    "Mul": lambda _, x, y: x * y,
    "Add": lambda _, x, y: x + y,
    "Cos": lambda _, x: np.cos(x),
    "Sin": lambda _, x: np.sin(x),
    "Concat": lambda given, *x: np.concatenate(x, given["axis"]),
}
