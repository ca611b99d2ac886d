"""A program in a pseudo-terminal, and what a person would see: pyte interprets what it writes."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import termios
import time
from collections.abc import Sequence
from typing import Any

import pyte

DEADLINE_S = 60.0


class Terminal:
    """Runs a command; use as a context manager, which kills what is left."""

    def __init__(
        self, command: Sequence[str], *, environment: dict[str, str] | None = None, columns: int = 80, lines: int = 40
    ) -> None:
        self.raw = b""  # all that the program wrote
        self._screen: Any = pyte.HistoryScreen(columns, lines, history=2000)
        self._stream: Any = pyte.ByteStream(self._screen)
        self._code: int | None = None
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            try:
                fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
                # A terminal that says nothing of bracketed paste and the like keeps `raw` readable.
                os.execvpe(command[0], [*command], {**os.environ, "TERM": "xterm", **(environment or {})})
            finally:
                os._exit(127)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self._code is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._fd)

    @property
    def screen(self) -> list[str]:
        """The lines on the screen and above it, without trailing spaces."""
        above = ["".join(line[i].data for i in range(self._screen.columns)) for line in self._screen.history.top]
        lines = [line.rstrip() for line in [*above, *self._screen.display]]
        while lines and not lines[-1]:
            lines.pop()
        return lines

    @property
    def text(self) -> str:
        return "\n".join(self.screen)

    def type(self, keys: str) -> None:
        """Type, as one burst."""
        os.write(self._fd, keys.encode())

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self._screen.resize(lines, columns)

    def echoes(self) -> bool:
        """Whether the terminal is as a shell wants it back."""
        return bool(termios.tcgetattr(self._fd)[3] & termios.ECHO)

    def wait(self, condition: Any, deadline_s: float = DEADLINE_S) -> None:
        """Wait until a text is on the screen, or a function of this object holds."""
        holds = (lambda: condition in self.text) if isinstance(condition, str) else condition
        until = time.monotonic() + deadline_s
        while not holds():
            if time.monotonic() > until or not self.pump(0.05):
                if holds():
                    return
                raise AssertionError(
                    f"{condition!r} did not happen; on the screen:\n{self.text}\nraw: {self.raw[-500:]!r}"
                )

    def pump(self, seconds: float) -> bool:
        """Take what the program writes; false if it has closed the terminal."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if select.select([self._fd], [], [], left)[0]:
                try:
                    data = os.read(self._fd, 65536)
                except OSError:
                    return False
                self.raw += data
                self._stream.feed(data)
        return True

    def finish(self, deadline_s: float = DEADLINE_S) -> int:
        """Wait for the end; return the exit code, negative for a signal."""
        until = time.monotonic() + deadline_s
        while time.monotonic() < until:
            self.pump(0.02)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
                return self._code
        raise AssertionError(f"does not end; on the screen:\n{self.text}")
