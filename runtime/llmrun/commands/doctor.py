"""Report whether this machine and environment can run llmrun, and a given artifact.

Under mpirun also how the ranks' collectives travel, and how long an all-reduce takes.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from llmrun import __version__, console, gpu_report, launcher
from llmrun.commands import common
from llmrun.errors import IncompatibleError, LlmpackError, PeerError
from llmrun.operators import Operators

_ALL_REDUCE_BYTES = (8192, 16384)  # a token's hidden states in float32, of small and of 7B models
_ALL_REDUCE_CALLS = 500


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("artifact", metavar="ARTIFACT", nargs="?", help="directory made by `pack`")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Check one thing after the other; the exit code is that of the worst."""
    try:
        collectives: str | LlmpackError = _collectives()  # on every rank; the other checks are rank 0's
    except LlmpackError as error:
        collectives = error
    joined = None if arguments.artifact is None else gpu_report.of_artifact(arguments.artifact)  # on every rank
    if console.environment_rank() != 0:
        return 0

    def found_collectives() -> str:
        if isinstance(collectives, LlmpackError):
            raise collectives
        return collectives

    def gpu_collectives() -> str:
        if isinstance(joined, LlmpackError):
            raise joined
        return joined or ""

    checks: dict[str, Callable[[], str]] = {
        "python": lambda: f"{platform.python_version()}, llmrun {__version__}, {sys.prefix}",
        "machine": _machine,
        "onnxruntime": _onnxruntime,
        "operators": _operators,
        "mpi": _mpi,
        "collectives": found_collectives,
        "gpus": _gpus,
    }
    if joined is not None:
        checks["gpu ranks"] = gpu_collectives
    if arguments.artifact is not None:
        checks["artifact"] = lambda: _artifact(arguments.artifact)
    findings: list[dict[str, Any]] = []
    for name, check in checks.items():
        try:
            findings.append({"check": name, "ok": True, "found": check(), "exit_code": 0})
        except LlmpackError as error:
            findings.append(
                {"check": name, "ok": False, "found": f"{error.code}: {error}", "exit_code": error.exit_code}
            )
    worst = max(finding["exit_code"] for finding in findings)
    if arguments.json:
        common.write_json({"ok": worst == 0, "checks": findings})
    else:
        lines = [f"{'ok ' if f['ok'] else 'BAD'}  {f['check']:<12} {f['found']}\n" for f in findings]
        common.write("".join(lines))
    return worst


def _machine() -> str:
    from llmrun.memory import available_bytes

    cores = len(os.sched_getaffinity(0))
    return f"{platform.machine()}, {cores} cores to use, {available_bytes() / 2**30:.1f} GiB of memory available"


def _onnxruntime() -> str:
    import importlib.metadata

    from llmrun.session import import_onnxruntime

    ort = import_onnxruntime()
    names = {name for d in importlib.metadata.distributions() if (name := d.metadata["Name"]) is not None}
    installed = sorted(name for name in names if name.startswith("onnxruntime") and name != "onnxruntime-genai")
    if len(installed) > 1:
        raise IncompatibleError(
            f"{' and '.join(installed)} are installed and overwrite each other's files. Uninstall both, install one.",
            code="E414",
        )
    return f"{ort.__version__}, {', '.join(ort.get_available_providers())}"


def _operators() -> str:
    ops = Operators()
    return f"version {ops.version}, {ops.isa}, {ops.path}"


def _gpus() -> str:
    from llmrun.session import import_onnxruntime

    return gpu_report.describe(import_onnxruntime().get_available_providers())


def _mpi() -> str:
    if (fault := _mpi_fault()) is not None:
        return f"none: models of one rank only ({fault})"
    path, family = launcher.find_mpirun()
    launcher.check_launcher()
    return f"{family}, {path}"


def _collectives() -> str:
    """Name the transport of the collectives between this job's ranks, and measure it as llmrun uses it."""
    from llmrun import comm, cores, peers, rank_status, watchdog

    if launcher.launcher_family() is None or launcher.launcher_size() == 1:
        return "one rank: none (`mpirun -n 2 llmrun doctor` measures them)"
    ops = Operators()
    with watchdog.joining(watchdog.deadline_from_environment()):
        ranks = comm.connect()
    everyone = ranks.agree({"cores": rank_status.own_cores()})
    local = peers.local_ranks(ranks.peers, ranks.rank)
    affinities = [rank_status.read_cores(everyone[rank]["cores"]) for rank in local]
    allowed = os.sched_getaffinity(0)
    share = cores.share_cores(affinities, local.index(ranks.rank), 1, places=cores.places_of(allowed))
    if share.cores:
        os.sched_setaffinity(0, share.cores)
    if ranks.op_communicator is None:
        raise PeerError("the ranks have no communicator.")
    ops.set_communicator(ranks.op_communicator)
    ops.share_memory()
    medians = [_all_reduce_s(ops, size) for size in _ALL_REDUCE_BYTES]
    os.sched_setaffinity(0, allowed)
    times = ", ".join(
        f"{size >> 10} KB in {s * 1e6:.1f} us" for size, s in zip(_ALL_REDUCE_BYTES, medians, strict=True)
    )
    where = "own cores" if share.cores else "shared cores"
    return f"{ops.transport}, {ranks.size} ranks, {where}; all-reduce of {times} (median)"


def _all_reduce_s(ops: Operators, size: int) -> float:
    """Return the median seconds of a call, from Python; every rank calls it."""
    vector = (ctypes.c_float * (size // 4))()
    times = []
    for _ in range(_ALL_REDUCE_CALLS):
        started = time.perf_counter()
        if ops.functions.llmpack_ops_all_reduce(vector, vector, len(vector)) != 0:
            raise PeerError(f"all-reduce: {ops.last_error}")
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _mpi_fault() -> IncompatibleError | None:
    """Return why MPI cannot be loaded, if it cannot."""
    from llmrun import comm

    try:
        comm.load_mpi()
    except IncompatibleError as error:
        return error
    return None


def _artifact(path: str) -> str:
    from llmrun.artifact import open_artifact

    manifest = open_artifact(path).manifest
    if manifest.shards > 1 and (fault := _mpi_fault()) is not None:
        raise fault
    ranks = f"{manifest.shards} rank{'s' * (manifest.shards > 1)}"
    scheme = manifest.quantization["scheme"]
    return f"{path}: {ranks}, {scheme}, {manifest.max_seq_len} positions (digests: `llmrun verify`)"
