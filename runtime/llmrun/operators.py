"""The operator library of this process: loads it, and turns its return codes into errors.

ONNX Runtime loads the same file by itself (`register_custom_ops_library`); both see one library with one state, so what is
set here holds for all sessions that are made from then on.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmrun.errors import IncompatibleError, PeerError, ResourceError, UsageError
from llmrun.library import cannot_load, find_library
from llmrun.manifest import OPS_VERSION
from llmrun.mpi_functions import Communicator, communicator_struct

if TYPE_CHECKING:
    from mpi4py import MPI

    from llmrun.cores import CoreShare

_best_isa: bytes | None = None  # what the library chose when it was loaded


class Operators:
    """The loaded library. `functions`: those of `llmpack_ops.h`, for the modules that call them by themselves."""

    def __init__(self) -> None:
        """Find the library and load it.

        Raises:
            IncompatibleError: it is missing, cannot be loaded here, or has operators of another version.
        """
        self.path = find_library()
        try:
            self.functions = load_library(self.path)
        except OSError as error:
            raise cannot_load(self.path, error) from None
        except AttributeError as error:
            raise IncompatibleError(
                f"{self.path}: of another llmpack: {error}. Install llmpack again.", code="E416"
            ) from None
        self.version: int = self.functions.llmpack_ops_version()
        if self.version != OPS_VERSION:
            raise IncompatibleError(
                f"{self.path} has operator version {self.version}, this llmrun expects {OPS_VERSION}. Install llmpack again.",
                code="E416",
            )

    @property
    def isa(self) -> str:
        """Instruction set of the CPU kernels."""
        return self.functions.llmpack_ops_isa().decode()

    @property
    def isas(self) -> list[str]:
        """Instruction sets that this machine can run, best first."""
        return self.functions.llmpack_ops_isas().decode().split(", ")

    @property
    def transport(self) -> str:
        """How the collectives travel between the ranks."""
        return self.functions.llmpack_ops_transport().decode()

    @property
    def last_error(self) -> str:
        """What the last function that failed has to say."""
        return self.functions.llmpack_ops_last_error().decode("utf-8", "replace")

    def choose_isa(self, name: str | None) -> str:
        """Have sessions that are made from now on compute with an instruction set, the machine's best if None; return it.

        Raises:
            UsageError: this machine does not have it.
        """
        global _best_isa
        best = _best_isa = _best_isa or self.isa.encode()
        isa = best if name is None else name.encode()
        if self.functions.llmpack_ops_set_isa(isa) != 0:
            raise UsageError(f"--isa {name}: {self.last_error.removeprefix(f'llmpack_ops_set_isa: {name} is ')}")
        return isa.decode()

    def set_communicator(self, communicator: MPI.Intracomm) -> None:
        """Let the collectives use a communicator, which nobody else uses and which outlives them.

        Raises:
            IncompatibleError: the library refuses it.
        """
        described = communicator_struct(communicator)
        if self.functions.llmpack_ops_set_communicator(ctypes.byref(described)) != 0:
            raise IncompatibleError(f"operator library: {self.last_error}", code="E416")

    def share_memory(self) -> None:
        """Let the collectives go through shared memory, by MPI where that cannot be; every rank calls it.

        Raises:
            PeerError: the ranks could not agree.
        """
        if self.functions.llmpack_ops_share_memory() < 0:
            raise PeerError(f"operator library: {self.last_error}")

    @contextlib.contextmanager
    def running_on(self, share: CoreShare) -> Iterator[None]:
        """Let the sessions made meanwhile run their operators on the threads and cores of `share`.

        Raises:
            ResourceError: the system refuses a thread.
        """
        cores = (ctypes.c_int32 * len(share.cores))(*share.cores) if share.cores else None
        if self.functions.llmpack_ops_use_threads(share.num_threads, cores) != 0:
            raise ResourceError(f"{self.last_error} Use fewer --threads.")
        try:
            yield
        finally:
            self.functions.llmpack_ops_use_threads(0, None)

    def collective_state(self) -> tuple[int, int]:
        """Return how many collectives this rank has begun and ended."""
        begun, ended = ctypes.c_uint64(), ctypes.c_uint64()
        self.functions.llmpack_ops_collective_state(ctypes.byref(begun), ctypes.byref(ended))
        return begun.value, ended.value


def load_library(path: str | os.PathLike[str]) -> ctypes.CDLL:
    """Load the operator library and declare the functions of `llmpack_ops.h`.

    Raises:
        OSError: the file is missing, or no library for this machine.
    """
    library = ctypes.CDLL(os.fspath(path))
    library.llmpack_ops_version.argtypes = []
    library.llmpack_ops_version.restype = ctypes.c_int
    library.llmpack_ops_isa.argtypes = []
    library.llmpack_ops_isa.restype = ctypes.c_char_p
    library.llmpack_ops_isas.argtypes = []
    library.llmpack_ops_isas.restype = ctypes.c_char_p
    library.llmpack_ops_set_isa.argtypes = [ctypes.c_char_p]
    library.llmpack_ops_set_isa.restype = ctypes.c_int
    library.llmpack_ops_weight_fetch.argtypes = []
    library.llmpack_ops_weight_fetch.restype = ctypes.c_char_p
    library.llmpack_ops_set_weight_fetch.argtypes = [ctypes.c_char_p]
    library.llmpack_ops_set_weight_fetch.restype = ctypes.c_int
    library.llmpack_ops_use_threads.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_int32)]
    library.llmpack_ops_use_threads.restype = ctypes.c_int
    library.llmpack_ops_set_communicator.argtypes = [ctypes.POINTER(Communicator)]
    library.llmpack_ops_set_communicator.restype = ctypes.c_int
    library.llmpack_ops_share_memory.argtypes = []
    library.llmpack_ops_share_memory.restype = ctypes.c_int
    library.llmpack_ops_transport.argtypes = []
    library.llmpack_ops_transport.restype = ctypes.c_char_p
    library.llmpack_ops_all_reduce.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    library.llmpack_ops_all_reduce.restype = ctypes.c_int
    library.llmpack_ops_all_gather.argtypes = [ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3]
    library.llmpack_ops_all_gather.restype = ctypes.c_int
    library.llmpack_ops_weigh_runs.argtypes = [ctypes.c_void_p, ctypes.c_int64, *[ctypes.c_float] * 2, ctypes.c_void_p]
    library.llmpack_ops_weigh_runs.restype = None
    library.llmpack_ops_find_above.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p]
    library.llmpack_ops_find_above.restype = ctypes.c_int64
    counter = ctypes.POINTER(ctypes.c_uint64)
    library.llmpack_ops_collective_state.argtypes = [counter, counter]
    library.llmpack_ops_collective_state.restype = None
    library.llmpack_ops_profile.argtypes = [ctypes.c_int]
    library.llmpack_ops_profile.restype = ctypes.c_int
    library.llmpack_ops_profile_read.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p), counter, counter]
    library.llmpack_ops_profile_read.restype = ctypes.c_int
    _declare_gpu(library)
    library.llmpack_ops_last_error.argtypes = []
    library.llmpack_ops_last_error.restype = ctypes.c_char_p
    return library


def _declare_gpu(library: ctypes.CDLL) -> None:
    text, size, number = ctypes.c_char_p, ctypes.c_int64, ctypes.c_int
    library.llmpack_ops_gpu_probe.argtypes = [number, text, size]
    library.llmpack_ops_gpu_free_bytes.argtypes = [number, number, ctypes.POINTER(size)]
    library.llmpack_ops_gpu_measure.argtypes = [number, number, number, text, size]
    library.llmpack_ops_gpu_open.argtypes = [ctypes.c_void_p]
    library.llmpack_ops_gpu_close.argtypes = []
    library.llmpack_ops_gpu_allocate.argtypes = [size, ctypes.POINTER(ctypes.c_void_p)]
    library.llmpack_ops_gpu_free.argtypes = [ctypes.c_void_p]
    library.llmpack_ops_gpu_fill.argtypes = [ctypes.c_void_p, number, size]
    library.llmpack_ops_gpu_share.argtypes = []
    library.llmpack_ops_gpu_transport.argtypes = [ctypes.POINTER(number)]
    library.llmpack_ops_gpu_transport.restype = text
    library.llmpack_ops_gpu_time_all_reduce.argtypes = [size, size, number, ctypes.POINTER(ctypes.c_double)]
