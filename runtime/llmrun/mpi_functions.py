"""Hand the operator library the MPI functions it needs, without linking it to an MPI library.

In: an mpi4py communicator. Out: the `LlmpackCommunicator` of `custom_ops/llmpack_ops.h`: the values of the handles, and the
addresses of three functions in the very MPI library that mpi4py uses. This module does not import mpi4py when it is
imported (that would initialise MPI), and does not choose or load an MPI library.
"""

from __future__ import annotations

import ctypes
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpi4py import MPI


class Communicator(ctypes.Structure):
    """`LlmpackCommunicator`, member by member."""

    _fields_ = (
        ("struct_size", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("size", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("comm", ctypes.c_ssize_t),
        ("byte_type", ctypes.c_ssize_t),
        ("allgather", ctypes.c_void_p),
        ("alltoall", ctypes.c_void_p),
        ("error_string", ctypes.c_void_p),
    )


def communicator_struct(comm: MPI.Intracomm) -> Communicator:
    """Describe a communicator to the operator library.

    Args:
        comm: used by nobody else (a duplicate), so that the library's messages meet no others. Its error handler is
            set to MPI_ERRORS_RETURN: the library turns return codes into errors of the operator. It must outlive the use.
    Returns:
        What `llmpack_ops_set_communicator` takes; the library copies it.
    """
    from mpi4py import MPI

    comm.Set_errhandler(MPI.ERRORS_RETURN)
    # A symbol is looked up in mpi4py's module and then in what that is linked to: the functions that mpi4py itself calls.
    functions = ctypes.CDLL(MPI.__file__)

    def address(name: str) -> int | None:
        return ctypes.cast(getattr(functions, name), ctypes.c_void_p).value

    return Communicator(
        struct_size=ctypes.sizeof(Communicator),
        rank=comm.Get_rank(),
        size=comm.Get_size(),
        comm=MPI._handleof(comm),
        byte_type=MPI._handleof(MPI.BYTE),
        allgather=address("MPI_Allgather"),
        alltoall=address("MPI_Alltoall"),
        error_string=address("MPI_Error_string"),
    )


def load_library(path: str | os.PathLike[str]) -> ctypes.CDLL:
    """Load the operator library and declare the functions of `llmpack_ops.h`.

    ONNX Runtime loads the same file by itself (`register_custom_ops_library`); both see one library with one state.

    Raises:
        OSError: the file is missing, or no library for this machine.
    """
    library = ctypes.CDLL(os.fspath(path))
    library.llmpack_ops_version.argtypes = []
    library.llmpack_ops_version.restype = ctypes.c_int
    library.llmpack_ops_isa.argtypes = []
    library.llmpack_ops_isa.restype = ctypes.c_char_p
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
    library.llmpack_ops_gpu_share.argtypes = []
    library.llmpack_ops_gpu_transport.argtypes = [ctypes.POINTER(number)]
    library.llmpack_ops_gpu_transport.restype = text
    library.llmpack_ops_gpu_time_all_reduce.argtypes = [size, size, number, ctypes.POINTER(ctypes.c_double)]
