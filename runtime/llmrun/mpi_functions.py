"""Hand the operator library the MPI functions it needs, without linking it to an MPI library.

In: an mpi4py communicator. Out: the `LlmpackCommunicator` of `custom_ops/llmpack_ops.h`: the values of the handles, and the
addresses of three functions in the very MPI library that mpi4py uses. This module does not import mpi4py when it is
imported (that would initialise MPI), and does not choose or load an MPI library.
"""

from __future__ import annotations

import ctypes
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
