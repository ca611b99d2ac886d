"""The logits of a short sequence, computed from the packed bytes themselves: what `selfcheck.json` holds.

In: the finished weights.bin of every rank. Out: logits in float64, through the numpy reference of each operator, with the
sums over ranks that the subgraphs do. It shares no code with the kernels or the graphs, so agreement on a box shows that
packing, splitting, layout, kernels and collectives are right together. Products with weights are float64 sums in a fixed
order, from custom_ops/pack; the first and the last tile of each weight are also expanded by `layout` and multiplied by the
numpy reference, and must agree, so a library that packs and unpacks alike but wrongly is found. Weights are read a few tiles
at a time.
"""

from __future__ import annotations

import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from llmpack.layout import untile_nibbles, untile_rows, untile_six_bits
from llmpack.native import VECTORS, packed_product
from llmpack.rope import attention_scale, of_layer, rope_frequencies, rotation_scale
from llmpack.weights import EMBEDDING, HEAD, Initializer, RankWeight, heads_per_rank
from llmpack_ops import reference
from llmrun.artifact import LARGEST_LOGIT, ROW_TILE, IncompatibleError, InternalError, ModelConfig

NUM_IDS = VECTORS  # of a sequence, or of two side by side: one with activations as they are, one with rounded ones
_ELEMENTS_AT_ONCE = 1 << 20
_MAX_THREADS = 8
_SAME = 1e-10  # float64 sums in another order, as a share of the sum of magnitudes
# Largest allowed |difference|, as a share of the logits' root mean square, with its reason. Bounds per operator are in
# FORMAT 5.1; through a whole model only their accumulation can be stated, from the models in tests/e2e (see there). What
# 8-bit activations add up to depends on the model's depth and on the size of its weights, so it is computed as well.
_TOLERANCE = {
    "f32": 2e-4,  # float32 sums in another order
    "f16": 2e-2,  # and keys and values in float16
    "q8": 0.15,  # and activations in 8 bits
    "q4": 0.15,
}
_ROUNDINGS = 3.0  # times what rounding activations changes: a kernel's own float32 sums round some the other way
_LARGEST = float(np.finfo(np.float32).max)  # of what kernels compute with
_TOO_LARGE = "no machine runs this model in float32: its weights are damaged, or were made for another type"
_UNTILE = {"q8": untile_rows, "q6": untile_six_bits, "q4": untile_nibbles}


class PackedRank:
    """One rank's weights.bin, read by name; use as a context manager."""

    def __init__(self, path: Path, weights: list[RankWeight]) -> None:
        self.path = path
        self.weights = {(w.row.name, w.row.role == "bias"): w for w in weights}
        self._memory = threading.local()

    def __enter__(self) -> PackedRank:
        self._file = open(self.path, "rb")
        self._pool = ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), _MAX_THREADS))
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._file.close()

    def _read(self, item: Initializer, first: int = 0, count: int | None = None) -> np.ndarray:
        """Read entries first to first + count of an initializer's outermost axis, into memory that the thread reuses."""
        shape = (item.shape[0] if count is None else count, *item.shape[1:])
        stride = int(np.prod(item.shape[1:])) * item.dtype.itemsize
        key, size = item.name.rpartition(".")[2], shape[0] * stride
        held = getattr(self._memory, key, None)
        if held is None or len(held) < size:
            held = np.empty(size, np.uint8)
            setattr(self._memory, key, held)
        if os.preadv(self._file.fileno(), [held[:size].data], item.offset + first * stride) != size:
            raise InternalError(f"{self.path}: ends before {item.name} does")
        return held[:size].view(item.dtype).reshape(shape)

    def vector(self, name: str, *, is_bias: bool = False) -> np.ndarray:
        """Return a norm's weight, or the bias of a projection."""
        return self._read(self.weights[name, is_bias].initializers[0]).copy()

    def embedding(self, ids: np.ndarray) -> np.ndarray:
        """Return rows of the embedding: [len(ids), hidden_size]."""
        weight = self.weights[EMBEDDING, False]
        if weight.group_size is None:
            return np.concatenate([self._read(weight.initializers[0], int(i), 1).astype(np.float64) for i in ids])
        return np.stack([self._values(weight, int(i) // ROW_TILE)[i % ROW_TILE] for i in ids])

    def matmul(self, name: str, x: np.ndarray) -> np.ndarray:
        """Multiply x [T, in_features] with a projection as it was packed: [T, out_features]."""
        weight = self.weights[name, False]
        num_tiles = weight.initializers[0].shape[0]
        step = max(1, _ELEMENTS_AT_ONCE // (ROW_TILE * weight.num_columns))
        y = np.empty((len(x), num_tiles * ROW_TILE))
        for start in range(0, len(x), VECTORS):
            count = min(VECTORS, len(x) - start)
            columns = np.zeros((weight.num_columns, VECTORS))
            columns[:, :count] = x[start : start + count].T

            def product(first: int, columns: np.ndarray = columns) -> np.ndarray:
                tiles = self._tiles(weight, first, min(step, num_tiles - first))
                return packed_product(*tiles, weight.storage, weight.group_size or 0, columns)

            rows = np.concatenate(list(self._pool.map(product, range(0, num_tiles, step))))
            y[start : start + count] = rows[:, :count].T
        for tile in {0, num_tiles - 1}:
            self._compare_with_numpy(weight, tile, x, y[:, tile * ROW_TILE : (tile + 1) * ROW_TILE])
        return y[:, : weight.num_rows]

    def _tiles(self, weight: RankWeight, first: int, count: int) -> tuple[np.ndarray, np.ndarray | None]:
        arrays = [self._read(item, first, count) for item in weight.initializers]
        return arrays[0], arrays[1] if len(arrays) > 1 else None

    def _values(self, weight: RankWeight, tile: int) -> np.ndarray:
        """Return the weights of one tile, [ROW_TILE, in_features], by the numpy reference of layout and quantization."""
        tiles, scales = self._tiles(weight, tile, 1)
        if scales is None:
            return untile_rows(tiles, ROW_TILE).astype(np.float64)
        quantized = _UNTILE[weight.storage](tiles, ROW_TILE)
        return reference.dequantize(quantized, untile_rows(scales, ROW_TILE), weight.storage)

    def _compare_with_numpy(self, weight: RankWeight, tile: int, x: np.ndarray, y: np.ndarray) -> None:
        """Make sure that [T, ROW_TILE] products are those of the numpy reference of layout, quantization and product."""
        values = self._values(weight, tile)
        if not (np.abs(reference.matmul(x, values) - y) <= _SAME * (np.abs(x) @ np.abs(values).T)).all():
            raise InternalError(
                f"{self.path}: {weight.row.name}: the operator library and numpy read tile {tile} apart"
            )


def forward(
    config: ModelConfig,
    ranks: list[PackedRank],
    kv_dtype: str,
    ids: np.ndarray,
    *,
    has_rounded: bool = False,
) -> np.ndarray:
    """Run the split model over one sequence, and maybe over the same once more with activations rounded to 8 bits.

    Args:
        config: the architecture.
        ranks: every rank's weights.
        kv_dtype: "float16" or "float32": keys and values are rounded to it, as in the cache.
        ids: [T] token ids.
        has_rounded: append the sequence with rounded activations; see `round_activations`.

    Returns:
        logits of every position, [T or 2 T, vocab_size], float64.
    Raises:
        IncompatibleError: keys or values are beyond what the cache can hold, or a norm's input beyond what float32 can square.
    """
    num_tokens, num_sequences = len(ids), 1 + has_rounded
    num_heads, num_kv_heads = heads_per_rank(config, len(ranks))
    positions = np.tile(np.arange(num_tokens), num_sequences)
    empty = np.zeros((num_sequences, num_tokens, num_kv_heads, config.head_dim), kv_dtype)
    sequences = {
        "slot_mapping": np.arange(num_sequences * num_tokens),
        "query_start": np.arange(num_sequences + 1) * num_tokens,
        "seq_lens": np.full(num_sequences, num_tokens),
        "block_table": np.arange(num_sequences)[:, None],
    }

    largest_norm = math.sqrt(_LARGEST) * config.residual_multiplier  # graphs hold the stream divided by it

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        if not (np.linalg.norm(x, axis=1) < largest_norm).all():
            raise IncompatibleError(f"{name}: its input's squares are beyond float32's range; {_TOO_LARGE}.")
        return reference.rms_norm(x, ranks[0].vector(name), config.rms_norm_eps)

    def product(rank: PackedRank, name: str, x: np.ndarray) -> np.ndarray:
        group_size = rank.weights[name, False].group_size
        if group_size is not None:
            x = np.concatenate([x[:num_tokens], round_activations(x[num_tokens:], group_size)])
        return rank.matmul(name, x)

    def project(rank: PackedRank, name: str, x: np.ndarray, *, has_bias: bool) -> np.ndarray:
        y = product(rank, name, x)
        return y + rank.vector(name, is_bias=True) if has_bias else y

    gate = {"silu": reference.swiglu, "gelu_pytorch_tanh": reference.geglu}[config.activation]
    x = np.tile(ranks[0].embedding(ids), (num_sequences, 1)) * config.embedding_multiplier
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        normed, total = norm(f"{layer}.input_layernorm", x), np.zeros_like(x)
        for rank in ranks:
            qkv = project(rank, f"{layer}.self_attn.qkv_proj", normed, has_bias=config.attention_bias)
            if config.has_qk_norm:
                weights = (ranks[0].vector(f"{layer}.self_attn.{name}") for name in ("q_norm", "k_norm"))
                sizes = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "epsilon": config.rms_norm_eps}
                qkv = reference.qk_norm(qkv, *weights, **sizes)
            with np.errstate(over="ignore", invalid="ignore"):
                attended, _, _ = reference.paged_attention(
                    qkv, _cos_sin(config, i, positions), empty, empty, **sequences,
                    num_heads=num_heads, num_kv_heads=num_kv_heads, scale=attention_scale(config, i),
                    window=config.window_of(i),
                )  # fmt: skip
            if not np.isfinite(attended).all():
                advice = "--kv-dtype f32 can hold more" if kv_dtype == "float16" else _TOO_LARGE
                raise IncompatibleError(
                    f"{layer}.self_attn: its keys or values are beyond {kv_dtype}'s range; {advice}."
                )
            total = total + product(rank, f"{layer}.self_attn.o_proj", attended)
        if config.has_output_bias:
            total = total + ranks[0].vector(f"{layer}.self_attn.o_proj", is_bias=True)
        if config.has_post_norms:
            total = norm(f"{layer}.post_attention_layernorm", total)
        x, total = x + total * config.residual_multiplier, np.zeros_like(x)
        normed = norm(f"{layer}.{'pre_feedforward' if config.has_post_norms else 'post_attention'}_layernorm", x)
        for rank in ranks:
            gate_up = project(rank, f"{layer}.mlp.gate_up_proj", normed, has_bias=config.mlp_bias)
            total = total + product(rank, f"{layer}.mlp.down_proj", gate(gate_up))
        if config.mlp_bias:
            total = total + ranks[0].vector(f"{layer}.mlp.down_proj", is_bias=True)
        if config.has_post_norms:
            total = norm(f"{layer}.post_feedforward_layernorm", total)
        x = x + total * config.residual_multiplier
    normed = norm("model.norm", x)
    logits = np.concatenate([product(rank, HEAD, normed) for rank in ranks], axis=1)[:, : config.vocab_size]
    return logits / config.logits_scaling


def _cos_sin(config: ModelConfig, layer: int, positions: np.ndarray) -> np.ndarray:
    """Return a layer's table for positions [T]: [T, head_dim]."""
    config = of_layer(config, layer)
    angles = positions[:, None] * rope_frequencies(config).astype(np.float64) * config.rotates(layer)
    scale = rotation_scale(config) if config.rotates(layer) else None
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1) * (1 if scale is None else scale)


def round_activations(x: np.ndarray, group_size: int) -> np.ndarray:
    """Round each row to 8 bits, with one step for `group_size` features, as a product may (FORMAT 5.1)."""
    groups = x.reshape(len(x), -1, group_size)
    steps = np.abs(groups).max(axis=2, keepdims=True, initial=0.0) / 127
    return (np.rint(groups / np.where(steps > 0, steps, 1)) * steps).reshape(x.shape)


def selfcheck(
    config: ModelConfig,
    ranks: list[PackedRank],
    scheme: str,
    kv_dtype: str,
    num_ids: int = NUM_IDS,
) -> dict[str, Any]:
    """Return the members of selfcheck.json (FORMAT 6.1); the ids are spread over the vocabulary by a fixed rule.

    Raises:
        IncompatibleError: as `forward`, or logits are beyond what a reader takes.
    """
    is_rounded = scheme in ("q8", "q4")
    length = max(1, num_ids // 2) if is_rounded else num_ids
    ids = (np.arange(1, length + 1, dtype=np.int64) * 2654435761) % config.vocab_size
    rows = forward(config, ranks, kv_dtype, ids, has_rounded=is_rounded)
    logits = rows[length - 1]
    if not np.abs(logits).max() < LARGEST_LOGIT:
        raise IncompatibleError(
            f"{HEAD}: found a logit of {np.abs(logits).max():.2g}, expected less than {LARGEST_LOGIT:g}: its weights are"
            " damaged, or were made for another type."
        )
    scale = float(np.sqrt(np.mean(logits**2)))
    share = max(_TOLERANCE[scheme], _TOLERANCE["f16"] if kv_dtype == "float16" else 0.0)
    rounding = float(np.abs(rows[-1] - logits).max())  # 0 where nothing is rounded
    tolerance = round(max(share * scale, _ROUNDINGS * rounding, 1e-3), 4)
    return {"ids": ids.tolist(), "logits": [round(float(v), 4) + 0.0 for v in logits], "tolerance": tolerance}
