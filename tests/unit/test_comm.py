"""One rank without MPI, what a status holds, and which cores a rank gets; several ranks are tested in tests/mpi."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llmrun import comm
from llmrun.cores import CoreShare, Place, cpu_quota, places_of, share_cores
from llmrun.errors import InternalError, ResourceError
from llmrun.job import Job
from llmrun.job_options import ISAS, JobOptions
from llmrun.launcher import launcher_family
from llmrun.manifest import KvCacheSpec
from llmrun.memory import available_bytes, expect_one_sequence, fit_blocks
from llmrun.watchdog import Watchdog

pytestmark = pytest.mark.skipif(launcher_family() is not None, reason="pytest itself runs under mpirun")


def test_one_rank_needs_no_mpi() -> None:
    program = "import sys; from llmrun.comm import connect; assert connect().size == 1; print('mpi4py' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "False\n"
    )


def test_one_rank_agrees_with_itself() -> None:
    rank = comm.connect()
    assert rank.agree({"a": 1}) == [{"a": 1}]
    rank.send(np.zeros(3, np.int32).data)
    with pytest.raises(InternalError):
        rank.receive()
    assert [peer.pid for peer in rank.peers] == [os.getpid()]


@pytest.mark.parametrize(
    ("blocks", "free", "flags", "words"),
    [
        (16384, 16384, 0, None),  # a container's 64 MB
        (16384, 300, 0, None),
        (0, 0, 0, None),  # a tmpfs without a limit
        (16384, 256, 0, "1024 of 65536 KiB are free. MPICH needs more than 2 MiB there for 2 ranks"),
        (512, 512, 0, "2048 of 2048 KiB are free"),
        (16384, 16384, os.ST_RDONLY, "cannot be written to"),
    ],
)
def test_shared_memory_that_mpich_would_die_in_is_refused(
    blocks: int, free: int, flags: int, words: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = SimpleNamespace(f_frsize=4096, f_blocks=blocks, f_bavail=free, f_flag=flags)
    monkeypatch.setattr(os, "statvfs", lambda _: found)
    one_host = {"PMI_SIZE": "2", "MPI_LOCALNRANKS": "2"}
    if words is None:
        comm._expect_shared_memory(one_host, str(tmp_path))
    else:
        with pytest.raises(ResourceError, match=words):
            comm._expect_shared_memory(one_host, str(tmp_path))
    comm._expect_shared_memory({"PMI_SIZE": "2", "MPI_LOCALNRANKS": "1"}, str(tmp_path))


def test_no_shared_memory_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"No such file or directory. MPICH needs"):
        comm._expect_shared_memory({"PMI_SIZE": "2", "MPI_LOCALNRANKS": "2"}, str(tmp_path / "none"))


class Echo:
    """MPI's communicator of two ranks, of which the other one always says the same."""

    def Iallgather(self, sent: np.ndarray, received: np.ndarray) -> SimpleNamespace:
        received[:] = sent
        return SimpleNamespace(Test=lambda: True)


def job_of_two() -> Job:
    job, ranks = object.__new__(Job), object.__new__(comm.MpiRanks)
    ranks.rank, ranks.size, ranks._comm = 0, 2, Echo()  # type: ignore[assignment]
    job.rank, job.size, job.comm = 0, 2, ranks
    job.watchdog = Watchdog(0, (), 10.0)
    job._ops = SimpleNamespace(isas=list(ISAS))  # type: ignore[assignment]
    job.options = JobOptions(isa=ISAS[0])
    return job


@pytest.mark.parametrize("cores", [range(8192), range(1, 8192, 2), [8191], [0]], ids=["all", "odd", "last", "first"])
def test_the_affinity_of_the_largest_host_fits_a_status(monkeypatch: pytest.MonkeyPatch, cores: list[int]) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(cores))
    job = job_of_two()
    job._shake_hands({"manifest": "0" * 64, "options": "x" * 1000})
    assert job._affinities == [list(cores)] * 2


@pytest.mark.parametrize("character", ["a", "\n", "\u00e9", "\uffff", "\U0001f600", "\udc80"], ids=ascii)
def test_however_long_an_error_is_all_ranks_hear_of_it(character: str) -> None:
    def fail() -> None:
        raise ResourceError("refused: " + character * 10_000)

    with pytest.raises(ResourceError, match=f"refused: {character}{{200}}"):
        job_of_two().stage("failing", fail)


def test_waiting_does_not_use_the_core(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    now = [0.0]

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(comm.time, "sleep", sleep)
    monkeypatch.setattr(comm.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(comm.os, "sched_yield", lambda: now.__setitem__(0, now[0] + 1e-4))
    comm._poll(lambda: now[0] > 10)
    assert max(slept) == comm.MAX_SLEEP_S
    assert len(slept) < 1.1 * 10 / comm.MAX_SLEEP_S


@pytest.mark.parametrize(
    ("affinities", "threads", "shares"),
    [
        ([range(4)] * 2, None, [(2, (0, 1)), (2, (2, 3))]),
        ([range(5)] * 2, None, [(2, (0, 1)), (2, (2, 3))]),  # the odd core stays free
        ([range(4)] * 2, 1, [(1, (0,)), (1, (2,))]),
        ([range(4)] * 2, 3, [(3, ()), (3, ())]),  # more threads than cores: not pinned
        ([range(1)] * 2, None, [(1, ()), (1, ())]),
        ([[0, 1], [2, 3]], None, [(2, (0, 1)), (2, (2, 3))]),  # the launcher has divided them
        ([[0, 1], [1, 2]], None, [(1, ()), (1, ())]),  # an overlap that is not ours to resolve
    ],
)
def test_ranks_never_share_a_pinned_core(
    affinities: list[list[int]], threads: int | None, shares: list[tuple[int, tuple[int, ...]]]
) -> None:
    got = [share_cores(affinities, rank, threads) for rank in range(len(affinities))]
    assert got == [CoreShare(*share) for share in shares]
    pinned = [core for share in got for core in share.cores]
    assert len(set(pinned)) == len(pinned)


def topology(root: Path, siblings: list[str], packages: list[int]) -> dict[int, Place]:
    for core, (threads, package) in enumerate(zip(siblings, packages, strict=True)):
        folder = root / f"cpu{core}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(threads + "\n")
        (folder / "physical_package_id").write_text(f"{package}\n")
    return places_of(range(len(siblings)), root)


HALVES = ["0,4", "1,5", "2,6", "3,7"] * 2  # hyperthreads as most machines number them
PAIRS = ["0-1", "0-1", "2-3", "2-3", "4-5", "4-5", "6-7", "6-7"]  # and as some virtual machines do
ONE, SOCKETS, SOCKET_PAIRS = [0] * 8, [0, 0, 1, 1] * 2, [0, 1] * 4


@pytest.mark.parametrize(
    ("siblings", "packages", "threads", "shares"),
    [
        (HALVES, ONE, 1, [(0,), (2,)]),
        (HALVES, ONE, 2, [(0, 1), (2, 3)]),
        (HALVES, ONE, 3, [(0, 1, 4), (2, 3, 6)]),
        (HALVES, ONE, None, [(0, 1, 4, 5), (2, 3, 6, 7)]),
        (PAIRS, ONE, 2, [(0, 2), (4, 6)]),
        (HALVES, SOCKETS, None, [(0, 1, 4, 5), (2, 3, 6, 7)]),
        ([str(core) for core in range(8)], SOCKET_PAIRS, None, [(0, 2, 4, 6), (1, 3, 5, 7)]),  # every other one
    ],
)
def test_ranks_get_whole_cores_of_one_package_and_use_hyperthreads_last(
    siblings: list[str], packages: list[int], threads: int | None, shares: list[tuple[int, ...]], tmp_path: Path
) -> None:
    places = topology(tmp_path, siblings, packages)
    assert [share_cores([range(8)] * 2, rank, threads, places=places).cores for rank in (0, 1)] == shares


def test_a_core_of_which_the_system_says_nothing_is_one_of_its_own(tmp_path: Path) -> None:
    topology(tmp_path, ["0,2", "nonsense"], [0, 0])
    assert places_of([0, 1, 2], tmp_path) == {0: Place(0, 0, 0), 1: Place(0, 1, 0), 2: Place(0, 2, 0)}


@pytest.mark.parametrize(
    ("cores", "ranks", "threads", "quota", "share"),
    [
        (2, 2, None, 2.0, (1, (1,))),
        (2, 2, None, 1.0, (1, ())),  # half a core each: nobody may spin
        (2, 2, None, 1.99, (1, ())),
        (16, 2, None, 4.0, (2, (8, 9))),
        (16, 2, None, 5.9, (2, (8, 9))),
        (16, 2, 6, 4.0, (6, ())),  # more threads than the quota pays for: as asked, not pinned
        (16, 2, 1, 4.0, (1, (8,))),
        (4, 2, None, 64.0, (2, (2, 3))),  # more than there is
    ],
)
def test_a_quota_counts_as_cores(
    cores: int, ranks: int, threads: int | None, quota: float, share: tuple[int, tuple[int, ...]]
) -> None:
    assert share_cores([range(cores)] * ranks, ranks - 1, threads, quota) == CoreShare(*share)


def test_ranks_with_cores_of_their_own_share_a_quota() -> None:
    assert share_cores([range(4), range(4, 8)], 1, quota=4.0) == CoreShare(2, (4, 5))


@pytest.mark.parametrize(
    ("group", "limits", "expected"),
    [
        ("0::/a/b\n", {"a/b": "150000 100000"}, 1.5),
        ("0::/a/b\n", {"a/b": "max 100000", "a": "100000 100000"}, 1.0),  # the group around it limits as well
        ("0::/a/b\n", {"a/b": "300000 100000", "a": "100000 50000"}, 2.0),
        ("0::/\n", {"": "50000 100000"}, 0.5),  # a container
        ("0::/../../x\n", {"x": "50000 100000", "": "max 100000"}, 0.5),
        ("0::/a\n", {"a": "max 100000"}, None),
        ("0::/a.slice:cri:0a1b\n", {"a.slice:cri:0a1b": "200000 100000"}, 2.0),  # as containerd names a pod's
        ("0::/a\n", {"a": "nonsense"}, None),
        ("0::/gone\n", {}, None),
    ],
)
def test_the_smallest_quota_of_the_groups_around_us(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: str, limits: dict[str, str], expected: float | None
) -> None:
    make_groups(tmp_path, monkeypatch, group, {name: {"cpu.max": text} for name, text in limits.items()})
    assert cpu_quota() == expected


@pytest.mark.parametrize(
    ("own", "limits", "expected"),
    [
        ("4:cpu,cpuacct:/a/b\n", {"cpu/a/b": "150000"}, 1.5),
        ("4:cpu,cpuacct:/a/b\n", {"cpu/a/b": "-1", "cpu/a": "50000"}, 0.5),
        ("4:cpu:/docker/0a1b\n", {"cpu": "200000"}, 2.0),  # a container: its group is mounted as the root
        ("4:cpu:/\n", {"cpu": "-1"}, None),
        ("4:cpu:/a\n0::/\n", {"cpu/a": "50000"}, 0.5),  # both versions
        ("4:cpuset:/a\n3:memory:/a\n", {"cpu/a": "50000", "cpuset/a": "50000", "a": "50000"}, None),
    ],
)
def test_the_smallest_quota_of_version_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, limits: dict[str, str], expected: float | None
) -> None:
    groups = {name: {"cpu.cfs_quota_us": text, "cpu.cfs_period_us": "100000"} for name, text in limits.items()}
    make_groups(tmp_path, monkeypatch, own, groups)
    assert cpu_quota() == expected


def make_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, groups: dict[str, dict[str, str]]) -> None:
    """Have control groups with these files."""
    root = tmp_path / "cgroup"
    (tmp_path / "own").write_text(own)
    for name, files in groups.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (root / name / file).write_text(text + "\n")
    monkeypatch.setattr("llmrun.control_groups.ROOT", root)
    monkeypatch.setattr("llmrun.control_groups.OWN", tmp_path / "own")


def test_no_control_groups_no_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmrun.control_groups.OWN", tmp_path / "missing")
    assert cpu_quota() is None
    assert available_bytes() > 1 << 20


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"a/b": "1000"}, 1000 - 300 + 120),
        ({"a/b": "max", "a": "900"}, 900 - 300 + 120),  # a service's MemoryMax, a batch job's step
        ({"a/b": "2000", "a": "900", "": "1500"}, 900 - 300 + 120),
        ({"a/b": "100"}, 0),
    ],
)
def test_the_least_memory_that_the_groups_around_us_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limits: dict[str, str], expected: int
) -> None:
    used = {"memory.current": "300", "memory.stat": "anon 150\nactive_file 100\ninactive_file 20\nshmem 30"}
    groups = {name: {"memory.max": limit, **used} for name, limit in limits.items()}
    make_groups(tmp_path, monkeypatch, "0::/a/b\n", groups)
    assert available_bytes() == expected


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"memory/a/b": "1000"}, 1000 - 300 + 120),
        ({"memory/a/b": "9223372036854771712", "memory/a": "900"}, 900 - 300 + 120),
        ({"memory": "900", "a/b": "100", "cpu/a/b": "100"}, 900 - 300 + 120),  # a container's, as its root
    ],
)
def test_the_least_memory_that_groups_of_version_1_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limits: dict[str, str], expected: int
) -> None:
    statistics = "active_file 1\ninactive_file 2\ntotal_active_file 100\ntotal_inactive_file 20"
    used = {"memory.usage_in_bytes": "300", "memory.stat": statistics}
    groups = {name: {"memory.limit_in_bytes": limit, **used} for name, limit in limits.items()}
    make_groups(tmp_path, monkeypatch, "9:name=systemd:/a/b\n4:memory:/a/b\n1:cpu:/a/b\n", groups)
    assert available_bytes() == expected


def test_a_cache_takes_nine_tenths_of_what_is_free_and_no_more_than_it_wants() -> None:
    spec = KvCacheSpec("float16", 16, 2, 4, 64)
    manifest: Any = SimpleNamespace(kv_cache=spec, ranks=[SimpleNamespace(weight_bytes=5 << 20)])
    block = 16 * spec.bytes_per_token

    def fit(free: int, wanted: int, *, is_exact: bool = False) -> int:
        return fit_blocks(
            manifest, 0, free * block // 9 + 2, wanted, 100, is_exact=is_exact
        )  # a sequence takes 7 blocks

    assert [fit(100, wanted) for wanted in (7, 10, 11)] == [7, 10, 10]
    assert (fit(70, 10), fit(80, 8, is_exact=True)) == (7, 8)
    for free, is_exact, words in (
        (69, False, "the KV cache of 100 positions needs"),
        (79, True, "--kv-cache-mb asks for"),
    ):
        with pytest.raises(ResourceError, match=words):
            fit(free, 8, is_exact=is_exact)


def test_the_smallest_cache_that_is_advised_is_enough() -> None:
    spec = KvCacheSpec("float16", 16, 2, 4, 64)
    block = 16 * spec.bytes_per_token
    for positions in (1, 16, 17, 1000, 4096):
        least = -(-positions // 16)
        expect_one_sequence(spec, least, positions)
        with pytest.raises(ResourceError) as caught:
            expect_one_sequence(spec, least - 1, positions)
        advised = int(re.findall(r"Give (\d+) MiB", str(caught.value))[0])
        assert (advised << 20) // block >= least > ((advised - 1) << 20) // block
