"""`llmrun bench --profile` accounts for the whole step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from models import TINY
from mpi.harness import run_alone, run_ranks

Packed = Callable[..., Path]
LAYERS = TINY["num_hidden_layers"]


@pytest.mark.parametrize(("shards", "scheme", "op"), [(1, "f32", "MatMulF32"), (2, "q4", "MatMulQ4")])
def test_the_places_add_up_to_the_step(shards: int, scheme: str, op: str, packed_tiny: Packed) -> None:
    options = ["-p", 24, "-n", 8, "-d", 16, "-b", 3, "-r", 1, "--profile", "--json"]
    outcome = run_ranks(shards, "bench", packed_tiny(shards, scheme), *options)
    assert (outcome.code, outcome.errors) == (0, [])
    prompt, generation = json.loads(outcome.stdout)
    assert (generation["n_depth"], generation["n_seqs"], generation["profile"]["steps"]) == (16, 3, 8)
    for result in (prompt, generation):
        profile = result["profile"]
        rows = profile["rows"]
        assert sum(row["ms"] for row in rows) == pytest.approx(profile["step_ms"], rel=1e-9)
        assert sum(row["share"] for row in rows) == pytest.approx(1, rel=1e-9)
        # What the operators took was measured inside of what ONNX Runtime took, and that inside of the step: an
        # operator counted twice, or in another step, makes one of these negative.
        assert all(row["ms"] >= 0 for row in rows)
        calls = {(row["op"], row["role"]): row["calls"] for row in rows}
        assert calls[op, "mlp/down_proj"] == calls["PagedAttention", "self_attn/attention"] == LAYERS
        assert [n for (name, role), n in calls.items() if role == "lm_head" and name != "AllGather"] == [1]
        assert calls.get(("AllReduceAddRMSNorm", "mlp/down_proj"), 0) == (LAYERS if shards > 1 else 0)


def test_a_context_that_is_too_short_is_refused(packed_tiny: Packed) -> None:
    outcome = run_alone("bench", packed_tiny(1, "f32"), "-p", 0, "-n", 8, "-d", 120)
    assert (outcome.code, outcome.stdout) == (2, "")
    assert "do not fit the context of 128" in outcome.errors[0]


@pytest.mark.parametrize("megabytes", [64, 60, 0])  # of a small container
def test_the_roofline_is_measured_in_what_memory_there_is(megabytes: int, packed_tiny: Packed, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        f"""
import atexit, sys
import llmrun.memory
llmrun.memory.available_bytes = lambda loading=[1 << 30]: loading.pop() if loading else {megabytes} << 20
peak = lambda: next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
atexit.register(lambda: print(peak(), file=sys.stderr))
"""
    )
    options = ["-p", 8, "-n", 2, "-r", 1, "--json"]
    outcome = run_alone("bench", packed_tiny(1, "f32"), *options, environment={"PYTHONPATH": str(tmp_path)})
    assert outcome.code == 0
    generation = json.loads(outcome.stdout)[1]
    assert (generation["roofline_fraction"] is not None) == (megabytes == 64)  # less lies in a cache
    (peak,) = (line for line in outcome.stderr.splitlines() if line.startswith("VmHWM"))
    assert int(peak.split()[1]) < 200 << 10  # kB; it has some 80 MB by itself, and took 256 for the array


def test_doctor_measures_the_collectives_under_mpirun(packed_tiny: Packed) -> None:
    outcome = run_ranks(2, "doctor", packed_tiny(2, "q4"), "--json")
    assert outcome.code == 0
    checks = {check["check"]: check["found"] for check in json.loads(outcome.stdout)["checks"]}
    assert checks["collectives"].startswith("shared-memory, 2 ranks")
    assert "all-reduce of 8 KB in " in checks["collectives"]


def test_ranks_start_on_a_host_of_very_many_cores(packed_tiny: Packed, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os; os.sched_getaffinity, os.sched_setaffinity = lambda pid: set(range(8192)), lambda pid, cores: None"
    )
    path, environment = packed_tiny(2, "q4"), {"PYTHONPATH": str(tmp_path)}
    outcome = run_ranks(2, "doctor", "--json", environment=environment)
    checks = {check["check"]: check["found"] for check in json.loads(outcome.stdout)["checks"]}
    assert checks["collectives"].startswith("shared-memory, 2 ranks, own cores")
    outcome = run_ranks(2, path, "--threads", 1, "-p", "The king", "-n", 4, environment=environment)
    assert (outcome.code, outcome.errors) == (0, [])
