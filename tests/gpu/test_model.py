"""A rank's gpu.onnx through our operators, launcher and collectives on a stand-in driver, with numpy for the kernels.

The reference is selfcheck.json: logits in float64 from the packed bytes, by other code and another graph. What is shown: the
graph, every node's attributes, pointers, shapes, the order of launches and the collectives. What is not: the compiled kernels.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import standin

from models import GEMMA, GLM_MOE, GPT_OSS, GRANITE, GROWING, PARTLY_ROTATED, SMOLLM, make_checkpoint
from mxfp4_checkpoint import store_in_mxfp4

WORKER = Path(standin.HERE) / "worker.py"
# float16 between operators (2^-11 each), two layers, against float64, relative to the largest logit: seen 1e-3.
TOLERANCE = 6e-3


@pytest.fixture
def run_ranks(standins: Path, operators: Path, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    def run(
        scenario: str,
        artifact: Path,
        size: int = 1,
        folder: Path = standins,
        before: Callable[[int], list[str]] = lambda rank: [],
        **settings: object,
    ) -> list[dict[str, Any]]:
        """`before`: what a rank's command line begins with."""
        exchange = tmp_path / "exchange"
        exchange.mkdir(exist_ok=True)
        mini = standins / "libmini_ort.so"
        commands = [
            [
                *before(rank),
                sys.executable,
                str(WORKER),
                scenario,
                str(artifact),
                str(operators),
                str(mini),
                str(exchange),
                str(rank),
                str(size),
            ]
            for rank in range(size)
        ]
        environment = standin.environment(folder, **{"devices": size, **settings})
        ranks = [
            subprocess.Popen(c, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for c in commands
        ]
        results = []
        try:
            outputs = [rank.communicate(timeout=200) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        for rank, (out, err) in zip(ranks, outputs, strict=True):
            assert rank.returncode == 0, err
            results.append(json.loads(out))
            assert results[-1]["violations"] == 0, results[-1]["report"]
        return results

    return run


@pytest.mark.parametrize("quant", ["f16", "q8", "q4"])
def test_a_gpu_gives_the_logits_of_the_packed_bytes(quant, gpu_artifact, tiny_checkpoint, run_ranks):
    (result,) = run_ranks("logits", gpu_artifact(tiny_checkpoint, 1, quant))
    assert max(result["errors"]) < TOLERANCE, result["errors"]


FAMILIES = {
    "biased": {"model_type": "qwen2"},
    "normalised": {"model_type": "qwen3", "head_dim": 64},
    "partly-rotated": PARTLY_ROTATED,
    "multiplied": GRANITE,
    "not-all-rotated": SMOLLM,
    "with-growing-queries": GROWING,
    "windowed": {"model_type": "mistral", "sliding_window": 2},
    "normalised-before-it-is-added": {**GEMMA, "sliding_window": 2},
    # All experts: of fewer, rounding decides which.
    "shared-experts": {**GLM_MOE, "num_hidden_layers": 2, "num_experts_per_tok": 8},
    "experts-as-published": {**GPT_OSS, "num_hidden_layers": 2, "sliding_window": 2, "num_experts_per_tok": 6},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [1, 2])
def test_models_beside_llama_give_the_logits_of_the_packed_bytes(family, size, gpu_artifact, tmp_path, run_ranks):
    checkpoint = make_checkpoint(tmp_path / "m", **FAMILIES[family])
    if family == "experts-as-published":
        store_in_mxfp4(checkpoint)
    for result in run_ranks("logits", gpu_artifact(checkpoint, size, "q4"), size):
        assert max(result["errors"]) < TOLERANCE, result["errors"]


def test_rocm_gives_the_logits_of_the_packed_bytes(gpu_artifact, tiny_checkpoint, run_ranks):
    (result,) = run_ranks("logits-hip", gpu_artifact(tiny_checkpoint, 1, "q4"), chip="gfx1100")
    assert max(result["errors"]) < TOLERANCE, result["errors"]


def test_two_gpus_give_the_logits_of_the_packed_bytes(gpu_artifact, tiny_checkpoint, run_ranks):
    results = run_ranks("logits", gpu_artifact(tiny_checkpoint, 2, "q4"), 2)
    assert max(*results[0]["errors"], *results[1]["errors"]) < TOLERANCE
    assert "one-shot through mapped host memory" in results[0]["transport"]
    assert "libnccl.so.2 2.22.3" in results[0]["transport"]


@pytest.mark.parametrize(
    ("peer", "hip", "says"),
    [
        (1, False, "mapped host memory (rank 0: reaching the memory of rank 1's GPU: the driver says"),
        (1, True, "mapped host memory (rank 0: reaching the memory of rank 1's GPU: the driver says"),
        (2, False, "one-shot through the GPUs' own memory"),
        (2, True, "one-shot through the GPUs' own memory"),
        (
            3,
            False,
            "mapped host memory (rank 0: the memory of rank 1's GPU is open and does not hold what was written there)",
        ),
    ],
    ids=["refused", "refused_on_rocm", "there", "there_on_rocm", "loses_data"],
)
def test_peer_memory_is_used_where_it_holds_what_is_written(peer, hip, says, gpu_artifact, tiny_checkpoint, run_ranks):
    scenario, chip = ("logits-hip", "gfx1100") if hip else ("logits", "sm_89")
    results = run_ranks(scenario, gpu_artifact(tiny_checkpoint, 2, "q4"), 2, peer=peer, chip=chip)
    assert max(*results[0]["errors"], *results[1]["errors"]) < TOLERANCE
    assert says in results[0]["transport"]


@pytest.mark.parametrize("way", ["nccl", "staged", "no-mapping"])
def test_rows_beyond_one_shot_give_the_same_logits(way, gpu_artifact, tiny_checkpoint, run_ranks, standins, tmp_path):
    folder, settings = standins, {}
    if way != "nccl":
        folder = standin.build(tmp_path / "without-nccl", "libcuda.so.1")
    if way == "no-mapping":
        settings["register"] = 0
    results = run_ranks("long", gpu_artifact(tiny_checkpoint, 2, "q4"), 2, folder, **settings)
    assert max(result["error"] for result in results) < TOLERANCE
    assert ("by way of the CPU" in results[0]["transport"]) == (way != "nccl")
    assert ("not one-shot" in results[0]["transport"]) == (way == "no-mapping")


def test_ranks_that_share_a_gpu_do_without_nccl(gpu_artifact, tiny_checkpoint, run_ranks):
    results = run_ranks("logits", gpu_artifact(tiny_checkpoint, 2, "q4"), 2, devices=1)
    assert max(*results[0]["errors"], *results[1]["errors"]) < TOLERANCE
    assert "ranks share a GPU" in results[0]["transport"]


@pytest.mark.parametrize("size", [1, 2])
def test_decode_steps_are_captured_and_quiet(size, gpu_artifact, tiny_checkpoint, run_ranks):
    results = run_ranks("steps", gpu_artifact(tiny_checkpoint, size, "q4"), size)
    assert results[0]["launches"] > 0


@pytest.mark.parametrize(("size", "devices", "is_early"), [(1, 1, True), (2, 2, True), (2, 1, False)])
def test_kernels_begin_early_unless_ranks_share_a_gpu(
    size, devices, is_early, gpu_artifact, tiny_checkpoint, run_ranks
):
    """FORMAT 8.6: every launch of a step, eager and captured."""
    results = run_ranks("steps", gpu_artifact(tiny_checkpoint, size, "q4"), size, devices=devices, chip="sm_90")
    for result in results:
        assert result["launches"] > 100
        assert result["early"] == (result["launches"] if is_early else 0)


# As a container has it.
NAMED = "import os, socket, sys; socket.sethostname(sys.argv[1]); os.execv(sys.argv[2], sys.argv[2:])"


def test_ranks_whose_hosts_names_differ_may_share_a_gpu(gpu_artifact, tiny_checkpoint, run_ranks):
    namespace = ["unshare", "--uts", sys.executable, "-c", NAMED]
    trial = [*namespace, "trial", sys.executable, "-c", ""]
    if shutil.which("unshare") is None or subprocess.run(trial, check=False).returncode != 0:
        pytest.skip("needs unshare (Debian package util-linux) and the permission to use it")
    artifact = gpu_artifact(tiny_checkpoint, 2, "q4")
    own = {"devices": 1, "chip": "sm_90", "before": lambda rank: [*namespace, f"container-{rank}"]}
    for result in run_ranks("steps", artifact, 2, **own):
        assert result["launches"] > 100
        assert result["early"] == 0
        assert "ranks share a GPU" in result["transport"]


def test_all_reduces_are_timed(gpu_artifact, tiny_checkpoint, run_ranks):
    results = run_ranks("timed", gpu_artifact(tiny_checkpoint, 2, "q4"), 2)
    assert [result["code"] for result in results] == [0, 0]
    assert np.isfinite(results[0]["microseconds"])
