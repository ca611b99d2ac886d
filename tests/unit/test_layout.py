"""The row-tile order is a pure reordering, and the one that FORMAT.md 4.3 draws."""

import doctest

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llmpack import layout


def test_worked_examples_hold():
    assert doctest.testmod(layout).failed == 0


@given(st.integers(1, 40), st.integers(1, 5), st.sampled_from([1, 4]))
def test_tiles_give_the_matrix_back(num_rows, cells, cell):
    matrix = np.arange(num_rows * cells * cell).reshape(num_rows, -1)
    assert np.array_equal(layout.untile_rows(layout.tile_rows(matrix, cell), num_rows), matrix)


@given(st.integers(1, 40), st.integers(1, 5))
def test_nibbles_give_the_matrix_back(num_rows, cells):
    matrix = np.random.default_rng(num_rows).integers(0, 16, (num_rows, cells * 8), np.uint8)
    assert np.array_equal(layout.untile_nibbles(layout.tile_nibbles(matrix), num_rows), matrix)


@given(st.integers(1, 40), st.integers(1, 5))
def test_six_bit_tiles_give_the_matrix_back(num_rows, cells):
    matrix = np.random.default_rng(num_rows).integers(0, 64, (num_rows, cells * 16), np.uint8)
    assert np.array_equal(layout.untile_six_bits(layout.tile_six_bits(matrix), num_rows), matrix)


def test_three_bytes_hold_four_features_six_bits_each():
    quantized = np.random.default_rng(0).integers(0, 64, (20, 32), np.uint8)
    tiles = layout.tile_six_bits(quantized)
    for row, k, j in [(0, 0, 0), (3, 16, 1), (15, 16, 3), (17, 0, 2)]:
        parts = tiles[row // 16, k // 16, :, row % 16, j]
        assert [p & 63 for p in parts] == [quantized[row, k + 4 * p + j] for p in range(3)]
        assert sum(int(p >> 6) << 2 * i for i, p in enumerate(parts)) == quantized[row, k + 12 + j]


def test_byte_j_holds_features_j_and_j_plus_4_of_its_row():
    quantized = np.random.default_rng(0).integers(0, 16, (20, 32), np.uint8)
    tiles = layout.tile_nibbles(quantized)
    for row, k in [(0, 0), (3, 13), (15, 31), (17, 6)]:
        byte = tiles[row // 16, k // 8, row % 16, k % 4]
        assert (byte >> 4 if k % 8 >= 4 else byte & 15) == quantized[row, k]


def test_missing_rows_of_the_last_tile_are_zero_weights():
    tiles = layout.tile_nibbles(np.zeros((17, 8), np.uint8))
    assert (tiles[1, :, 1:] == 0x88).all()
    quantized = layout.untile_six_bits(layout.tile_six_bits(np.zeros((17, 16), np.uint8)), 32)
    assert (quantized[17:] == 32).all()
    assert (layout.tile_rows(np.ones((17, 4), np.uint8), 4, 128)[1, :, 1:] == 128).all()
