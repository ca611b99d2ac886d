"""AllReduce and AllGather between real ranks (FORMAT.md 5.6, 5.7): the same bits on each, summed in rank order."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llmrun import launcher

SCRIPT = Path(__file__).parent / "collectives_ranks.py"


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_get_the_bits_of_the_sum_in_rank_order(library_path: Path, ranks: int) -> None:
    """By shared memory and by MPI alike."""
    run(library_path, ranks, "bits")


@pytest.mark.mpi
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_ten_thousand_collectives_in_sequence(library_path: Path, ranks: int) -> None:
    run(library_path, ranks, "sequence")


def run(library_path: Path, ranks: int, what: str) -> None:
    if launcher.library_family() is None:
        pytest.skip("no MPI library in this environment")
    path, family = launcher.find_mpirun()
    options = launcher.mpirun_options(family, ranks)
    command = [path, *options, sys.executable, str(SCRIPT), str(library_path), what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{ranks} ranks agree" in done.stdout
