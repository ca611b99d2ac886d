"""What a rank does in `test_shared_collectives.py`: python collectives_processes.py LIBRARY FOLDER RANK SIZE SCENARIO

The ranks are plain processes, without MPI and its launcher, which would end them all as soon as one dies: the MPI
functions that the library needs exchange files in FOLDER. A scenario prints what the rank saw, as JSON.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1] / "runtime")]

from llmrun.mpi_functions import Communicator  # noqa: E402
from llmrun.operators import load_library  # noqa: E402

HANDLE = ctypes.c_ssize_t
EXCHANGE = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_int, HANDLE, ctypes.c_void_p, ctypes.c_int, HANDLE, HANDLE
)
ERROR_STRING = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_int))
DEADLINE_S = 60


class Rank:
    """The library with a communicator of files."""

    def __init__(self, path: str, folder: Path, rank: int, size: int) -> None:
        self.rank, self.size, self._folder, self._count = rank, size, folder, 0
        self.library = load_library(path)
        self._functions = (
            EXCHANGE(lambda send, count, _t, receive, _n, _r, _c: self._exchange(send, count, receive, False)),
            EXCHANGE(lambda send, count, _t, receive, _n, _r, _c: self._exchange(send, count, receive, True)),
            ERROR_STRING(lambda *_: 0),
        )
        addresses = [ctypes.cast(f, ctypes.c_void_p).value for f in self._functions]
        given = Communicator(ctypes.sizeof(Communicator), rank, size, 0, 0, 0, *addresses)
        assert self.library.llmpack_ops_set_communicator(ctypes.byref(given)) == 0
        self.shared = self.library.llmpack_ops_share_memory()
        self.why_not = self.error() if self.shared else ""

    def error(self) -> str:
        return self.library.llmpack_ops_last_error().decode()

    def transport(self) -> str:
        return self.library.llmpack_ops_transport().decode()

    def all_reduce(self, x: np.ndarray, y: np.ndarray) -> int:
        return self.library.llmpack_ops_all_reduce(x.ctypes.data, y.ctypes.data, x.size)

    def meet(self) -> None:
        """A collective of everybody that must succeed."""
        x = np.full(1000, self.rank, np.float32)
        assert self.all_reduce(x, x) == 0, self.error()
        assert (x == sum(range(self.size))).all()

    def _exchange(self, send: int, count: int, receive: int, is_alltoall: bool) -> int:
        self._count += 1
        data = ctypes.string_at(send, count * self.size if is_alltoall else count)
        for rank, message in enumerate(
            data[r * count : (r + 1) * count] if is_alltoall else data for r in range(self.size)
        ):
            written = self._folder / f"{self._count}-{self.rank}-{rank}"
            written.with_suffix(".new").write_bytes(message)
            written.with_suffix(".new").rename(written)
        for rank in range(self.size):
            path = self._folder / f"{self._count}-{rank}-{self.rank}"
            until = time.monotonic() + DEADLINE_S
            while not path.exists():
                if time.monotonic() > until:
                    return 1
                time.sleep(0.001)
            ctypes.memmove(receive + rank * count, path.read_bytes(), count)
        return 0


def killed(ranks: Rank, folder: Path, *, waits: bool) -> dict[str, object]:
    """The last rank is killed, before or while the others wait for it."""
    ranks.meet()
    if ranks.rank == ranks.size - 1:
        time.sleep(0.5 if waits else 0)
        (folder / "killed").write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0 if waits else 0.5)
    x = np.ones(1000, np.float32)
    codes = [ranks.all_reduce(x, np.empty_like(x))]
    error, ended = ranks.error(), time.time()
    codes.append(ranks.all_reduce(x, np.empty_like(x)))
    seconds = ended - float((folder / "killed").read_text())
    return {"codes": codes, "error": error, "second": ranks.error(), "seconds": seconds}


def differs(ranks: Rank, call: Callable[[np.ndarray, np.ndarray], int], room: int) -> dict[str, object]:
    ranks.meet()
    x, y = np.ones(room, np.float32), np.full(room + 1000, 7, np.float32)
    found = {"code": call(x, y), "error": ranks.error(), "untouched": bool((y == 7).all())}
    ranks.library.llmpack_ops_set_communicator(None)  # as a host must; another rank may be a step behind
    return found


def count(ranks: Rank, counts: tuple[int, int]) -> dict[str, object]:
    """The last rank has another number of elements."""
    n = counts[ranks.rank == ranks.size - 1]
    return differs(ranks, lambda x, y: ranks.all_reduce(x[:n], y[:n]), max(counts))


def kind(ranks: Rank) -> dict[str, object]:
    """The last rank gathers while the others reduce."""

    def call(x: np.ndarray, y: np.ndarray) -> int:
        if ranks.rank < ranks.size - 1:
            return ranks.all_reduce(x, y[: x.size])
        return ranks.library.llmpack_ops_all_gather(x.ctypes.data, y.ctypes.data, 1, x.size, ranks.size * x.size)

    return differs(ranks, call, 100)


def leaves(ranks: Rank) -> dict[str, object]:
    """The last rank leaves in order, and goes on living."""
    ranks.meet()
    if ranks.rank == ranks.size - 1:
        ranks.library.llmpack_ops_set_communicator(None)
        time.sleep(1)
        return {"transport": ranks.transport()}
    x = np.ones(10, np.float32)
    return {"code": ranks.all_reduce(x, x), "error": ranks.error()}


def slow(ranks: Rank) -> dict[str, object]:
    """Rank 0 comes a second late; the others may not spend it computing."""
    ranks.meet()
    used = time.process_time()
    if ranks.rank == 0:
        time.sleep(1)
    ranks.meet()
    return {"cpu_s": time.process_time() - used}


def anonymous(ranks: Rank) -> dict[str, object]:
    """What is mapped, and which files are open."""
    ranks.meet()
    maps = [line.split(maxsplit=5)[5] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line]
    links = {os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if os.path.lexists(entry.path)}
    ranks.meet()
    return {"maps": sorted(set(maps)), "links": sorted(links)}


def plain(ranks: Rank) -> dict[str, object]:
    """What the library says and does."""
    ranks.meet()
    x = np.full(50_000, ranks.rank + 1, np.float32)
    assert ranks.all_reduce(x, x) == 0
    assert (x == ranks.size * (ranks.size + 1) / 2).all()
    return {"transport": ranks.transport(), "shared": ranks.shared, "why_not": ranks.why_not}


def main(path: str, folder: Path, rank: int, size: int, scenario: str) -> None:
    if scenario == "few-files" and rank == size - 1:
        # What the exchange needs, and then one: not the descriptors of all processes. Whoever started this process may have
        # left gaps between its descriptors, and a library preloaded into it too.
        used = max(int(name) for name in os.listdir("/proc/self/fd"))
        while (last := os.open(os.devnull, os.O_RDONLY)) <= used:
            pass
        resource.setrlimit(resource.RLIMIT_NOFILE, (last + 3, last + 3))
    ranks = Rank(path, folder, rank, size)
    scenarios: dict[str, Callable[[], dict[str, object]]] = {
        "plain": lambda: plain(ranks),
        "few-files": lambda: plain(ranks),
        "killed-before": lambda: killed(ranks, folder, waits=False),
        "killed-meanwhile": lambda: killed(ranks, folder, waits=True),
        "count": lambda: count(ranks, (4096, 4097)),
        "count-large": lambda: count(ranks, (300_000, 500)),
        "count-zero": lambda: count(ranks, (100, 0)),
        "kind": lambda: kind(ranks),
        "leaves": lambda: leaves(ranks),
        "slow": lambda: slow(ranks),
        "anonymous": lambda: anonymous(ranks),
    }
    print(json.dumps(scenarios[scenario]()))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
