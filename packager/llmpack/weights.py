"""One row per weight: its name in the artifact, the tensors it is made of, how it is split over ranks, how it is stored.

In: a ModelConfig and the choice of scheme and shards. Out: `WeightRow`s (pure data), and for each rank the slices of the
checkpoint and the shapes of the initializers. Reads nothing. The order of `weight_rows` is the order of `weights.bin`.

| split | out_features | in_features | afterwards |
|---|---|---|---|
| column | a share for each rank | all | nothing |
| row | all | a share for each rank | AllReduce |
| vocab | a share of the vocabulary | all | AllGather |
| replicated | all | all | nothing |
| first | all, on rank 0 alone | all | AllReduce |
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from llmpack.expert_tensors import GROUP_SIZE as MXFP4_GROUP_SIZE
from llmpack.rope import order_of_features
from llmrun.artifact import ROW_TILE, WEIGHT_ALIGNMENT, ModelConfig, UsageError

Split = Literal["column", "row", "vocab", "replicated", "first"]
Role = Literal["linear", "experts", "router", "head", "embedding", "norm", "bias"]
MATRICES: tuple[Role, ...] = ("linear", "experts", "router", "head")  # in row tiles, whatever their storage
SCHEMES = ("f32", "f16", "q8", "q4")
GROUP_SIZES = (32, 64, 128)
DEFAULT_GROUP_SIZES = (64, 32)  # the first that divides
MAX_SHARDS = 64
QUANTIZED = ("q8", "q6", "q4", "mxfp4")  # storages with scales
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
CORRECTION_BIAS = "e_score_correction_bias"


@dataclass(frozen=True)
class Quantization:
    """Scheme of the artifact; group_size, of the projections, counts input features.

    Attributes:
        has_mxfp4: whether the checkpoint has its experts in MXFP4, which stay so where weights are quantized.
    """

    scheme: str
    group_size: int
    has_mxfp4: bool = False

    def of_role(self, role: Role) -> str:
        """Return how a role is stored (FORMAT 4.4, 4.5); norms and biases stay float32, and routers float."""
        if role in ("norm", "bias"):
            return "f32"
        if role == "router":
            return "f32" if self.scheme == "f32" else "f16"
        if role == "experts" and self.has_mxfp4 and self.scheme in QUANTIZED:
            return "mxfp4"
        return "q6" if self.scheme == "q4" and role in ("head", "embedding") else self.scheme

    def group_size_of(self, role: Role, num_columns: int) -> int | None:
        """Return how many input features share a scale in a matrix of this role; None: it has no scales."""
        storage = self.of_role(role)
        if storage == "q6":
            return next(size for size in reversed(GROUP_SIZES) if num_columns % size == 0)
        if storage == "mxfp4":
            return MXFP4_GROUP_SIZE
        return self.group_size if storage in QUANTIZED else None


@dataclass(frozen=True)
class WeightRow:
    """`name` + ".weight" (or ".bias") in the artifact; `sources` are tensors of the checkpoint, or their rows, stacked.

    A source called as the row is so in the artifact, too. A vector of several experts is a matrix of `num_experts` rows.
    """

    name: str
    sources: tuple[str, ...]
    split: Split
    role: Role
    offset: float = 0.0  # added to each value
    num_experts: int | None = None


@dataclass(frozen=True)
class Block:
    """A rectangle of one source that belongs to a rank; `rows` may have a step."""

    source: str
    rows: slice
    columns: slice

    @property
    def num_rows(self) -> int:
        """Rows of the rectangle."""
        return len(range(self.rows.start, self.rows.stop, self.rows.step or 1))


@dataclass(frozen=True)
class Initializer:
    """One initializer of a rank's graph; `offset` and `num_bytes` in its weights.bin."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        """Bytes without padding."""
        return int(np.prod(self.shape)) * self.dtype.itemsize


@dataclass(frozen=True)
class RankWeight:
    """A weight as one rank holds it: [num_rows, num_columns], of which `padding` zero rows come last."""

    row: WeightRow
    blocks: tuple[Block, ...]
    num_rows: int
    num_columns: int
    padding: int
    storage: str
    group_size: int | None
    initializers: tuple[Initializer, ...]
    is_shared: bool = False  # the initializers are another weight's, or lie in them; that one writes them


def weight_rows(config: ModelConfig) -> list[WeightRow]:
    """Return the table of all weights, in the order of the forward pass."""
    offset = 1.0 if config.architecture == "Gemma3ForCausalLM" else 0.0  # it stores what norms multiply by, less 1
    rows = [WeightRow(EMBEDDING, (f"{EMBEDDING}.weight",), "replicated", "embedding")]

    def projection(name: str, sources: str, split: Split, has_bias: bool) -> None:
        parent = name.rpartition(".")[0]
        roots = [f"{parent}.{source}" for source in sources.split()]
        rows.append(WeightRow(name, tuple(f"{root}.weight" for root in roots), split, "linear"))
        if has_bias:
            # A row-parallel bias is added once, after the AllReduce, and so is whole on every rank.
            bias_split: Split = "replicated" if split == "row" else split
            rows.append(WeightRow(name, tuple(f"{root}.bias" for root in roots), bias_split, "bias"))

    def norm(name: str) -> None:
        rows.append(WeightRow(name, (f"{name}.weight",), "replicated", "norm", offset))

    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        norm(f"{layer}.input_layernorm")
        projection(f"{layer}.self_attn.qkv_proj", "q_proj k_proj v_proj", "column", config.attention_bias)
        if config.has_qk_norm:
            norm(f"{layer}.self_attn.q_norm")
            norm(f"{layer}.self_attn.k_norm")
        if config.has_sinks:
            sinks = f"{layer}.self_attn.sinks"
            rows.append(WeightRow(sinks, (sinks,), "column", "bias"))
        projection(f"{layer}.self_attn.o_proj", "o_proj", "row", config.has_output_bias)
        norm(f"{layer}.post_attention_layernorm")
        if config.has_post_norms:
            norm(f"{layer}.pre_feedforward_layernorm")
        if config.is_sparse(i):
            rows += _expert_rows(config, f"{layer}.mlp")
        else:
            projection(f"{layer}.mlp.gate_up_proj", "gate_proj up_proj", "column", config.mlp_bias)
            projection(f"{layer}.mlp.down_proj", "down_proj", "row", config.mlp_bias)
        if config.has_post_norms:
            norm(f"{layer}.post_feedforward_layernorm")
    norm("model.norm")
    rows.append(WeightRow(HEAD, (f"{HEAD}.weight",), "vocab", "head"))
    return rows


def _expert_rows(config: ModelConfig, mlp: str) -> list[WeightRow]:
    """Return those of a layer of experts: the matrices of all lie one after another, so that one node has all (FORMAT 4.7).

    Those that all tokens share have the numbers from num_experts on.
    """
    num_experts = config.num_all_experts
    roots = [f"{mlp}.experts.{i}" for i in range(num_experts)]
    gate_up = [f"{root}.{name}" for root in roots for name in ("gate_proj", "up_proj")]
    down = [f"{root}.down_proj" for root in roots]
    rows = []

    def add(name: str, matrices: list[str], split: Split, role: Role, of_bias: Split, several: int | None) -> None:
        rows.append(WeightRow(name, tuple(f"{matrix}.weight" for matrix in matrices), split, role))
        if config.has_expert_biases:
            rows.append(WeightRow(name, tuple(f"{m}.bias" for m in matrices), of_bias, "bias", num_experts=several))

    add(f"{mlp}.gate", [f"{mlp}.gate"], "replicated", "router", "replicated", None)
    if config.has_correction_bias:
        correction = f"{mlp}.gate.{CORRECTION_BIAS}"
        rows.append(WeightRow(correction, (correction,), "replicated", "bias"))
    add(f"{mlp}.experts.gate_up_proj", gate_up, "column", "experts", "column", num_experts)
    # What ranks sum up has its bias once: on the first of them.
    add(f"{mlp}.experts.down_proj", down, "row", "experts", "first", num_experts)
    return rows


def source_shape(config: ModelConfig, source: str) -> tuple[int, ...]:
    """Return the shape that a source must have: [out_features, in_features], or [size]."""
    root, _, kind = source.rpartition(".")
    hidden, intermediate = config.hidden_size, config.intermediate_size
    if ".mlp.experts." in root:
        intermediate = config.moe_intermediate_size or 0
    query, key_value = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    if kind == "sinks":
        return (config.num_attention_heads,)
    if kind == CORRECTION_BIAS:
        return (config.num_experts or 0,)
    out_in = {
        "embed_tokens": (config.vocab_size, hidden),
        "lm_head": (config.vocab_size, hidden),
        "q_proj": (query, hidden),
        "k_proj": (key_value, hidden),
        "v_proj": (key_value, hidden),
        "o_proj": (hidden, query),
        "gate": (config.num_experts or 0, hidden),
        "gate_proj": (intermediate, hidden),
        "up_proj": (intermediate, hidden),
        "down_proj": (hidden, intermediate),
        "q_norm": (config.head_dim,),
        "k_norm": (config.head_dim,),
    }.get(root.rpartition(".")[2], (hidden,))
    return out_in if kind == "weight" else out_in[:1]


def plan_rank(config: ModelConfig, quantization: Quantization, shards: int, rank: int) -> list[RankWeight]:
    """Return every weight of one rank, with the blocks to read and the initializers to write, offsets included."""
    offset, weights = 0, []
    for row in weight_rows(config):
        if row.split == "first" and rank > 0:
            continue
        blocks = tuple(block for source in row.sources for block in _blocks(config, source, row.split, shards, rank))
        padding = vocab_per_rank(config, shards) - blocks[0].num_rows if row.split == "vocab" else 0
        num_rows = sum(block.num_rows for block in blocks) + padding
        num_columns = blocks[0].columns.stop - blocks[0].columns.start
        storage, group_size = quantization.of_role(row.role), quantization.group_size_of(row.role, num_columns)
        if row.role == "head" and config.tie_word_embeddings and group_size is not None:
            embedding = next(w for w in weights if w.row.role == "embedding")
            if shared := _part_of(embedding, row.name, rank * num_rows, num_rows, whole=shards == 1):
                weights.append(
                    RankWeight(row, blocks, num_rows, num_columns, padding, storage, group_size, shared, True)
                )
                continue
        initializers = []
        for suffix, dtype, shape in _stored(row, storage, num_rows, num_columns, group_size):
            name = row.name if row.sources == (row.name,) else f"{row.name}.{suffix}"
            initializers.append(Initializer(name, np.dtype(dtype), shape, offset))
            offset += -(-initializers[-1].num_bytes // WEIGHT_ALIGNMENT) * WEIGHT_ALIGNMENT
        weights.append(
            RankWeight(row, blocks, num_rows, num_columns, padding, storage, group_size, tuple(initializers))
        )
    return weights


def _part_of(
    embedding: RankWeight, name: str, first_row: int, num_rows: int, *, whole: bool
) -> tuple[Initializer, ...] | None:
    """Return the initializers of a tied head, whose bytes are those of the embedding's rows; None: they cannot be.

    Ranks have whole tiles then, and what begins within the embedding's is aligned as every initializer (FORMAT 4.5).
    """
    if whole:
        return embedding.initializers
    first, count = first_row // ROW_TILE, num_rows // ROW_TILE
    parts = []
    for item in embedding.initializers:
        bytes_per_tile = item.num_bytes // item.shape[0]
        offset = item.offset + first * bytes_per_tile
        if num_rows % ROW_TILE or first + count > item.shape[0] or offset % WEIGHT_ALIGNMENT:
            return None
        suffix = item.name.rpartition(".")[2]
        parts.append(Initializer(f"{name}.{suffix}", item.dtype, (count, *item.shape[1:]), offset))
    return tuple(parts)


def num_bytes(weights: Iterable[RankWeight]) -> int:
    """Return the size of weights.bin."""
    ends = [i.offset + -(-i.num_bytes // WEIGHT_ALIGNMENT) * WEIGHT_ALIGNMENT for w in weights for i in w.initializers]
    return max(ends, default=0)


def heads_per_rank(config: ModelConfig, shards: int) -> tuple[int, int]:
    """Return (num_heads_per_rank, num_kv_heads_per_rank)."""
    return config.num_attention_heads // shards, max(1, config.num_key_value_heads // shards)


def vocab_per_rank(config: ModelConfig, shards: int) -> int:
    """Return the rows of the head on each rank, padding included (FORMAT 4.6)."""
    return -(-config.vocab_size // shards)


def _blocks(config: ModelConfig, source: str, split: Split, shards: int, rank: int) -> list[Block]:
    """Return what a rank holds of a source, in the order in which it holds it."""
    block = _block(config, source, split, shards, rank)
    order = order_of_features(config)
    if len(order) == 1 or not source.rpartition(".")[0].endswith(("q_proj", "k_proj", "q_norm", "k_norm")):
        return [block]
    heads = range(block.rows.start, block.rows.stop, config.head_dim)
    rows = [slice(first + part.start, first + part.stop, part.step) for first in heads for part in order]
    return [Block(source, part, block.columns) for part in rows]


def _block(config: ModelConfig, source: str, split: Split, shards: int, rank: int) -> Block:
    num_rows, num_columns = (*source_shape(config, source), 1)[:2]
    all_rows, all_columns = slice(0, num_rows), slice(0, num_columns)
    if split in ("replicated", "first"):
        return Block(source, all_rows, all_columns)
    if split == "row":
        share = num_columns // shards
        return Block(source, all_rows, slice(rank * share, (rank + 1) * share))
    if split == "vocab":
        share = vocab_per_rank(config, shards)
        return Block(source, slice(min(rank * share, num_rows), min((rank + 1) * share, num_rows)), all_columns)
    if source.rpartition(".")[0].endswith(("k_proj", "v_proj")):
        # Fewer KV heads than ranks: neighbouring ranks hold the same head (FORMAT 4.2).
        first = rank * config.num_key_value_heads // shards * config.head_dim
        return Block(source, slice(first, first + heads_per_rank(config, shards)[1] * config.head_dim), all_columns)
    share = num_rows // shards
    return Block(source, slice(rank * share, (rank + 1) * share), all_columns)


def _stored(
    row: WeightRow, storage: str, num_rows: int, num_columns: int, group_size: int | None
) -> list[tuple[str, str, tuple[int, ...]]]:
    """Return (suffix, numpy dtype, shape) of the initializers of one weight (FORMAT 4.3, 4.5)."""
    role = row.role
    if role in ("norm", "bias"):
        shape = (num_rows,) if row.num_experts is None else (row.num_experts, num_rows // row.num_experts)
        return [("weight" if role == "norm" else "bias", "<f4", shape)]
    tiles = -(-num_rows // ROW_TILE)
    if group_size is None:
        shape = (num_rows, num_columns) if role == "embedding" else (tiles, num_columns, ROW_TILE)
        return [("weight", {"f32": "<f4", "f16": "<f2"}[storage], shape)]
    cells = {"q8": (num_columns // 4,), "q6": (num_columns // 16, 3)}.get(storage, (num_columns // 8,))
    return [
        ("weight", "u1", (tiles, *cells, ROW_TILE, 4)),
        ("scales", "<f2", (tiles, num_columns // group_size, ROW_TILE)),
    ]


def check_options(scheme: str, group_size: int | None, shards: int) -> Quantization:
    """Return the Quantization for command-line values; the errors name what is allowed."""
    if scheme not in SCHEMES:
        raise UsageError(f"--quant {scheme}: unknown; choose one of {', '.join(SCHEMES)}.")
    if group_size is not None and group_size not in GROUP_SIZES:
        raise UsageError(f"--group-size {group_size}: choose one of {', '.join(map(str, GROUP_SIZES))}.")
    if not 1 <= shards <= MAX_SHARDS:
        raise UsageError(f"--shards {shards}: expected 1 to {MAX_SHARDS}.")
    return Quantization(scheme, group_size or DEFAULT_GROUP_SIZES[0])
