"""The README's Python examples run, as they stand, on the packed demo model, and the files that it names exist."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mpi.harness import mpirun_command

README = Path(__file__).parents[2] / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_the_files_of_the_house_exist() -> None:
    (house,) = re.findall(r"## The house\n\n```\n(.*?)```", README.read_text(), re.DOTALL)
    folder, missing = README.parent, []
    for line in house.splitlines():
        if line and line[0] != " ":
            folder = README.parent / (line.split()[0] if line.split()[0].endswith("/") else "")
        here = folder / next(iter(re.findall(r"^  (\w+/)", line)), "")
        missing += [name for name in re.findall(r"\b\w+\.(?:py|h|md|toml)\b", line) if not any(here.rglob(name))]
    assert missing == []


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 3


@pytest.mark.parametrize("index", range(len(EXAMPLES)))
def test_an_example_runs(index: int, packed_demo: Callable[..., Path], tmp_path: Path) -> None:
    example = EXAMPLES[index]
    folder = tmp_path / "artifacts"
    folder.mkdir()
    (folder / "demo-q4").symlink_to(packed_demo(1, "q4"))
    (folder / "demo-q4-tp2").symlink_to(packed_demo(2, "q4"))
    (tmp_path / "example.py").write_text(example)
    command = [sys.executable, "example.py"]
    if "demo-q4-tp2" in example:
        command = [*mpirun_command(2), *command]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.split()) > 5
