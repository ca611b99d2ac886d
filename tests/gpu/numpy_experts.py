"""The kernels of a mixture of experts in numpy, as numpy_kernels.py has the others (FORMAT 5.16, 8.4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy_memory import Launch, at, half, weight

from llmpack_ops import reference


def moe_route(p: Launch) -> None:
    rows, number = p["grid"][0], p["num_experts"]
    bias = at(p["correction_bias"], (number,), np.float32) if p.get("has_correction_bias") else None
    experts, weights = reference.route(
        at(p["logits"], (rows, number), np.float32),
        p["num_experts_per_tok"],
        norm_topk_prob=bool(p["norm_topk_prob"]),
        num_shared_experts=p.get("num_shared_experts", 0),
        sigmoid_scoring=bool(p.get("sigmoid_scoring")),
        e_score_correction_bias=bias,
        routed_scaling_factor=p["scaling_factor"] if p.get("has_scaling_factor") else 1.0,
    )
    at(p["experts"], experts.shape, np.int32)[:] = experts
    at(p["routing"], experts.shape, np.float32)[:] = weights


def _expert(storage: str, expert: int, n: int, k: int, p: Launch) -> np.ndarray:
    """Weights [n, k] of one expert."""
    width = {"f16": 32, "q8": 16, "q4": 8, "mxfp4": 8}[storage]  # bytes of 16 rows and one input feature
    own = {**p, "weight": p["weight"] + expert * n * k * width // 16}
    if storage != "f16":
        own["scales"] += expert * n * (k // p["group_size"]) * 2
    return weight(storage, n, k, own)


def _bias(expert: int, n: int, p: Launch) -> np.ndarray:
    """Return one expert's [n]; zeros where the kernel has none."""
    return at(p["bias"] + expert * n * 4, (n,), np.float32) if p.get("has_bias") else np.zeros(n, np.float32)


def _gate(sums: np.ndarray, p: Launch) -> np.ndarray:
    return half(
        reference.clamped_swiglu(sums, p["alpha"], p["limit"]) if p.get("has_limit") else reference.swiglu(sums)
    )


def moe_gate_up(storage: str, p: Launch) -> None:
    hidden, width, chosen = p["in_features"], p["intermediate_size"], p["num_experts_per_tok"]
    rows = p["grid"][0] // chosen
    assert rows <= p["max_rows"]
    x, experts = at(p["x"], (rows, hidden), np.float16), at(p["experts"], (rows, chosen), np.int32)
    h = at(p["h"], (rows, chosen, width), np.float16)
    for t, i in np.ndindex(rows, chosen):
        expert = int(experts[t, i])
        sums = x[t].astype(np.float32) @ _expert(storage, expert, 2 * width, hidden, p).T + _bias(expert, 2 * width, p)
        h[t, i] = _gate(sums[None], p)[0]


def moe_down(storage: str, p: Launch) -> None:
    rows, hidden, width, chosen = p["grid"][0], p["in_features"], p["intermediate_size"], p["num_experts_per_tok"]
    assert rows <= p["max_rows"]
    experts, shares = (at(p[n], (rows, chosen), t) for n, t in (("experts", np.int32), ("routing", np.float32)))
    h, total = at(p["h"], (rows, chosen, width), np.float16).astype(np.float32), np.zeros((rows, hidden))
    for t, i in np.ndindex(rows, chosen):
        expert = int(experts[t, i])
        total[t] += shares[t, i] * (_expert(storage, expert, hidden, width, p) @ h[t, i] + _bias(expert, hidden, p))
    at(p["y"], (rows, hidden), np.float16)[:] = half(total)


def moe_sort(p: Launch) -> None:
    count, number, block = p["num_pairs"], p["num_experts"], p["block"]
    experts = at(p["experts"], (count,), np.int32)
    at(p["pairs"], (count,), np.int32)[:] = np.argsort(experts, kind="stable")
    ends = np.cumsum(np.bincount(experts, minlength=number))
    found = [(e, first, end) for e, end in enumerate(ends) for first in range(ends[e - 1] if e else 0, end, block)]
    blocks = at(p["blocks"], (-(-count // block) + number, 3), np.int32)
    blocks[:] = 0
    blocks[len(blocks) - len(found) :] = found  # the last ones: too few programs would miss some


def _blocks(p: Launch) -> Any:
    """Yield the expert, the places and the pairs of each block."""
    for expert, first, end in at(p["blocks"], (p["grid"][0], 3), np.int32):
        places = slice(int(first), min(int(end), int(first) + p["block"]))
        if places.start < places.stop:
            yield int(expert), places, at(p["pairs"], (places.stop,), np.int32)[places]


def moe_grouped_gate_up(storage: str, p: Launch) -> None:
    hidden, width = p["in_features"], p["intermediate_size"]
    for expert, places, pairs in _blocks(p):
        rows = pairs // p["num_experts_per_tok"]
        x = at(p["x"], (int(rows.max()) + 1, hidden), np.float16)[rows].astype(np.float32)
        sums = x @ _expert(storage, expert, 2 * width, hidden, p).T + _bias(expert, 2 * width, p)
        at(p["h"], (places.stop, width), np.float16)[places] = _gate(sums, p)


def moe_grouped_down(storage: str, p: Launch) -> None:
    hidden, width = p["in_features"], p["intermediate_size"]
    for expert, places, pairs in _blocks(p):
        h = at(p["h"], (places.stop, width), np.float16)[places].astype(np.float32)
        shares = at(p["routing"], (int(pairs.max()) + 1,), np.float32)[pairs, None]
        z = at(p["z"], (int(pairs.max()) + 1, hidden), np.float16)
        z[pairs] = half(shares * (h @ _expert(storage, expert, hidden, width, p).T + _bias(expert, hidden, p)))


def moe_combine(p: Launch) -> None:
    rows, hidden = p["grid"][1], p["in_features"]
    z = at(p["z"], (rows, p["num_experts_per_tok"], hidden), np.float16)
    at(p["y"], (rows, hidden), np.float16)[:] = half(z.astype(np.float32).sum(axis=1))


KERNELS: dict[str, Callable[[Launch], None]] = {
    "moe_route": moe_route,
    "moe_sort": moe_sort,
    "moe_combine": moe_combine,
    **{
        f"moe_{name}_{s}": (lambda p, s=s, f=f: f(s, p))
        for s in ("f16", "q8", "q4", "mxfp4")
        for name, f in (
            ("gate_up", moe_gate_up),
            ("down", moe_down),
            ("grouped_gate_up", moe_grouped_gate_up),
            ("grouped_down", moe_grouped_down),
        )
    },
}
