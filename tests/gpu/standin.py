"""Builds the stand-ins and the small ONNX Runtime, and makes kernel files whose code is a name.

`environment(...)` is for a process in which the stand-ins take the drivers' place: they come first in the loader's search path.
`serve_launches` lets numpy compute what is launched.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import sys
from collections.abc import Container
from pathlib import Path
from typing import Any

from llmpack.kernel_file import Kernel, KernelFile, Parameter, to_bytes
from llmpack.kernel_plan import KernelSpec

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SOURCES = {
    "libcuda.so.1": (["gcc", "-DSTANDIN_CUDA"], "standin_driver.c"),
    "libamdhip64.so.7": (["gcc", "-DSTANDIN_HIP"], "standin_driver.c"),
    "libnccl.so.2": (["gcc"], "standin_nccl.c"),
    "librccl.so.1": (["gcc"], "standin_nccl.c"),
    "libmini_ort.so": (["g++", "-std=c++17", f"-I{ROOT / 'custom_ops'}"], "mini_ort.cpp"),
}
KINDS = {"i32": "i", "fp32": "f"}
_callbacks: list[Any] = []  # the driver holds their addresses


def build(folder: Path, *names: str) -> Path:
    """Compile stand-ins into a folder; all of them without names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or SOURCES:
        compiler, source = SOURCES[name]
        flags = ["-O1", "-g", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-fvisibility=hidden"]
        target = ["-o", str(folder / name), str(HERE / source), "-lpthread", "-ldl"]
        subprocess.run([*compiler, *flags, *target], check=True)
    return folder


def environment(folder: Path, **settings: object) -> dict[str, str]:
    """Return the environment of a process on a machine with the stand-in GPUs; settings as STANDIN_*."""
    kept = (key for key in os.environ if not key.startswith("STANDIN_") and not key.endswith("_VISIBLE_DEVICES"))
    inherited = {key: os.environ[key] for key in kept}
    own = {f"STANDIN_{key.upper()}": str(value) for key, value in settings.items()}
    path = os.pathsep.join([str(HERE), str(HERE.parent / "ops"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**inherited, "LD_LIBRARY_PATH": str(folder), "PYTHONPATH": path, **own}


def run(
    folder: Path, code: str, *arguments: object, timeout_s: float = 120, **settings: object
) -> subprocess.CompletedProcess[str]:
    """Run Python code in such a process."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(
        command, env=environment(folder, **settings), capture_output=True, text=True, timeout=timeout_s
    )


def write_kernels(path: Path, specs: list[KernelSpec], arch: str = "sm_89", **changes: Any) -> None:
    """Write such a kernel file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(to_bytes(kernels_of(specs, arch, **changes)))


def kernels_of(
    specs: list[KernelSpec], arch: str, shared_bytes: int = 0, waiting: Container[str] = (), **changes: Any
) -> KernelFile:
    """Return a kernel file with the plan's records, and code that is the function's name; "ptx_80" is for sm_80."""
    backend, kind = ("hip", "hsaco") if arch.startswith("gfx") else ("cuda", "cubin")
    if arch.startswith("ptx_"):
        arch, kind = arch.replace("ptx_", "sm_"), "ptx"
    warp_size = 64 if arch.startswith("gfx9") else 32
    kernels = []
    for spec in specs:
        types = {**spec.types, "global_scratch": "*i8", "profile_scratch": "*i8"}
        kernels.append(
            Kernel(
                op=spec.op,
                constants=spec.constants,
                function=function_name(spec),
                code=_code(function_name(spec), kind),
                num_warps=max(1, spec.threads // warp_size),
                shared_bytes=shared_bytes,
                grid=spec.grid,
                waits=spec.op in waiting,
                parameters=tuple(_parameter(name, kind) for name, kind in types.items()),
                **changes,
            )
        )
    return KernelFile(backend, arch, kind, warp_size, tuple(kernels))


def _code(name: str, kind: str) -> bytes:
    return f".version 8.0 // {name}\0".encode() if kind == "ptx" else b"\x7fELF" + name.encode()


def _parameter(name: str, kind: str) -> Parameter:
    is_pointer = kind.startswith("*")
    return Parameter(name, kind, 8 if is_pointer else 4, 16 if is_pointer else 1)


def function_name(spec: KernelSpec) -> str:
    return f"{spec.op}_{hashlib.sha256(repr(sorted(spec.constants.items())).encode()).hexdigest()[:8]}"


def serve_launches(specs: list[KernelSpec], *, is_hip: bool = False, waiting: Container[str] = ()) -> ctypes.CDLL:
    """Declare the functions to the stand-in driver and compute launches with numpy; returns the driver.

    `waiting`: operations whose kernels wait by themselves for those before (FORMAT 8.6).
    """
    import numpy_kernels

    driver = ctypes.CDLL("libamdhip64.so.7" if is_hip else "libcuda.so.1")
    driver.standin_report.restype = ctypes.c_char_p
    by_name = {function_name(spec): spec for spec in specs}
    for name, spec in by_name.items():
        kinds = "w" * (spec.op in waiting) + "".join(KINDS.get(kind, "p") for kind in spec.types.values()) + "nn"
        driver.standin_declare(name.encode(), kinds.encode())

    def launched(name: bytes, dims: Any, _count: int, values: Any) -> None:
        spec = by_name[name.decode()]
        parameters: dict[str, Any] = {**spec.constants, "grid": tuple(dims[:3])}
        for i, (parameter, kind) in enumerate(spec.types.items()):
            if kind == "fp32":
                parameters[parameter] = ctypes.c_float.from_buffer(ctypes.c_uint32(values[i] & 0xFFFFFFFF)).value
            else:
                parameters[parameter] = (
                    int(values[i]) if kind != "i32" else ctypes.c_int32(values[i] & 0xFFFFFFFF).value
                )
        try:
            numpy_kernels.KERNELS[spec.op](parameters)
        except BaseException as error:
            print(f"{spec.op}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(70)

    kind = ctypes.CFUNCTYPE(
        None, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_int, ctypes.POINTER(ctypes.c_uint64)
    )
    _callbacks.append(kind(launched))
    driver.standin_callback(_callbacks[-1])
    return driver
