"""Several hosts: namespaces of one machine that only TCP joins. Each holds no more of the artifact than its ranks need."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from namespaces import Hosts, why_not

from llmrun import launcher

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.skipif(launcher.library_family() is None, reason="no MPI library in this environment"),
]
Packed = Callable[..., Path]
ARGUMENTS = ("-p", "The king", "-n", "16", "--temperature", "0")


@pytest.fixture(scope="module", autouse=True)
def _possible() -> None:
    if (reason := why_not()) is not None:
        pytest.skip(f"no hosts can be made here: {reason}")


def own_folders(artifact: Path, ranks: list[int], target: Path) -> Path:
    """Copy what one host needs: everything but the other ranks' folders (FORMAT 1.3)."""
    others = [path.name for path in artifact.glob("rank-*") if int(path.name.removeprefix("rank-")) not in ranks]
    shutil.copytree(artifact, target, ignore=lambda _, names: [name for name in names if name in others])
    return target


@pytest.fixture(params=[(1, 1), (2, 2)], ids=["1+1", "2+2"])
def cluster(request: pytest.FixtureRequest, packed_demo: Packed, tmp_path: Path) -> Iterator[tuple[Hosts, Path, Path]]:
    """Two hosts, the artifact's path on both, and the whole artifact, which neither has."""
    shares: tuple[int, ...] = request.param
    whole = packed_demo(sum(shares), "q4")
    place = tmp_path / "artifact"
    place.mkdir()
    mounts, first = [], 0
    for host, count in enumerate(shares):
        mounts.append({own_folders(whole, list(range(first, first + count)), tmp_path / f"host{host}"): place})
        first += count
    with Hosts(len(shares), tmp_path, mounts) as hosts:
        yield hosts, place, whole


def mpirun(hosts: Hosts, size: int, *arguments: str) -> list[str]:
    """Return the command line, on the first host, that starts ranks on all of them."""
    path, family = launcher.find_mpirun()
    per_host = size // len(hosts.names)
    where = ",".join(f"{name}:{per_host}" for name in hosts.names)
    if family == launcher.MPICH:
        options = ["-launcher", "ssh", "-launcher-exec", str(hosts.agent), "-hosts", where, "-n", str(size)]
    else:
        options = [
            "--host",
            where,
            "-n",
            str(size),
            "--prtemca",
            "plm_ssh_agent",
            str(hosts.agent),
            "--bind-to",
            "none",
        ]
        options += ["--prefix", str(Path(path).parent.parent), "--allow-run-as-root"]
    program = [sys.executable, "-m", "llmrun", *arguments]
    return hosts.command(0, path, *options, *program)


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, stdin=subprocess.DEVNULL)


def test_hosts_give_the_text_of_one(cluster: tuple[Hosts, Path, Path]) -> None:
    hosts, place, whole = cluster
    size = len(list(whole.glob("rank-*")))
    alone = run([sys.executable, "-m", "llmrun", str(whole), *ARGUMENTS])
    assert alone.returncode == 0
    together = run(mpirun(hosts, size, str(place), *ARGUMENTS))
    assert (together.returncode, together.stdout) == (0, alone.stdout), together.stderr
    seen = run(hosts.command(1, "sh", "-c", f"hostname; ls {place}; ls /proc/{os.getpid()}/status"))
    assert "host1" in seen.stdout
    assert "rank-0" not in seen.stdout  # it really was not there
    assert "status" not in seen.stdout  # and neither were our processes


def test_a_host_that_lacks_its_rank_is_named(cluster: tuple[Hosts, Path, Path]) -> None:
    hosts, place, whole = cluster
    size = len(list(whole.glob("rank-*")))
    run(hosts.command(1, "rm", "-r", str(place / f"rank-{size - 1}")))
    done = run(mpirun(hosts, size, str(place), *ARGUMENTS))
    assert done.returncode != 0
    assert done.stdout in ("", "\n") or "The" not in done.stdout
    assert f"rank-{size - 1}" in done.stderr
    assert "error[E3" in done.stderr


def test_a_rank_lost_on_another_host_ends_the_job(cluster: tuple[Hosts, Path, Path]) -> None:
    hosts, place, whole = cluster
    size = len(list(whole.glob("rank-*")))
    command = mpirun(hosts, size, str(place), "-p", "The king", "-n", "400", "--ignore-eos")
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
    try:
        assert job.stdout is not None
        assert os.read(job.stdout.fileno(), 1)  # it writes
        run(hosts.command(1, "sh", "-c", "for p in /proc/[0-9]*; do grep -qa 'llmrun' $p/cmdline &&"
                          " grep -qaE 'PMI_RANK=|OMPI_COMM_WORLD_RANK=' $p/environ && kill -9 ${p#/proc/}; done"))  # fmt: skip
        killed = time.monotonic()
        job.communicate(timeout=60)
        assert job.returncode != 0
        assert time.monotonic() - killed < 40
    finally:
        job.send_signal(signal.SIGKILL)
        job.wait()
