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
    if missing := -num_rows % ROW_TILE:
        matrix = np.concatenate([matrix, np.full((missing, num_columns), fill, matrix.dtype)])
    tiles = matrix.reshape(len(matrix) // ROW_TILE, ROW_TILE, num_columns // cell, cell).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(tiles[..., 0] if cell == 1 else tiles)


def untile_rows(tiles: np.ndarray, num_rows: int) -> np.ndarray:
    """Undo `tile_rows`: [num_tiles, num_cells, ROW_TILE(, cell)] -> [num_rows, num_cells * cell]."""
    if tiles.ndim == 3:
        tiles = tiles[..., None]
    num_tiles, num_cells, _, cell = tiles.shape
    return tiles.transpose(0, 2, 1, 3).reshape(num_tiles * ROW_TILE, num_cells * cell)[:num_rows]


def tile_nibbles(quantized: np.ndarray, zero: int = 8) -> np.ndarray:
    """Tile 4-bit integers: in each cell, byte j holds feature j in its low half and feature j + 4 in its high half.

    Args:
        quantized: [num_rows, in_features], uint8 in 0..15; in_features is a multiple of 8.
        zero: what missing rows become.

    Returns:
        [ceil(num_rows / ROW_TILE), in_features / 8, ROW_TILE, 4], uint8.

    >>> [hex(b) for b in tile_nibbles(np.arange(8, dtype=np.uint8)[None])[0, 0, 0]]
    ['0x40', '0x51', '0x62', '0x73']
    """
    num_rows, in_features = quantized.shape
    cells = quantized.reshape(num_rows, in_features // _NIBBLE_CELL, 2, _NIBBLE_CELL // 2)
    packed = cells[:, :, 0] | cells[:, :, 1] << 4
    return tile_rows(packed.reshape(num_rows, in_features // 2), _NIBBLE_CELL // 2, fill=zero | zero << 4)


def untile_nibbles(tiles: np.ndarray, num_rows: int) -> np.ndarray:
    """Undo `tile_nibbles`: -> [num_rows, in_features], uint8 in 0..15."""
    packed = untile_rows(tiles, num_rows).reshape(num_rows, -1, 1, _NIBBLE_CELL // 2)
    return np.concatenate([packed & 15, packed >> 4], axis=2).reshape(num_rows, -1)


def tile_six_bits(quantized: np.ndarray) -> np.ndarray:
    """Tile 6-bit integers, sixteen features of a row in three cells of four bytes.

    Byte j of cell p holds feature 4 p + j in its low six bits; its high two bits are bits 2 p and 2 p + 1 of feature 12 + j.

    Args:
        quantized: [num_rows, in_features], uint8 in 0..63; in_features is a multiple of 16. Missing rows become 32 (zero).

    Returns:
        [ceil(num_rows / ROW_TILE), in_features / 16, 3, ROW_TILE, 4], uint8.

    >>> row = np.array([[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 0b010000, 0b001000, 0b000100, 0b111111]], np.uint8)
    >>> [hex(b) for b in tile_six_bits(row)[0, 0, :, 0].ravel()]
    ['0x0', '0x1', '0x2', '0xc3', '0x4', '0x85', '0x46', '0xc7', '0x48', '0x9', '0xa', '0xcb']
    """
    rows = tile_rows(quantized, 1, fill=32).transpose(0, 2, 1)  # [tiles, ROW_TILE, in_features]
    quarters = rows.reshape(*rows.shape[:2], -1, 4, 4)
    split = [quarters[..., p, :] | (quarters[..., 3, :] >> 2 * p & 3) << 6 for p in range(3)]
    return np.ascontiguousarray(np.stack(split, axis=3).transpose(0, 2, 3, 1, 4))


def untile_six_bits(tiles: np.ndarray, num_rows: int) -> np.ndarray:
    """Undo `tile_six_bits`: -> [num_rows, in_features], uint8 in 0..63."""
    rows = tiles.transpose(0, 3, 1, 2, 4)  # [tiles, ROW_TILE, in_features / 16, 3, 4]
    fourth = sum(rows[..., p, :] >> 6 << 2 * p for p in range(3))
    quarters = np.concatenate([rows & 63, np.asarray(fourth, np.uint8)[..., None, :]], axis=3)
    return quarters.reshape(len(tiles) * ROW_TILE, -1)[:num_rows]
