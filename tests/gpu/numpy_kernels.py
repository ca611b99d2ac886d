"""The kernels of FORMAT 8.4 in numpy, on the stand-in driver's memory: what a launch must mean, read from the specification.

In: the callback's op, constants, parameter values and grid. They follow the pointers that the launcher gave, so a wrong
pointer, shape or order gives wrong numbers. Layouts are undone here a second time, independently of the packager.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from llmpack_ops import reference

TAG = 1 << 62
WAIT_S = 60.0

Launch = dict[str, Any]  # parameter name -> value, constants, "grid"


def at(address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """View the stand-in's device memory."""
    import ctypes

    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * count).from_address(address & ~TAG), dtype).reshape(shape)


def half(values: np.ndarray) -> np.ndarray:
    return np.clip(values, -65504, 65504).astype(np.float16)


def untile(storage: str, n: int, k: int, p: Launch) -> np.ndarray:
    """Undo FORMAT 4.3: the weight [n, k] in float32."""
    tiles = -(-n // 16)
    if storage == "f16":
        return at(p["weight"], (tiles, k, 16), np.float16).transpose(0, 2, 1).reshape(-1, k)[:n].astype(np.float32)
    if storage in ("q4", "mxfp4"):
        b = at(p["weight"], (tiles, k // 8, 16, 4), np.uint8)
        q = np.concatenate([b & 15, b >> 4], axis=3)
    elif storage == "q6":
        b = at(p["weight"], (tiles, k // 16, 3, 16, 4), np.uint8)
        parts = [b[:, :, i] & 63 for i in range(3)]
        fourth = (b[:, :, 0] >> 6) | (b[:, :, 1] >> 6) << 2 | (b[:, :, 2] >> 6) << 4
        q = np.concatenate([*parts, fourth], axis=3)
    else:
        q = at(p["weight"], (tiles, k // 4, 16, 4), np.uint8)
    q = q.transpose(0, 2, 1, 3).reshape(-1, k)[:n]
    groups = k // p["group_size"]
    scales = at(p["scales"], (tiles, groups, 16), np.float16).transpose(0, 2, 1).reshape(-1, groups)[:n]
    return reference.dequantize(q, scales, storage).astype(np.float32)


_weights: dict[tuple, tuple[int, np.ndarray]] = {}  # by place: a checksum of the bytes, and what they stand for


def weight(storage: str, n: int, k: int, p: Launch) -> np.ndarray:
    """Return the weight [n, k] in float32; a place may hold another one later, as memory is given back and taken again."""
    key, tiles = (p["weight"], storage, n, k), -(-n // 16)
    sum_of = zlib.adler32(
        at(p["weight"], (tiles * k * {"f16": 32, "q8": 16, "q6": 12, "q4": 8, "mxfp4": 8}[storage],), np.uint8)
    )
    if storage != "f16":
        sum_of = zlib.adler32(at(p["scales"], (tiles * 16 * (k // p["group_size"]) * 2,), np.uint8), sum_of)
    if _weights.get(key, (None,))[0] != sum_of:
        _weights[key] = sum_of, untile(storage, n, k, p)
    return _weights[key][1]


def matmul(storage: str, p: Launch) -> None:
    rows, k, n = p["num_rows"], p["in_features"], p["out_features"]
    x = at(p["x"], (rows, k), np.float16).astype(np.float32)
    y = x @ weight(storage, n, k, p).T
    if p["y_bits"] == 32:
        at(p["y"], (rows, n), np.float32)[:] = y
    else:
        at(p["y"], (rows, n), np.float16)[:] = half(y)


def embed(storage: str, p: Launch) -> None:
    rows, width = p["grid"][0], p["in_features"]
    ids = at(p["ids"], (rows,), np.int32)
    y = at(p["y"], (rows, width), np.float32)
    if storage == "f16":
        y[:] = at(p["weight"], (int(ids.max()) + 1, width), np.float16)[ids]
    else:
        y[:] = untile(storage, int(ids.max()) + 1, width, p)[ids]


def norm(p: Launch, rows: int, x: np.ndarray) -> None:
    w = at(p["weight"], (x.shape[1],), np.float32)
    at(p["y"], (rows, x.shape[1]), np.float16)[:] = half(reference.rms_norm(x, w, p["epsilon"]))


def rms_norm(p: Launch) -> None:
    rows, width = p["grid"][0], p["in_features"]
    norm(p, rows, at(p["x"], (rows, width), np.float32))


def add_rms_norm(p: Launch) -> None:
    rows, width = p["grid"][0], p["in_features"]
    residual = at(p["residual"], (rows, width), np.float32)
    residual += at(p["x"], (rows, width), np.float16)
    norm(p, rows, residual)


def norm_add_rms_norm(p: Launch) -> None:
    rows, width = p["grid"][0], p["in_features"]
    _add_normed(p, at(p["x"], (rows, width), np.float16))


def _add_normed(p: Launch, x: np.ndarray) -> None:
    residual = at(p["residual"], x.shape, np.float32)
    residual += reference.rms_norm(x, at(p["x_weight"], x.shape[1:], np.float32), p["epsilon"]).astype(np.float32)
    norm(p, len(x), residual)


def qk_norm(p: Launch) -> None:
    sizes = {name: p[name] for name in ("num_heads", "num_kv_heads")}
    dim = p["head_dim"]
    shape = (p["grid"][0], (sizes["num_heads"] + 2 * sizes["num_kv_heads"]) * dim)
    weights = (at(p[name], (dim,), np.float32) for name in ("q_weight", "k_weight"))
    y = reference.qk_norm(at(p["qkv"], shape, np.float16), *weights, **sizes, epsilon=p["epsilon"])
    at(p["y"], shape, np.float16)[:] = half(y)


def gated(p: Launch, combine: Callable[[np.ndarray], np.ndarray]) -> None:
    rows, width = p["grid"][1], p["in_features"]
    gate_up = at(p["gate_up"], (rows, 2 * width), np.float16)
    at(p["y"], (rows, width), np.float16)[:] = half(combine(gate_up))


def cache_write(p: Launch) -> None:
    rows, heads, kv, dim = p["grid"][0], p["num_heads"], p["num_kv_heads"], p["head_dim"]
    qkv = at(p["qkv"], (rows, heads + 2 * kv, dim), np.float16)
    cos_sin = at(p["cos_sin"], (rows, dim), np.float32)
    slots = at(p["slot_mapping"], (rows,), np.int32)
    k = reference.rotate(qkv[:, heads : heads + kv], cos_sin)
    for t in range(rows):
        if slots[t] >= 0:
            start = int(slots[t]) * kv * dim * 2
            at(p["key_cache"] + start, (kv, dim), np.float16)[:] = half(k[t])
            at(p["value_cache"] + start, (kv, dim), np.float16)[:] = qkv[t, heads + kv :]


def _attend(p: Launch, b: int, first: int, end: int, part: slice | None = None) -> Any:
    """Yield (token, head, scores, values) of a sequence, of the positions that the token sees."""
    heads, kv, dim, size = p["num_heads"], p["num_kv_heads"], p["head_dim"], p["block_size"]
    length = int(at(p["seq_lens"] + 4 * b, (1,), np.int32)[0])
    table = at(p["block_table"] + 4 * b * p["table_stride"], (p["table_stride"],), np.int32)
    positions = np.arange(length)
    slots = table[positions // size].astype(np.int64) * size + positions % size
    top = int(slots.max()) + 1
    keys = at(p["key_cache"], (top, kv, dim), np.float16)[slots].astype(np.float64)
    values = at(p["value_cache"], (top, kv, dim), np.float16)[slots].astype(np.float64)
    qkv = at(p["qkv"], (end, heads + 2 * kv, dim), np.float16)
    q = reference.rotate(qkv[:, :heads], at(p["cos_sin"], (end, dim), np.float32))
    for t in range(first, end):
        end_seen = length - (end - t) + 1
        seen = slice(max(0, end_seen - p["window"]), end_seen)
        for h in range(heads):
            scores = keys[seen, h * kv // heads] @ q[t, h] * p["scale"]
            yield t, h, scores, values[seen, h * kv // heads]


def _sinks(p: Launch) -> np.ndarray:
    heads = p["num_heads"]
    return at(p["sinks"], (heads,), np.float32).astype(np.float64) if "sinks" in p else np.full(heads, -np.inf)


def attention(p: Launch) -> None:
    starts = at(p["query_start"], (p["num_sequences"] + 1,), np.int32)
    out = at(p["out"], (int(starts[-1]), p["num_heads"], p["head_dim"]), np.float16)
    sinks = _sinks(p)
    for b in range(p["num_sequences"]):
        for t, h, scores, values in _attend(p, b, int(starts[b]), int(starts[b + 1])):
            w = np.exp(scores - scores.max())
            out[t, h] = half(w @ values / (w.sum() + np.exp(sinks[h] - scores.max())))


def attention_split(p: Launch) -> None:
    sequences, splits = p["grid"][0], p["num_splits"]
    starts = at(p["query_start"], (sequences + 1,), np.int32)
    partial = at(p["partial"], (int(starts[-1]), p["num_heads"], splits, p["head_dim"] + 2), np.float32)
    for b in range(sequences):
        for t, h, scores, values in _attend(p, b, int(starts[b]), int(starts[b + 1])):
            share = -(-len(scores) // splits)
            for s in range(splits):
                own = slice(s * share, (s + 1) * share)
                top = scores[own].max(initial=-np.inf)
                w = np.exp(scores[own] - top) if len(scores[own]) else np.zeros(0)
                partial[t, h, s, :-2] = w @ values[own]
                partial[t, h, s, -2:] = top, w.sum()


def attention_combine(p: Launch) -> None:
    rows, heads, dim, splits = p["grid"][0], p["num_heads"], p["head_dim"], p["num_splits"]
    partial = at(p["partial"], (rows, heads, splits, dim + 2), np.float32).astype(np.float64)
    highest = partial[..., -2].max(axis=2)
    w = np.exp(partial[..., -2] - highest[..., None])
    sums = (partial[..., -1] * w).sum(axis=2) + np.exp(_sinks(p) - highest)
    at(p["out"], (rows, heads, dim), np.float16)[:] = half(
        (partial[..., :-2] * w[..., None]).sum(axis=2) / sums[..., None]
    )


def moe_route(p: Launch) -> None:
    rows, number, chosen = p["grid"][0], p["num_experts"], p["num_experts_per_tok"]
    logits = at(p["logits"], (rows, number), np.float32)
    experts, weights = reference.route(logits, chosen, norm_topk_prob=bool(p["norm_topk_prob"]))
    at(p["experts"], (rows, chosen), np.int32)[:] = experts
    at(p["routing"], (rows, chosen), np.float32)[:] = weights


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
    blocks[: len(found)] = found


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


def top_k_first(p: Launch) -> None:
    width, k, chunk, rows, known = p["in_features"], p["k"], p["chunk"], p["grid"][1], p["num_columns"]
    parts = -(-width // chunk)
    logits = at(p["logits"], (rows, width), np.float32)[:, :known]
    keys = at(p["keys"], (rows, parts, k), np.int64)
    sums = at(p["sums"], (rows, parts), np.float32)
    keys[:] = np.iinfo(np.int64).min + 1
    bits = (logits + np.float32(0)).view(np.int32)
    ids = p["first_id"] + np.arange(known)
    ordered = np.where(bits < 0, bits ^ 0x7FFFFFFF, bits).astype(np.int64) << 32 | (0x7FFFFFFF - ids)
    for part in range(parts):
        own = slice(part * chunk, min((part + 1) * chunk, known))
        best = -np.sort(-ordered[:, own], axis=1)[:, :k]
        keys[:, part, : best.shape[1]] = best
        sums[:, part] = np.exp(logits[:, own] - logits[:, own].max(axis=1, keepdims=True, initial=-np.inf)).sum(axis=1)
        sums[~np.isfinite(logits[:, own]).all(axis=1), part] = np.nan


def top_k_last(p: Launch) -> None:
    width, k, chunk, rows = p["in_features"], p["k"], p["chunk"], p["grid"][0]
    parts = -(-width // chunk)
    keys = at(p["keys"], (rows, parts, k), np.int64)
    sums = at(p["sums"], (rows, parts), np.float32)
    top = at(p["top"], (rows, k + 1), np.int64)
    top[:, :k] = -np.sort(-keys.reshape(rows, -1), axis=1)[:, :k]
    shares = np.where(sums == 0, 0, sums * np.exp(_logit(keys[:, :, 0]) - _logit(top[:, :1])))
    top[:, k] = shares.sum(axis=1).astype(np.float32).view(np.int32)


def _logit(keys: np.ndarray) -> np.ndarray:
    bits = (keys >> 32).astype(np.int32)
    return np.where(bits < 0, bits ^ 0x7FFFFFFF, bits).astype(np.int32).view(np.float32)


def meet(p: Launch, own: np.ndarray) -> np.ndarray:
    """The protocol of 8.5 for own [rows, width]; returns every rank's: [ranks, rows, width]."""
    rows, width = own.shape
    ranks, most = p["ranks"], p["max_rows"]
    buffers, flags = (at(p[name], (ranks,), np.int64) for name in ("buffers", "flags"))
    epochs = at(p["epochs"], (most,), np.int32)
    all_rows = np.empty((ranks, *own.shape), own.dtype)
    steps = epochs[:rows] + 1
    mine = at(int(buffers[p["rank"]]), (2, most, width), own.dtype)
    for i in range(rows):
        mine[steps[i] % 2, i] = own[i]
        at(int(flags[p["rank"]]), (most, 32), np.int32)[i, 0] = steps[i]
    until = time.monotonic() + WAIT_S
    for r in range(ranks):
        theirs = at(int(buffers[r]), (2, most, width), own.dtype)
        for i in range(rows):
            while int(at(int(flags[r]), (most, 32), np.int32)[i, 0]) - int(steps[i]) < 0:
                if time.monotonic() > until:
                    raise TimeoutError(f"rank {r} does not come to step {steps[i]} of row {i}")
                time.sleep(0.0005)
            all_rows[r, i] = theirs[steps[i] % 2, i]
    epochs[:rows] = steps
    return all_rows


def all_reduce_add_rms_norm(p: Launch) -> None:
    rows, width = p["grid"][0], p["in_features"]
    residual = at(p["residual"], (rows, width), np.float32)
    residual += reference.all_reduce(list(meet(p, at(p["x"], (rows, width), np.float16))))
    norm(p, rows, residual)


def all_reduce_norm_add_rms_norm(p: Launch) -> None:
    rows, width = p["grid"][0], p["in_features"]
    _add_normed(p, reference.all_reduce(list(meet(p, at(p["x"], (rows, width), np.float16)))))


def all_reduce(p: Launch) -> None:
    rows, width = p["grid"][0], p["in_features"]
    total = reference.all_reduce(list(meet(p, at(p["x"], (rows, width), np.float16))))
    at(p["y"], (rows, width), np.float16)[:] = half(total)


KERNELS: dict[str, Callable[[Launch], None]] = {
    **{f"matmul_{s}": (lambda p, s=s: matmul(s, p)) for s in ("f16", "q8", "q6", "q4")},
    **{f"embed_{s}": (lambda p, s=s: embed(s, p)) for s in ("f16", "q8", "q6")},
    "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm,
    "norm_add_rms_norm": norm_add_rms_norm,
    "qk_norm": qk_norm,
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
    "swiglu": lambda p: gated(p, reference.swiglu),
    "geglu": lambda p: gated(p, reference.geglu),
    "cache_write": cache_write,
    "attention": attention,
    "attention_split": attention_split,
    "attention_combine": attention_combine,
    "top_k_first": top_k_first,
    "top_k_last": top_k_last,
    "all_reduce_add_rms_norm": all_reduce_add_rms_norm,
    "all_reduce_norm_add_rms_norm": all_reduce_norm_add_rms_norm,
    "all_reduce": all_reduce,
}
