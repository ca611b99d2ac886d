"""One `KernelSpec` and one chip -> code, by Triton's own compilers: no GPU, driver or toolkit is needed.

Runs in worker processes of `kernels.py`. Triton is imported inside the functions: only who packs for GPU targets needs it.
The same specification gives the same bytes on every machine: line information, which holds paths, is left out, and
fused multiply-add is pinned.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from llmpack.kernel_file import Kernel, Parameter
from llmpack.kernel_spec import BACKEND, KernelSpec

POINTER_DIVISOR = 16  # bytes; weights start at 64, device allocations at 256
# PTX that a driver of CUDA 12.0, the oldest that the launcher takes, compiles; chips that are newer than it need newer PTX.
PTX_VERSION, NEWER_PTX_VERSIONS = 80, {"sm_100": 86, "sm_120": 87}
OVERLAP_FROM = 90  # the first of CUDA's chips with programmatic dependent launch
_SIZES = {"i32": 4, "fp32": 4}
ENVIRONMENT = {"TRITON_DISABLE_LINE_INFO": "1", "TRITON_DEFAULT_FP_FUSION": "1", "TRITON_INTERPRET": "0"}


def prepare_worker(cache_directory: str) -> None:
    """Set what Triton reads from the environment, before it is imported."""
    os.environ.update(ENVIRONMENT, TRITON_CACHE_DIR=cache_directory)
    for name in [n for n in os.environ if n.startswith(("TRITON_", "MLIR_", "LLVM_")) and n not in ENVIRONMENT]:
        if name != "TRITON_CACHE_DIR":
            del os.environ[name]


def compile_kernel(spec: KernelSpec, backend: str, arch: str) -> dict[str, Kernel]:
    """Compile for one chip.

    Args:
        spec: the function and its constants.
        backend: "cuda" or "hip".
        arch: "sm_89", "gfx1100".

    Returns:
        by kind of code: "cubin" and "ptx", or "hsaco".
    """
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

    if (own := spec.of(arch)) is None:
        raise AssertionError(f"{spec.op} {spec.constants}: there is none for {arch}")
    spec = own
    module, _, name = spec.function.partition(".")
    function = getattr(importlib.import_module(f"llmpack_kernels.{module}"), name)
    decode = importlib.import_module("llmpack_kernels.decode")
    own = {"cuda": decode.CUDA.value, "hip": decode.HIP.value}[backend]
    other = spec.on(arch)
    constexprs = {n: own if v == BACKEND else other.get(n, v) for n, v in spec.constexprs.items()}
    names = list(function.arg_names)
    if set(names) != set(spec.types) | set(constexprs):
        raise AssertionError(f"{spec.function} has the parameters {names}, the plan {[*spec.types, *constexprs]}")
    kept = [n for n in names if n in spec.types]
    warp_size = 64 if arch.startswith("gfx9") else 32
    kind = GluonASTSource if isinstance(function, GluonJITFunction) else ASTSource
    source = kind(
        function,
        {n: spec.types.get(n, "constexpr") for n in names},
        {(names.index(n),): v for n, v in constexprs.items()},
        {(names.index(n),): [["tt.divisibility", POINTER_DIVISOR]] for n in kept if spec.types[n].startswith("*")},
    )
    target = GPUTarget(backend, int(arch.removeprefix("sm_")) if backend == "cuda" else arch, warp_size)
    options = {
        "num_warps": max(1, spec.threads // warp_size),
        # AMD's shared memory is small and its pipelines hold one stage in registers.
        "num_stages": other.get("stages", spec.stages if backend == "cuda" else min(2, spec.stages)),
        "enable_fp_fusion": True,
    }
    if backend == "cuda":
        options["ptx_version"] = NEWER_PTX_VERSIONS.get(arch, PTX_VERSION)
        options["launch_pdl"] = int(arch.removeprefix("sm_")) >= OVERLAP_FROM  # read by llmpack_kernels.overlap
    with knobs.amd.scope(), knobs.nvidia.scope():
        knobs.amd.use_buffer_ops = bool(other.get("buffer_ops", 1))
        if arch != "sm_100":
            # From sm_90 on Triton takes an assembler of CUDA 13, whose cubins have a newer ABI: a driver of CUDA 12 should
            # refuse them (inferred, not tried). For sm_100 it is the one that spills nothing.
            knobs.nvidia.ptxas_blackwell = knobs.nvidia.ptxas.path
        compiled = triton.compile(source, target=target, options=options)
    metadata: Any = compiled.metadata
    parameters = [
        Parameter(n, spec.types[n], _SIZES.get(spec.types[n], 8), POINTER_DIVISOR if spec.types[n][0] == "*" else 1)
        for n in kept
    ]
    parameters += [Parameter(n, "*u8", 8) for n in ("global_scratch", "profile_scratch")]
    common: dict[str, Any] = {
        "op": spec.op,
        "constants": spec.constants,
        "function": metadata.name,
        "num_warps": metadata.num_warps,
        "shared_bytes": metadata.shared,
        "grid": spec.grid,
        "parameters": tuple(parameters),
        "num_ctas": metadata.num_ctas,
        "cooperative": bool(metadata.launch_cooperative_grid),
        "waits": "griddepcontrol.wait" in compiled.asm.get("ptx", ""),
        "global_scratch_bytes": metadata.global_scratch_size,
        "profile_scratch_bytes": metadata.profile_scratch_size,
    }
    if backend == "hip":
        registers, spills, static = amd_resources(compiled.asm["amdgcn"])
        resources = {"registers": registers, "spill_bytes": spills, "static_shared_bytes": static}
        return {"hsaco": Kernel(code=compiled.asm["hsaco"], **resources, **common)}
    registers, spills, static = nvidia_resources(compiled.asm["cubin"])
    resources = {"registers": registers, "spill_bytes": spills, "static_shared_bytes": static}
    return {
        "cubin": Kernel(code=compiled.asm["cubin"], **resources, **common),
        "ptx": Kernel(code=compiled.asm["ptx"].encode() + b"\0", **common),
    }


def nvidia_tool(name: str) -> Path:
    """Return the path of one of the tools in Triton's wheel: cuobjdump, nvdisasm."""
    import triton

    return Path(triton.__file__).parent / "backends/nvidia/bin" / name


def nvidia_resources(cubin: bytes) -> tuple[int, int, int]:
    """Return registers a thread, bytes of stack and local memory a thread (spills among them), and static shared memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [nvidia_tool("cuobjdump"), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"], found["SHARED"]


def amd_resources(assembly: str) -> tuple[int, int, int]:
    """Return vector registers (accumulation registers among them), bytes of scratch a thread, and static LDS bytes."""
    found = {name: int(value) for name, value in re.findall(r"^\s+\.(\w+):\s+(\d+)$", assembly, re.MULTILINE)}
    spilled = 4 * (found["vgpr_spill_count"] + found["sgpr_spill_count"])
    return found["vgpr_count"], max(found["private_segment_fixed_size"], spilled), found["group_segment_fixed_size"]


def triton_version() -> str | None:
    """Return Triton's version, or None where it is not installed."""
    import importlib.metadata

    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("triton")
    return None
