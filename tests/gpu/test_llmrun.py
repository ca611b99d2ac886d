"""`llmrun --provider cuda` from the command line to the launches, on one and on two stand-in GPUs, against the CPU.

The model, kernels computed by numpy and float16 between the operators, must say what the CPU says; and what a step takes
back from a GPU must be the likeliest tokens, or the whole rows where a request needs them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import standin

from llmpack import kernels
from llmpack.pack import Options, pack
from llmrun import launcher
from models import DEMO

PROMPT = "In the evening the prince"
NUM_TOKENS, VOCABULARY, RECORD_BYTES = 10, json.loads((DEMO / "config.json").read_text())["vocab_size"], 8 * 65


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The demo model with code that is a name."""

    def build(specs: Any, targets: Any, *_: Any) -> dict[str, Any]:
        names = [*(target for target in targets if target != "cpu"), kernels.PTX_TARGET]
        return {target: standin.kernels_of(specs, target) for target in names}

    folder = tmp_path_factory.mktemp("for-standins")

    def get(shards: int) -> Path:
        target = folder / f"tp{shards}"
        if not target.exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(kernels, "build", build)
                patch.setattr(kernels, "check_compiler", lambda: "none")
                pack(DEMO, target, Options(shards=shards, targets=("sm_89", "gfx1100")))
        return target

    return get


@pytest.fixture
def steps(tmp_path: Path) -> Path:
    """Where the stand-in for ONNX Runtime writes what each step was."""
    (tmp_path / "steps").write_text("")
    return tmp_path / "steps"


@pytest.fixture
def run(standins: Path, steps: Path):
    def run(shards: int, provider: str, *command: object, **settings: object) -> subprocess.CompletedProcess[str]:
        environment = standin.environment(standins, **{"devices": shards, **settings})
        if provider != "cpu":
            environment["PYTHONPATH"] = f"{standin.HERE / 'standin_ort'}:{environment['PYTHONPATH']}"
            environment |= {"LLMPACK_MINI_ORT": str(standins / "libmini_ort.so"), "LLMPACK_STEPS": str(steps)}
        whole = [sys.executable, *command]
        if shards > 1:
            path, family = launcher.find_mpirun()
            whole = [path, *launcher.mpirun_options(family, shards), *whole]
        return subprocess.run(
            [*map(str, whole)], env=environment, capture_output=True, text=True, timeout=120, check=False
        )

    return run


@pytest.fixture
def generate(artifact, run, steps: Path):
    def generate(shards: int, provider: str, *arguments: object) -> tuple[dict[str, Any], list[dict[str, int]]]:
        options = ["-p", PROMPT, "-n", NUM_TOKENS, "--ignore-eos", "--json", "--provider", provider, *arguments]
        steps.write_text("")
        done = run(shards, provider, "-m", "llmrun", "generate", artifact(shards), *options)
        assert (done.returncode, done.stderr) == (0, "")
        return json.loads(done.stdout), [json.loads(line) for line in steps.read_text().splitlines()]

    return generate


GREEDY = ("--temperature", 0)
PENALTY = (*GREEDY, "--repeat-penalty", 1.2)


@pytest.mark.parametrize(
    ("shards", "options"),
    [(1, GREEDY), pytest.param(2, GREEDY, marks=pytest.mark.mpi), pytest.param(2, PENALTY, marks=pytest.mark.mpi)],
    ids=["one_gpu", "two_gpus", "two_gpus_whole_rows"],
)
def test_gpus_say_what_the_cpu_says(shards: int, options: tuple, generate) -> None:
    expected, _ = generate(shards, "cpu", *options)
    found, steps = generate(shards, "cuda", *options)
    assert found["ids"] == expected["ids"]
    assert len(steps) == NUM_TOKENS * shards
    assert [step["graph"] for step in steps].count("1") == (NUM_TOKENS - 1) * shards, "decode steps are one graph"
    # `taken` is counted up to the step before.
    columns = -(-VOCABULARY // shards)
    needs_rows = "--repeat-penalty" in options
    assert max(step["taken"] for step in steps) == (NUM_TOKENS - 1) * (RECORD_BYTES + needs_rows * 4 * columns)


def test_a_cache_that_holds_no_whole_sequence_is_named_as_such(artifact, run) -> None:
    done = run(
        1, "cuda", "-m", "llmrun", "generate", artifact(1), "-p", PROMPT, "--provider", "cuda", "--kv-cache-mb", 1
    )
    assert done.returncode == 5
    assert "--kv-cache-mb holds" in done.stderr


@pytest.mark.parametrize("shards", [1, pytest.param(2, marks=pytest.mark.mpi)])
def test_a_spoilt_cache_ends_the_job(shards: int, artifact, run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache that is spoilt is the one that the kernels read."""
    monkeypatch.setenv("LLMRUN_FAULT", f"{shards - 1}:decode:nan")
    options = ["-p", PROMPT, "-n", 4, "--ignore-eos", "--provider", "cuda"]
    done = run(shards, "cuda", "-m", "llmrun", "generate", artifact(shards), *options)
    assert done.returncode == 7, done.stderr


LARGE_STEPS = """
import sys
from llmrun import Engine

with Engine(sys.argv[1], provider="cuda", max_num_seqs=3) as engine:
    rows = engine.logits_batch([[n, *range(3, 300)] for n in range(3)], chunk=2048)
    assert [len(each) for each in rows] == [298] * 3
"""
MANY_SEQUENCES = """
import sys
from llmrun import Engine

with Engine(sys.argv[1], provider="cuda", max_num_seqs=512) as engine:
    most, planned = engine.job.options.most_tokens, engine.core._scheduler.token_budget
    assert planned <= most, (planned, most)
"""


@pytest.mark.parametrize("code", [LARGE_STEPS, MANY_SEQUENCES], ids=["of_a_chunk", "of_sequences"])
def test_no_step_is_larger_than_the_memory_laid_out_for_it(code: str, artifact, run) -> None:
    done = run(1, "cuda", "-c", code, artifact(1))
    assert done.returncode == 0, done.stderr


def test_a_rank_uses_no_gpu_but_its_own(artifact, run) -> None:
    """A context takes hundreds of megabytes of each, and another program may have one for itself."""
    options = ["-p", PROMPT, "-n", 1, "--provider", "cuda"]
    done = run(1, "cuda", "-m", "llmrun", "generate", artifact(1), *options, devices=2, taken=1)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("chip", "advice"), [("sm_121", ""), ("sm_90", " Pack with --targets sm_90 for a faster start.")]
)
def test_a_chip_that_takes_ptx_is_told_of_no_target_but_one_that_can_be_packed(chip, advice, artifact, run) -> None:
    done = run(
        1, "cuda", "-m", "llmrun", "generate", artifact(1), "-p", PROMPT, "-n", 1, "--provider", "cuda", chip=chip
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == f"llmrun: no code for {chip} in the artifact: the driver compiles its ptx_80 now.{advice}\n"


def test_a_driver_that_is_too_old_for_the_code_compiles_its_ptx(artifact, run) -> None:
    done = run(
        1, "cuda", "-m", "llmrun", "generate", artifact(1), "-p", PROMPT, "-n", 1, "--provider", "cuda", refuses=1
    )
    assert done.returncode == 0, done.stderr
    why, advice = "the driver is too old for the code of sm_89", "Install a newer one."
    assert done.stderr == f"llmrun: {why}: the driver compiles its ptx_80 now. {advice}\n"


ON_WHAT_IS_SHOWN = """
import os, sys
from llmrun import console
from llmrun.cli import main

os.environ["CUDA_VISIBLE_DEVICES"] = sys.argv[3].split()[console.environment_rank()]
sys.exit(main(["generate", sys.argv[1], "-p", sys.argv[2], "-n", "2", "--provider", "cuda", *sys.argv[4:]]))
"""


@pytest.mark.mpi
@pytest.mark.parametrize("options", [(), ("--share-gpu",)], ids=["alone", "sharing"])
def test_ranks_that_are_shown_a_gpu_each_have_their_own(options: tuple, artifact, run) -> None:
    done = run(2, "cuda", "-c", ON_WHAT_IS_SHOWN, artifact(2), PROMPT, "1 0", *options)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.mpi
def test_ranks_that_are_shown_the_same_gpu_are_refused(artifact, run) -> None:
    done = run(2, "cuda", "-c", ON_WHAT_IS_SHOWN, artifact(2), PROMPT, "1 1")
    assert done.returncode == 2
    assert "2 ranks and 1 GPU on this host. Pack for --shards 1, or" in done.stderr


ON_THE_CPU = """
import sys, onnxruntime
from llmrun.cli import main

onnxruntime.get_available_providers = lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
sys.exit(main(["generate", sys.argv[1], "-p", sys.argv[2], "-n", "2"]))
"""


def test_whoever_has_a_gpu_and_computes_on_the_cpu_is_told_why(artifact, run) -> None:
    done = run(1, "cpu", "-c", ON_THE_CPU, artifact(1), PROMPT, version=11040)
    assert done.returncode == 0, done.stderr
    assert "this runs on the CPU, not on a GPU. libcuda.so.1 supports CUDA 11.4, expected" in done.stderr


@pytest.mark.mpi
@pytest.mark.parametrize(("taken", "who"), [(0, ""), (1, "rank 1: ")])
def test_all_ranks_compute_on_the_cpu_if_one_has_no_gpu(taken: int, who: str, artifact, run) -> None:
    done = run(2, "cpu", "-c", ON_THE_CPU, artifact(2), PROMPT, devices=2, taken=taken)
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    reason = f"{who}using GPU {taken}: the driver says 'stand-in error 46' (error 46)."
    assert line == f"llmrun: this runs on the CPU, not on a GPU. {reason}"


TWO_ENGINES = """
import sys
from llmrun import Engine

if sys.argv[2] != "closed":
    if sys.argv[2] == "failed":
        from llmrun import errors, rank_files

        def fail(files):
            raise errors.IntegrityError("changed meanwhile")

        conclude, rank_files.RankFiles.conclude = rank_files.RankFiles.conclude, fail
        try:
            Engine(sys.argv[1], provider="cuda", kv_cache_mb=64)
        except errors.IntegrityError:
            rank_files.RankFiles.conclude = conclude
        first = 8 << 30  # of the stand-in, all of it
    else:
        engine = Engine(sys.argv[1], provider="cuda", kv_cache_mb=64)
        first = engine.job.placement.free_bytes
        del engine
    engine = Engine(sys.argv[1], provider="cuda", kv_cache_mb=64)
    print(first, "same")
    print(engine.job.placement.free_bytes, "same")
    sys.exit()
for _ in range(2):
    with Engine(sys.argv[1], provider="cuda", kv_cache_mb=64) as engine:
        text = engine.complete("The prince", max_tokens=2, temperature=0).text
        free = engine.job.placement.free_bytes
    if engine.rank == 0:
        print(free, text)
"""


@pytest.mark.parametrize(
    ("shards", "how"), [(1, "closed"), (1, "dropped"), (1, "failed"), pytest.param(2, "closed", marks=pytest.mark.mpi)]
)
def test_an_engine_that_is_no_more_leaves_the_gpu_to_the_next(shards: int, how: str, artifact, run) -> None:
    done = run(shards, "cuda", "-c", TWO_ENGINES, artifact(shards), how)
    assert done.returncode == 0, done.stderr
    (free, text), (free_again, text_again) = (line.split(" ", 1) for line in done.stdout.splitlines())
    assert text == text_again
    assert int(free) - int(free_again) < 32 << 20, "it holds its keys and values still"
