"""Lines from a person at a terminal: editing, history, and messages of several lines.

In: the terminal, through the standard library's readline where Python has it. Out: one message at a time. The history
is a private file of one JSON string a line, because a message may hold newlines. Knows nothing of chats but the names of
the commands that Tab completes.
"""

from __future__ import annotations

import contextlib
import glob
import json
import locale
import os
import signal
import sys
import tempfile
import termios
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

try:
    import readline
except ImportError:  # a Python built without it: lines still arrive, as the terminal itself edits them
    readline = None

PROMPT, CONTINUATION = "> ", ". "
QUOTES = '"""'
MAX_HISTORY = 1000
_KEPT = ~(termios.ICANON | termios.ECHO)


def default_history() -> Path | None:
    """Return $XDG_STATE_HOME/llmrun/history; None where there is no home."""
    state = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(state):
        home = os.path.expanduser("~")
        if not os.path.isabs(home):
            return None
        state = os.path.join(home, ".local", "state")
    return Path(state, "llmrun", "history")


class _ResumedError(Exception):
    """The terminal was a shell's for a while; `line` is what had been typed."""

    def __init__(self, line: str) -> None:
        super().__init__(line)
        self.line = line


class KeptKeys:
    """Has the terminal keep keys as they are typed, unseen, until a message is read; Ctrl-C and Ctrl-Z act at once.

    A terminal that edits lines itself would show them amid an answer, and spoil Ctrl-D: it makes it the end of a line,
    which, when editing begins, turns into a character 0 that ends nothing (Linux, n_tty.c). Does nothing where there is
    no readline to edit them, and while llmrun runs in the background, where it would be stopped for it. A shell to which
    Ctrl-Z led sets the terminal for itself, so what goes on after it sets it again, and shows a line that was being typed.
    """

    def __enter__(self) -> KeptKeys:
        """Begin; the end restores the terminal."""
        self._found: list[Any] | None = None
        self._is_reading = self._is_editing = False
        if readline is not None:
            with contextlib.suppress(termios.error, OSError):
                self._found = termios.tcgetattr(0)
        self._resume = signal.signal(signal.SIGCONT, self._on_resume)
        try:
            self._set(_KEPT)
        except BaseException:  # a signal's
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the terminal."""
        signal.signal(signal.SIGCONT, self._resume)
        self._set(~0)

    @contextlib.contextmanager
    def read(self) -> Iterator[None]:
        """Let readline read, which echoes only where the terminal does."""
        self._is_reading = True
        self._set(~termios.ICANON)
        try:
            yield
        finally:
            self._is_reading = False
            self._set(_KEPT)

    def edit(self, prompt: str) -> str:
        """Return a line, within `read`.

        Raises:
            EOFError, KeyboardInterrupt: as `input`.
        """
        line = ""
        while True:
            try:
                self._is_editing = True
                try:
                    return _input(prompt, line)
                finally:
                    self._is_editing = False
            except _ResumedError as error:  # readline sets the terminal only when it begins
                line = error.line
                self._set(~termios.ICANON)

    def _on_resume(self, *_: object) -> None:
        if not self._is_reading:
            self._set(_KEPT)
        elif self._is_editing and readline is not None and self._has_terminal():
            raise _ResumedError(readline.get_line_buffer())

    def _has_terminal(self) -> bool:
        with contextlib.suppress(OSError):  # a terminal that is gone
            return self._found is not None and os.tcgetpgrp(0) == os.getpgrp()
        return False

    def _set(self, mask: int) -> None:
        if self._found is None or not self._has_terminal():
            return
        attributes = self._found.copy()
        attributes[3] &= mask
        with contextlib.suppress(termios.error):
            termios.tcsetattr(0, termios.TCSANOW, attributes)


class LineEditor:
    """Reads messages. `history` None: only what is typed now can be recalled, and nothing is written."""

    def __init__(self, commands: Sequence[str], history: Path | None, keys: KeptKeys) -> None:
        """Prepare the terminal's editing; a history that cannot be read is an empty one."""
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # type: ignore[union-attr]
        self._history = history
        self._commands = sorted(commands)
        self._keys = keys
        if readline is None:
            return
        _edit_utf8()
        readline.set_auto_history(False)  # a message of several lines is one entry
        readline.set_completer_delims(" ")
        readline.set_completer(self._complete)
        readline.parse_and_bind("tab: complete")
        if os.environ.get("TERM", "dumb") != "dumb":
            # Pasted lines are one message; Python turns it off.
            readline.parse_and_bind("set enable-bracketed-paste on")
        for message in _load(history):
            _recall(message)

    def read(self) -> str:
        r"""Return the next message, as typed.

        A line that begins with three double quotes opens a block, which the next three at the end of a line close; a
        backslash at the end of a line goes on in the next one.

        Raises:
            EOFError: Ctrl-D on an empty line.
            KeyboardInterrupt: Ctrl-C; what was typed is gone.
        """
        with self._keys.read():
            line = self._keys.edit(PROMPT)
            if line.lstrip().startswith(QUOTES):
                text = self._read_block(line.lstrip().removeprefix(QUOTES))
            else:
                lines = [line]
                while lines[-1].endswith("\\"):
                    lines[-1] = lines[-1][:-1]
                    lines.append(self._keys.edit(CONTINUATION))
                text = "\n".join(lines)
        self._remember(text)
        return text

    def _read_block(self, first: str) -> str:
        lines = [first]
        while not lines[-1].rstrip().endswith(QUOTES):
            lines.append(self._keys.edit(CONTINUATION))
        lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
        return "\n" + "\n".join(lines).strip("\n")  # a block is text, whatever it begins with

    def _remember(self, text: str) -> None:
        text = text.strip("\n")
        if readline is None or not text.strip():
            return
        length = readline.get_current_history_length()
        if length and readline.get_history_item(length) == text:
            return
        _recall(text)
        if self._history is not None:
            _append(self._history, text)

    def _complete(self, text: str, state: int) -> str | None:
        """Complete a command at the beginning of the line, and the file name of /save."""
        assert readline is not None
        begin = readline.get_begidx()
        if begin == 0:
            found = [name + " " for name in self._commands if name.startswith(text)] if text.startswith("/") else []
        elif readline.get_line_buffer().startswith("/save "):
            pattern = glob.escape(os.path.expanduser(text)) + "*"
            found = [path + "/" * os.path.isdir(path) for path in sorted(glob.glob(pattern))]
        else:
            found = []
        return found[state] if state < len(found) else None


def _input(prompt: str, line: str) -> str:
    """Return a line that begins as `line`."""
    if readline is None:
        return input(prompt)
    editor = readline
    editor.set_startup_hook(lambda: editor.insert_text(line))
    try:
        return input(prompt)
    finally:
        editor.set_startup_hook()


def _edit_utf8() -> None:
    """Have readline edit UTF-8, as this module reads it, whatever the locale."""
    if locale.nl_langinfo(locale.CODESET).upper() in ("UTF-8", "UTF8"):
        return
    with contextlib.suppress(locale.Error):  # a system without it: what is not ASCII is edited byte by byte
        locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
        os.environ["LC_ALL"] = "C.UTF-8"  # from which Python takes it anew for each line that is edited


def _recall(message: str) -> None:
    """Let a message be recalled, if readline can hold it: no character 0, none that the locale lacks."""
    assert readline is not None
    with contextlib.suppress(ValueError):
        readline.add_history(message)


def _load(path: Path | None) -> list[str]:
    """Return the latest messages of a history; shorten the file where it has grown to twice what is kept."""
    if path is None:
        return []
    try:
        lines = path.read_text("utf-8", "replace").splitlines()
    except OSError:
        return []
    messages = []
    for line in lines[-MAX_HISTORY:]:
        with contextlib.suppress(ValueError):
            if isinstance(message := json.loads(line), str):
                messages.append(message)
    if len(lines) > 2 * MAX_HISTORY:
        with contextlib.suppress(OSError):
            descriptor, name = tempfile.mkstemp(dir=path.parent)  # private
            with open(descriptor, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(message) + "\n" for message in messages)
            os.replace(name, path)
    return messages


def _append(path: Path, text: str) -> None:
    """Add a message to a history; what people ask is nobody else's affair, so file and folder are private."""
    with contextlib.suppress(OSError):  # a read-only home: no history
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(descriptor, (json.dumps(text) + "\n").encode())
        finally:
            os.close(descriptor)
