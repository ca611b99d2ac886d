"""What `llmrun doctor` says of GPUs: which there are, what their links carry, and how ranks would join: measured.

In: the operator library, and an artifact if one was named. Out: one sentence for each finding. Loads no weights, makes no
session.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmrun import device
from llmrun.errors import IncompatibleError, LlmpackError, PeerError
from llmrun.operators import Operators

if TYPE_CHECKING:
    from llmrun.job import Job

_ABSENT = ("no NVIDIA ", "no AMD ")  # how the operator library begins where there is no driver, or no GPU
_ROOM = 256 << 20  # bytes of a GPU's memory; measuring takes half of them
_REPEATS = 500
_ROWS = (1, 8)  # a token, and eight sequences' tokens


def describe(available: Sequence[str]) -> str:
    """Return what GPUs this host has and what was measured of each; "none" without one.

    Args:
        available: ONNX Runtime's execution providers.
    Raises:
        IncompatibleError: a driver or a GPU cannot be used; says what was found of the others, too.
    """
    ops = Operators().functions
    found: list[str] = []
    is_faulty = False
    for provider in ("cuda", "rocm"):
        try:
            version, gpus = device.probe(ops, provider)
        except IncompatibleError as error:
            if not str(error).startswith(_ABSENT):
                found.append(_reason(error))
                is_faulty = True
            continue
        for gpu in gpus:
            name = f"GPU {gpu.ordinal} {gpu.name} ({gpu.chip}, {version})"
            try:
                found.append(f"{name}, {_one(ops, provider, gpus, gpu)}")
            except IncompatibleError as error:
                found.append(f"{name}: not usable: {_reason(error)}")
                is_faulty = True
        if gpus and device.PROVIDERS[provider] not in available:
            found.append(f'onnxruntime has no provider for them: `pip install "llmpack[{provider}]"`')
    if is_faulty:
        raise IncompatibleError("; ".join(found), code="E421")
    return "; ".join(found) if found else "none: no NVIDIA and no AMD GPU with its driver; llmrun computes on the CPU"


def _reason(error: IncompatibleError) -> str:
    return str(error).removesuffix(".")


def _one(ops: ctypes.CDLL, provider: str, gpus: list[device.Gpu], gpu: device.Gpu) -> str:
    free = device.free_bytes(ops, provider, gpu)
    text = f"{free / 1e9:.1f} GB free"
    if free < _ROOM:
        return f"{text}, too little to measure its links"
    figures = device.measure(ops, provider, gpu.ordinal)
    to_host, to_device = (figures[f"{way}_bytes_per_s"] / 1e9 for way in ("device_to_host", "host_to_device"))
    text += f", pinned memory {to_device:.1f} GB/s in and {to_host:.1f} out"
    text += f", copies within {figures['copy_bytes_per_s'] / 1e9:.0f} GB/s"
    for peer in gpus[gpu.ordinal + 1 :]:
        text += f", to GPU {peer.ordinal} {_link(ops, provider, gpu, peer)}"
    return text


def _link(ops: ctypes.CDLL, provider: str, gpu: device.Gpu, peer: device.Gpu) -> str:
    try:
        link = device.measure(ops, provider, gpu.ordinal, peer.ordinal)
    except IncompatibleError as error:  # what is said of the peer itself shows whether it is at fault
        return f"not measured ({_reason(error)})"
    return f"{link['peer_bytes_per_s'] / 1e9:.1f} GB/s" if link["peer_access"] else "no access (host memory is used)"


def time_collectives(job: Job) -> str:
    """Join the GPUs of the job's ranks and time all-reduces; every rank calls it.

    Raises:
        LlmpackError: the same on every rank.
    """
    if job.placement.gpu is None:
        return "this artifact runs on the CPU here"
    job.join()
    if job.size == 1:
        return "one rank: none"
    width = job.manifest.model.hidden_size
    times = [job.stage("timing", lambda rows=rows: _time(job, rows, width)) for rows in _ROWS]
    rates = ", ".join(f"{rows} x {width} float16 in {us:.1f} us" for rows, us in zip(_ROWS, times, strict=True))
    return f"{job.gpu_transport}; all-reduce of {rates} (mean of {_REPEATS})"


def _time(job: Job, rows: int, width: int) -> float:
    microseconds = ctypes.c_double()
    ops = job.operators
    if ops.functions.llmpack_ops_gpu_time_all_reduce(rows, width, _REPEATS, ctypes.byref(microseconds)) != 0:
        raise PeerError(f"all-reduce: {ops.last_error}")
    return microseconds.value


def of_artifact(path: str) -> str | LlmpackError | None:
    """Time the collectives of an artifact's ranks under mpirun, on every rank; None: no job, no GPU code, or no artifact."""
    from llmrun import launcher
    from llmrun.artifact import open_artifact
    from llmrun.job import Job
    from llmrun.job_options import JobOptions

    try:
        manifest = open_artifact(path, ranks=[]).manifest
    except LlmpackError:  # doctor says so of the artifact itself
        return None
    try:
        if launcher.launcher_family() is None or manifest.shards == 1 or not manifest.kernels:
            return None
        job = Job(path, JobOptions(verify="size"))
        try:
            return time_collectives(job)
        finally:
            job.watchdog.close()
    except LlmpackError as error:
        return error
