"""One rank without MPI, and which cores a rank gets; several ranks are tested in tests/mpi."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from llmrun import comm
from llmrun.cores import CoreShare, share_cores
from llmrun.errors import InternalError
from llmrun.launcher import launcher_family

pytestmark = pytest.mark.skipif(launcher_family() is not None, reason="pytest itself runs under mpirun")


def test_one_rank_needs_no_mpi() -> None:
    program = "import sys; from llmrun.comm import connect; assert connect().size == 1; print('mpi4py' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "False\n"
    )


def test_one_rank_agrees_with_itself() -> None:
    rank = comm.connect()
    assert rank.agree({"a": 1}) == [{"a": 1}]
    rank.send(np.zeros(3, np.int32))
    with pytest.raises(InternalError):
        rank.receive()
    assert [peer.pid for peer in rank.peers] == [os.getpid()]


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
