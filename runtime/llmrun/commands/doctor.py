"""Report whether this machine and environment can run llmrun, and a given artifact."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable
from typing import Any

from llmrun import __version__, console, gpu_report, launcher, library
from llmrun.commands import common
from llmrun.errors import IncompatibleError, LlmpackError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("artifact", metavar="ARTIFACT", nargs="?", help="directory made by `pack`")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Check one thing after the other; the exit code is that of the worst."""
    joined = None if arguments.artifact is None else gpu_report.of_artifact(arguments.artifact)  # on every rank
    if console.environment_rank() != 0:
        return 0

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
    from llmrun.job import available_bytes

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
    from llmrun import mpi_functions

    place = library.find_library()
    try:
        ops = mpi_functions.load_library(place)
    except OSError as error:
        raise IncompatibleError(f"{place}: cannot be loaded: {error}.", code="E416") from None
    return f"version {ops.llmpack_ops_version()}, {ops.llmpack_ops_isa().decode()}, {place}"


def _gpus() -> str:
    from llmrun.session import import_onnxruntime

    return gpu_report.describe(import_onnxruntime().get_available_providers())


def _mpi() -> str:
    if launcher.library_family() is None and not _has_mpi4py():
        return "none: models of one rank only"
    path, family = launcher.find_mpirun()
    launcher.check_launcher()
    return f"{family}, {path}"


def _has_mpi4py() -> bool:
    import importlib.util

    return importlib.util.find_spec("mpi4py") is not None


def _artifact(path: str) -> str:
    from llmrun.artifact import open_artifact

    manifest = open_artifact(path).manifest
    if manifest.shards > 1 and not _has_mpi4py():
        launcher.find_mpirun()  # raises, with the remedy
    scheme = manifest.quantization["scheme"]
    return f"{path}: {manifest.shards} ranks, {scheme}, {manifest.max_seq_len} positions (digests: `llmrun verify`)"
