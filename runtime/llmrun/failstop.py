"""The end of a rank that cannot end in order: one line, then the process, and with it the job.

An uncaught exception or `sys.exit` on one rank leaves the others waiting for ever (measured, both MPIs), and a
handler written in Python does not run while the main thread is inside a long step. So signals are read from a pipe by
a thread, exceptions that nobody caught end the process, and `os._exit` with a code other than 0 makes either mpirun
end the other ranks.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

from llmrun import console, launcher

if TYPE_CHECKING:
    from llmrun.peers import Peer

_last_actions: list[Callable[[int], None]] = []
_leaving = threading.RLock()  # taken once and for all: whoever else would leave waits for the end


def before_leaving(action: Callable[[int], None]) -> None:
    """Have `leave` call `action` with the exit code; it must be quick."""
    _last_actions.append(action)


def leave(code: int) -> NoReturn:
    """End this process at once, but for what `before_leaving` asked; a job's other ranks end with it."""
    _leaving.acquire()
    launcher.note_exit_code(code or 1)
    while _last_actions:
        with contextlib.suppress(Exception):
            _last_actions.pop()(code or 1)
    os._exit(code or 1)


def take_along(find: Callable[[], Sequence[Peer]]) -> None:
    """Have other ranks of this host killed two seconds after `leave`, and then their launcher, should it not end them.

    `find`: names them when it comes to that. Both MPIs' launchers now and then do not see that a rank has left, or wait
    for ever when all have (tests/benchmarks/LOG.md). Theirs has ten seconds, then SIGTERM, then SIGKILL; not if a program
    of the user's stands between it and this rank, which may have more to do.
    """

    def kill(_code: int) -> None:
        from llmrun.peers import process_started, rank_of_process

        pids = [peer.pid for peer in find() if process_started(peer.pid) == peer.started]
        parent = os.getppid()
        is_launcher = launcher.launcher_family() is not None and rank_of_process(parent) is None
        _kill_if_still_there(pids, parent if is_launcher else 0)

    before_leaving(kill)


def _kill_if_still_there(pids: Sequence[int], parent: int) -> None:
    import subprocess

    script = """
        there() { left=; for pid; do grep -qs '^State:.[^ZX]' /proc/$pid/status && left="$left $pid"; done; [ "$left" ]; }
        wait_for() { tries=$1; shift; while there "$@" && [ $tries -gt 0 ]; do sleep 0.2; tries=$((tries - 1)); done; }
        parent=$1; shift
        wait_for 10 "$@"; there "$@" && kill -9 $left
        [ $parent -gt 1 ] || exit 0
        wait_for 50 $parent; there $parent && kill $parent
        wait_for 10 $parent; there $parent && kill -9 $parent"""
    nowhere = subprocess.DEVNULL
    command = ["/bin/sh", "-c", script, "sh", str(parent), *map(str, pids)]
    subprocess.Popen(command, stdin=nowhere, stdout=nowhere, stderr=nowhere, start_new_session=True)


def outlive_launcher() -> None:
    """Go on in a child process, out of the launcher's reach, so that rank 0 of a server can say its last words.

    When a rank is lost, MPICH's proxy kills the others at once, by their process groups, which they lead and cannot
    leave. So the rank's own process only waits: it passes signals on, and ends as its child does. If it is killed, the
    child is told by SIGUSR1 (`Signals`). To be called before threads, MPI and ONNX Runtime.
    """
    parent = os.getpid()
    launcher.die_with_parent(signal.SIGKILL)
    child = os.fork()
    if child == 0:
        os.setsid()
        signal.signal(signal.SIGUSR1, lambda *_: None)
        launcher.die_with_parent(signal.SIGUSR1)
        if os.getppid() != parent:
            leave(6)
        return
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _: os.kill(child, received))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(parent, -code)
    os._exit(code)


def install_hooks(rank: int, size: int, *, keep_traceback: bool) -> None:
    """Make an exception that nobody catches, on any thread, end the job.

    `keep_traceback`: a user's own script wants its traceback; the command line wants one line.
    """
    where = f"rank {rank}: " if size > 1 else ""

    def end(error: BaseException) -> None:
        known = console.as_llmpack_error(error, where)
        if keep_traceback and known is not error:
            sys.__excepthook__(type(error), error, error.__traceback__)
        else:
            console.show_traceback(error)
            console.say(console.error_line(known))
        leave(known.exit_code)

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, KeyboardInterrupt):
            leave(130)
        end(error.with_traceback(trace))

    def thread_hook(arguments: threading.ExceptHookArgs) -> None:
        if arguments.exc_value is not None and not isinstance(arguments.exc_value, SystemExit):
            end(arguments.exc_value)

    sys.excepthook = hook
    threading.excepthook = thread_hook


class Signals:
    """SIGINT and SIGTERM end the process with 130 and 143; while `answering`, SIGINT only sets `stop_answer`."""

    def __init__(self) -> None:
        """Prepare; `install` takes effect."""
        self.stop_answer = threading.Event()
        self._is_answering = False
        self._drain: Callable[[], None] | None = None
        self._is_deaf = False

    def install(self) -> None:
        """Take over SIGINT, SIGTERM and SIGHUP; from the main thread."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader,), name="signals", daemon=True).start()

    def answering(self) -> _Answering:
        """Return a context in which SIGINT stops the answer and not the program."""
        return _Answering(self)

    @contextlib.contextmanager
    def draining(self, drain: Callable[[], None], seconds: float) -> Iterator[None]:
        """In this context the first SIGINT or SIGTERM calls `drain`; the process then ends by itself, within `seconds`.

        Tells the launching llmrun, if there is one, whom to signal and how long to wait.
        """
        self._drain = drain
        folder = os.environ.get(launcher.LAUNCH_VARIABLE)
        if folder:
            launcher.note_draining(folder, os.getpid(), seconds)
        yield
        self._drain = None

    def ignore(self) -> None:
        """Leave SIGINT and SIGTERM to rank 0, whom the same signal reaches."""
        self._is_deaf = True

    def _watch(self, reader: int) -> None:
        while data := os.read(reader, 1):
            number = data[0]
            if number == signal.SIGUSR1:
                console.say(
                    "llmrun: error[E602]: another rank, or the launcher of this one, is gone; the job has ended."
                )
                leave(6)
            if number == signal.SIGINT and self._is_answering and not self.stop_answer.is_set():
                self.stop_answer.set()
            elif number in (signal.SIGINT, signal.SIGTERM) and self._is_deaf:
                continue
            elif number in (signal.SIGINT, signal.SIGTERM) and self._drain is not None:
                drain, self._drain = self._drain, None
                drain()
            elif number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                os._exit(128 + number)  # without a note: a launcher also sends SIGTERM to the survivors of a lost rank


class _Answering:
    """See `Signals.answering`; tells the launching llmrun, if there is one, whom to interrupt."""

    def __init__(self, signals: Signals) -> None:
        self._signals = signals
        folder = os.environ.get(launcher.LAUNCH_VARIABLE)
        self._note = os.path.join(folder, "answering") if folder else None

    def __enter__(self) -> None:
        self._signals.stop_answer.clear()
        self._signals._is_answering = True
        if self._note:
            with open(self._note, "w") as file:
                file.write(str(os.getpid()))

    def __exit__(self, *_: object) -> None:
        if self._note:
            os.unlink(self._note)
        self._signals._is_answering = False
