"""One rank's weights.bin, read by name: rows, vectors and float64 products of what was packed, some tiles at a time.

Products are sums in a fixed order, from custom_ops/pack; the first and the last tile of each weight are also expanded by
`layout` and multiplied by the numpy reference, and must agree, so a library that packs and unpacks alike but wrongly is found.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from llmpack.layout import untile_nibbles, untile_rows, untile_six_bits
from llmpack.native import VECTORS, packed_product
from llmpack.weights import EMBEDDING, Initializer, RankWeight
from llmpack_ops import reference
from llmrun.artifact import ROW_TILE, InternalError

_ELEMENTS_AT_ONCE = 1 << 20
_MAX_THREADS = 8
_SAME = 1e-10  # float64 sums in another order, as a share of the sum of magnitudes
_UNTILE = {"q8": untile_rows, "q6": untile_six_bits, "q4": untile_nibbles, "mxfp4": untile_nibbles}


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

    def matmul(self, name: str, x: np.ndarray, part: tuple[int, int] = (0, 1), *, compares: bool = True) -> np.ndarray:
        """Multiply x [T, in_features] with a projection as it was packed: [T, out_features].

        Args:
            name: of the projection.
            x: any number of rows.
            part: (i, count): with the i-th of `count` matrices of whole tiles that lie one after another in it.
            compares: whether the first and the last tile are multiplied by numpy, too.
        """
        weight = self.weights[name, False]
        num_tiles = weight.initializers[0].shape[0] // part[1]
        begin = part[0] * num_tiles
        step = max(1, _ELEMENTS_AT_ONCE // (ROW_TILE * weight.num_columns))
        y = np.empty((len(x), num_tiles * ROW_TILE))
        for start in range(0, len(x), VECTORS):
            count = min(VECTORS, len(x) - start)
            columns = np.zeros((weight.num_columns, VECTORS))
            columns[:, :count] = x[start : start + count].T

            def product(first: int, columns: np.ndarray = columns) -> np.ndarray:
                tiles = self._tiles(weight, begin + first, min(step, num_tiles - first))
                return packed_product(*tiles, weight.storage, weight.group_size or 0, columns)

            rows = np.concatenate(list(self._pool.map(product, range(0, num_tiles, step))))
            y[start : start + count] = rows[:, :count].T
        for tile in {0, num_tiles - 1} if compares else ():
            self._compare_with_numpy(weight, begin + tile, x, y[:, tile * ROW_TILE : (tile + 1) * ROW_TILE])
        return y[:, : weight.num_rows // part[1]]

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
