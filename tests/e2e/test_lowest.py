"""The lowest versions that pyproject.toml allows, in an interpreter of their own: they pack the same bytes, run and serve."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llmrun.library import LIBRARY_NAME, find_library
from models import DEMO

ROOT = Path(__file__).resolve().parents[2]
Packed = Callable[..., Path]
Run = Callable[..., str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run a program of that interpreter, which has our packages as they lie here, and this environment's library."""
    python = os.environ.get("LLMPACK_LOWEST_PYTHON")
    if not python or not os.path.exists(python):
        pytest.skip("LLMPACK_LOWEST_PYTHON names no interpreter with the lowest versions")
    places = tmp_path_factory.mktemp("lowest")
    (places / "llmrun").mkdir()
    for source in [*(ROOT / "runtime" / "llmrun").iterdir(), find_library()]:
        if source.name != LIBRARY_NAME or source == find_library():
            (places / "llmrun" / source.name).symlink_to(source)
    folders = [places, *(ROOT / name for name in ("packager", "custom_ops", "tests/unit"))]
    environment = {**os.environ, "PYTHONPATH": ":".join(map(str, folders)), "PYTHONSAFEPATH": "1"}

    def run(*arguments: object) -> str:
        done = subprocess.run(
            [python, *map(str, arguments)], capture_output=True, text=True, timeout=120, env=environment, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_they_pack_the_same_bytes_and_run_them(run: Run, packed_demo: Packed, tmp_path: Path) -> None:
    usual, found = packed_demo(2, "q4"), tmp_path / "artifact"
    run(
        "-c",
        "from llmpack.cli import main; raise SystemExit(main())",
        DEMO,
        "-o",
        found,
        "--shards",
        2,
        "--quant",
        "q4",
    )
    names = sorted(path.relative_to(usual) for path in usual.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(found) for path in found.rglob("*") if path.is_file())
    assert [name for name in names if (usual / name).read_bytes() != (found / name).read_bytes()] == []
    arguments = ["-m", "llmrun", str(found), "-p", "The king", "-n", "8", "--temperature", "0"]
    here = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=True)
    assert run(*arguments) == here.stdout


def test_their_grammars_hold(run: Run, packed_demo: Packed) -> None:
    run(ROOT / "tests" / "e2e" / "lowest_grammars.py", packed_demo(2, "q4"))
