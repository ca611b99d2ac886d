"""GPU code for the targets asked for: every kernel of the plan, compiled in parallel, cached by content, one file per target.

In: the plan (`kernel_plan.py`) and target names. Out: kernel files (FORMAT.md 8), the same bytes whatever the number of
processes and whatever the cache held. It writes no artifact.

The cache holds one small kernel file per kernel and chip under `$LLMPACK_CACHE`, else `$XDG_CACHE_HOME/llmpack`, else
`~/.cache/llmpack`; deleting it costs time only. A name is the digest of all that the code depends on.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from llmpack import kernel_file
from llmpack.kernel_compiler import compile_kernel, prepare_worker, triton_version
from llmpack.kernel_file import Kernel, KernelFile
from llmpack.kernel_spec import KernelSpec
from llmrun.artifact import (
    CUDA_TARGETS,
    PTX_TARGET,
    ROCM_TARGETS,
    IncompatibleError,
    IntegrityError,
    ResourceError,
    UsageError,
)

GPU_TARGETS = CUDA_TARGETS + ROCM_TARGETS
TARGET_SETS = {"cuda": CUDA_TARGETS, "rocm": ROCM_TARGETS, "all": ("cpu", *GPU_TARGETS)}
# Bytes of shared memory that one program may have.
SHARED_MEMORY = {
    "sm_80": 163 << 10, "sm_86": 99 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10,
    **dict.fromkeys(ROCM_TARGETS, 64 << 10),
}  # fmt: skip
PTX_CHIP = (
    f"sm_{PTX_TARGET.removeprefix('ptx_')}"  # rides along with every CUDA target: newer chips, of any family, take it
)


def parse_targets(names: Iterable[str]) -> tuple[str, ...]:
    """Resolve names and sets of names; "cpu" is always among them, first, and each target once, in the order of this module.

    Raises:
        UsageError: an unknown name; lists what there is.
    """
    wanted = {"cpu"}
    for name in names:
        if name not in ("cpu", *GPU_TARGETS, *TARGET_SETS):
            known = ", ".join(("cpu", *GPU_TARGETS, *TARGET_SETS))
            raise UsageError(f"--targets {name}: unknown; choose from {known}.")
        wanted |= set(TARGET_SETS.get(name, (name,)))
    return tuple(name for name in ("cpu", *GPU_TARGETS) if name in wanted)


def check_compiler() -> str:
    """Return Triton's version; without Triton, say how to install it."""
    version = triton_version()
    if version is None:
        raise IncompatibleError(
            "GPU targets are compiled by Triton, which is not installed here: `pip install 'llmpack[kernels]'` (1 GB), or"
            " --targets cpu."
        )
    return version


def file_name(target: str) -> str:
    """Return the path of a target's kernel file in the artifact (FORMAT.md 8.1)."""
    return f"kernels/{_backend(target)}-{target}.bin"


def _backend(target: str) -> str:
    return "hip" if target.startswith("gfx") else "cuda"


def build(
    specs: list[KernelSpec],
    targets: Iterable[str],
    on_progress: Callable[[int, int], None] = lambda *_: None,
    num_processes: int | None = None,
) -> dict[str, KernelFile]:
    """Compile every kernel for every GPU target.

    Args:
        specs: from `plan_kernels`.
        targets: of `GPU_TARGETS`; any CUDA target adds `PTX_TARGET`.
        on_progress: called with (kernels done, kernels in all).
        num_processes: default: one for each core.

    Returns:
        target name -> kernel file.

    Raises:
        IncompatibleError: Triton is missing, or a kernel needs more shared memory than a target has.
    """
    targets = [target for target in targets if target != "cpu"]
    chips = [*targets]
    if PTX_CHIP not in chips and any(target in CUDA_TARGETS for target in targets):
        chips.append(PTX_CHIP)
    check_compiler()
    done: dict[tuple[str, int], dict[str, Kernel]] = {}
    missing = []
    sources = _sources()
    wanted = {chip: [i for i, spec in enumerate(specs) if spec.of(chip) is not None] for chip in chips}
    for chip in chips:
        for index in wanted[chip]:
            spec = specs[index]
            path = _cache_path(sources, spec, chip)
            if (found := _read_cache(path)) is not None:
                done[chip, index] = found
            else:
                missing.append((chip, index, path))
    total = sum(map(len, wanted.values()))
    on_progress(len(done), total)
    if missing:
        with tempfile.TemporaryDirectory(prefix="llmpack-triton-") as scratch:
            context = multiprocessing.get_context("spawn")
            workers = min(num_processes or os.cpu_count() or 1, len(missing))
            with ProcessPoolExecutor(workers, context, _begin_worker, (scratch,)) as pool:
                futures = {pool.submit(compile_kernel, specs[i], _backend(chip), chip): (chip, i, path)
                           for chip, i, path in missing}  # fmt: skip
                try:
                    for future in as_completed(futures):
                        chip, index, path = futures[future]
                        done[chip, index] = future.result()
                        _write_cache(path, done[chip, index])
                        on_progress(len(done), total)
                except BrokenProcessPool:
                    raise ResourceError(
                        "a compiler process of the GPU kernels was killed, most likely for memory (1 GB each)."
                    ) from None
                finally:
                    pool.shutdown(cancel_futures=True)
    files = {}
    for target in targets:
        kind = "hsaco" if _backend(target) == "hip" else "cubin"
        files[target] = _file(target, target, kind, [done[target, i][kind] for i in wanted[target]])
    if PTX_CHIP in chips:
        files[PTX_TARGET] = _file(PTX_TARGET, PTX_CHIP, "ptx", [done[PTX_CHIP, i]["ptx"] for i in wanted[PTX_CHIP]])
    return files


def _begin_worker(scratch: str) -> None:
    prepare_worker(scratch)
    # What Triton has made in Gluon lives to the end, and an interpreter that ends says so on stderr, function by function.
    atexit.register(os._exit, 0)


def _file(target: str, arch: str, kind: str, kernels: list[Kernel]) -> KernelFile:
    for kernel in kernels:
        if (needed := kernel.shared_bytes + kernel.static_shared_bytes) > SHARED_MEMORY[arch]:
            raise IncompatibleError(
                f"--targets {target}: {kernel.op} of this model's shape needs {needed} bytes of shared memory, the chip has"
                f" {SHARED_MEMORY[arch]}; leave the target out."
            )
    return KernelFile(_backend(target), arch, kind, 64 if arch.startswith("gfx9") else 32, tuple(kernels))


def cache_directory() -> Path:
    """Return where compiled kernels are kept."""
    if own := os.environ.get("LLMPACK_CACHE"):
        return Path(own) / "kernels"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmpack/kernels"


def _sources() -> str:
    """Digest of everything that decides what a specification compiles to, but for the specification and the chip."""
    digest = hashlib.sha256(f"{triton_version()} {kernel_file.VERSION}".encode())
    package = importlib.util.find_spec("llmpack_kernels")
    folders = (package.submodule_search_locations if package else None) or []
    compiler = importlib.util.find_spec("llmpack.kernel_compiler")
    paths = sorted(path for folder in folders for path in Path(folder).glob("*.py"))
    for path in [*paths, Path((compiler and compiler.origin) or "")]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _cache_path(sources: str, spec: KernelSpec, chip: str) -> Path:
    text = json.dumps([sources, dataclasses.asdict(spec), chip], sort_keys=True)
    return cache_directory() / hashlib.sha256(text.encode()).hexdigest()


def _read_cache(path: Path) -> dict[str, Kernel] | None:
    """Return what a cache entry holds; None where there is none, or it is damaged."""
    with contextlib.suppress(OSError, IntegrityError, ValueError):
        data = path.read_bytes()
        if hashlib.sha256(data[32:]).digest() == data[:32]:
            kernels = {}
            at = 32
            while at < len(data):
                size = int.from_bytes(data[at : at + 8], "little")
                entry = kernel_file.from_bytes(data[at + 8 : at + 8 + size], str(path))
                kernels[entry.code_kind] = entry.kernels[0]
                at += 8 + size
            return kernels
    return None


def _write_cache(path: Path, kernels: dict[str, Kernel]) -> None:
    data = b""
    for kind, kernel in kernels.items():
        entry = kernel_file.to_bytes(KernelFile("", "", kind, 0, (kernel,)))
        data += len(entry).to_bytes(8, "little") + entry
    with contextlib.suppress(OSError):  # a cache that cannot be written is no cache
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(hashlib.sha256(data).digest() + data)
        os.replace(partial, path)
