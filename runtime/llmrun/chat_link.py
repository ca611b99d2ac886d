"""A chat in two processes: a person's terminal here, rank 0 of the model there, and lines of JSON between them.

The process that was typed keeps the terminal, with its editing, its signals and its size; the ranks have none of that,
under either mpirun. It sends `{"ask": messages}`, and `{"stop": n}` to end the n-th answer; rank 0 says `ready` once,
and for each question any number of `text` (with `is_thought`, where the model only thinks it) and then one `done` or
`error`. The end of rank 0's input ends the job. Being a message and no signal, a stop never meets the wrong answer, and
Ctrl-C is the terminal side's affair alone.
"""

from __future__ import annotations

import errno
import json
import os
import queue
import select
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmrun import console, launch, launcher, stdin

Message = dict[str, Any]
_LEAVING_S = 10.0


class RanksEndedError(Exception):
    """The job is over; `code` is its exit code. Its ranks have said why."""

    def __init__(self, code: int) -> None:
        super().__init__(f"the job ended with {code}")
        self.code = code


class ChatJob:
    """The terminal's side: starts the ranks, and talks with rank 0."""

    def __init__(self, num_ranks: int, arguments: Sequence[str]) -> None:
        """Prepare `llmrun ARGUMENTS`; use as a context manager, which starts and ends the job."""
        self._num_ranks, self._arguments = num_ranks, arguments
        self._rest = b""
        self._sink: int | None = None

    def __enter__(self) -> ChatJob:
        """Start the ranks."""
        self._folder = launch.private_folder()
        child = None
        try:
            self._child = child = launch.start_ranks(
                launch.rank_command(self._num_ranks),
                self._arguments,
                self._folder.name,
                {launcher.CHAT_VARIABLE: "1"},
            )
            self._events = os.open(self._path("stdout"), os.O_RDONLY | os.O_NONBLOCK)
            self._poller = select.poll()
            self._poller.register(self._events, select.POLLIN)
            self._errors = launch.OutputPump(self._path("stderr"), 2)
            self._errors.start()
        except BaseException:  # a signal's, too
            if child is not None:
                _end(child, in_order=False)
            self._folder.cleanup()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End the ranks: in order if nothing is wrong."""
        in_order = kind is None and self._sink is not None
        if self._sink is not None:
            os.close(self._sink)
        _end(self._child, in_order=in_order)
        self._errors.finish(lambda: kind is not None)
        os.close(self._events)
        self._folder.cleanup()

    @property
    def has_ended(self) -> bool:
        """Whether the job is over."""
        return self._child.poll() is not None

    def send(self, message: Mapping[str, Any]) -> None:
        """Send rank 0 a message.

        Raises:
            RanksEndedError: nobody is there any more.
        """
        try:
            console.write_all(self._open_sink(), (json.dumps(message) + "\n").encode())
        except BrokenPipeError:
            self._raise_ended()

    def receive(self, timeout_s: float) -> Message | None:
        """Return rank 0's next message; None if there is none in time.

        Raises:
            RanksEndedError: there will be none.
        """
        until = time.monotonic() + timeout_s
        while True:
            line, newline, rest = self._rest.partition(b"\n")
            if newline:
                self._rest = rest
                return json.loads(line)
            has_ended = self.has_ended  # looked at before the pipe: what was written before the end is read
            left_s = until - time.monotonic()
            if not self._poller.poll(max(0.0, left_s * 1e3)):
                if has_ended:
                    self._raise_ended()
                if left_s <= 0:
                    return None
                continue
            data = os.read(self._events, 65536)
            self._rest += data
            if not data and has_ended:
                self._raise_ended()
            if not data:  # rank 0 has not opened it yet, or has just left
                time.sleep(0.02)
                if left_s <= 0:
                    return None

    def _path(self, name: str) -> str:
        return os.path.join(self._folder.name, name)

    def _open_sink(self) -> int:
        """Open rank 0's input; it may be about to open its end."""
        while self._sink is None:
            try:
                self._sink = os.open(self._path("stdin"), os.O_WRONLY | os.O_NONBLOCK)
                os.set_blocking(self._sink, True)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                if self.has_ended:
                    self._raise_ended()
                time.sleep(0.01)
        return self._sink

    def _raise_ended(self) -> None:
        code = self._child.wait()
        self._errors.finish()  # what the ranks said comes before what we say
        note, log = Path(self._path("exit-code")), Path(self._path("mpirun.log"))
        raise RanksEndedError(launch.job_exit_code(code, note, log))


def _end(child: subprocess.Popen[bytes], *, in_order: bool) -> None:
    """Wait for a job, or end it. MPICH's mpirun loses a SIGTERM in the second millisecond of its life (measured): so two."""
    for seconds in (_LEAVING_S / 5, _LEAVING_S):
        if not in_order:
            child.terminate()
        try:
            child.wait(seconds)
        except subprocess.TimeoutExpired:
            continue
        return
    child.kill()
    child.wait()


class Inbox:
    """Rank 0's side: messages from the terminal as they come, read by a thread."""

    def __init__(self) -> None:
        """Begin to read."""
        self._messages: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._stopped = 0
        threading.Thread(target=self._read, name="chat", daemon=True).start()

    def next_question(self) -> list[dict[str, str]] | None:
        """Wait for the next messages to answer; None: the person has left."""
        message = self._messages.get()
        return None if message is None else message["ask"]

    def has_stopped(self, number: int) -> bool:
        """Tell whether the terminal wants no more of answer `number`."""
        return self._stopped >= number

    def _read(self) -> None:
        for line in stdin.read_lines():
            message = json.loads(line)
            if "stop" in message:
                self._stopped = message["stop"]
            else:
                self._messages.put(message)
        self._stopped = 1 << 62
        self._messages.put(None)


def send_event(write: Callable[[str], None], **event: Any) -> None:
    """Send the terminal's side a message."""
    write(json.dumps(event) + "\n")
