"""`pack --targets` end to end: what the artifact lists, that it still runs on the CPU, and that it is reproducible."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmpack import kernel_file, kernel_plan, kernels
from llmpack.pack import Options, pack
from llmrun.artifact import open_artifact
from models import DEMO


@pytest.fixture
def few_variants(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fewer variants of each operation: the demo's test for all targets compiles all of them."""
    monkeypatch.setattr(kernel_plan, "ROWS", (4,))
    monkeypatch.setenv("LLMPACK_CACHE", str(tmp_path / "cache"))


@pytest.mark.slow
def test_an_artifact_with_gpu_code(tmp_path: Path, tiny_checkpoint: Path, few_variants: None) -> None:
    options = Options(scheme="q4", group_size=32, targets=("gfx1100",))
    steps = []
    pack(tiny_checkpoint, tmp_path / "a", options, lambda step, done, total: steps.append((step, done, total)))
    manifest = open_artifact(tmp_path / "a").manifest
    assert manifest.targets == ("cpu", "gfx1100")
    assert manifest.kernels == {"gfx1100": "kernels/hip-gfx1100.bin"}
    assert manifest.kernels["gfx1100"] in manifest.files
    assert manifest.ranks[0].graphs == {"cpu": "rank-0/cpu.onnx", "gpu": "rank-0/gpu.onnx"}
    file = kernel_file.from_bytes((tmp_path / "a" / manifest.kernels["gfx1100"]).read_bytes(), "f")
    assert {k.op for k in file.kernels} >= {"matmul_q4", "matmul_q6", "embed_q6", "attention", "top_k_first"}
    counts = [(done, total) for step, done, total in steps if step == "kernels"]
    assert counts[-1] == (len(file.kernels), len(file.kernels))

    # From the cache, and in another process with its own order of work: the same bytes.
    pack(tiny_checkpoint, tmp_path / "b", options)
    for name in ("manifest.json", "kernels/hip-gfx1100.bin", "rank-0/gpu.onnx"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name

    # The CPU's part is the same as without GPU targets.
    pack(tiny_checkpoint, tmp_path / "c", Options(scheme="q4", group_size=32))
    for name in ("rank-0/cpu.onnx", "rank-0/weights.bin", "selfcheck.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "c" / name).read_bytes(), name
    command = [sys.executable, "-m", "llmrun", "verify", "--deep", str(tmp_path / "a")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        pytest.param(("sm_89", "gfx1100"), ("sm_89", "gfx1100"), id="both vendors"),
        pytest.param(("all",), kernels.GPU_TARGETS, id="all", marks=pytest.mark.extended),
    ],
)
def test_the_demo_for_gpus_runs_on_the_cpu_and_lists_what_it_holds(
    targets: tuple[str, ...], expected: tuple[str, ...], tmp_path: Path, monkeypatch
) -> None:
    """All variants of a model's kernels for all targets take minutes; then they come from .build."""
    if targets != ("all",):
        monkeypatch.setattr(kernel_plan, "ROWS", (4,))
    monkeypatch.setenv("LLMPACK_CACHE", str(Path(__file__).parents[2] / ".build/kernel-cache"))
    pack(DEMO, tmp_path / "a", Options(scheme="q4", shards=2, targets=targets))
    manifest = open_artifact(tmp_path / "a").manifest
    assert manifest.targets == ("cpu", *expected)
    assert set(manifest.kernels) == {*expected, kernels.PTX_TARGET}
    for target, path in manifest.kernels.items():
        file = kernel_file.from_bytes((tmp_path / "a" / path).read_bytes(), path)
        assert len(file.kernels) == len({(k.op, *sorted(k.constants.items())) for k in file.kernels}) > 25, target
        shared_bytes = kernels.SHARED_MEMORY.get(target, 1 << 30)  # PTX: the driver decides
        for kernel in file.kernels:
            most = 16 if (target, kernel.op) == ("sm_100", "attention") else 0  # of the demo's heads of 32 features
            assert kernel.spill_bytes <= most, (target, kernel.op, kernel.constants, kernel.spill_bytes)
            assert kernel.shared_bytes + kernel.static_shared_bytes <= shared_bytes, (
                target,
                kernel.op,
                kernel.constants,
            )

    def llmrun(*arguments: object) -> str:
        command = [sys.executable, "-m", "llmrun", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    shown = json.loads(llmrun("show", tmp_path / "a", "--json"))
    assert (shown["targets"], set(shown["kernels"])) == (["cpu", *expected], set(manifest.kernels))
    answer = json.loads(llmrun("generate", tmp_path / "a", "-p", "The king", "-n", 5, "--ignore-eos", "--json"))
    assert len(answer["ids"]) == 5


def test_a_cpu_artifact_says_nothing_of_kernels(tmp_path: Path, tiny_checkpoint: Path) -> None:
    pack(tiny_checkpoint, tmp_path / "a", Options(scheme="q4"))
    assert "kernels" not in json.loads((tmp_path / "a/manifest.json").read_text())
    assert not (tmp_path / "a/kernels").exists()
