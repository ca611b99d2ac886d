"""Runs ranks as a subprocess of ordinary pytest, with a deadline, and looks for processes that were left behind."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmrun import launcher

DEADLINE_S = 60.0
LEFTOVER_S = 5.0  # measured: up to 2.9 s until the last rank is gone after its mpirun was killed
_MARK = "LLMRUN_TEST_JOB"


@dataclass(frozen=True)
class Outcome:
    """How a job ended. `leftovers`: command lines of its processes that were still there LEFTOVER_S later."""

    code: int
    stdout: str
    stderr: str
    seconds: float
    leftovers: list[str]

    @property
    def errors(self) -> list[str]:
        """The lines in which llmrun reports an error; launchers add lines of their own."""
        return [line for line in self.stderr.splitlines() if line.startswith("llmrun: error")]


class RunningJob:
    """A started job; `finish` waits for it."""

    def __init__(
        self, command: Sequence[str], *, environment: dict[str, str] | None = None, stdin: str | None = None
    ) -> None:
        self._job = uuid.uuid4().hex
        self._started = time.monotonic()
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **(environment or {}), _MARK: self._job},
            start_new_session=True,
        )
        self._stdin = None if stdin is None else stdin.encode("utf-8", "surrogateescape")

    def processes(self) -> dict[int, str]:
        """Return the command lines of the job's processes, by pid; found by a mark in their environment."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                if f"{_MARK}={self._job}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue  # gone meanwhile, or somebody else's
        return found

    def rank_pid(self, rank: int) -> int:
        """Return the pid of a rank, once it runs."""
        deadline = time.monotonic() + DEADLINE_S
        wanted = {f"PMI_RANK={rank}".encode(), f"OMPI_COMM_WORLD_RANK={rank}".encode()}
        while time.monotonic() < deadline:
            for pid in self.processes():
                try:
                    if wanted & set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")):
                        return pid
                except OSError:
                    continue
            time.sleep(0.05)
        raise TimeoutError(f"no rank {rank} after {DEADLINE_S} s")

    def wait_for_output(self) -> None:
        """Wait until the job has written something, and take the first byte: it is answering by then."""
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], DEADLINE_S)[0]:
            raise TimeoutError(f"no output after {DEADLINE_S} s")
        os.read(self.process.stdout.fileno(), 1)

    def finish(self, deadline_s: float = DEADLINE_S) -> Outcome:
        """Wait for the end; past the deadline kill everything and fail."""
        try:
            out, err = self.process.communicate(self._stdin, timeout=deadline_s)
        except subprocess.TimeoutExpired:
            self.kill()
            out, err = self.process.communicate()
            raise AssertionError(f"hangs for {deadline_s} s; stdout {out!r}, stderr {err!r}") from None
        seconds = time.monotonic() - self._started
        until = time.monotonic() + LEFTOVER_S
        while (left := self.processes()) and time.monotonic() < until:
            time.sleep(0.05)
        leftovers = list(left.values())
        self.kill()
        text = [data.decode("utf-8", "replace") for data in (out, err)]
        return Outcome(self.process.returncode, text[0], text[1], seconds, leftovers)

    def kill(self) -> None:
        """Kill every process of the job."""
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def mpirun_command(num_ranks: int) -> list[str]:
    """Return the start of a command line under this environment's mpirun."""
    path, family = launcher.find_mpirun()
    return [path, *launcher.mpirun_options(family, num_ranks)]


def llmrun_command(*arguments: object) -> list[str]:
    """Return `llmrun ARGUMENTS` as this interpreter runs it."""
    return [sys.executable, "-m", "llmrun", *map(str, arguments)]


def script_command(text: str, folder: Path, *arguments: object) -> list[str]:
    """Return `mpirun -n 2 python SCRIPT ARGUMENTS`, for a script that is written into `folder`."""
    script = folder / "script.py"
    script.write_text(text)
    return [*mpirun_command(2), sys.executable, str(script), *map(str, arguments)]


def run_ranks(
    num_ranks: int,
    *arguments: object,
    environment: dict[str, str] | None = None,
    stdin: str | None = None,
    deadline_s: float = DEADLINE_S,
) -> Outcome:
    """Run `mpirun -n NUM_RANKS llmrun ARGUMENTS`."""
    command = [*mpirun_command(num_ranks), *llmrun_command(*arguments)]
    return RunningJob(command, environment=environment, stdin=stdin).finish(deadline_s)


def run_alone(
    *arguments: object,
    environment: dict[str, str] | None = None,
    stdin: str | None = None,
    deadline_s: float = DEADLINE_S,
) -> Outcome:
    """Run `llmrun ARGUMENTS` without mpirun."""
    return RunningJob(llmrun_command(*arguments), environment=environment, stdin=stdin).finish(deadline_s)


def run_script(text: str, tmp_path: Path, *arguments: object) -> Outcome:
    """Run a user's script on two ranks."""
    return RunningJob(script_command(text, tmp_path, *arguments)).finish()
