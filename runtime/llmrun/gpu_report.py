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
_REPEATS = 500
_ROWS = (1, 8)  # a token, and eight sequences' tokens


def describe(available: Sequence[str]) -> str:
    """Return what GPUs this host has and what was measured of each; "none" without one.

    Args:
        available: ONNX Runtime's execution providers.
    Raises:
        IncompatibleError: there are GPUs, and their driver cannot be used.
    """
    ops = Operators().functions
    found, missing = [], []
    for provider in ("cuda", "rocm"):
        try:
            version, gpus = device.probe(ops, provider)
        except IncompatibleError as error:
            missing.append(str(error))
            if not missing[-1].startswith(_ABSENT):
                raise
            continue
        found += [_one(ops, provider, version, gpus, gpu) for gpu in gpus]
        if gpus and device.PROVIDERS[provider] not in available:
            found.append(f'onnxruntime has no provider for them: `pip install "llmpack[{provider}]"`')
    return "; ".join(found) if found else "none: no NVIDIA and no AMD GPU with its driver; llmrun computes on the CPU"


def _one(ops: ctypes.CDLL, provider: str, version: str, gpus: list[device.Gpu], gpu: device.Gpu) -> str:
    text = f"GPU {gpu.ordinal} {gpu.name} ({gpu.chip}, {version}), {device.free_bytes(ops, provider, gpu) / 1e9:.1f} GB free"
    figures = device.measure(ops, provider, gpu.ordinal)
    to_host, to_device = (figures[f"{way}_bytes_per_s"] / 1e9 for way in ("device_to_host", "host_to_device"))
    text += f", pinned memory {to_device:.1f} GB/s in and {to_host:.1f} out"
    text += f", copies within {figures['copy_bytes_per_s'] / 1e9:.0f} GB/s"
    for peer in gpus[gpu.ordinal + 1 :]:
        link = device.measure(ops, provider, gpu.ordinal, peer.ordinal)
        rate = f"{link['peer_bytes_per_s'] / 1e9:.1f} GB/s"
        text += f", to GPU {peer.ordinal} {rate if link['peer_access'] else 'no access (host memory is used)'}"
    return text


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
    """Time the collectives of an artifact's ranks under mpirun, on every rank; None: there is no job, or no GPU code."""
    from llmrun import launcher
    from llmrun.artifact import open_artifact
    from llmrun.job import Job
    from llmrun.job_options import JobOptions

    try:
        manifest = open_artifact(path, ranks=[]).manifest
        if launcher.launcher_family() is None or manifest.shards == 1 or not manifest.kernels:
            return None
        job = Job(path, JobOptions(verify="size"))
        try:
            return time_collectives(job)
        finally:
            job.watchdog.close()
    except LlmpackError as error:
        return error
