"""A thread per rank that ends the job when a rank makes no progress, is stopped, or is gone.

Two things are watched. Progress: while a phase is armed (loading, a step), either the phase ends or the operator
library's count of collectives moves within the deadline. Peers on the same host: a process that is stopped for as
long as the deadline, also while nobody computes, or that is gone, is lost. The launcher usually notices a death
first; it never notices a stop. Time counts only while this thread itself runs: a job suspended with Ctrl-Z and
resumed later is not late.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from llmrun import console, failstop, launcher
from llmrun.errors import UsageError
from llmrun.peers import Peer, local_peers, read_process_stat, siblings

DEFAULT_S = 30.0
LOAD_S = 600.0
POLL_S = 0.5
GONE_S = 4.0  # the launcher's turn to end the job, and then the collectives'
TURN_S, MOST_TURNS_S = 1.0, 4.0  # between what the ranks of a host say of the same peer
TOKENS_PER_DEADLINE = 256  # a step of this many tokens gets twice the deadline of a decode step

CollectiveState = Callable[[], tuple[int, int]]


def deadline_from_environment() -> float:
    """Return LLMRUN_WATCHDOG_S, in seconds; 0 is off.

    Raises:
        UsageError: it is set to something that is not a number of seconds.
    """
    text = os.environ.get("LLMRUN_WATCHDOG_S", str(DEFAULT_S))
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e6:
        raise UsageError(f"LLMRUN_WATCHDOG_S={text!r}: expected a number of seconds, 0 for off.")
    return value


class Phase:
    """Something that is watched as long as it lasts: a context. One thread at a time is in one."""

    __slots__ = ("_watchdog", "deadline_s", "is_done_here", "name", "waited_s")

    def __init__(self, watchdog: Watchdog, name: str, deadline_s: float, *, is_done_here: bool) -> None:
        self._watchdog, self.name, self.deadline_s, self.is_done_here = watchdog, name, deadline_s, is_done_here
        self.waited_s = 0.0  # without progress, as the watchdog counts it

    def __enter__(self) -> None:
        self._watchdog.current = self

    def __exit__(self, _kind: type[BaseException] | None, _error: object, _trace: object) -> None:
        self._watchdog.current = None


class Watchdog:
    """Watches one rank and its peers on the same host.

    Attributes:
        current: what the rank is in; set by that phase.
    """

    def __init__(
        self,
        rank: int,
        peers: tuple[Peer, ...],
        deadline_s: float,
        *,
        find_peers: Callable[[], Sequence[Peer]] | None = None,
        on_lost: Callable[[str], None] | None = None,
        peer_state: Callable[[Peer], str] | None = None,
    ) -> None:
        """Watch `peers` on this host, or those that `find_peers` names at each look.

        `on_lost` is told in one sentence what is wrong, and by default ends the job; `peer_state` as the function.
        """
        self._rank, self._size, self._deadline_s = rank, len(peers), deadline_s
        own_host = local_peers(peers, rank)
        self._find_peers = find_peers or (lambda: own_host)
        # All ranks of a host see what is wrong with one: the lowest speaks, and the launcher has time to end the others.
        turn = sum(peer.rank < rank for peer in own_host) if peers else rank
        self._turn_s = min(TURN_S * turn, MOST_TURNS_S)
        self._on_lost = on_lost or _end_job
        self._peer_state = peer_state or process_state
        self._collectives: CollectiveState = lambda: (0, 0)
        self._unwell: dict[int, float] = {}  # seconds for which a peer has been seen stopped or gone
        self.current: Phase | None = None
        self._seen: tuple[int, int] = (0, 0)
        self._is_closed = threading.Event()

    def start(self, event: threading.Event | None = None) -> None:
        """Begin to watch, or once `event` is set; off if the deadline is 0."""
        if self._deadline_s > 0:
            threading.Thread(target=self._watch, args=(event,), name="watchdog", daemon=True).start()

    def close(self) -> None:
        """Stop watching: the ranks are about to leave in order."""
        self._is_closed.set()

    @property
    def is_closed(self) -> bool:
        """Whether nothing is watched any more."""
        return self._is_closed.is_set()

    def count_collectives(self, state: CollectiveState) -> None:
        """Take `state` (collectives begun, ended) as a sign of progress."""
        self._collectives = state

    def step_deadline(self, num_tokens: int) -> float:
        """Return the seconds that a step may take from one collective to the next."""
        return self._deadline_s * (1 + num_tokens // TOKENS_PER_DEADLINE)

    @property
    def load_deadline(self) -> float:
        """Seconds that a step of the start may take."""
        return max(LOAD_S, self._deadline_s)

    def phase(self, name: str, deadline_s: float | None = None, *, is_done_here: bool = False) -> Phase:
        """Return a context in which to watch progress.

        `deadline_s` None: the decode deadline. `is_done_here`: this rank has done its part, and waits for the others.
        """
        return Phase(self, name, deadline_s or self._deadline_s, is_done_here=is_done_here)

    def tick(self, elapsed_s: float) -> None:
        """Look once; `elapsed_s` since the last look."""
        for peer in self._find_peers():
            self._look_at(peer, elapsed_s)
        phase, before = self.current, self._seen
        self._seen = state = self._collectives()
        if phase is not None:
            phase.waited_s = phase.waited_s + elapsed_s if state == before else 0.0
            self._judge(phase, state)

    def _judge(self, phase: Phase, state: tuple[int, int]) -> None:
        name, deadline_s, waited_s = phase.name, phase.deadline_s, phase.waited_s
        begun, ended = state
        if begun > ended or phase.is_done_here:
            # A rank that is stuck by itself reports first, then the lowest rank that waits for it.
            if waited_s > deadline_s + 1 + 0.5 * self._rank:
                who = f"rank {1 - self._rank}" if self._size == 2 else "another rank"
                what = f"done its part of {name}" if phase.is_done_here else f"reached collective {begun} ({name})"
                self._on_lost(f"{who} has not {what} for {waited_s:.0f} s; seen by rank {self._rank}")
        elif waited_s > deadline_s:
            self._on_lost(f"rank {self._rank} is stuck: no progress in {name} for {waited_s:.0f} s")

    def _look_at(self, peer: Peer, elapsed_s: float) -> None:
        state = self._peer_state(peer)
        if state == "running":
            self._unwell.pop(peer.rank, None)
            return
        seconds = self._unwell.get(peer.rank, 0.0) + elapsed_s
        self._unwell[peer.rank] = seconds
        if state == "stopped" and seconds > self._deadline_s + self._turn_s:
            self._on_lost(
                f"rank {peer.rank} (pid {peer.pid}) is stopped for {seconds:.0f} s; seen by rank {self._rank}"
            )
        elif state == "gone" and seconds > GONE_S + self._turn_s:
            self._on_lost(f"rank {peer.rank} (pid {peer.pid}) is gone; seen by rank {self._rank}")

    def _watch(self, event: threading.Event | None) -> None:
        if event is not None:
            event.wait()
        poll_s = min(POLL_S, self._deadline_s / 4)
        last = time.monotonic()
        while not self._is_closed.wait(poll_s):
            now = time.monotonic()
            self.tick(min(now - last, 2 * poll_s))
            last = now


@contextlib.contextmanager
def joining(deadline_s: float) -> Iterator[None]:
    """Watch while this rank joins the others, who they are being unknown yet: a stopped one, or one that never comes."""
    if launcher.launcher_family() is None:
        yield
        return
    rank = console.environment_rank()
    dog = Watchdog(rank, (), deadline_s, find_peers=lambda: siblings("T"), on_lost=_end_joining)
    dog.start()
    try:
        with dog.phase("waiting for all ranks to start", dog.load_deadline):
            yield
    except Exception:
        if sys.excepthook is sys.__excepthook__:  # a user's script; llmrun itself has hooks, and looks after the others
            failstop.install_hooks(rank, launcher.launcher_size() or 1, keep_traceback=True)
            failstop.take_along(siblings)
        raise
    finally:
        dog.close()


@functools.cache  # once for all jobs of a process
def watch_the_end(rank: int, peers: tuple[Peer, ...], deadline_s: float) -> None:
    """Watch for a stopped rank of this host while this one ends, when MPI waits for all; they may be gone by then.

    In vain where the user's program has initialised MPI: then mpi4py leaves it, when no thread runs any more.
    """
    is_ending = threading.Event()
    Watchdog(
        rank,
        peers,
        deadline_s,
        peer_state=lambda peer: "stopped" if process_state(peer) == "stopped" else "running",
    ).start(is_ending)
    atexit.register(is_ending.set)  # Python starts no thread any more by then


def process_state(peer: Peer) -> str:
    """Return "running", "stopped" or "gone"."""
    stat = read_process_stat(peer.pid)
    if stat is None or stat[0] in "ZX" or int(stat[19]) != peer.started:
        return "gone"
    return "stopped" if stat[0] == "T" else "running"


def _end_joining(what: str) -> None:
    # MPICH's launcher takes a rank that leaves before MPI knows it for one that has done its work, and waits for the rest.
    failstop.take_along(siblings)
    _end_job(what)


def _end_job(what: str) -> None:
    if not launcher.has_exit_code():
        console.say(
            f"llmrun: error[E601]: {what}. The job has ended; LLMRUN_WATCHDOG_S changes the time allowed, 0 turns this off."
        )
    failstop.leave(6)
