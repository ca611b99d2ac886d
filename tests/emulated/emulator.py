"""The operator library for aarch64, built by a cross compiler and run by qemu-user, for tests on another machine.

`Emulator` answers what the tests ask of ONNX Runtime and of the library; host.cpp, its other half, runs on the emulated
machine. Tests say what is missing where there is no cross compiler or emulator, and are skipped.
"""

from __future__ import annotations

import fcntl
import shutil
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
BUILD = ROOT / ".build/aarch64"
COMPILER, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64"
# With dot products and nothing later than Armv8.2: an instruction that such a machine lacks ends the emulation.
WITH_DOT_PRODUCTS, WITHOUT = "cortex-a76", "cortex-a72"
# enum ONNXTensorElementDataType
ELEMENT_TYPES = {"float32": 1, "uint8": 2, "int32": 6, "int64": 7, "float16": 10}


def missing() -> str | None:
    """Say what must be installed to emulate; None if nothing is missing."""
    absent = [name for name in (COMPILER, QEMU) if shutil.which(name) is None]
    if not absent:
        return None
    return f"{' and '.join(absent)} not found: on Debian, apt-get install g++-aarch64-linux-gnu qemu-user"


def build() -> None:
    """Cross-compile the library and the host, as far as they have changed; tests side by side do it one after another."""
    tools = Path(sys.executable).parent
    cmake = shutil.which("cmake", path=tools) or "cmake"
    generator = ["-G", "Ninja"] if shutil.which("ninja", path=tools) or shutil.which("ninja") else []
    if ninja := shutil.which("ninja", path=tools):
        generator.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")
    target = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={COMPILER}"]
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (
            [cmake, "-S", ROOT / "custom_ops", "-B", BUILD, *generator, *target],
            [cmake, "--build", BUILD, "--target", "emulated_host"],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, f"{command}:\n{done.stdout}{done.stderr}"


def machine_root() -> Path:
    """Where the cross compiler's own C library is, for the emulator to find it."""
    name = "-print-file-name=libc.so.6"
    found = subprocess.run([COMPILER, name], capture_output=True, text=True, check=True).stdout.strip()
    return Path(found).resolve().parents[1]


class EmulatedError(Exception):
    """What the library said."""


class Emulator:
    """The library in a process of the emulated machine."""

    def __init__(self, cpu: str = WITH_DOT_PRODUCTS) -> None:
        self._process = subprocess.Popen(
            [QEMU, "-cpu", cpu, "-L", machine_root(), BUILD / "emulated_host", BUILD / "libllmpack_ops.so"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def isa(self) -> str:
        self._ask("isa")
        return self._answer().decode()

    def set_isa(self, name: str) -> None:
        self._ask("set_isa", name)

    def run(
        self,
        op: str,
        inputs: Mapping[str, np.ndarray | None],
        outputs: int,
        attributes: Mapping[str, Any],
        *,
        name: str = "the_node",
        threads: int = 1,
    ) -> list[np.ndarray]:
        """Run one operator; an input that is None is missing. What it writes into its inputs is written into these arrays.

        Raises:
            EmulatedError: the operator refused, or failed.
        """
        integers = {k: v for k, v in attributes.items() if isinstance(v, int)}
        floats = {k: v for k, v in attributes.items() if isinstance(v, float)}
        request: list[Any] = [op, name, len(integers)]
        for key, value in integers.items():
            request += [key, value]
        request.append(len(floats))
        for key, value in floats.items():
            request += [key, value]
        request.append(len(inputs))
        for array in inputs.values():
            request += [0] if array is None else [ELEMENT_TYPES[array.dtype.name], array.ndim, *array.shape, array]
        self._ask("run", *request, outputs, threads)
        results = []
        for _ in range(outputs):
            shape = np.frombuffer(self._answer(), np.int64)
            results.append(np.frombuffer(self._answer(), np.float32).reshape(shape).copy())
        for array in (array for array in inputs.values() if array is not None):
            after = np.frombuffer(self._answer(), array.dtype).reshape(array.shape)
            if not np.array_equal(after.view(np.uint8), np.ascontiguousarray(array).view(np.uint8)):
                array[...] = after
        return results

    def pack(self, numbers: list[int], arrays: list[bytes]) -> tuple[int, bytes, bytes]:
        """Return llmpack_ops_pack_rows' code, weight and scales; `numbers` and `arrays` as host.cpp reads them."""
        self._ask("pack", *numbers, *arrays)
        return int(self._answer()), self._answer(), self._answer()

    def product(self, numbers: list[int], arrays: list[bytes]) -> tuple[int, bytes]:
        """Return llmpack_ops_packed_product's code and y."""
        self._ask("product", *numbers, *arrays)
        return int(self._answer()), self._answer()

    def ranks(self, x: np.ndarray, *, shares_memory: bool) -> tuple[np.ndarray, np.ndarray]:
        """Run AllReduce and AllGather in len(x) processes of the emulated machine; x: [ranks, n], float32.

        Returns:
            What each rank got: sums [ranks, n], and rows side by side [ranks, ranks * n].
        """
        self._ask("ranks", len(x), int(shares_memory), x)
        sums, gathered = (np.frombuffer(self._answer(), np.float32) for _ in range(2))
        return sums.reshape(x.shape), gathered.reshape(len(x), -1)

    def _ask(self, what: str, *arguments: Any) -> None:
        parts = []
        for argument in (what, *arguments):
            if isinstance(argument, int):
                parts.append(struct.pack("<q", argument))
            elif isinstance(argument, float):
                parts.append(struct.pack("<d", argument))
            else:
                is_array = isinstance(argument, np.ndarray)
                data = argument.tobytes() if is_array else argument.encode() if isinstance(argument, str) else argument
                parts.append(struct.pack("<q", len(data)) + data)
        assert self._process.stdin is not None
        self._process.stdin.write(b"".join(parts))
        self._process.stdin.flush()
        if error := self._answer().decode():
            raise EmulatedError(error)

    def _answer(self) -> bytes:
        assert self._process.stdout is not None
        head = self._process.stdout.read(8)
        if len(head) < 8:
            raise RuntimeError(f"the emulated machine ended, status {self._process.wait()}")
        return self._process.stdout.read(struct.unpack("<q", head)[0])
