"""What a rank says when the job ends around it: one line for the user, whoever is first."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmrun import failstop, launcher
from llmrun.commands import common
from llmrun.errors import NumericError, PeerError


class Left(Exception):
    """In place of the end of the process."""


def leave(code: int) -> None:
    raise Left(code)


@pytest.mark.parametrize("error", [PeerError("rank 1 has ended"), NumericError("the model computed NaN")])
@pytest.mark.parametrize("is_told", [False, True])
def test_a_rank_that_was_left_is_silent_once_another_has_said_why(
    error: Exception, is_told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(failstop, "leave", leave)
    monkeypatch.setenv(launcher.LAUNCH_VARIABLE, str(tmp_path))
    if is_told:
        launcher.note_exit_code(1)
    with pytest.raises(Left):
        common._fail(error)
    is_silent = is_told and isinstance(error, PeerError)
    assert (str(error) in capfd.readouterr().err) == (not is_silent)


LEAVES = """
import sys
from llmrun import failstop
from llmrun.peers import Peer, process_started
pid, later = map(int, sys.argv[1:])
failstop.take_along(lambda: [Peer(1, "here", pid, process_started(pid) + later)])
failstop.leave(6)
"""


@pytest.fixture
def other_rank() -> Iterator[int]:
    """The pid of a stopped process; at the end it must have been killed."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as sleeper:
        sleeper.send_signal(signal.SIGSTOP)
        yield sleeper.pid
        try:
            assert sleeper.wait(10) == -signal.SIGKILL
        finally:
            sleeper.kill()


def test_another_rank_is_killed_when_the_launcher_does_not(other_rank: int) -> None:
    """No launcher at all, here: what the rank that leaves has left behind does it."""
    assert subprocess.run([sys.executable, "-c", LEAVES, str(other_rank), "0"], check=False).returncode == 6


def test_a_process_that_has_a_ranks_pid_by_now_is_left_alone() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as somebody:
        try:
            assert subprocess.run([sys.executable, "-c", LEAVES, str(somebody.pid), "1"], check=False).returncode == 6
            with pytest.raises(subprocess.TimeoutExpired):
                somebody.wait(3.5)
        finally:
            somebody.kill()


@pytest.mark.parametrize(
    ("trap", "number"),
    [("", signal.SIGTERM), pytest.param("trap '' TERM; ", signal.SIGKILL, marks=pytest.mark.extended)],
)
def test_a_launcher_that_does_not_see_the_end_is_ended(trap: str, number: signal.Signals, other_rank: int) -> None:
    """A shell stands for it: the rank is its child, and it sleeps on when that has left."""
    script = f'{trap}PMI_RANK=0 PMI_SIZE=2 "$@"; echo $?; while :; do sleep 1; done'
    command = ["/bin/sh", "-c", script, "sh", sys.executable, "-c", LEAVES, str(other_rank), "0"]
    started = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as shell:
        try:
            assert shell.stdout is not None
            assert shell.stdout.readline() == b"6\n"
            assert shell.wait(30) == -number
        finally:
            shell.kill()
    assert time.monotonic() - started > 10  # it may take its time


@pytest.mark.slow
def test_a_program_between_launcher_and_rank_goes_on(other_rank: int) -> None:
    """It has the rank's environment too, and cleans up, say, for longer than the launcher has."""
    command = ["/bin/sh", "-c", '"$@"; exec sleep 60', "sh", sys.executable, "-c", LEAVES, str(other_rank), "0"]
    with subprocess.Popen(command, env={**os.environ, "PMI_RANK": "0", "PMI_SIZE": "2"}) as wrapper:
        try:
            with pytest.raises(subprocess.TimeoutExpired):
                wrapper.wait(14)
        finally:
            wrapper.kill()


def test_a_rank_of_another_mpi_is_no_rank_of_this_job() -> None:
    """A rank that is refused takes along those that its own launcher started, and nobody else's."""
    program = "from llmrun.peers import siblings; print([peer.pid for peer in siblings()])"
    script = """
        OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_RANK=0 sleep 30 & other=$!
        PMI_SIZE=2 PMI_RANK=0 sleep 30 & own=$!
        PMI_SIZE=2 PMI_RANK=1 "$@"
        echo "[$own]"; kill $own $other"""
    outcome = subprocess.run(
        ["/bin/sh", "-c", script, "sh", sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=False
    )
    found, expected = outcome.stdout.splitlines()
    assert found == expected


def test_a_rank_of_another_job_is_no_rank_of_this_one() -> None:
    """Of two jobs on a host, as large as each other: each has a launcher of its own, which a shell stands for.

    Between the launcher and the rank is another process of that rank, as where a server's rank 0 outlives its job.
    """
    program = """
from llmrun.peers import process_started, siblings
print([(peer.rank, peer.pid) for peer in siblings() if peer.started == process_started(peer.pid)])
"""
    rank_0 = "PMI_SIZE=2 PMI_RANK=0 sleep 30 & rank_0=$!;"
    with subprocess.Popen(["/bin/sh", "-c", f"{rank_0} read line; kill $rank_0"], stdin=subprocess.PIPE) as other:
        script = f'{rank_0} PMI_SIZE=2 PMI_RANK=1 "$@"; echo "[(0, $rank_0)]"; kill $rank_0'
        rank_1 = ["/bin/sh", "-c", '"$@"; exit', "sh", sys.executable, "-c", program]
        command = ["/bin/sh", "-c", script, "sh", *rank_1]
        outcome = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        other.communicate(b"\n")
    found, expected = outcome.stdout.splitlines()
    assert found == expected
