"""`llmrun chat` at a real pseudo-terminal, on one rank and on two: keys in, screen out."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from chat_at_terminal import BACKSPACE, CTRL_A, CTRL_C, CTRL_D, HOME, LEFT, SLOW_ANSWER, STATS, UP, Chat
from harness import LEFTOVER_S
from terminal import Terminal

from llmrun import chat_terminal
from models import demo_with_template

Packed = Callable[..., Path]


def test_typing_editing_and_every_command(chat: Chat, tmp_path: Path) -> None:
    chat.ask("The kxng" + LEFT * 2 + BACKSPACE + "i\r")
    assert "> The king" in chat.screen
    assert STATS.search(chat.text)
    assert b"\x1b[2m[" in chat.raw  # dim
    chat.type("/help\r")
    chat.wait("/save FILE")
    chat.type("/system\r")
    chat.wait("There is no system message.")
    chat.type("/system Speak like a duke.\r/system\r")
    chat.wait(lambda: chat.screen.count("Speak like a duke.") == 1)
    chat.type("/save " + str(tmp_path / "talk.json") + "\r")
    chat.wait("3 messages are in")
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert [message["role"] for message in saved] == ["system", "user", "assistant"]
    assert saved[1]["content"] == "The king"
    answer = chat.text.partition("> The king\n")[2].partition("\n[")[0]
    assert saved[2]["content"].split() == answer.split()
    chat.type("/save " + str(tmp_path / "talk.json") + "\r")
    chat.wait("exists already")
    chat.type("/save " + str(tmp_path / "no" / "talk.txt") + "\r")
    chat.wait("No such file")
    chat.type("/save ~nobody-of-that-name/talk.txt\r")
    chat.wait("~nobody-of-that-name/talk.txt: No such file")
    chat.type("/stats\r")
    chat.wait("conversation  1 answer, ")
    chat.type("/reset\r/stats\r")
    chat.wait("conversation  0 answers, 0 of 512 tokens of context")
    chat.type("/system -\r/save " + str(tmp_path / "empty.txt") + "\r")
    chat.wait("0 messages are in")
    chat.type("/nonsense here\r")
    chat.wait("/nonsense: there is no such command")
    chat.type("/sy\tNew.\r/system\r")  # Tab completes
    chat.wait("\nNew.")
    chat.ask(" /etc is text\r")
    chat.type("/quit\r")
    assert chat.finish() == 0
    assert chat.echoes()
    gone_by = time.monotonic() + LEFTOVER_S
    while chat.processes() and time.monotonic() < gone_by:
        time.sleep(0.05)
    assert chat.processes() == []


def test_history_is_recalled_kept_and_private(tmp_path: Path, packed_demo: Packed) -> None:
    path = packed_demo(1, "q4")
    with Chat(tmp_path, path, "-n", "2") as chat:
        chat.wait("/help shows")
        chat.ask("first question\r")
        chat.ask('"""one\rtwo"""\r')
        chat.ask(UP + UP + CTRL_A + "my \r")
        assert "> my first question" in chat.screen
        chat.type(CTRL_D)
        assert chat.finish() == 0
    file = tmp_path / "state" / "llmrun" / "history"
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        "first question",
        "one\ntwo",
        "my first question",
    ]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    with Chat(tmp_path, path, "-n", "2") as chat:
        chat.wait("/help shows")
        chat.type(UP)
        chat.wait("> my first question")
        chat.type("\r")
        chat.wait(lambda: chat.answers() == 1)
    with Chat(tmp_path, "chat", path, "-n", "2", "--no-history") as chat:
        chat.wait("/help shows")
        chat.type(UP + "x\r")
        chat.wait("\n> x")
        chat.wait(lambda: chat.answers() == 1)
    assert len(file.read_text().splitlines()) == 3


@pytest.mark.parametrize("locale", ["C", "POSIX"])
def test_a_plain_locale_does_not_matter(locale: str, tmp_path: Path, packed_demo: Packed) -> None:
    file = tmp_path / "state" / "llmrun" / "history"
    file.parent.mkdir(parents=True)
    file.write_text('"\\ud800"\n"\\u0000"\n"nämlich"\n')  # the first two readline cannot hold
    with Chat(tmp_path, packed_demo(1, "q4"), "-n", "2", environment={"LC_ALL": locale}) as chat:
        chat.wait("/help shows")
        chat.type(UP)
        chat.wait("> nämlich")
        chat.ask("\r")
        chat.ask("Königé" + BACKSPACE + "\r")
        assert "> König" in chat.screen
        assert "UTF-8" not in chat.text
    assert [json.loads(line) for line in file.read_text().splitlines()][3:] == ["König"]


def test_messages_of_several_lines(chat: Chat, tmp_path: Path) -> None:
    chat.ask('"""a\r/b\r\rc"""\r')
    chat.ask("d\\\re\r")
    chat.ask("\x1b[200~f\rg\x1b[201~\r")  # a paste
    chat.type("/save " + str(tmp_path / "talk.json") + "\r")
    chat.wait("messages are in")
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert [message["content"] for message in saved if message["role"] == "user"] == ["a\n/b\n\nc", "d\ne", "f\ng"]


def test_ctrl_c_stops_the_answer_and_the_next_question_is_answered(tmp_path: Path, artifact: Path) -> None:
    with Chat(tmp_path, artifact, "-n", "450", "--ignore-eos", environment=SLOW_ANSWER) as chat:
        chat.begin_answer()
        chat.type(CTRL_C)
        chat.wait(lambda: chat.answers() == 1)
        assert "stopped]" in chat.text
        tokens = int(re.search(r"\[(\d+) tokens?,", chat.text)[1])  # type: ignore[index]
        assert 0 < tokens < 450
        chat.type("/reset\r")
        chat.type("More\r")
        chat.wait(lambda: chat.answers() == 2)
        assert "450 tokens" in chat.text
        assert "cut at --max-tokens]" in chat.text
        chat.type(CTRL_D)
        assert chat.finish() == 0


def test_ctrl_c_at_the_prompt_clears_and_twice_leaves(chat: Chat) -> None:
    chat.type("half a li" + CTRL_C)
    chat.wait(lambda: chat.screen[-1] == ">")
    time.sleep(1.2)
    chat.ask("whole\r")
    assert "\n> whole" in chat.text
    chat.type('"""block\r')
    chat.wait(lambda: chat.screen[-1] == ".")  # or the prompt below may be the one of before, and two signals one
    chat.type(CTRL_C)
    chat.wait(lambda: chat.screen[-1] == ">")
    chat.type(CTRL_C)
    assert chat.finish() == 130
    assert chat.echoes()


def test_what_is_typed_while_it_loads_waits_for_the_prompt(tmp_path: Path, artifact: Path) -> None:
    with Chat(tmp_path, artifact, "-n", "2", environment={"LLMRUN_FAULT": "0:load:slow"}) as chat:
        chat.wait(lambda: not chat.echoes())
        chat.type("hellp" + BACKSPACE + "o\r" + CTRL_D)
        chat.pump(0.3)
        assert chat.screen == []
        assert chat.finish() == 0
        assert "> hello" in chat.screen
        assert chat.answers() == 1
        assert chat.echoes()


def test_what_is_typed_during_an_answer_waits_for_the_prompt(tmp_path: Path, artifact: Path) -> None:
    with Chat(tmp_path, artifact, "-n", "4", "--ignore-eos", environment=SLOW_ANSWER) as chat:
        chat.begin_answer()
        chat.type("/stats\r" + CTRL_D)
        chat.pump(0.3)
        assert "/stats" not in chat.text
        assert chat.finish() == 0
        assert "\n> /stats\nconversation  1 answer, " in chat.text
        assert chat.echoes()


def resume_as_from_a_shell(chat: Chat) -> None:
    """Stop the chat, set the terminal as a shell does for itself, and let it go on."""
    os.kill(chat.pid, signal.SIGSTOP)
    os.waitpid(chat.pid, os.WUNTRACED)
    attributes = termios.tcgetattr(chat._fd)
    attributes[3] |= termios.ICANON | termios.ECHO
    termios.tcsetattr(chat._fd, termios.TCSANOW, attributes)
    os.kill(chat.pid, signal.SIGCONT)


@pytest.mark.parametrize("when", ["load", "answer"])
def test_keys_are_kept_after_it_was_stopped_too(when: str, tmp_path: Path, packed_demo: Packed) -> None:
    environment = SLOW_ANSWER if when == "answer" else {"LLMRUN_FAULT": "0:load:slow"}
    with Chat(tmp_path, packed_demo(1, "q4"), "-n", "4", "--ignore-eos", environment=environment) as chat:
        if when == "answer":
            chat.begin_answer()
        chat.wait(lambda: not chat.echoes())
        resume_as_from_a_shell(chat)
        chat.wait(lambda: not chat.echoes(), 2)
        chat.type("/stats" + CTRL_D + "\r" + CTRL_D)  # the first ends nothing: the line is not empty
        assert chat.finish() == 0
        assert "> /stats\nconversation  " in chat.text
        assert chat.echoes()


@pytest.mark.parametrize(("prompt", "before"), [(">", ""), (".", '"""\r')], ids=["line", "block"])
def test_a_line_is_shown_and_edited_on_after_it_was_stopped(
    prompt: str, before: str, tmp_path: Path, packed_demo: Packed
) -> None:
    with Chat(tmp_path, packed_demo(1, "q4"), "-n", "4") as chat:
        chat.wait("/help shows")
        chat.type(before + "half a lin")
        chat.wait(lambda: chat.screen[-1] == f"{prompt} half a lin")
        resume_as_from_a_shell(chat)
        chat.wait(lambda: not chat.echoes(), 2)
        chat.type(BACKSPACE + LEFT + "X")
        chat.wait(lambda: chat.screen[-1] == f"{prompt} half a lXi", 2)
        chat.ask('\r"""\r' if before else "\r")
        chat.type(CTRL_D)
        assert chat.finish() == 0
        assert chat.echoes()


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=["no-colour", "dumb"])
def test_a_terminal_without_colours(environment: dict[str, str], tmp_path: Path, packed_demo: Packed) -> None:
    with Chat(tmp_path, packed_demo(1, "q4"), "-n", "2", environment=environment) as chat:
        chat.wait("/help shows")
        chat.ask("hello\r")
        assert not re.search(rb"\x1b\[\d+m", chat.raw)
        if "TERM" in environment:
            assert b"\x1b" not in chat.raw
        chat.type(CTRL_D)
        assert chat.finish() == 0


@pytest.mark.parametrize("ending", ["<think>\n", ""], ids=["thinks", "answers"])
def test_thoughts_are_dim(ending: str, tmp_path: Path, packed: Packed) -> None:
    template = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}" + ending
    folder = demo_with_template(tmp_path / "model", template)
    with Chat(tmp_path, packed(folder, 1, "q8"), "-n", "9", "--temperature", "0") as chat:
        chat.wait("/help shows")
        chat.ask("The king\r")  # this model never ends what it has begun
        answer = chat.raw.rpartition(b"The king")[2].partition(b"[9 tokens")[0].removesuffix(b"\x1b[2m")
        assert (b"\x1b[2m" in answer) == bool(ending)
        assert len(re.sub(rb"\x1b\[\d+m|\s", b"", answer)) > 9
        chat.type(CTRL_D)
        assert chat.finish() == 0


def test_a_window_that_changes_its_size(chat: Chat, tmp_path: Path) -> None:
    chat.resize(30, 20)
    words = "a line that is longer than the narrow window is wide"
    chat.type(words)
    chat.wait(lambda: words.replace(" ", "") in "".join(chat.screen).replace(" ", ""))
    assert len(chat.screen[-1]) <= 30
    chat.type(HOME + "X")
    chat.resize(100, 20)
    chat.pump(0.3)
    chat.ask("\r")
    chat.type("/save " + str(tmp_path / "talk.json") + "\r")
    chat.wait("messages are in")
    assert json.loads((tmp_path / "talk.json").read_text())[0]["content"] == "X" + words


def test_answers_go_to_a_file_and_the_rest_to_the_terminal(tmp_path: Path, packed_demo: Packed) -> None:
    line = [sys.executable, "-m", "llmrun", "chat", str(packed_demo(1, "q4")), "-n", "4", "--temperature", "0"]
    shell = ["sh", "-c", '"$@" > ' + str(tmp_path / "answers"), "sh", *line]
    with Terminal(shell, environment={"XDG_STATE_HOME": str(tmp_path)}) as terminal:
        terminal.wait("/help shows")
        terminal.type("hellp" + BACKSPACE + "o\r")
        terminal.wait("first after")
        assert "> hello" in terminal.screen
        terminal.type(CTRL_D)
        assert terminal.finish() == 0
    answers = (tmp_path / "answers").read_text()
    assert answers.strip()
    assert "hello" not in answers
    assert ">" not in answers


def test_a_name_that_no_file_can_have_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    terminal = object.__new__(chat_terminal._Terminal)
    terminal._messages, terminal._style = [], ("", "")
    terminal._save("a\0b")
    assert capfd.readouterr().err == "a\u2400b: embedded null byte.\n"


def test_a_conversation_that_outgrows_the_context_is_told(chat: Chat) -> None:
    chat.type(" ".join(["word"] * 700) + "\r")
    chat.wait("error[E204]")
    chat.ask("short\r")
