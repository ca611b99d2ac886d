"""What the commands' helps say is so, an option that would do nothing is not offered, and messages name what a user typed."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llmrun.cli import COMMANDS, build_parser

Packed = Callable[..., Path]


def llmrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llmrun", *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "500"}
    return subprocess.run(command, input="", capture_output=True, text=True, env=environment, timeout=120)


def options_of(command: str) -> dict[str, argparse.Action]:
    parser = build_parser((command,))
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return {name: action for action in commands.choices[command]._actions for name in action.option_strings}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_says_what_it_does(command: str) -> None:
    assert [name for name, action in options_of(command).items() if not action.help] == []


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("generate", "standard input"),
        ("chat", "each line of standard input is a turn"),
        ("bench", "The column roofline"),
        ("doctor", "Under mpirun"),
        ("verify", "running, with --deep"),
    ],
)
def test_the_whole_of_what_a_command_does_is_in_its_help(command: str, says: str) -> None:
    assert says in llmrun(command, "--help").stdout


def test_only_commands_that_generate_text_guess_ahead() -> None:
    assert {c for c in COMMANDS if "--speculate" in options_of(c)} == {"generate", "chat", "serve"}


@pytest.mark.parametrize(
    ("arguments", "command"), [(["--tokens", "3"], "generate"), (["verify", "--verify", "off"], "verify")]
)
def test_an_unknown_option_leads_to_the_help_of_its_command(
    arguments: list[str], command: str, packed_tiny: Packed
) -> None:
    done = (
        llmrun(*arguments, packed_tiny(1, "q8")) if command in arguments else llmrun(packed_tiny(1, "q8"), *arguments)
    )
    assert done.returncode == 2
    assert f"`llmrun {command} --help` shows how." in done.stderr


def test_no_prompt_says_where_one_comes_from(packed_tiny: Packed) -> None:
    for arguments in ([], ["-p", ""], ["--ids"]):
        done = llmrun(packed_tiny(1, "q8"), *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.endswith("the prompt is empty. Give a text with -p, -f or on standard input.\n")


def test_instruction_sets_of_the_machine_are_named(packed_tiny: Packed) -> None:
    other = "avx2" if platform.machine() == "aarch64" else "neon"
    done = llmrun(packed_tiny(1, "q8"), "-p", "x", "--isa", other)
    says = f"error[E201]: --isa {other}: not an instruction set of this machine, expected one of: "
    assert (done.returncode, says in done.stderr) == (2, True), done.stderr
    assert "portable" in done.stderr
