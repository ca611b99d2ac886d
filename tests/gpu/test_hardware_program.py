"""`make test-gpu` itself, as far as a machine without a GPU can run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "hardware.py"


@pytest.mark.slow
def test_the_program_runs_dry(tmp_path):
    path = tmp_path / "results.json"
    command = [sys.executable, str(PROGRAM), "--dry", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(path.read_text())
    rows = {what: value for what, value, _ in results["rows"]}
    assert rows["two ranks on one GPU: collectives"] == "right"
    assert {name for name in rows if name.startswith("operators")} == {
        f"operators: {name}" for name in ("products", "norms", "swiglu", "embeddings", "attention", "top_k")
    }
    assert "model dry: decode, graph" in rows


def test_without_a_gpu_it_says_so_in_one_line(tmp_path):
    (tmp_path / "libcuda.so.1").write_text("no library")
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    command = [sys.executable, str(PROGRAM), "--json", str(tmp_path / "r.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert done.returncode == 2
    (line,) = done.stdout.splitlines()
    assert line.startswith("test-gpu: there is no GPU here, nothing was run: no NVIDIA driver")


def test_the_baseline_graph_runs():
    """On the CPU, with the tiny shape: the graph is right, its speed says nothing."""
    from ort_baseline import decode_seconds_per_layer

    assert 0 < decode_seconds_per_layer("dry", "CPUExecutionProvider", layers=2, repeats=2) < 10
