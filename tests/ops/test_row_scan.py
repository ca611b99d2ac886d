"""What sampling asks of a row of logits, against numpy in float64, on every instruction set."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import numpy as np
import pytest

from llmrun import row_scan
from llmrun.job_options import ISAS

SIZES = {
    "one token": 1,
    "no whole vector": 15,
    "a vector and one": 17,
    "a stretch": 64,
    "one below a run": 255,
    "a run": 256,
    "runs and a tail": 1000,
    "a vocabulary": 32_003,
}


@pytest.fixture(params=SIZES.values(), ids=SIZES)
def row(request: pytest.FixtureRequest) -> np.ndarray:
    """Logits at an address that suits no vector; -inf among them, and many that are equal."""
    memory = np.zeros(request.param + 1, np.float32)
    row = memory[1:]
    row[:] = np.round(np.random.default_rng(request.param).standard_normal(len(row)) * 6, 1)
    row[1::7] = -np.inf
    return row


@pytest.fixture(params=ISAS, autouse=True)
def isa(request: pytest.FixtureRequest, library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each instruction set of this machine: the functions are called in this process, so none of an emulated one."""
    monkeypatch.setattr(row_scan, "_library", lambda: library)
    before = library.llmpack_ops_isa()
    if library.llmpack_ops_set_isa(request.param.encode()) != 0:
        pytest.skip(library.llmpack_ops_last_error().decode())
    yield
    library.llmpack_ops_set_isa(before)


@pytest.mark.parametrize("temperature", [1e-30, 0.7, 100.0])
def test_runs_weigh_what_float64_says(row: np.ndarray, temperature: float) -> None:
    highest = float(row.max())
    with np.errstate(over="ignore"):
        weights = np.exp((row.astype(np.float64) - highest) / temperature)
    expected = np.add.reduceat(weights, np.arange(0, len(row), row_scan.RUN_TOKENS))
    found = row_scan.weigh_runs(row, highest, temperature)
    # e^x within 2 units in the last place of x, which is rounded: |x| 2^-24, for those that weigh anything; 1e-37: to 0.
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-35)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99, 1.0])
def test_what_is_at_least_a_threshold_is_found_in_order(row: np.ndarray, share: float) -> None:
    finite = np.sort(row[np.isfinite(row)])
    threshold = finite[int(share * (len(finite) - 1))]
    found = row_scan.find_at_least(row, threshold)
    np.testing.assert_array_equal(found, np.flatnonzero(row >= threshold))
    above = row_scan.find_at_least(row, np.nextafter(np.float32(row.max()), np.float32(np.inf)))
    assert len(above) == 0
