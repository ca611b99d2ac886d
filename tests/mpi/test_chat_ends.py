"""How `llmrun chat` at a real pseudo-terminal ends, or refuses to begin, on one rank and on two."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from chat_at_terminal import CTRL_C, SLOW_ANSWER, Chat
from harness import LEFTOVER_S
from terminal import Terminal

Packed = Callable[..., Path]


AT_THE_MOMENT = """
import os, signal, sys, termios
from llmrun import chat_link, chat_terminal, cli, launch
where = sys.argv.pop(1)
def interrupted(function):
    def call(*arguments, **options):
        result = function(*arguments, **options)
        os.kill(os.getpid(), signal.SIGINT)
        return result
    return call
if where == "keys": termios.tcsetattr = interrupted(termios.tcsetattr)
if where == "before ranks": launch.find_mpirun = interrupted(launch.find_mpirun)
if where == "ranks": launch.start_ranks = interrupted(launch.start_ranks)
if where == "pump": launch.OutputPump.start = interrupted(launch.OutputPump.start)
if where == "talk": chat_terminal._Terminal.talk = interrupted(lambda terminal: terminal._job.receive(60))
sys.exit(cli.main())
"""


@pytest.mark.parametrize("where", ["keys", "before ranks", "ranks", "pump", "talk"])
def test_ctrl_c_at_the_very_beginning_leaves_nothing(where: str, tmp_path: Path, packed_demo: Packed) -> None:
    command = [sys.executable, "-c", AT_THE_MOMENT, where, "chat", str(packed_demo(2, "q4")), "--no-history"]
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    with Terminal(command, environment={"TMPDIR": str(temporary)}) as terminal:
        assert terminal.finish(15) == 130
        assert terminal.text == ""
        assert terminal.echoes()
    assert list(temporary.glob("llmrun-*")) == []  # mpirun, told by the kernel, may still be removing its own


def test_ctrl_c_while_it_loads_leaves(tmp_path: Path, artifact: Path) -> None:
    with Chat(tmp_path, artifact, environment={"LLMRUN_FAULT": "0:load:slow"}) as chat:
        chat.wait(lambda: len(chat.processes()) > 1)
        time.sleep(0.5)
        chat.type(CTRL_C)
        assert chat.finish(15) == 130


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_at_the_prompt_ends_the_chat(rank: int, tmp_path: Path, packed_demo: Packed) -> None:
    with Chat(tmp_path, packed_demo(2, "q4")) as chat:
        chat.wait("/help shows")
        chat.type("half a line")
        chat.wait("> half a line")
        os.kill(chat.rank_pid(rank, 2), signal.SIGKILL)
        assert chat.finish() == 6
        assert "SIGKILL" in chat.text
        assert chat.echoes()


def test_a_rank_that_dies_in_an_answer_ends_the_chat(tmp_path: Path, artifact: Path, packed_demo: Packed) -> None:
    size = 2 if artifact == packed_demo(2, "q4") else 1
    with Chat(tmp_path, artifact, "-n", "450", "--ignore-eos", environment=SLOW_ANSWER) as chat:
        chat.begin_answer()
        os.kill(chat.rank_pid(size - 1, size), signal.SIGKILL)
        assert chat.finish() == 6
        assert "error[E602]" in chat.text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_and_leaves_nothing(number: signal.Signals, chat: Chat) -> None:
    os.kill(chat.pid, number)
    assert chat.finish() == 128 + number
    gone_by = time.monotonic() + LEFTOVER_S
    while chat.processes() and time.monotonic() < gone_by:
        time.sleep(0.05)
    assert chat.processes() == []
    assert chat.echoes()


def test_answers_that_find_no_room_end_it_with_a_reason(tmp_path: Path, packed_demo: Packed) -> None:
    line = [sys.executable, "-m", "llmrun", "chat", str(packed_demo(1, "q4")), "-n", "4"]
    with Terminal(
        ["sh", "-c", '"$@" > /dev/full', "sh", *line], environment={"XDG_STATE_HOME": str(tmp_path)}
    ) as terminal:
        terminal.wait("/help shows")
        terminal.type("hello\r")
        assert terminal.finish() == 5
        assert "error[E503]: standard output: No space left on device." in terminal.text


@pytest.mark.parametrize(("option", "complaint"), [("-n", "expected 1 or more"), ("--top-p", "top_p")])
def test_bad_sampling_is_refused_before_anything_is_loaded(
    option: str, complaint: str, tmp_path: Path, packed_demo: Packed
) -> None:
    with Chat(tmp_path, packed_demo(1, "q4"), option, "0") as chat:
        assert chat.finish() == 2
        assert complaint in chat.text
        assert "/help" not in chat.text


def test_an_artifact_that_cannot_chat_is_refused(tmp_path: Path, packed: Packed, tiny_checkpoint: Path) -> None:
    with Chat(tmp_path, "chat", packed(tiny_checkpoint)) as chat:
        assert chat.finish() == 2
        assert "error[E205]" in chat.text
