"""`make test-gpu` itself, as far as a machine without a GPU can run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

PROGRAM = Path(__file__).parent / "hardware.py"


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["sm_89", pytest.param("gfx1100", marks=pytest.mark.extended)])
def test_the_program_runs_dry(chip, tmp_path):
    path = tmp_path / "results.json"
    command = [sys.executable, str(PROGRAM), "--dry", "--chip", chip, "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(path.read_text())
    rows = {what: value for what, value, _ in results["rows"]}
    assert rows["two ranks on one GPU: collectives"] == "right"
    assert {name for name in rows if name.startswith("operators")} == {
        f"operators: {name}"
        for name in (
            "products",
            "real_products",
            "norms",
            "post_norms",
            "qk_norm",
            "gated",
            "embeddings",
            "attention",
            "real_attention",
            "sinks",
            "growing_queries",
            "top_k",
            "experts",
            "biased_experts",
            "shared_experts",
        )
    }
    assert {f"model {name}: {what}, graph" for name in ("dry", "dry-moe") for what in ("decode", "prefill 16")} <= set(
        rows
    )
    assert float(rows["demo model against float64"]) < 1e-2
    assert {"onnxruntime dry: decode, eager", "onnxruntime dry: prefill, eager"} <= set(rows)
    assert results["failed"] == 0


def test_code_that_was_prepared_before_a_change_of_the_kernels_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "")  # which the program sets, for its own children
    import hardware
    import standin

    from llmpack import kernels

    source, builds = tmp_path / "matmul.py", []
    source.write_text("before")

    def build(specs, targets):
        builds.append(targets)
        return {target: standin.kernels_of(specs, target) for target in targets}

    monkeypatch.setattr(kernels, "build", build)
    monkeypatch.setattr(hardware, "KERNELS", tmp_path)
    monkeypatch.setattr(hardware, "SOURCES", [source], raising=False)
    bench = SimpleNamespace(models=("dry",), chip="sm_89", dry=False, row=lambda *_: None)
    first = hardware.kernels_for(bench)
    assert (hardware.kernels_for(bench), len(builds)) == (first, 1)
    source.write_text("after")
    assert hardware.kernels_for(bench) != first
    assert len(builds) == 2


@pytest.mark.parametrize("chip", ["sm_90", "gfx1100"])
def test_what_is_timed_with_one_token_is_not_the_kernel_for_many(chip, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "")
    import hardware
    import shapes

    specs = [spec for spec in hardware.all_specs(("7b",)) if spec.op == "matmul_q4" and spec.of(chip) is not None]
    for shards in (1, 2, 4):
        for n, k in shapes.products("7b", shards).values():
            own = [s.constants for s in specs if (s.constants["out_features"], s.constants["in_features"]) == (n, k)]
            assert any(0 < constants["max_rows"] <= 8 for constants in own), (shards, n, k)


def test_without_a_gpu_it_says_so_in_one_line(tmp_path):
    (tmp_path / "libcuda.so.1").write_text("no library")
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    command = [sys.executable, str(PROGRAM), "--json", str(tmp_path / "r.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert done.returncode == 2
    (line,) = done.stdout.splitlines()
    assert line.startswith("test-gpu: there is no GPU here, nothing was run: no NVIDIA driver")


def test_only_the_parts_and_models_asked_for_are_run(tmp_path):
    command = [sys.executable, str(PROGRAM), "--dry", "--json", str(tmp_path / "r.json"), "--parts"]
    done = subprocess.run([*command, "operators"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    names = [row[0] for row in json.loads((tmp_path / "r.json").read_text())["rows"]]
    assert not [name for name in names if not name.startswith(("stand-in", "copy", "operators"))]
    done = subprocess.run([*command, "operators,speed"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "--parts: no speed. There are two-ranks, demo," in done.stderr


def test_the_deadline_is_kept_whatever_hangs(tmp_path):
    """The table and the results of what was done are there all the same."""
    code = """
import sys, time, argparse, pathlib
sys.path.insert(0, sys.argv[1])
import gpu_bench
bench = gpu_bench.Bench(
    argparse.Namespace(dry=True, chip="", minutes=0.01, json=pathlib.Path(sys.argv[2]), parts=("second",))
)
bench.stop_in_time()
bench.row("first", "1")
bench.part("second", lambda: time.sleep(100))"""
    command = [sys.executable, "-c", code, str(PROGRAM.parent), str(tmp_path / "r.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "0.01 minutes are over" in done.stdout
    assert [row[0] for row in json.loads((tmp_path / "r.json").read_text())["rows"]] == ["first", "the rest"]


def test_the_baseline_fits_a_file_of_protobuf():
    import ort_baseline
    import shapes

    for name in ("7b", "13b", "34b", "70b"):
        hidden, vocabulary = shapes.MODELS[name][0], shapes.MODELS[name][6]
        layer = sum(n * k for n, k in shapes.products(name, 1).values())
        layers = ort_baseline.most_layers(name)
        assert layers >= 2
        assert (layers * layer + hidden * vocabulary) * (0.5 + 2 / ort_baseline.BLOCK) < 2e9
