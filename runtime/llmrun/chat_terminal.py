"""The terminal's side of `llmrun chat`: reads messages and commands, shows answers; the model runs in other processes.

Answers go to standard output as they come; prompts, statistics and complaints go to standard error. What a model wrote
cannot steer the terminal: control characters are shown, not sent.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from llmrun import console
from llmrun.artifact import open_artifact
from llmrun.chat_link import ChatJob, RanksEndedError
from llmrun.errors import ResourceError, UsageError
from llmrun.line_editor import QUOTES, KeptKeys, LineEditor, default_history

if TYPE_CHECKING:
    from types import FrameType

DOUBLE_S = 1.0  # a second Ctrl-C within it leaves
HELP = f"""\
/help            this
/system [TEXT]   show the system message, or replace it; `/system -` removes it
/reset           forget the conversation, but not the system message
/stats           what the conversation has taken so far
/save FILE       write the conversation: as JSON if FILE ends with .json, else as text
/quit            leave; so do Ctrl-D, and Ctrl-C twice
{QUOTES} begins a message of several lines and ends it, and a \\ at the end of a line goes on in the next one.
Ctrl-C stops an answer. The arrow keys edit and recall; Tab completes commands."""
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run(arguments: argparse.Namespace) -> int:
    """Talk with the person at the terminal until they leave; return the exit code."""
    manifest = open_artifact(arguments.artifact, ranks=[]).manifest
    if manifest.tokenizer is None or manifest.tokenizer.chat_template is None:
        missing = "tokenizer" if manifest.tokenizer is None else "chat template"
        raise UsageError(f"{arguments.artifact}: has no {missing}. Use `llmrun generate`.", code="E205")
    for number in _ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave_by_signal)
    with KeptKeys() as keys, ChatJob(manifest.shards, arguments.typed) as job:
        return _Terminal(job, arguments, keys).talk()


def _leave_by_signal(number: int, _frame: FrameType | None) -> NoReturn:
    for another in _ENDING:  # would leave the end half done
        signal.signal(another, signal.SIG_IGN)
    sys.exit(128 + number)


class _Terminal:
    def __init__(self, job: ChatJob, arguments: argparse.Namespace, keys: KeptKeys) -> None:
        self._job = job
        self._keys = keys
        self._answer_stream = os.dup(1)
        self._is_answer_shown = os.isatty(1)
        if not self._is_answer_shown:
            os.dup2(2 if os.isatty(2) else 0, 1)  # editing needs the terminal there; the answers have their own copy
        self._style = ("\x1b[2m", "\x1b[0m") if _has_colours() else ("", "")
        self._messages: list[dict[str, str]] = []
        if arguments.system is not None:
            self._messages.append({"role": "system", "content": arguments.system})
        self._history = None if arguments.no_history else default_history()
        self._asked = 0
        self._interrupts = 0
        self._totals: dict[str, float] = {}
        self._last: dict[str, Any] = {}
        self._ready: dict[str, Any] = {}
        self._is_prompting = False
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: self._say(HELP),
            "/system": self._set_system,
            "/reset": lambda _: self._reset(),
            "/stats": lambda _: self._say_stats(),
            "/save": self._save,
        }

    def talk(self) -> int:
        """Take messages until the person leaves or the ranks end."""
        signal.signal(signal.SIGINT, self._on_interrupt)
        signal.signal(signal.SIGCHLD, self._look_at_job)
        try:
            while (event := self._job.receive(0.1)) is None:
                if self._interrupts:
                    return 130
            self._ready = event["ready"]
            editor = LineEditor([*self._commands, "/quit"], self._history, self._keys)
            self._say("/help shows the commands.", is_dim=True)
            while (message := self._read(editor)) is not None and self._take(message):
                pass
        except RanksEndedError as error:
            return error.code
        except KeyboardInterrupt:
            self._say("")
            return 130
        return 0

    def _read(self, editor: LineEditor) -> str | None:
        """Return the next message; None if the person leaves."""
        interrupted_s = float("-inf")
        while True:
            try:
                self._is_prompting = True  # now Ctrl-C, and the end of the ranks, interrupt
                try:
                    self._look_at_job()
                    message = editor.read()
                finally:
                    self._is_prompting = False
                message.encode()
            except KeyboardInterrupt:
                if time.monotonic() - interrupted_s < DOUBLE_S:
                    raise
                interrupted_s = time.monotonic()
                self._say("")
            except EOFError:
                self._say("")
                return None
            except UnicodeEncodeError:  # what could not be decoded became surrogates
                self._say("That was not UTF-8.")
            else:
                return message

    def _take(self, message: str) -> bool:
        """Obey a command, or have a message answered; false: leave."""
        if not message.startswith("/"):
            if message.strip():
                self._ask(message.strip("\n"))
            return True
        name, _, argument = message.partition(" ")
        name = name.rstrip()
        if name == "/quit":
            return False
        if name in self._commands:
            self._commands[name](argument.strip())
        else:
            self._say(f"{name}: there is no such command; /help shows all. To send it as text, put a space before it.")
        return True

    def _ask(self, text: str) -> None:
        """Send the conversation with a new message, and show the answer."""
        messages = [*self._messages, {"role": "user", "content": text}]
        self._asked += 1
        pieces: list[str] = []
        self._interrupts = 0
        self._job.send({"ask": messages})
        is_told = False
        while True:
            event = self._job.receive(0.05)
            if self._interrupts and not is_told:
                self._job.send({"stop": self._asked})
                is_told = True
            elif self._interrupts > 1:  # the step that runs takes its time
                raise KeyboardInterrupt
            if event is None:
                continue
            if "text" not in event:
                break
            pieces.append(event["text"])
            self._write(event["text"], is_dim=event.get("is_thought", False))
        if "error" in event:
            self._say(event["error"])
            return
        done = self._last = event["done"]
        if not "".join(pieces).endswith("\n"):
            self._write("\n")
        self._messages = [*messages, {"role": "assistant", "content": done["text"]}]
        for key in ("prompt_n", "prompt_ms", "predicted_n", "predicted_ms"):
            self._totals[key] = self._totals.get(key, 0) + done[key]
        self._totals["answers"] = self._totals.get("answers", 0) + 1
        self._say(self._describe(done), is_dim=True)

    def _describe(self, done: dict[str, Any]) -> str:
        parts = [f"{done['answer_n']} token{'s' * (done['answer_n'] != 1)}"]
        if (speed := _tokens_per_s(done, 1)) is not None:
            parts.append(f"{speed:.1f} tokens/s")
        if done["prompt_ms"]:
            parts.append(f"first after {done['prompt_ms'] / 1e3:.2f} s")
        if done["finish_reason"] == "stopped":
            parts.append("stopped")
        elif done["finish_reason"] == "length":
            is_full = done["context_n"] >= self._ready["max_seq_len"]
            parts.append("cut: the context is full, /reset makes room" if is_full else "cut at --max-tokens")
        return f"[{', '.join(parts)}]"

    def _set_system(self, text: str) -> None:
        system = [message for message in self._messages[:1] if message["role"] == "system"]
        if not text:
            self._say(system[0]["content"] if system else "There is no system message.")
            return
        self._messages = self._messages[len(system) :]
        if text != "-":
            self._messages.insert(0, {"role": "system", "content": text})

    def _reset(self) -> None:
        self._messages = [message for message in self._messages[:1] if message["role"] == "system"]
        self._last = {}

    def _say_stats(self) -> None:
        answers = sum(message["role"] == "assistant" for message in self._messages)
        lines = [
            f"conversation  {answers} answer{'s' * (answers != 1)},"
            f" {self._last.get('context_n', 0)} of {self._ready['max_seq_len']} tokens of context",
            f"loading       {self._ready['load_ms'] / 1e3:.2f} s",
        ]
        if self._totals:
            speed = _tokens_per_s(self._totals, self._totals["answers"])
            lines.append(
                f"all answers   {self._totals['predicted_n']:.0f} tokens"
                + (f", {speed:.1f} tokens/s" if speed is not None else "")
                + f"; {self._totals['prompt_n']:.0f} tokens of prompts in {self._totals['prompt_ms'] / 1e3:.2f} s"
            )
        self._say("\n".join(lines))

    def _save(self, name: str) -> None:
        path = Path(os.path.expanduser(name))  # Path's own raises where there is no such user
        if not name:
            self._say("/save needs the name of a file.")
            return
        if path.suffix == ".json":
            text = json.dumps(self._messages, ensure_ascii=False, indent=2) + "\n"
        else:
            text = "\n\n".join(f"{message['role']}:\n{message['content']}" for message in self._messages) + "\n"
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            self._say(f"{path} exists already: choose another name.")
        except (OSError, ValueError) as error:  # a character 0 in the name
            self._say(f"{path}: {getattr(error, 'strerror', error)}.")
        else:
            self._say(f"{len(self._messages)} messages are in {path}.")

    def _say(self, text: str, *, is_dim: bool = False) -> None:
        dim, plain = self._style if is_dim and text else ("", "")
        console.say(dim + console.harmless(text) + plain)

    def _write(self, text: str, *, is_dim: bool = False) -> None:
        dim, plain = self._style if is_dim and self._is_answer_shown else ("", "")
        shown = dim + console.harmless(text) + plain if self._is_answer_shown else text
        try:
            console.write_all(self._answer_stream, shown.encode("utf-8", "replace"))
        except BrokenPipeError:
            raise
        except OSError as error:
            raise ResourceError(f"standard output: {error.strerror}.", code="E503") from None

    def _on_interrupt(self, *_: object) -> None:
        if self._is_prompting:
            raise KeyboardInterrupt
        self._interrupts += 1

    def _look_at_job(self, *_: object) -> None:
        if self._is_prompting and self._job.has_ended:
            self._is_prompting = False
            os.write(2, b"\n")
            while True:  # raises what ended it
                self._job.receive(1.0)


def _tokens_per_s(timings: dict[str, Any], answers: float) -> float | None:
    """Return the speed of decoding: each answer's first token belongs to its prompt."""
    decoded = timings["predicted_n"] - answers
    return decoded * 1e3 / timings["predicted_ms"] if decoded > 0 and timings["predicted_ms"] > 0 else None


def _has_colours() -> bool:
    return os.isatty(2) and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"
