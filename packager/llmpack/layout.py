"""The order in which a kernel reads a projection: row tiles (artifacts/FORMAT.md 4.3).

In: a matrix [num_rows, in_features] of values or of quantized integers. Out: the same numbers, ROW_TILE rows side by side.
Pure reordering: nothing is rounded, and `untile_*` gives the matrix back.
"""

from __future__ import annotations

import numpy as np

from llmrun.artifact import ROW_TILE

_NIBBLE_CELL = 8  # input features of one row in one cell of four bytes


def tile_rows(matrix: np.ndarray, cell: int = 1, fill: int = 0) -> np.ndarray:
    """Put ROW_TILE rows side by side.

    Args:
        matrix: [num_rows, num_columns].
        cell: neighbouring columns of a row that stay together; divides num_columns.
        fill: value of the rows that complete the last tile.

    Returns:
        [ceil(num_rows / ROW_TILE), num_columns / cell, ROW_TILE, cell]; without the last axis when cell is 1.

    >>> tile_rows(np.array([[1, 2], [3, 4]]))[0, :, :3].tolist()
    [[1, 3, 0], [2, 4, 0]]
    """
    num_rows, num_columns = matrix.shape
    if num_columns % cell:
        raise ValueError(f"{num_columns} columns are not a multiple of cell {cell}")
    if missing := -num_rows % ROW_TILE:
        matrix = np.concatenate([matrix, np.full((missing, num_columns), fill, matrix.dtype)])
    tiles = matrix.reshape(-1, ROW_TILE, num_columns // cell, cell).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(tiles[..., 0] if cell == 1 else tiles)


def untile_rows(tiles: np.ndarray, num_rows: int) -> np.ndarray:
    """Undo `tile_rows`: [num_tiles, num_cells, ROW_TILE(, cell)] -> [num_rows, num_cells * cell]."""
    if tiles.ndim == 3:
        tiles = tiles[..., None]
    num_tiles, num_cells, _, cell = tiles.shape
    return tiles.transpose(0, 2, 1, 3).reshape(num_tiles * ROW_TILE, num_cells * cell)[:num_rows]


def tile_nibbles(quantized: np.ndarray) -> np.ndarray:
    """Tile 4-bit integers: in each cell, byte j holds feature j in its low half and feature j + 4 in its high half.

    Args:
        quantized: [num_rows, in_features], uint8 in 0..15; in_features is a multiple of 8. Missing rows become 8 (zero).

    Returns:
        [ceil(num_rows / ROW_TILE), in_features / 8, ROW_TILE, 4], uint8.

    >>> [hex(b) for b in tile_nibbles(np.arange(8, dtype=np.uint8)[None])[0, 0, 0]]
    ['0x40', '0x51', '0x62', '0x73']
    """
    num_rows, in_features = quantized.shape
    cells = quantized.reshape(num_rows, in_features // _NIBBLE_CELL, 2, _NIBBLE_CELL // 2)
    packed = cells[:, :, 0] | cells[:, :, 1] << 4
    return tile_rows(packed.reshape(num_rows, in_features // 2), _NIBBLE_CELL // 2, fill=0x88)


def untile_nibbles(tiles: np.ndarray, num_rows: int) -> np.ndarray:
    """Undo `tile_nibbles`: -> [num_rows, in_features], uint8 in 0..15."""
    packed = untile_rows(tiles, num_rows).reshape(num_rows, -1, 1, _NIBBLE_CELL // 2)
    return np.concatenate([packed & 15, packed >> 4], axis=2).reshape(num_rows, -1)
