"""`make test-gpu`: checks every operator on a GPU against numpy, then times it. One command, no network, nine minutes.

    python tests/gpu/hardware.py              on a machine with a GPU; exits with 2, and one line, where there is none
    python tests/gpu/hardware.py --prepare --chip sm_90    compile the code elsewhere, into .build/gpu-kernels
    python tests/gpu/hardware.py --dry        the same program on the stand-in driver, with tiny shapes and numpy for kernels

The code under test is what ships: Triton's output from a kernel file, our launcher, our operators. In place of ONNX Runtime
stands mini_ort.cpp; where onnxruntime-gpu is installed, tests/gpu/ort_baseline.py times its own operators beside it. Prints one
table last, and leaves within nine minutes whatever hangs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [
    str(HERE),
    str(HERE.parent / "ops"),
    *(str(ROOT / part) for part in ("packager", "runtime", "custom_ops")),
]
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # of the processes that compile

import box  # noqa: E402
import shapes  # noqa: E402
import standin  # noqa: E402
from checks import check_operators  # noqa: E402
from device import Device  # noqa: E402
from executor import MiniOrt  # noqa: E402
from gpu_bench import Bench  # noqa: E402
from timings import bandwidth, baseline, end_to_end, matrix_vector, prefill  # noqa: E402

from llmpack import kernel_file  # noqa: E402
from llmpack.kernel_plan import KernelSpec  # noqa: E402

KERNELS = ROOT / ".build" / "gpu-kernels"
MODELS = ("7b", "13b", "34b", "70b", "30b-a3b")
PARTS = ("two-ranks", "demo", "operators", "matrix-vector", "prefill", "model", "onnxruntime")
SOURCES = [
    *sorted((ROOT / "custom_ops/llmpack_kernels").glob("*.py")),
    *(
        ROOT / "packager/llmpack" / name
        for name in ("kernel_compiler.py", "kernel_file.py", "kernel_plan.py", "kernel_spec.py", "moe_plan.py")
    ),
]


def all_specs(models: tuple[str, ...]) -> list[KernelSpec]:
    """Everything that is run: whole models on one GPU, products and collectives of two and four shards."""
    specs: dict[tuple, KernelSpec] = {}
    for model in models:
        shards_run = (1, 2) if model.startswith("dry") else (1, 2, 4)
        for shards in shards_run:
            for spec in shapes.specs_of(shapes.config_of(model, 1), shards):
                is_wanted = spec.op == "matmul_q4" and spec.constants["max_rows"] in (1, 8, 0)  # 8: q4 on NVIDIA
                if (shards == 1 and model != "34b") or is_wanted:
                    specs[spec.op, *sorted(spec.constants.items())] = spec
    from checks import extra_specs

    for spec in (*shapes.collectives_of(models[0], 2), *extra_specs()):
        specs.setdefault((spec.op, *sorted(spec.constants.items())), spec)
    return list(specs.values())


def kernels_for(bench: Bench) -> Path:
    """Return a kernel file for the chip: prepared, or compiled now."""
    specs = all_specs(bench.models)
    text = hashlib.sha256(repr(sorted(map(repr, specs))).encode())
    for source in SOURCES:  # code that was prepared before a change is not the code under test
        text.update(source.read_bytes())
    digest = text.hexdigest()[:12]
    backend = "hip" if bench.chip.startswith("gfx") else "cuda"
    path = KERNELS / f"{backend}-{bench.chip}-{digest}.bin"
    if bench.dry:
        path = bench.build / "kernels.bin"
        standin.write_kernels(path, specs, bench.chip)
    elif not path.exists():
        from llmpack import kernels

        started = time.monotonic()
        file = kernels.build(specs, [bench.chip])[bench.chip]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(kernel_file.to_bytes(file))
        bench.row("kernels compiled", f"{time.monotonic() - started:.0f} s", f"{len(specs)} for {bench.chip}")
    return path


def build_operators(bench: Bench) -> Path:
    """Build the operator library, unless it is there."""
    from llmrun.library import find_library

    try:
        return find_library()
    except Exception:
        folder = ROOT / ".build" / "ops"
        subprocess.run(
            ["cmake", "-S", str(ROOT / "custom_ops"), "-B", str(folder)], check=True, stdout=subprocess.DEVNULL
        )
        subprocess.run(["cmake", "--build", str(folder), "-j"], check=True, stdout=subprocess.DEVNULL)
        return folder / "libllmpack_ops.so"


def demo(bench: Bench, operators: Path, mini: Path) -> None:
    """The demo model, packed for this chip: its own example against the packager's float64 logits, in a process of its own.

    In another, no kernel begins before the one before it has ended (FORMAT 8.6): the same bits, else one does not wait.
    What lies in artifacts/demo-gpu, of an earlier commit or another chip, is taken only where nothing can be packed.
    """
    from llmrun.artifact import IncompatibleError

    artifact = bench.build / "demo" if bench.dry else ROOT / "artifacts" / "demo-gpu"
    try:
        from llmpack import kernels
        from llmpack.pack import Options, pack

        if bench.dry:
            kernels.build = lambda specs, *_: {bench.chip: standin.kernels_of(specs, bench.chip)}
        pack(ROOT / "tests/checkpoints/demo", artifact, Options(targets=(bench.chip,), force=True))
    except (ImportError, IncompatibleError) as error:
        if not (artifact / "manifest.json").exists():
            bench.row("demo model", "not run", f"no artifacts/demo-gpu, and it cannot be packed here: {error}")
            return
    program = map(str, (HERE / "demo_on_gpu.py", artifact, operators, mini, bench.chip, int(bench.dry)))
    command, results = [sys.executable, *program], []
    for no_overlap in ("0", "1"):
        environment = {**os.environ, "LLMPACK_NO_PDL": no_overlap}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode != 0:
            raise AssertionError(done.stderr.strip().splitlines()[-1])
        results.append(json.loads(done.stdout.splitlines()[-1]))
    found = results[0]
    if results[0]["sha256"] != results[1]["sha256"]:
        raise AssertionError("demo model: kernels that begin before the one before has ended give other bits")
    bench.results["demo"] = found
    bench.row(
        "demo model against float64",
        f"{found['error']:.2e}",
        f"of the largest logit, {found['tokens']} tokens; bound {found['bound']}",
    )


def two_ranks(bench: Bench, operators: Path, mini: Path, kernels: Path) -> None:
    """The collectives of two processes on one GPU: right, and timed (they take turns, so the time says little)."""
    exchange = bench.build / "exchange"
    exchange.mkdir()
    arguments = [str(operators), str(mini), str(kernels), str(exchange)]
    commands = [
        [
            sys.executable,
            str(HERE / "collectives_on_gpu.py"),
            *arguments,
            str(rank),
            "2",
            bench.models[0],
            str(int(bench.dry)),
            str(int(bench.is_hip)),
        ]
        for rank in range(2)
    ]
    ranks = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for command in commands
    ]
    try:
        outputs = [rank.communicate(timeout=45) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    if failed := [err for rank, (_, err) in zip(ranks, outputs, strict=True) if rank.returncode != 0]:
        raise AssertionError(f"a rank: {failed[0][-400:]}")
    found = [json.loads(out.splitlines()[-1]) for out, _ in outputs]
    if found[0]["sums"] != found[1]["sums"]:
        raise AssertionError("the ranks have different bits")
    bench.results["two_ranks"] = found[0]
    bench.row(
        "two ranks on one GPU: collectives", "right", f"{found[0]['transport']}; {found[0]['us']:.0f} us each, sharing"
    )


def in_stand_in(chip: str) -> None:
    """Start again with the stand-in driver in the loader's path."""
    if "LLMPACK_STAND_IN" in os.environ:
        return
    vendor = ("libamdhip64.so.7", "librccl.so.1") if chip.startswith("gfx") else ("libcuda.so.1", "libnccl.so.2")
    folder = standin.build(Path(tempfile.mkdtemp(prefix="llmpack-standin-")), *vendor)
    environment = {**standin.environment(folder, bytes=1 << 36, chip=chip), "LLMPACK_STAND_IN": str(folder)}
    os.execve(sys.executable, [sys.executable, *sys.argv], environment)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dry", action="store_true", help="on the stand-in driver, with tiny shapes")
    parser.add_argument("--prepare", action="store_true", help="compile for --chip and stop; needs no GPU")
    parser.add_argument("--chip", default="")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--models", default=",".join(MODELS), help="whose shapes are timed")
    parser.add_argument("--parts", default=",".join(PARTS), help="what is run")
    parser.add_argument("--json", type=Path, default=ROOT / ".build" / "test-gpu.json")
    arguments = parser.parse_args()
    for option, known in (("models", MODELS), ("parts", PARTS)):
        asked = getattr(arguments, option).split(",")
        if unknown := [name for name in asked if name not in known]:
            parser.error(f"--{option}: no {', '.join(unknown)}. There are {', '.join(known)}.")
        setattr(arguments, option, tuple(asked))
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    if arguments.prepare:
        bench = Bench(arguments)
        print(kernels_for(bench))
        return 0
    if arguments.dry:
        in_stand_in(arguments.chip or "sm_89")
    bench = Bench(arguments)
    path = build_operators(bench)
    operators = box.load_operators(path)
    from llmrun import device as placement

    missing = []
    for provider in ("cuda", "rocm"):
        try:
            version, gpus = placement.probe(operators, provider)
            break
        except Exception as error:
            missing.append(str(error))
    else:
        print(f"test-gpu: there is no GPU here, nothing was run: {'; '.join(missing)}")
        return 2
    bench.is_hip = provider == "rocm"
    bench.stop_in_time()
    bench.chip = arguments.chip or gpus[0].chip
    bench.row(
        gpus[0].name,
        bench.chip,
        f"{version}, {gpus[0].total_bytes / 1e9:.0f} GB, {gpus[0].multiprocessors} multiprocessors",
    )
    bench.results["gpu"] = vars(gpus[0])
    mini = standin.build(bench.build, "libmini_ort.so") / "libmini_ort.so"
    kernels = kernels_for(bench)
    driver = standin.serve_launches(all_specs(bench.models), is_hip=bench.is_hip) if bench.dry else None
    bench.part("two-ranks", lambda: two_ranks(bench, path, mini, kernels))  # before this process holds memory
    bench.part("demo", lambda: demo(bench, path, mini))
    box.open_gpu(operators, kernels, vendor=int(bench.is_hip), max_sequences=8, max_rows=2048)
    device, ort = Device(is_hip=bench.is_hip), MiniOrt(mini, path, bench.provider)
    bench.part("bandwidth", lambda: bandwidth(bench, device))
    bench.part("operators", lambda: check_operators(bench, ort, device), 20)
    bench.part("matrix-vector", lambda: matrix_vector(bench, ort, device), 60)
    bench.part("prefill", lambda: prefill(bench, ort, device), 60)
    whole = [name for name in bench.models if name != "34b"]
    for name in whole:
        bench.part("model", lambda name=name: end_to_end(bench, ort, device, name), 60, of=name)
    for name in (
        name for name in whole if name not in shapes.EXPERTS
    ):  # which onnxruntime's own operators are not here
        bench.part("onnxruntime", lambda name=name: baseline(bench, name), 45, of=name)
    if driver is not None and driver.standin_violations():
        raise AssertionError(driver.standin_report().decode())
    return bench.finish(arguments.json)


if __name__ == "__main__":
    sys.exit(main())
