"""The same library in the oldest supported ONNX Runtime, which another interpreter has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "smoke_old_ort.py"


def run_smoke(python: str, library_path: Path) -> str:
    done = subprocess.run([python, SCRIPT, library_path], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_operator_runs_in_this_onnxruntime(library_path: Path) -> None:
    assert "AllGather" in run_smoke(sys.executable, library_path)


def test_every_operator_runs_in_onnxruntime_1_22(library_path: Path) -> None:
    python = os.environ.get("LLMPACK_LOWEST_PYTHON")
    if not python or not os.path.exists(python):
        pytest.skip("LLMPACK_LOWEST_PYTHON names no interpreter with onnxruntime 1.22")
    assert run_smoke(python, library_path).startswith("onnxruntime 1.22.")
