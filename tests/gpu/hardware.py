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
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

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
from executor import GpuModel, MiniOrt  # noqa: E402

from llmpack import kernel_file  # noqa: E402
from llmpack.kernel_plan import KernelSpec  # noqa: E402

KERNELS = ROOT / ".build" / "gpu-kernels"
GOALS = {"matvec": 0.85, "prefill": 0.6}
F16 = 10  # ONNX element types
F32, U8 = 1, 2


class Bench:
    """What all parts share: the machine, the time left, the results."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.dry, self.chip, self.minutes, self.path = arguments.dry, arguments.chip, arguments.minutes, arguments.json
        self.deadline = time.monotonic() + 60 * arguments.minutes
        self.rows: list[tuple[str, str, str]] = []
        self.results: dict[str, Any] = {"dry": self.dry}
        self.failed = 0
        self.build = Path(tempfile.mkdtemp(prefix="llmpack-gpu-"))
        self.models = ("dry",) if self.dry else ("7b", "13b", "34b", "70b")
        self.copy_bytes_per_s = 0.0
        self.is_hip = False
        self._is_over = threading.Lock()

    def stop_in_time(self) -> None:
        """Print what there is and leave at the deadline, whatever the device waits for."""

        def leave() -> None:
            self.row("the rest", "not run", f"{self.minutes:g} minutes are over")
            self.failed += 1
            os._exit(self.finish(self.path))

        timer = threading.Timer(self.deadline - time.monotonic(), leave)
        timer.daemon = True
        timer.start()

    @property
    def provider(self) -> str:
        return "ROCMExecutionProvider" if self.is_hip else "CUDAExecutionProvider"

    def part(self, name: str, work: Callable[[], None], needs_s: float = 0) -> None:
        """Run a part; an error is a row of the table and makes the exit code 1."""
        started = time.monotonic()
        if self.deadline - started < needs_s:
            self.row(name, "not run", f"less than {needs_s:.0f} s are left")
            return
        try:
            work()
        except Exception as error:
            traceback.print_exc()
            self.failed += 1
            self.row(name, "FAILED", f"{type(error).__name__}: {error}"[:150])
        print(f"-- {name}: {time.monotonic() - started:.1f} s", flush=True)

    def row(self, what: str, value: str, note: str = "") -> None:
        self.rows.append((what, value, note))
        print(f"   {what:<44} {value:>14}  {note}", flush=True)

    def finish(self, path: Path) -> int:
        self._is_over.acquire()  # once: the deadline's thread may come at the same moment
        self.results |= {"rows": self.rows, "failed": self.failed}
        path.write_text(json.dumps(self.results, indent=1))
        print(f"\n{'':=<100}")
        for what, value, note in self.rows:
            print(f"{what:<44} {value:>14}  {note}")
        print(f"{'':=<100}\n{path}; {self.failed} parts failed")
        return 1 if self.failed else 0


def all_specs(models: tuple[str, ...]) -> list[KernelSpec]:
    """Everything that is run: whole models on one GPU, products and collectives of two and four shards."""
    specs: dict[tuple, KernelSpec] = {}
    for model in models:
        shards_run = (1, 2) if model == "dry" else (1, 2, 4)
        for shards in shards_run:
            for spec in shapes.specs_of(shapes.config_of(model, 1), shards):
                is_wanted = spec.op == "matmul_q4" and spec.constants["max_rows"] in (1, 0)
                is_collective = spec.op.startswith("all_") and model in ("7b", "dry") and shards == 2
                if (shards == 1 and model != "34b") or is_wanted or is_collective:
                    specs[spec.op, *sorted(spec.constants.items())] = spec
    from checks import extra_specs

    for spec in extra_specs():
        specs.setdefault((spec.op, *sorted(spec.constants.items())), spec)
    return list(specs.values())


def kernels_for(bench: Bench) -> Path:
    """Return a kernel file for the chip: prepared, or compiled now."""
    specs = all_specs(bench.models)
    digest = hashlib.sha256(repr(sorted(map(repr, specs))).encode()).hexdigest()[:12]
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


def bandwidth(bench: Bench, device: Device) -> None:
    """Copies within the device; bytes read and written."""
    size = 1 << (20 if bench.dry else 31)
    first, second = device.allocate(size), device.allocate(size)
    seconds = device.seconds(lambda: device.copy_within(second, first, size), 10)
    bench.copy_bytes_per_s = 2 * size / seconds
    for memory in (first, second):
        device.free(memory)
    bench.results["copy_bytes_per_s"] = bench.copy_bytes_per_s
    bench.row(
        "copy within the device",
        f"{bench.copy_bytes_per_s / 1e9:.0f} GB/s",
        "read and written; what follows is a share of it",
    )


class Product:
    """One matrix, in as many copies as no cache holds."""

    def __init__(self, ort: MiniOrt, device: Device, n: int, k: int, *, is_dry: bool) -> None:
        self.n, self.k, self._device = n, k, device
        groups = k // 64
        self.num_bytes = -(-n // 16) * 16 * (k // 2 + 2 * groups)
        self._ort = ort
        self.node = ort.node("MatMulQ4", in_features=k, out_features=n, group_size=64)
        count = 2 if is_dry else max(2, -(-(1 << 29) // self.num_bytes))
        rng = np.random.default_rng(0)
        weight = rng.integers(0, 256, n * k // 2, dtype=np.uint8)
        scales = np.full(n * groups, 0.001, np.float16)
        self.copies = [(device.put(weight), device.put(scales)) for _ in range(count)]

    def plan(self, rows: int) -> tuple[Callable[[], None], Callable[[], None], int]:
        """Return (run all copies once, free, number of copies)."""
        from executor import Plan

        n, k, tiles = self.n, self.k, -(-self.n // 16)
        x = self._device.put(np.random.default_rng(1).standard_normal((rows, k)).astype(np.float16))
        y = self._device.allocate(rows * n * 2)
        plan = Plan(self._ort)
        for weight, scales in self.copies:
            inputs = [(F16, (rows, k), x), (U8, (tiles, k // 8, 16, 4), weight), (F16, (tiles, k // 64, 16), scales)]
            plan.add(self.node, [plan.value(*t) for t in inputs], [plan.value(F16, (rows, n), y)])

        def free() -> None:
            self._device.free(x)
            self._device.free(y)

        return lambda: plan.run(self._device.stream), free, len(self.copies)

    def close(self) -> None:
        for pair in self.copies:
            for memory in pair:
                self._device.free(memory)


def matrix_vector(bench: Bench, ort: MiniOrt, device: Device) -> None:
    """q4 products with one row, of every shape, as a share of the copy bandwidth in weight bytes."""
    bench.results["matvec"] = {}
    for model in bench.models:
        for shards in (1, 2) if bench.dry else (1, 2, 4):
            total_bytes, total_s, worst = 0, 0.0, (2.0, "")
            for name, (n, k) in shapes.products(model, shards).items():
                product = Product(ort, device, n, k, is_dry=bench.dry)
                run, free, count = product.plan(1)
                replay = device.capture(run)
                seconds = device.seconds(replay, 1 if bench.dry else 20) / count
                share = product.num_bytes / seconds / bench.copy_bytes_per_s
                bench.results["matvec"][f"{model}/{shards}/{name}"] = {
                    "n": n,
                    "k": k,
                    "us": seconds * 1e6,
                    "share": share,
                }
                total_bytes, total_s, worst = (
                    total_bytes + product.num_bytes,
                    total_s + seconds,
                    min(worst, (share, name)),
                )
                free()
                product.close()
            share = total_bytes / total_s / bench.copy_bytes_per_s
            verdict = "" if bench.dry else ("ok" if share >= GOALS["matvec"] else f"goal {GOALS['matvec']}")
            bench.row(
                f"q4 matrix-vector {model}, {shards} shards",
                f"{share:.3f}",
                f"{verdict}; worst {worst[1]} {worst[0]:.3f}",
            )


def prefill(bench: Bench, ort: MiniOrt, device: Device) -> None:
    """q4 products with many rows, as a share of the dense float16 rate of the vendor's library (torch)."""
    try:
        import torch

        has_torch = torch.cuda.is_available() and not bench.dry
    except ImportError:
        has_torch = False
    bench.results["prefill"] = {}
    for model in bench.models:
        for rows in (40,) if bench.dry else (512, 2048):
            ours_s = dense_s = operations = 0.0
            for n, k in shapes.products(model, 1).values():
                product = Product(ort, device, n, k, is_dry=True)
                run, free, count = product.plan(rows)
                ours_s += device.seconds(run, 1 if bench.dry else 10) / count
                operations += 2.0 * rows * n * k
                free()
                product.close()
                if has_torch:
                    dense_s += _dense_seconds(rows, n, k)
            rate = operations / ours_s
            bench.results["prefill"][f"{model}/{rows}"] = {
                "flops": rate,
                "dense_flops": operations / dense_s if dense_s else None,
            }
            share = f"{dense_s / ours_s:.3f}" if dense_s else "?"
            verdict = f"{rate / 1e12:.0f} TFLOP/s" + (
                f" of {operations / dense_s / 1e12:.0f}; goal {GOALS['prefill']}"
                if dense_s
                else "; no torch to compare"
            )
            bench.row(f"q4 products {model}, {rows} tokens", share, verdict)


def _dense_seconds(rows: int, n: int, k: int) -> float:
    import torch

    x, w = (
        torch.randn(rows, k, device="cuda", dtype=torch.float16),
        torch.randn(n, k, device="cuda", dtype=torch.float16),
    )
    for _ in range(3):
        x @ w.T
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(10):
        x @ w.T
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e4


def end_to_end(bench: Bench, ort: MiniOrt, device: Device, name: str) -> None:
    """Decode and prefill of a whole model with random weights, launched one by one and as a graph."""
    config = shapes.config_of(name)
    weights = shapes.weights_of(config)
    num_bytes = sum(i.num_bytes for w in weights if w.row.role != "embedding" for i in w.initializers)
    needed = num_bytes * 1.05 + (1 << 30)
    if device.free_bytes() < needed:
        bench.row(f"model {name}", "not run", f"{needed / 1e9:.0f} GB needed, {device.free_bytes() / 1e9:.0f} GB free")
        return
    path = bench.build / f"{name}.onnx"
    shapes.write_graph(config, path)
    prompt = 16 if bench.dry else 512
    model = GpuModel(path, ort, device, num_blocks=2 * (prompt // 16 + 8), weights=shapes.random_weights(config))
    ids = [int(i) for i in np.random.default_rng(0).integers(3, config.vocab_size, prompt)]
    blocks = prompt // 16 + 4
    step = model.step(box.feeds([ids], [prompt], blocks))
    prefill_s = device.seconds(step.run, 1 if bench.dry else 5)
    prefill_graph_s = device.seconds(device.capture(step.run), 1 if bench.dry else 5)
    step.close()
    step = model.step(box.feeds([[5]], [prompt + 1], blocks))
    eager_s = device.seconds(step.run, 1 if bench.dry else 20)
    replay = device.capture(step.run)
    graph_s = device.seconds(replay, 1 if bench.dry else 50)
    logits = step.output("logits")
    if not np.isfinite(logits).all():
        raise AssertionError(f"{name}: logits are not finite")
    step.close()
    model.close()
    share = num_bytes / graph_s / bench.copy_bytes_per_s
    bench.results[f"model/{name}"] = {
        "weight_bytes": num_bytes,
        "prefill_tokens_per_s_eager": prompt / prefill_s,
        "prefill_tokens_per_s_graph": prompt / prefill_graph_s,
        "decode_tokens_per_s_eager": 1 / eager_s,
        "decode_tokens_per_s_graph": 1 / graph_s,
        "decode_share_of_copy_bandwidth": share,
    }
    bench.row(
        f"model {name}: decode, graph",
        f"{1 / graph_s:.1f} tok/s",
        f"{share:.3f} of the bandwidth; launched one by one {1 / eager_s:.1f}",
    )
    bench.row(
        f"model {name}: prefill {prompt}, graph",
        f"{prompt / prefill_graph_s:.0f} tok/s",
        f"launched one by one {prompt / prefill_s:.0f}",
    )


def demo(bench: Bench, operators: Path, mini: Path) -> None:
    """The demo model, packed for this chip: its own example against the packager's float64 logits, in a process of its own."""
    artifact = bench.build / "demo" if bench.dry else ROOT / "artifacts" / "demo-gpu"
    if not (artifact / "manifest.json").exists():
        try:
            from llmpack import kernels
            from llmpack.pack import Options, pack
        except ImportError as error:
            bench.row("demo model", "not run", f"no artifacts/demo-gpu, and it cannot be packed here: {error}")
            return
        if bench.dry:
            kernels.build = lambda specs, *_: {bench.chip: standin.kernels_of(specs, bench.chip)}
        pack(ROOT / "tests/checkpoints/demo", artifact, Options(targets=(bench.chip,)))
    done = subprocess.run(
        [sys.executable, *map(str, (HERE / "demo_on_gpu.py", artifact, operators, mini, bench.chip, int(bench.dry)))],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise AssertionError(done.stderr.strip().splitlines()[-1])
    found = json.loads(done.stdout.splitlines()[-1])
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
        outputs = [rank.communicate(timeout=90) for rank in ranks]
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
    parser.add_argument("--json", type=Path, default=ROOT / ".build" / "test-gpu.json")
    arguments = parser.parse_args()
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
    bench.part("two ranks", lambda: two_ranks(bench, path, mini, kernels))  # before this process holds memory
    bench.part("demo", lambda: demo(bench, path, mini))
    box.open_gpu(operators, kernels, vendor=int(bench.is_hip), max_sequences=8, max_rows=2048)
    device, ort = Device(is_hip=bench.is_hip), MiniOrt(mini, path, bench.provider)
    bench.part("bandwidth", lambda: bandwidth(bench, device))
    bench.part("operators", lambda: check_operators(bench, ort, device), 20)
    bench.part("matrix-vector", lambda: matrix_vector(bench, ort, device), 60)
    bench.part("prefill", lambda: prefill(bench, ort, device), 60)
    for name in ("dry",) if bench.dry else ("7b", "13b", "70b"):
        bench.part(f"model {name}", lambda name=name: end_to_end(bench, ort, device, name), 60)
    for name in ("dry",) if bench.dry else ("7b", "13b", "70b"):
        bench.part(f"onnxruntime's own operators, {name}", lambda name=name: baseline(bench, name), 45)
    if driver is not None and driver.standin_violations():
        raise AssertionError(driver.standin_report().decode())
    return bench.finish(arguments.json)


def baseline(bench: Bench, name: str) -> None:
    """onnxruntime's own 4-bit operators on the same shape, beside what ours have reached."""
    import onnxruntime

    provider = "CPUExecutionProvider" if bench.dry else bench.provider
    if provider not in onnxruntime.get_available_providers():
        note = f"onnxruntime {onnxruntime.__version__} here has no {provider}"
        bench.row(f"onnxruntime {name}", "not run", note)
        return
    import ort_baseline

    if bench.is_hip and not bench.dry:
        bench.row(f"onnxruntime {name}", "not run", "its ROCm build has no GroupQueryAttention (ck_tile)")
        return
    own = bench.results.get(f"model/{name}", {})
    found = ort_baseline.tokens_per_s(name, provider, repeats=2 if bench.dry else 30)
    bench.results[f"onnxruntime/{name}"] = found
    for what, number in found.items():
        beside = f"ours {own[what] / number:.2f} times that" if own.get(what) else "ours was not run"
        title = what.replace("_tokens_per_s_", ", ")
        bench.row(f"onnxruntime {name}: {title}", f"{number:.1f} tok/s", f"{beside}; from a few of its layers")


if __name__ == "__main__":
    sys.exit(main())
