"""Expected decode speed of two-GPU pairs, from bytes and latencies: writes PROJECTION.md beside this file.

    python tests/benchmarks/projection.py

Every input is in the tables below. None of the fractions and latencies is measured on our kernels yet: they are ranges, and
`--check` (in the tests) fails when PROJECTION.md is not what these tables give. Put measured figures in place of the ranges.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

TARGET = Path(__file__).with_name("PROJECTION.md")


@dataclass(frozen=True)
class Model:
    """Numbers of config.json; head_dim is 128."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int


@dataclass(frozen=True)
class Pair:
    """Two GPUs on PCIe. Ranges are (pessimistic, optimistic)."""

    name: str
    bandwidth: float  # GB/s of one GPU, its data sheet
    fraction: tuple[float, float]  # of the data sheet's bandwidth that products reach; ASSUMED
    all_reduce: tuple[float, float]  # us, one-shot over pinned host memory, 16 KB, with the norm; ASSUMED
    gap: tuple[float, float]  # us between dependent kernels: CUDA graphs on NVIDIA, queued launches on AMD; ASSUMED


MODELS = (
    Model("Llama-2-70B", 8192, 28672, 80, 64, 8, 32000),
    Model("CodeLlama-34B", 8192, 22016, 48, 64, 8, 32000),
)
PAIRS = (
    Pair("2 x RTX 4090", 1008, (0.75, 0.88), (20, 8), (1.8, 0.9)),
    Pair("2 x RX 7900 XTX", 960, (0.65, 0.85), (25, 10), (5.0, 2.5)),
    Pair("2 x A100 80 GB PCIe", 1935, (0.55, 0.80), (20, 8), (1.8, 0.9)),
    Pair("2 x A10G", 600, (0.75, 0.88), (25, 10), (2.2, 1.1)),
)
# tok/s, batch 1, 4 bits, tensor-parallel over the same GPUs; MLC's blog of October 2023 and llm-perf-bench.
MLC = {
    ("Llama-2-70B", "2 x RTX 4090"): 34.5,
    ("Llama-2-70B", "2 x RX 7900 XTX"): 29.9,
    ("Llama-2-70B", "2 x A100 80 GB PCIe"): 40.9,
    ("Llama-2-70B", "2 x A10G"): 19.8,
    ("CodeLlama-34B", "2 x RTX 4090"): 64.9,
    ("CodeLlama-34B", "2 x RX 7900 XTX"): 56.5,
    ("CodeLlama-34B", "2 x A10G"): 38.4,
}
RANKS = 2
LINEAR_BITS = 4 + 16 / 64  # q4, one float16 scale for 64 weights
HEAD_BITS = 6 + 16 / 128  # q6, one for 128
CONTEXT = 264  # tokens: prompt of 8, 256 generated, as MLC's
ALL_REDUCES_PER_LAYER = 2
# qkv, cache_write, attention_split, attention_combine, o, all_reduce+norm, gate_up, swiglu, down, all_reduce+norm
KERNELS_PER_LAYER = 10
ONCE_PER_TOKEN = (
    150,
    60,
)  # us: head's gather over host memory, choice of the token, ONNX Runtime's and the host's step; ASSUMED


def bytes_per_gpu(model: Model) -> float:
    """Weights and cache that one rank reads for one token, bytes."""
    query, key_value = model.heads * 128, model.kv_heads * 128
    layer = model.hidden * (2 * query + 2 * key_value + 3 * model.intermediate)
    weights = model.layers * layer * LINEAR_BITS / 8 + model.hidden * model.vocabulary * HEAD_BITS / 8
    cache = model.layers * 2 * key_value * 2 * CONTEXT
    return (weights + cache) / RANKS


def milliseconds(model: Model, pair: Pair, which: int) -> dict[str, float]:
    """Parts of one token's time; `which`: 0 pessimistic, 1 optimistic."""
    return {
        "memory": bytes_per_gpu(model) / (pair.bandwidth * 1e6 * pair.fraction[which]),
        "all_reduce": model.layers * ALL_REDUCES_PER_LAYER * pair.all_reduce[which] / 1e3,
        "gaps": model.layers * KERNELS_PER_LAYER * pair.gap[which] / 1e3,
        "once": ONCE_PER_TOKEN[which] / 1e3,
    }


def table(model: Model) -> list[str]:
    """The rows of one model."""
    gigabytes = bytes_per_gpu(model) / 1e9
    lines = [
        f"## {model.name}: {gigabytes:.2f} GB a token and GPU",
        "",
        "| GPUs | roofline, tok/s | expected | of the roofline | ms: memory, all-reduces, gaps, once | MLC |",
        "|---|---|---|---|---|---|",
    ]
    for pair in PAIRS:
        roofline = pair.bandwidth / gigabytes
        worst, best = (milliseconds(model, pair, which) for which in (0, 1))
        low, high = 1e3 / sum(worst.values()), 1e3 / sum(best.values())
        parts = ", ".join(f"{worst[name]:.1f} to {best[name]:.1f}" for name in worst)
        theirs = MLC.get((model.name, pair.name))
        lines.append(
            f"| {pair.name} | {roofline:.1f} | {low:.0f} to {high:.0f} | {low / roofline:.0%} to {high / roofline:.0%} |"
            f" {parts} | {theirs if theirs is not None else 'not published'} |"
        )
    return [*lines, ""]


def page() -> str:
    """The whole of PROJECTION.md."""
    head = f"""# What two GPUs should reach

**A projection, not a measurement.** Our kernels are compiled for these chips and run by Triton's interpreter; they have not
run on any of them. Made by `python tests/benchmarks/projection.py` from the tables in that file; change it there.

    time of a token = bytes / (bandwidth * fraction)               products and attention, the weights read once
                    + layers * {ALL_REDUCES_PER_LAYER} * all-reduce          one-shot over pinned host memory, with the norm
                    + layers * {KERNELS_PER_LAYER} * gap                from the end of a kernel to the next one's first load
                    + once                               choice of the token, its way to the host, the host's step

bytes: q4 at {LINEAR_BITS:g} bits a weight, the head as q6 at {HEAD_BITS:g}, and the cache of {CONTEXT} tokens, over
{RANKS} ranks. Batch 1; an all-reduce is of 16 KB.
"""
    assumed = [
        "## What is assumed",
        "",
        "| GPUs | GB/s (data sheet) | fraction of it | all-reduce, us | gap, us |",
        "|---|---|---|---|---|",
    ]
    for pair in PAIRS:
        ranges = [f"{a:g} to {b:g}" for a, b in (pair.fraction, pair.all_reduce, pair.gap)]
        assumed.append(f"| {pair.name} | {pair.bandwidth:g} | {' | '.join(ranges)} |")
    tail = f"""
Once a token: {ONCE_PER_TOKEN[0]} to {ONCE_PER_TOKEN[1]} us. Where the ranges come from:

* fraction: MLC's own figures imply 0.76 to 0.81 on one RTX 4090; counted instructions (LOG.md) leave the q4 product bound by
  memory on the 4090 and the 7900 XTX, and on the A100 with half of its issue slots;
* all-reduce: the aim is 15 us; two PCIe round trips and 16 KB each way are 5 us at best;
* gap: common figures for captured CUDA graphs; AMD's are larger and MLC ran without graphs there too.

**Uncertainty.** The two ends combine all pessimistic and all optimistic inputs, so the truth should lie inside; the middle
means nothing. One missing effect would break it: a product that is not bound by memory at batch 1, or an all-reduce that waits
for a late rank. MLC's figures are of October 2023 at 4.5 bits a weight; a like-for-like comparison needs both on one machine.
"""
    bodies = [line for model in MODELS for line in table(model)]
    return "\n".join([head, *bodies, *assumed]) + "\n" + tail


def main() -> int:
    if "--check" in sys.argv:
        return 0 if TARGET.read_text() == page() else 1
    TARGET.write_text(page())
    print(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
