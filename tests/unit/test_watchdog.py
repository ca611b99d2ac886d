"""The watchdog's judgement, on a clock that the test turns."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llmrun import peers
from llmrun.errors import UsageError
from llmrun.launcher import LAUNCH_VARIABLE
from llmrun.peers import Peer, host_identity, process_started
from llmrun.watchdog import GONE_S, LOAD_S, Watchdog, deadline_from_environment, process_state

PEERS = (Peer(0, "here", 10, 1), Peer(1, "here", 11, 1), Peer(2, "there", 12, 1))


class Case:
    """A rank's watchdog with a deadline of 10 s."""

    def __init__(self, peers: tuple[Peer, ...] = PEERS, rank: int = 0) -> None:
        self.lost: list[str] = []
        self.states: dict[int, str] = {}
        self.collectives: tuple[int, int] = (0, 0)
        self.asked: set[int] = set()
        self.dog = Watchdog(rank, peers, 10.0, on_lost=self.lost.append, peer_state=self._state)
        self.dog.count_collectives(lambda: self.collectives)

    def _state(self, peer: Peer) -> str:
        self.asked.add(peer.rank)
        return self.states.get(peer.rank, "running")

    def wait(self, seconds: float) -> None:
        for _ in range(int(seconds * 2)):
            self.dog.tick(0.5)


def test_a_phase_without_progress_is_stuck() -> None:
    case = Case()
    with case.dog.phase("decode step"):
        case.wait(9)
        assert not case.lost
        case.wait(3)
    assert "rank 0 is stuck: no progress in decode step" in case.lost[0]


def test_who_waits_for_the_others_after_its_own_part_blames_them() -> None:
    case = Case(PEERS[:2])
    with case.dog.phase("loading", is_done_here=True):
        case.wait(10.5)
        assert not case.lost  # the stuck rank's own turn
        case.wait(1)
    assert "rank 1 has not done its part of loading for 12 s; seen by rank 0" in case.lost[0]


def test_a_longer_deadline_is_one_for_loading_too() -> None:
    """As the message of a stuck start says."""
    assert Watchdog(0, PEERS, 10.0).load_deadline == LOAD_S
    assert Watchdog(0, PEERS, 2 * LOAD_S).load_deadline == 2 * LOAD_S


def test_collectives_are_progress() -> None:
    case = Case()
    with case.dog.phase("prefill step"):
        for count in range(1, 6):
            case.collectives = (count, count)
            case.wait(8)
    assert not case.lost


def test_waiting_in_a_collective_blames_the_other_rank() -> None:
    case = Case(PEERS[:2])
    case.collectives = (7, 6)
    with case.dog.phase("decode step"):
        case.wait(10.5)
        assert not case.lost  # the stuck rank itself reports first
        case.wait(3)
    assert "rank 1 has not reached collective 7 (decode step)" in case.lost[0]


def test_idle_is_not_stuck() -> None:
    case = Case()
    case.wait(100)
    assert not case.lost


def test_a_phase_begins_with_a_fresh_clock() -> None:
    case = Case()
    for _ in range(5):
        with case.dog.phase("decode step"):
            case.wait(9)
    assert not case.lost


def test_a_stopped_peer_is_lost_also_while_idle() -> None:
    case = Case()
    case.states[1] = "stopped"
    case.wait(9)
    assert not case.lost
    case.wait(2)
    assert "rank 1 (pid 11) is stopped" in case.lost[0]


@pytest.mark.parametrize(("state", "seconds"), [("stopped", 10.0), ("gone", GONE_S)])
def test_of_a_hosts_ranks_the_lowest_speaks_first(state: str, seconds: float) -> None:
    """The launcher has a second to end the others, or whoever sees the same says the same."""
    peers = tuple(Peer(rank, "here" if rank > 1 else "there", 10 + rank, 1) for rank in range(12))
    for rank, turn_s in ((2, 0), (3, 1), (5, 3), (11, 4)):
        case = Case(peers, rank)
        case.states[4] = state
        case.wait(seconds + turn_s)
        assert not case.lost
        case.wait(1)
        assert "rank 4 (pid 14)" in case.lost[0]


def test_who_is_watched_may_become_known_later() -> None:
    lost: list[str] = []
    found: list[Peer] = []
    dog = Watchdog(0, (), 10.0, find_peers=lambda: found, on_lost=lost.append, peer_state=lambda _: "stopped")
    for _ in range(40):
        dog.tick(0.5)
    assert not lost
    found.append(PEERS[1])
    for _ in range(22):
        dog.tick(0.5)
    assert "rank 1 (pid 11) is stopped" in lost[0]


def test_a_peer_that_goes_on_is_forgiven() -> None:
    case = Case()
    for _ in range(4):
        case.states[1] = "stopped"
        case.wait(8)
        case.states[1] = "running"
        case.wait(1)
    assert not case.lost


def test_the_launcher_may_end_the_job_before_a_death_is_reported() -> None:
    case = Case()
    case.states[1] = "gone"
    case.wait(GONE_S)
    assert not case.lost
    case.wait(1)
    assert "rank 1 (pid 11) is gone" in case.lost[0]


def test_pids_of_another_host_are_not_looked_at() -> None:
    case = Case()
    case.wait(1)
    assert case.asked == {1}


def test_long_steps_get_more_time() -> None:
    dog = Watchdog(0, PEERS[:1], 30.0)
    assert dog.step_deadline(1) == 30.0
    assert dog.step_deadline(512) == 90.0


@pytest.mark.parametrize("text", ["soon", "-1", "nan", "1e9", ""])
def test_a_deadline_that_is_no_number_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMRUN_WATCHDOG_S", text)
    with pytest.raises(UsageError, match="LLMRUN_WATCHDOG_S"):
        deadline_from_environment()


def test_a_host_is_told_by_its_boot_and_its_process_numbers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers may have one name, and hosts may have been cloned."""
    own = host_identity()
    assert own == host_identity()
    for where, name in ((peers.os, "readlink"), (peers.Path, "read_text")):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, lambda *_: "another")
            assert host_identity() != own


def test_a_process_may_be_named_like_its_own_state(tmp_path: Path) -> None:
    program = shutil.copy(shutil.which("sleep") or "", tmp_path / "a) Z 1 (b")
    process = subprocess.Popen([program, "60"])
    assert process_state(Peer(1, "here", process.pid, process_started(process.pid) or 0)) == "running"
    process.kill()
    process.wait()


def test_process_states_are_those_of_the_kernel() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = process_started(process.pid)
    assert started is not None
    peer = Peer(1, "here", process.pid, started)
    assert process_state(peer) == "running"
    assert process_state(Peer(1, "here", process.pid, started + 1)) == "gone"  # a reused pid
    os.kill(process.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    assert process_state(peer) == "stopped"
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert process_state(peer) == "gone"  # a zombie
    process.communicate()
    assert process_state(peer) == "gone"


@pytest.mark.parametrize("has_said", [False, True])
def test_one_rank_says_why_the_job_has_ended(has_said: bool, tmp_path: Path) -> None:
    if has_said:
        (tmp_path / "exit-code").write_text("6")
    program = (
        "from llmrun.watchdog import Watchdog\ndog = Watchdog(0, (), 1.0)\n"
        "with dog.phase('work'):\n    while True: dog.tick(0.6)\n"
    )
    environment = {**os.environ, LAUNCH_VARIABLE: str(tmp_path)}
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert ended.returncode == 6
    assert ("rank 0 is stuck" in ended.stderr, ended.stderr == "") == (not has_said, has_said)
