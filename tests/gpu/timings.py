"""The parts of `make test-gpu` that time: copies, products, whole models, and onnxruntime's own operators beside them."""

from __future__ import annotations

from collections.abc import Callable

import box
import numpy as np
import shapes
from device import Device
from executor import GpuModel, MiniOrt, Plan
from gpu_bench import Bench

GOALS = {"matvec": 0.85, "prefill": 0.6}
F16, U8 = 10, 2  # ONNX element types


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
                run()  # a driver may load code at its first launch, which no capture takes
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
    experts = sum(i.num_bytes for w in weights if w.row.role == "experts" for i in w.initializers)
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
    if experts:  # of which a token reads its own
        num_bytes -= experts * (config.num_experts - config.num_experts_per_tok) // config.num_experts
    share = num_bytes / graph_s / bench.copy_bytes_per_s
    bench.results[f"model/{name}"] = {
        "weight_bytes": num_bytes,  # that a token reads
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
