"""The README's Python examples run, as they stand, on the packed demo model."""

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
