"""Output and terminals: whole writes, one-line errors, progress, and what a rank under mpirun may believe about its streams.

`isatty()` is wrong under mpirun (Open MPI: stdout always, MPICH: never; stdin never), so the launching `llmrun`
passes what it saw in LLMRUN_TTY, and without that a rank takes no stream for a terminal.
"""

from __future__ import annotations

import os
import re
import select
import sys
from collections.abc import Mapping

from llmrun.errors import InternalError, LlmpackError

# The last is all that `srun --mpi=pmix` sets. Open MPI's first, as launcher.py looks: a shell around it may have others.
RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def is_under_mpirun() -> bool:
    """Tell whether a launcher started this process."""
    return any(name in os.environ for name in RANK_VARIABLES)


def environment_rank() -> int:
    """Return the rank that the launcher gave this process, before MPI is initialised; 0 without a launcher."""
    return launched_rank(os.environ) or 0


def launched_rank(environment: Mapping[str, str]) -> int | None:
    """Return the rank that a launcher gave the process of an environment; None without one."""
    return next((int(environment[name]) for name in RANK_VARIABLES if environment.get(name, "").isdigit()), None)


def is_terminal(stream: str) -> bool:
    """Tell whether `stream` ("stdin", "stdout" or "stderr") is the user's terminal."""
    seen = os.environ.get("LLMRUN_TTY")
    if seen is not None:
        return stream in seen.split(",")
    return not is_under_mpirun() and os.isatty(("stdin", "stdout", "stderr").index(stream))


def harmless(text: str) -> str:
    """Replace control characters by their pictures, but for new lines and tabs: what a model writes may command a terminal."""
    return _CONTROLS.sub(lambda match: chr(0x2400 + ord(match[0])) if match[0] < " " else "\ufffd", text)


def say(text: str) -> None:
    """Write one line to standard error in one system call, so that lines of several ranks do not mix."""
    try:
        sys.stderr.flush()
        os.write(2, (text + "\n").encode("utf-8", "backslashreplace"))
    except (OSError, ValueError, AttributeError):  # closed: nobody is listening
        pass


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of `data`, waiting for room even if writing does not block: another program that shares a pipe decides that."""
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(descriptor, rest) :]
        except BlockingIOError:
            poller = select.poll()
            poller.register(descriptor, select.POLLOUT)
            poller.poll()


def error_line(error: BaseException) -> str:
    """Return the one line that reports an error; a bug of ours shows its type."""
    known = as_llmpack_error(error)
    # Names may hold anything.
    text = "".join(char if char.isprintable() else repr(char)[1:-1] for char in str(known).strip())
    return f"llmrun: error[{known.code}]: {text}"


def as_llmpack_error(error: BaseException, where: str = "") -> LlmpackError:
    """Return `error` itself, or what it means to a user."""
    if isinstance(error, LlmpackError):
        return error
    if isinstance(error, MemoryError):
        from llmrun.errors import ResourceError

        return ResourceError(f"{where}out of memory. Use fewer sequences or a shorter --max-seq-len.")
    text = " ".join(str(error).split())
    return InternalError(f"{where}{type(error).__name__}: {text} (a bug of llmrun: LLMRUN_DEBUG=1 shows the traceback)")


def show_traceback(error: BaseException) -> None:
    """Print the traceback if the user asked for it with LLMRUN_DEBUG=1."""
    if os.environ.get("LLMRUN_DEBUG") == "1":
        import traceback

        traceback.print_exception(error)


class Progress:
    """Tell of slow work on standard error: a rewritten line on a terminal, else a line for each 10 % after 5 s."""

    def __init__(self, what: str, *, is_quiet: bool) -> None:
        """Name the work in words; a quiet progress never prints."""
        import time

        self._what, self._is_quiet, self._clock = what, is_quiet, time.monotonic
        self._is_live = is_terminal("stderr")
        self._started = self._clock()
        self._shown = 0

    def __call__(self, done: int, total: int) -> None:
        """Report `done` of `total` bytes."""
        tenth = 10 if total == 0 else done * 10 // total
        if self._is_quiet or tenth == self._shown or (elapsed := self._clock() - self._started) < 0.5:
            return
        self._shown = tenth
        if self._is_live:
            end = "\r\x1b[K" if tenth == 10 else ""
            os.write(2, f"\r\x1b[Kllmrun: {self._what}: {tenth * 10} %{end}".encode())
        elif elapsed > 5:
            say(f"llmrun: {self._what}: {tenth * 10} %")
