"""The files in runtime/deploy name options, exit codes and sources that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from llmrun import errors
from llmrun.cli import build_parser

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "runtime" / "deploy"


def test_the_units_command_line_is_understood() -> None:
    unit = (DEPLOY / "llmrun@.service").read_text()
    (line,) = re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    program, *words = shlex.split(line.replace("%i", "NAME").replace("%d", "/run/credentials"))
    chosen = build_parser().parse_args(words)
    assert (Path(program).name, chosen.command, chosen.api_key_file) == ("llmrun", "serve", "/run/credentials/api-key")
    (codes,) = re.findall(r"^RestartPreventExitStatus=(.*)$", unit, re.MULTILINE)
    staying = {errors.UsageError, errors.IntegrityError, errors.IncompatibleError}
    assert set(map(int, codes.split())) == {kind.exit_code for kind in staying}


def test_the_unit_allows_the_sockets_that_serving_and_mpi_take() -> None:
    (families,) = re.findall(r"^RestrictAddressFamilies=(.*)$", (DEPLOY / "llmrun@.service").read_text(), re.MULTILINE)
    assert set(families.split()) == {"AF_UNIX", "AF_INET", "AF_INET6", "AF_NETLINK"}


def test_what_the_image_copies_and_runs_exists() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    sources = [word for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE) for word in line.split()[:-1]]
    assert sources
    assert [name for name in sources if not (ROOT / name).exists()] == []
    packages = re.search(r"wheel\.packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text())
    assert packages is not None
    for path in re.findall(r'"(.*?)"', packages[1]):
        assert path.partition("/")[0] in sources
    (command,) = re.findall(r"^#\s+llmrun (serve .*)$", text, re.MULTILINE)
    assert build_parser().parse_args(shlex.split(command)).host == "0.0.0.0"
