"""`llmrun chat` with the demo model in a pseudo-terminal, and the keys of one."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from harness import _MARK
from terminal import Terminal

UP, LEFT, HOME, CTRL_A, CTRL_C, CTRL_D, BACKSPACE = "\x1b[A", "\x1b[D", "\x1b[H", "\x01", "\x03", "\x04", "\x7f"
# The second token takes 3 s: a fast machine gives 450 before a key is pressed.
SLOW_ANSWER = {"LLMRUN_FAULT": "0:decode:slow"}
STATS = re.compile(r"\[\d+ tokens?(, [\d.]+ tokens/s)?, first after [\d.]+ s.*\]")


class Chat(Terminal):
    """A chat with the demo model; each has its own home."""

    def __init__(self, home: Path, *arguments: object, environment: dict[str, str] | None = None) -> None:
        self.mark = f"{home}"
        command = [sys.executable, "-m", "llmrun", *map(str, arguments), "--temperature", "0"]
        variables = {"XDG_STATE_HOME": str(home / "state"), _MARK: self.mark, "LLMRUN_WATCHDOG_S": "0"}
        super().__init__(command, environment={**variables, **(environment or {})}, columns=200)

    def answers(self) -> int:
        return sum(bool(STATS.search(line)) for line in self.screen)

    def ask(self, keys: str) -> None:
        """Type a message and wait for the end of its answer."""
        count = self.answers()
        self.type(keys)
        self.wait(lambda: self.answers() == count + 1 and self.screen[-1] == ">")

    def begin_answer(self) -> None:
        """Type the first message and wait for the beginning of its answer."""
        self.wait("/help shows")
        self.type("Tell\r")
        self.wait(lambda: bool(self.text.partition("> Tell\n")[2].strip()))

    def processes(self) -> list[int]:
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and f"{_MARK}={self.mark}".encode() in (entry / "environ").read_bytes().split(
                    b"\0"
                ):
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    def rank_pid(self, rank: int, size: int) -> int:
        """Return the pid of a rank: of several by mpirun's variables, a single one is the child of what was typed."""
        wanted = {f"PMI_RANK={rank}".encode(), f"OMPI_COMM_WORLD_RANK={rank}".encode()}
        for pid in self.processes():
            if size == 1 and pid != self.pid:
                return pid
            if wanted & set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")):
                return pid
        raise AssertionError("no such rank")
