"""Decoding and plain reading of the same files in turn: the program behind `make bench`'s share of the bandwidth."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks.peers.environment import HERE, compile_c
from benchmarks.peers.share import num_meetings, read_shares


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_c("machine.c", tmp_path_factory.mktemp("machine") / "machine")


def read(machine: Path, *files: Path, threads: int = 2) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [machine, str(threads), "on-demand", *files], input="\n\nloads\n5\n", capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("count", [1, 2])
def test_every_line_gives_a_rate(machine: Path, tmp_path: Path, count: int) -> None:
    files = [tmp_path / str(i) for i in range(count)]
    for file in files:
        np.zeros(5_000_001, np.uint8).tofile(file)
    done = read(machine, *files)
    assert done.returncode == 0
    rates = [float(line) for line in done.stdout.splitlines()]
    assert len(rates) == 4
    assert min(rates) > 1e7


def test_files_that_are_not_there_or_not_one_for_each_thread(machine: Path, tmp_path: Path) -> None:
    assert read(machine, tmp_path / "absent").returncode == 1
    assert read(machine, *[Path(__file__)] * 3).returncode == 1


def test_weights_read_are_a_share_of_the_bandwidth_around_each_turn() -> None:
    assert read_shares([50, 20], 700_000_000, [30e9, 50e9, 20e9]) == pytest.approx([0.875, 0.4])


def test_the_share_is_printed(machine: Path, packed_tiny: Callable[..., Path]) -> None:
    artifact = packed_tiny(1, "f32")
    command = [sys.executable, HERE / "share.py", artifact, "1", machine, "1", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    found = json.loads(done.stdout)
    shares = {"share", "share_loads", "share_meeting"}
    assert set(found) == shares | {"read_bytes_per_s", "loads_bytes_per_s", "meeting_bytes_per_s"}
    assert min(found.values()) > 0


def test_ranks_meet_twice_a_layer_and_for_the_logits() -> None:
    assert [num_meetings(22, 2), num_meetings(22, 1)] == [45, 1]
