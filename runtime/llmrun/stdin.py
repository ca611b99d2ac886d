"""Input as rank 0 sees it: standard input from the launching llmrun's pipe, from mpirun, or directly; files; UTF-8."""

from __future__ import annotations

import contextlib
import os
import select
import stat
from collections.abc import Iterator
from pathlib import Path

from llmrun import launcher
from llmrun.errors import UsageError

_POLL_S = 0.1
_MAX_LINKS = 40  # as many as Linux follows


def read_chunks() -> Iterator[bytes]:
    """Yield standard input as it arrives, until its end; on rank 0 only (another rank's read may never return).

    Raises:
        UsageError: it cannot be read.
    """
    folder = os.environ.get(launcher.LAUNCH_VARIABLE)
    if folder:
        with open(os.path.join(folder, "stdin"), "rb", buffering=0) as pipe:
            while data := pipe.read(65536):
                yield data
        with contextlib.suppress(FileNotFoundError):
            raise _unreadable(int(Path(folder, "stdin-error").read_text()))
    elif launcher.launcher_family() == launcher.OPEN_MPI:
        yield from _read_from_open_mpi()
    else:
        try:
            while data := read_descriptor(0):
                yield data
        except OSError as error:
            raise _unreadable(error.errno or 0) from None


def read_descriptor(descriptor: int) -> bytes:
    """Return what has arrived, or wait for it, even if reading does not block; empty: the end."""
    while True:
        try:
            return os.read(descriptor, 65536)
        except BlockingIOError:
            poller = select.poll()
            poller.register(descriptor, select.POLLIN)
            poller.poll()


def _unreadable(number: int) -> UsageError:
    return UsageError(f"standard input: {os.strerror(number)}.", code="E209")


def read_file(path: str) -> bytes:
    """Return a file's bytes, or those of a descriptor of what the user typed (`/dev/stdin`, bash's `<(...)`).

    Raises:
        UsageError: it cannot be read.
    """
    try:
        return Path(_as_seen_by_the_user(path)).read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}.", code="E209") from None


def _as_seen_by_the_user(path: str) -> str:
    """Return `path`, or if it leads to a descriptor of this process, that of the llmrun that launched it, if one did."""
    folder = os.environ.get(launcher.LAUNCH_VARIABLE)
    own = os.path.realpath("/proc/self/fd")
    step = path
    for _ in range(_MAX_LINKS if folder else 0):
        parent = os.path.realpath(os.path.dirname(step))
        step = os.path.join(parent, os.path.basename(step))
        if parent == own:
            return os.path.join(str(folder), "descriptors", os.path.basename(step))
        if not os.path.islink(step):
            break
        step = os.path.join(parent, os.readlink(step))
    return path


def read_lines() -> Iterator[bytes]:
    """Yield the lines of standard input without their ends."""
    rest = b""
    for data in read_chunks():
        *lines, rest = (rest + data).split(b"\n")
        yield from lines
    if rest:
        yield rest


def decode_utf8(data: bytes, where: str) -> str:
    """Return the text.

    Raises:
        UsageError: it is not UTF-8; names the offset of the first bad byte.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{where}: not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}. Convert it first.",
            code="E207",
        ) from None


def _read_from_open_mpi() -> Iterator[bytes]:
    """Read what Open MPI's mpirun forwards: it never forwards the end (measured, 5.0.11), so look at its own input."""
    quiet_polls = 0
    while True:
        ready, _, _ = select.select([0], [], [], _POLL_S)
        if ready:
            quiet_polls = 0
            if not (data := os.read(0, 65536)):
                return
            yield data
        elif _has_ended(os.getppid()):
            quiet_polls += 1
            if quiet_polls == 3:  # what mpirun had read has had time to arrive
                return


def _has_ended(pid: int) -> bool:
    """Tell whether nothing is left to read of another process's standard input."""
    path = Path(f"/proc/{pid}/fd/0")
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            fields = Path(f"/proc/{pid}/fdinfo/0").read_text().split()
            return int(fields[fields.index("pos:") + 1]) >= path.stat().st_size
        if not stat.S_ISFIFO(mode):
            return os.readlink(path) == os.devnull
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        return True  # mpirun has closed it
    except (OSError, ValueError):
        return False
    try:
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        events = dict(poller.poll(0)).get(descriptor, 0)
        return bool(events & select.POLLHUP) and not events & select.POLLIN
    finally:
        os.close(descriptor)
