"""`llmrun ARTIFACT` typed without mpirun: starts `mpirun -n SHARDS llmrun ARTIFACT` of the same environment, and waits.

Its ranks talk to us directly (`llmrun.launcher` says why), through the files of a folder: `arguments` (what was typed:
mpirun would take a ":" among them for the end of the program's, and others could read keys on the command line),
`descriptors` (a link to ours), `stdin`, `stdout` and `stderr` (pipes), `stdin-error` (errno, if stdin cannot be read),
`started`, `answering` (rank 0's pid while Ctrl-C is to stop an answer only), `draining` (rank 0's pid, and the seconds
that it may take to end in order) and `exit-code` (the job's own). What mpirun itself has to say is shown only if no rank
explained the end.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmrun import console, stdin
from llmrun.errors import ResourceError
from llmrun.launcher import (
    LAUNCH_VARIABLE,
    MPICH,
    die_with_parent,
    find_mpirun,
    mpirun_environment,
    mpirun_options,
    write_arguments,
)

KILL_AFTER_S = 5.0
ENDS_WITHIN_S = 10.0  # mpirun, once a rank has said how the job ends
FAREWELL_S = 3.0
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_FATAL_SIGNALS = {
    signal.SIGKILL,
    signal.SIGSEGV,
    signal.SIGBUS,
    signal.SIGABRT,
    signal.SIGILL,
    signal.SIGFPE,
    signal.SIGTERM,
}


def private_folder() -> tempfile.TemporaryDirectory[str]:
    """Return a context: a folder of this user alone, for what ranks and the llmrun that launched them tell each other.

    Raises:
        ResourceError: there is no place for it.
    """
    try:
        return tempfile.TemporaryDirectory(prefix="llmrun-")
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        raise ResourceError(
            f"no temporary folder: {reason}. Set TMPDIR to one that can be written to.", code="E507"
        ) from None


def rank_command(num_ranks: int) -> list[str]:
    """Return how ranks of this host are started, a single one without mpirun, which is looked for.

    Raises:
        IncompatibleError: there is no mpirun of this environment.
        ResourceError: it could not enter the working folder.
    """
    command = [sys.executable, "-P", "-m", "llmrun"]  # -P: no modules of the folder that we happen to be in
    if num_ranks == 1:
        return command
    mpirun, family = find_mpirun()
    _expect_working_folder(family)
    return [mpirun, *mpirun_options(family, num_ranks), *command]


def _expect_working_folder(family: str) -> None:
    """Refuse a folder that was left to us, by `sudo` say, and that mpirun, which enters it by its name, cannot enter.

    Raises:
        ResourceError: this user may not enter it, or it was deleted and mpirun is Open MPI's; MPICH's does without.
    """
    try:
        os.stat(os.path.join(os.getcwd(), "."))
    except FileNotFoundError:
        if family == MPICH:
            return
        what = "was deleted"
    except PermissionError:
        what = "may not be entered by this user"
    else:
        return
    raise ResourceError(f"the working folder {what}, and mpirun must enter it. `cd` to another one.", code="E508")


def start_ranks(
    command: Sequence[str], arguments: Sequence[str], folder: str, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start `llmrun ARGUMENTS` on ranks of this host.

    Args:
        command: of `rank_command`.
        arguments: of llmrun's command line.
        folder: empty; gets the pipes and notes through which the ranks talk to us.
        environment: variables to add.
    """
    write_arguments(folder, arguments)
    os.symlink(f"/proc/{os.getpid()}/fd", os.path.join(folder, "descriptors"))
    for name in ("stdin", "stdout", "stderr"):
        os.mkfifo(os.path.join(folder, name), 0o600)
    streams = [name for fd, name in enumerate(("stdin", "stdout", "stderr")) if _isatty(fd)]
    variables = {
        **mpirun_environment(),
        **(environment or {}),
        "LLMRUN_TTY": ",".join(streams),
        LAUNCH_VARIABLE: folder,
    }
    with open(os.path.join(folder, "mpirun.log"), "wb") as log:
        # Its own session: a terminal's Ctrl-C must reach this parent only, which decides what it means.
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=variables,
            start_new_session=True,
            preexec_fn=_begin_child,  # safe: no thread has been started yet
        )
    if command[0] != sys.executable:
        _start_thread(_end_late, child, Path(folder, "exit-code"))
    return child


def _begin_child() -> None:
    die_with_parent()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)


def _start_thread(target: Callable[..., None], *arguments: Any) -> threading.Thread:
    """Start a thread that leaves signals to the main one, whose waiting at a prompt they must interrupt."""
    thread = threading.Thread(target=target, args=arguments, daemon=True)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        thread.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return thread


def _end_late(child: subprocess.Popen[bytes], note: Path) -> None:
    """Kill an mpirun that does not see that its job has ended, as Open MPI's now and then, when all ranks have left."""
    while child.poll() is None:
        if not note.exists():
            time.sleep(1)
            continue
        try:
            child.wait(ENDS_WITHIN_S)
        except subprocess.TimeoutExpired:
            child.kill()


def run_job(num_ranks: int, arguments: Sequence[str]) -> int:
    """Run `llmrun ARGUMENTS` on `num_ranks` ranks of this host and wait.

    SIGINT and SIGTERM end the job, or only the answer while rank 0 of a chat says so, or let rank 0 of a server end it.

    Returns:
        the job's exit code; 6 if a rank was killed by a signal or vanished.
    """
    with private_folder() as folder, contextlib.ExitStack() as stack:
        command = rank_command(num_ranks)
        # Until somebody passes signals on: no rank is left behind.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)
        try:
            child = start_ranks(command, arguments, folder)
            signals = stack.enter_context(_SignalForwarder(child, Path(folder)))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        pumps = [OutputPump(os.path.join(folder, name), fd) for fd, name in ((1, "stdout"), (2, "stderr"))]
        for pump in pumps:
            pump.start()
        _start_thread(_pump_stdin, folder)
        code = child.wait()
        _wait_for_server(folder)
        for pump in pumps:
            pump.finish(lambda: signals.received is not None)
        stack.close()
        if signals.received is not None and not (signals.is_draining and Path(folder, "exit-code").exists()):
            return 128 + signals.received
        code = job_exit_code(code, Path(folder, "exit-code"), Path(folder, "mpirun.log"))
        if (failure := pumps[0].failure) is not None and code == 0:
            lost = ResourceError(f"standard output: {failure.strerror}.", code="E503")
            console.say(console.error_line(lost))
            return lost.exit_code
        return code


def _wait_for_server(folder: str) -> None:
    """Give rank 0 of a server, which outlives its launcher, the time for its last words; then end it."""
    until = time.monotonic() + FAREWELL_S
    with contextlib.suppress(OSError, ValueError, ProcessLookupError):
        pid = int(Path(folder, "draining").read_text().split()[0])
        mark = f"{LAUNCH_VARIABLE}={folder}".encode()
        while mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):  # empty for one that has ended
            if time.monotonic() > until:
                os.kill(pid, signal.SIGKILL)
                return
            time.sleep(0.02)


def job_exit_code(code: int, note: Path, log: Path) -> int:
    """Return how the job ended: as a rank said, or else 6, with what mpirun's code and log say about a lost rank."""
    try:
        return int(note.read_text())
    except (OSError, ValueError):
        pass
    number = -code if code < 0 else code - 128 if code > 128 else code
    if not 0 <= code < 8 and number in _FATAL_SIGNALS:
        by_whom = " (out of memory, or somebody's kill)" if number in (signal.SIGKILL, signal.SIGTERM) else ""
        what = f"a rank was killed by {signal.Signals(number).name}{by_whom}"
    elif (note.parent / "started").exists():
        what = "a rank left before the work was done"
    else:
        console.say(log.read_text("utf-8", "replace").strip())
        what = f"mpirun ended with {code}, and no rank said why"
    console.say(f"llmrun: error[E602]: {what}; the job has ended.")
    return 6


class OutputPump:
    """Copies a pipe of the ranks to a descriptor of ours on a thread; if nobody reads that, they are told by a broken pipe."""

    def __init__(self, pipe: str, descriptor: int) -> None:
        self.failure: OSError | None = None  # why our descriptor takes no more; a reader that left is no failure
        self._descriptor = descriptor
        self._reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        self._is_over = threading.Event()

    def start(self) -> None:
        """Begin to copy."""
        self._thread = _start_thread(self._pump)

    def finish(self, is_hurried: Callable[[], bool] = lambda: False) -> None:
        """Copy the rest; the writer is gone. Once `is_hurried`, whoever reads has FAREWELL_S to take it."""
        self._is_over.set()
        left_s = FAREWELL_S
        while self._thread.is_alive() and left_s > 0:
            self._thread.join(0.1)
            left_s -= 0.1 * is_hurried()

    def _pump(self) -> None:
        poller = select.poll()
        poller.register(self._reader, select.POLLIN)
        try:
            while True:
                is_over = self._is_over.is_set()
                events = poller.poll(100)
                data = os.read(self._reader, 65536) if events else b""
                if not data and is_over:
                    return
                if not data and events:  # the writer has closed, or not yet opened
                    self._is_over.wait(0.1)
                console.write_all(self._descriptor, data)
        except BrokenPipeError:
            pass
        except OSError as error:
            self.failure = error
        finally:
            os.close(self._reader)


def _isatty(descriptor: int) -> bool:
    try:
        return os.isatty(descriptor)
    except OSError:
        return False


def _pump_stdin(folder: str) -> None:
    """Copy standard input into the pipe once rank 0 has opened it, and close it at the end; note why if it is no end."""
    pipe = os.path.join(folder, "stdin")
    with contextlib.suppress(OSError), open(pipe, "wb", buffering=0) as sink:  # waits for a reader, who may leave
        while data := _read_stdin(folder):
            sink.write(data)


def _read_stdin(folder: str) -> bytes:
    try:
        return stdin.read_descriptor(0)
    except OSError as error:
        Path(folder, "stdin-error").write_text(str(error.errno))
        return b""


class _SignalForwarder:
    """While entered, passes SIGINT and SIGTERM on to the job; remembers the one that ended it."""

    def __init__(self, child: subprocess.Popen[bytes], folder: Path) -> None:
        self._child, self._folder = child, folder
        self.is_draining = False
        self._previous: dict[int, object] = {}
        self.received: int | None = None

    def __enter__(self) -> _SignalForwarder:
        for number in _PASSED_ON:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                self._previous[number] = signal.signal(number, self._forward)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _forward(self, number: int, _frame: object) -> None:
        if number == signal.SIGINT and self.received is None:
            with contextlib.suppress(OSError, ValueError):  # rank 0 stops its answer, nothing else ends
                os.kill(int((self._folder / "answering").read_text()), signal.SIGINT)
                return
        if self.received is None and number != signal.SIGHUP:
            with contextlib.suppress(OSError, ValueError):
                pid, seconds = (self._folder / "draining").read_text().split()
                os.kill(int(pid), signal.SIGTERM)
                self.received, self.is_draining = number, True
                late = float(seconds) + KILL_AFTER_S
                threading.Thread(target=self._kill_late, args=(late,), daemon=True).start()
                return
        if self.received is None:
            self.received = number
            threading.Thread(target=self._kill_late, args=(KILL_AFTER_S,), daemon=True).start()
        self._child.send_signal(signal.SIGTERM)

    def _kill_late(self, seconds: float) -> None:
        try:
            self._child.wait(seconds)
        except subprocess.TimeoutExpired:
            self._child.kill()
