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


def test_byte_j_holds_features_j_and_j_plus_4_of_its_row():
    quantized = np.random.default_rng(0).integers(0, 16, (20, 32), np.uint8)
    tiles = layout.tile_nibbles(quantized)
    for row, k in [(0, 0), (3, 13), (15, 31), (17, 6)]:
        byte = tiles[row // 16, k // 8, row % 16, k % 4]
        assert (byte >> 4 if k % 8 >= 4 else byte & 15) == quantized[row, k]


def test_missing_rows_of_the_last_tile_are_zero_weights():
    tiles = layout.tile_nibbles(np.zeros((17, 8), np.uint8))
    assert (tiles[1, :, 1:] == 0x88).all()
    assert (layout.tile_rows(np.ones((17, 4), np.uint8), 4, 128)[1, :, 1:] == 128).all()
