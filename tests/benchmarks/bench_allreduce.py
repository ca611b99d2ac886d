"""All-reduce of 1 KB to 1 MB between the ranks of one host: ours through shared memory, ours by MPI, MPI_Allreduce.

    mpirun -n 2 python tests/benchmarks/bench_allreduce.py LIBRARY [--rounds 20] [--calls 200] [--json]

LIBRARY is libllmpack_ops.so. Each rank is pinned to a core of its own, as llmrun does, if there are enough. The three
take turns in every round, so that other load on the machine meets all alike. A call's time is the slowest rank's,
from the call to its return, measured in C (time_allreduce.c, compiled here); before each call the ranks fill their
vectors, and nothing else separates the calls. `quiet` is the median of the round with the smallest median: what the
machine does when nobody disturbs it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "runtime"))

from llmrun.cores import places_of, share_cores  # noqa: E402
from llmrun.mpi_functions import communicator_struct  # noqa: E402
from llmrun.operators import load_library  # noqa: E402

SIZES = [1 << power for power in range(10, 21)]


def compile_timer(folder: str) -> ctypes.CDLL:
    path = Path(folder, "time_allreduce.so")
    source = HERE / "time_allreduce.c"
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", source, "-o", path], check=True)
    timer = ctypes.CDLL(str(path))
    pointer, handle = ctypes.c_void_p, ctypes.c_ssize_t
    timer.time_ours.argtypes = [*[pointer] * 3, ctypes.c_int64, ctypes.c_int, pointer]
    timer.time_theirs.argtypes = [*[pointer] * 3, ctypes.c_int64, *[handle] * 3, ctypes.c_int, pointer]
    return timer


def main() -> None:
    parser = argparse.ArgumentParser(description="Time all-reduce; run it under mpirun.")
    parser.add_argument("library", type=Path)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--calls", type=int, default=200, help="a round of each way; fewer for large vectors")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="bytes")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    import mpi4py

    mpi4py.rc.thread_level = "serialized"  # as llmrun asks for
    from mpi4py import MPI

    comm = MPI.COMM_WORLD.Dup()
    rank, size = comm.Get_rank(), comm.Get_size()
    own = sorted(os.sched_getaffinity(0))
    share = share_cores(comm.allgather(own), rank, 1, places=places_of(own))
    library = load_library(options.library)
    given = communicator_struct(comm)
    with tempfile.TemporaryDirectory() as folder:
        timer = compile_timer(folder)
    if share.cores:
        os.sched_setaffinity(0, share.cores)

    def address(function: object) -> int | None:
        return ctypes.cast(function, ctypes.c_void_p).value  # type: ignore[arg-type]

    ours = address(library.llmpack_ops_all_reduce)
    theirs = address(ctypes.CDLL(MPI.__file__).MPI_Allreduce)
    handles = [MPI._handleof(handle) for handle in (MPI.FLOAT, MPI.SUM, comm)]

    def use_shared_memory() -> None:
        assert library.llmpack_ops_share_memory() == 0, library.llmpack_ops_last_error().decode()

    def use_mpi() -> None:
        assert library.llmpack_ops_set_communicator(ctypes.byref(given)) == 0

    use_mpi()

    def measure(nbytes: int) -> dict[str, dict[str, float]]:
        n = nbytes // 4
        calls = max(20, min(options.calls, options.calls * 65536 // nbytes))
        x, y = np.zeros(n, np.float32), np.zeros(n, np.float32)
        us = np.zeros(calls)
        pointers = x.ctypes.data, y.ctypes.data, n
        ways: dict[str, tuple[Callable[[], None], Callable[[int], int]]] = {
            "shared memory": (use_shared_memory, lambda c: timer.time_ours(ours, *pointers, c, us.ctypes.data)),
            "MPI transport": (use_mpi, lambda c: timer.time_ours(ours, *pointers, c, us.ctypes.data)),
            "MPI_Allreduce": (
                lambda: None,
                lambda c: timer.time_theirs(theirs, *pointers, *handles, c, us.ctypes.data),
            ),
        }
        rounds: dict[str, list[np.ndarray]] = {way: [] for way in ways}
        for _ in range(options.rounds):
            for way, (prepare, run) in ways.items():
                prepare()
                assert run(10) == 0  # first touch of the memory
                comm.Barrier()
                assert run(calls) == 0
                assert y[0] == y[-1] == calls * size
                slowest = np.empty_like(us)
                comm.Allreduce(us, slowest, MPI.MAX)
                rounds[way].append(slowest)
        return {way: summary(taken) for way, taken in rounds.items()}

    results = {nbytes: measure(nbytes) for nbytes in options.sizes}
    if rank == 0:
        vendor = ".".join(map(str, MPI.get_vendor()[1]))
        where = f"{MPI.get_vendor()[0]} {vendor}, {size} ranks, cores {'own' if share.cores else 'shared'}"
        print(json.dumps({"where": where, "us": results}) if options.json else f"{where}\n{table(results)}")


def summary(rounds: list[np.ndarray]) -> dict[str, float]:
    every = np.concatenate(rounds)
    return {
        "quiet": min(float(np.median(r)) for r in rounds),
        "median": float(np.median(every)),
        "p99": float(np.percentile(every, 99)),
    }


def table(results: dict[int, dict[str, dict[str, float]]]) -> str:
    lines = ["| bytes | shared memory, us: quiet / median / p99 | MPI transport | MPI_Allreduce |", "|---|---|---|---|"]
    for nbytes, ways in results.items():
        cells = [" / ".join(f"{value:.1f}" for value in figures.values()) for figures in ways.values()]
        lines.append(f"| {nbytes} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
