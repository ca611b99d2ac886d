"""Who the ranks are: of a job whose ranks have met, and of one whose ranks have not, what /proc says of this host."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from llmrun import console, launcher

ALONE_S = 1.0  # with an error that rank 0 shares it has left by then
TOLD_ALIKE_S = 10.0  # rank 0 may not even have read its command line
_POLL_S = 0.020


@dataclass(frozen=True)
class Peer:
    """A rank as its host's process table knows it; `started` (clock ticks since boot) tells a reused pid."""

    rank: int
    host: str
    pid: int
    started: int


def local_ranks(peers: tuple[Peer, ...], rank: int) -> list[int]:
    """Return the ranks on the host of `rank`, in order."""
    return [peer.rank for peer in peers if peer.host == peers[rank].host]


def local_peers(peers: tuple[Peer, ...], rank: int) -> list[Peer]:
    """Return the other ranks on the host of `rank`, in order; none if nobody is known yet."""
    return [peers[other] for other in local_ranks(peers, rank) if other != rank]


def process_started(pid: int) -> int | None:
    """Return when a process of this host started, in clock ticks since boot; None if it is gone."""
    stat = read_process_stat(pid)
    return None if stat is None else int(stat[19])


def read_process_stat(pid: int) -> list[str] | None:
    """Return the fields of /proc/PID/stat from the state on; None if the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def siblings(states: str = "RSDTt") -> list[Peer]:
    """Return the ranks that this rank's launcher started on this host: what is known of others before MPI is there.

    `states`: of /proc/PID/stat; those that are in one of them.
    """
    own, host = console.environment_rank(), host_identity()
    above = next((pid for pid in _ancestors(os.getpid()) if rank_of_process(pid) is None), None)
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or (stat := read_process_stat(int(name))) is None or stat[0] not in states:
            continue
        rank = rank_of_process(int(name))
        if rank is not None and rank != own and above in _ancestors(int(name)):
            found.append(Peer(rank, host, int(name), int(stat[19])))
    return found


def has_joined() -> bool:
    """Whether MPI knows this rank; before, MPICH's launcher takes one that leaves for one that has done its work."""
    mpi = sys.modules.get("mpi4py.MPI")
    return mpi is not None and mpi.Is_initialized()


def is_alone_with_it(*, is_told_alike: bool) -> bool:
    """Tell whether rank 0 does not share an error that this rank has before the ranks meet, and so says nothing of it.

    `is_told_alike`: the error comes from the command line, which is the same on all hosts.
    """
    until = time.monotonic() + (TOLD_ALIKE_S if is_told_alike else ALONE_S)
    while any(peer.rank == 0 for peer in siblings()):
        if time.monotonic() > until:
            return True
        time.sleep(_POLL_S)
    return not is_told_alike and not launcher.is_on_one_host()


def _ancestors(pid: int) -> list[int]:
    """Return the parent of a process, its parent, and so on."""
    found: list[int] = []
    while (stat := read_process_stat(pid)) is not None and (pid := int(stat[1])) > 0:
        found.append(pid)
    return found


def rank_of_process(pid: int) -> int | None:
    """Return the rank that a launcher like ours gave a process, in a job as large as ours; None: none did, or it is gone.

    The shell that `srun --pty` or an mpirun started is rank 0 of a job of one, and so is all that is typed there.
    """
    try:
        lines = Path(f"/proc/{pid}/environ").read_bytes().decode("utf-8", "replace").split("\0")
    except OSError:
        return None
    environment = {name: value for name, _, value in (line.partition("=") for line in lines)}
    if any(of(environment) != of() for of in (launcher.launcher_size, launcher.launcher_family)):
        return None
    return console.launched_rank(environment)


def host_identity() -> str:
    """Return a name that two processes share exactly if they can see each other's pids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        boot, namespace = "", ""
    return f"{os.uname().nodename}/{boot}/{namespace}"


def own_identity(rank: int) -> Peer:
    """Return what this process is to the other ranks."""
    return Peer(rank, host_identity(), os.getpid(), process_started(os.getpid()) or 0)
