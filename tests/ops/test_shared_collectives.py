"""Collectives through shared memory when something goes wrong, and the protocol under ThreadSanitizer; no MPI needed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sanitized import run_sanitized

HERE = Path(__file__).parent
SCRIPT = HERE / "collectives_processes.py"
OPS = HERE.parents[1] / "custom_ops"
DEADLINE_S = 60


def run_ranks(
    library: Path, folder: Path, size: int, scenario: str, *, last_rank_prefix: tuple[str, ...] = ()
) -> list[dict[str, Any] | None]:
    """What each rank printed; None for one that was killed."""
    processes = [
        subprocess.Popen(
            [
                *(last_rank_prefix if rank == size - 1 else ()),
                *(sys.executable, str(SCRIPT), str(library), str(folder), str(rank), str(size), scenario),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    results: list[dict[str, Any] | None] = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=DEADLINE_S)
            if process.returncode == -signal.SIGKILL:
                results.append(None)
                continue
            assert process.returncode == 0, err
            results.append(json.loads(out))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return results


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("scenario", ["killed-before", "killed-meanwhile"])
def test_a_killed_rank_is_named_by_all_others(library_path: Path, tmp_path: Path, scenario: str, size: int) -> None:
    *others, last = run_ranks(library_path, tmp_path, size, scenario)
    assert last is None
    for rank, result in enumerate(others):
        assert result is not None
        assert result["codes"] == [-1, -1]
        expected = rf"rank {size - 1} \(pid \d+\) has ended, and rank {rank} waits for it in AllReduce of 1000 elements"
        assert re.search(expected, result["error"]), result["error"]
        assert "an earlier collective failed: " in result["second"]
        assert 2 < result["seconds"] < 5


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    ("scenario", "words", "last_words"),
    [
        ("count", "AllReduce of 4096 elements", "AllReduce of 4097 elements"),
        ("count-large", "AllReduce of 300000 elements", "AllReduce of 500 elements"),
        ("count-zero", "AllReduce of 100 elements", "AllReduce of 0 elements"),
        ("kind", "AllReduce of 100 elements", r"AllGather of 1 x 100 elements to \d+ columns"),
    ],
)
def test_different_calls_are_an_error_on_every_rank_and_write_nothing(
    library_path: Path, tmp_path: Path, scenario: str, words: str, last_words: str, size: int
) -> None:
    for rank, result in enumerate(run_ranks(library_path, tmp_path, size, scenario)):
        assert result is not None
        own, other = (last_words, words) if rank == size - 1 else (words, last_words)
        assert result["code"] == -1
        assert re.search(rf"the ranks disagree: rank {rank} is in {own}, rank \d in {other}", result["error"]), result[
            "error"
        ]
        assert result["untouched"]


def test_a_rank_that_leaves_is_an_error_of_the_others(library_path: Path, tmp_path: Path) -> None:
    first, second, last = run_ranks(library_path, tmp_path, 3, "leaves")
    assert last == {"transport": "none"}
    for result in (first, second):
        assert result is not None
        assert result["code"] == -1
        assert re.search(r"rank 2 \(pid \d+\) has left the communicator", result["error"])


def test_waiting_for_a_slow_rank_costs_no_core(library_path: Path, tmp_path: Path) -> None:
    for result in run_ranks(library_path, tmp_path, 2, "slow"):
        assert result is not None
        assert result["cpu_s"] < 0.1


def test_the_memory_has_no_name(library_path: Path, tmp_path: Path) -> None:
    """Whenever a rank is killed, nothing is left: there is no file, neither in /dev/shm nor elsewhere."""
    for result in run_ranks(library_path, tmp_path, 2, "anonymous"):
        assert result is not None
        assert "/memfd:llmpack (deleted)" in result["maps"]
        assert not [path for path in result["maps"] if path.startswith("/dev/shm")]
        assert not [link for link in result["links"] if "memfd" in link]  # closed: the mapping alone holds it


def test_memory_is_shared_on_one_host(library_path: Path, tmp_path: Path) -> None:
    expected = {"transport": "shared-memory", "shared": 0, "why_not": ""}
    assert run_ranks(library_path, tmp_path, 3, "plain") == [expected] * 3


def test_if_one_rank_cannot_share_all_use_mpi_and_say_why(library_path: Path, tmp_path: Path) -> None:
    if "libasan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip(
            "UBSan asks of an object's memory through a pipe, and calls it invalid where no descriptors are left"
        )
    results = run_ranks(library_path, tmp_path, 3, "few-files")
    assert results[0] is not None
    assert re.search(r"rank 2: pidfd_open of \d+: Too many open files", results[0]["why_not"])
    assert results[0]["transport"] == "mpi"
    assert results[0]["shared"] == 1
    assert results[1:] == results[:1] * 2


def test_ranks_that_cannot_see_each_other_use_mpi(library_path: Path, tmp_path: Path) -> None:
    prefix = ("unshare", "--pid", "--fork", "--mount-proc")
    if shutil.which("unshare") is None or subprocess.run([*prefix, "true"], check=False).returncode != 0:
        pytest.skip("this user may not make a pid namespace")
    results = run_ranks(library_path, tmp_path, 2, "plain", last_rank_prefix=prefix)
    assert results[0] is not None
    assert results[0]["transport"] == "mpi"
    assert "rank 1 does not see the processes of rank 0" in results[0]["why_not"]
    assert results[1:] == results[:1]


def test_ranks_that_leave_keep_nobody_waiting(tmp_path: Path) -> None:
    """Whoever is a step behind still finds their marks, and whoever sleeps is woken; what each says is checked, too."""
    cpu = OPS / "cpu"
    sources = [HERE / "collectives_leave.cpp", cpu / "waiting.cpp", *cpu.glob("collectives*.cpp")]
    assert "all were told" in run_sanitized(tmp_path / "leave", "thread", sources)


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_the_protocol_under_a_sanitizer(tmp_path: Path, sanitizer: str) -> None:
    """Threads as ranks, with random sizes and delays, tiny slots, and step numbers that wrap."""
    cpu = OPS / "cpu"
    sources = [HERE / "collectives_stress.cpp", cpu / "waiting.cpp", *cpu.glob("collectives*.cpp")]
    assert "all agree" in run_sanitized(tmp_path / "stress", sanitizer, sources)
