"""The kernels of FORMAT 8.4 in numpy, on the stand-in driver's memory: what a launch must mean, read from the specification.

In: the callback's op, constants, parameter values and grid. They follow the pointers that the launcher gave, so a wrong
pointer, shape or order gives wrong numbers. numpy_memory.py: what they point to; numpy_experts.py: mixtures of experts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy_experts
from numpy_memory import Launch, at, half, untile, weight

from llmpack_ops import reference

WAIT_S = 60.0


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
        if "llama_4_scaling_beta" in p:
            steps = (end_seen - 1) // p["original_positions"]
            q[t] *= 1 + p["llama_4_scaling_beta"] * np.log1p(steps)
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
    **numpy_experts.KERNELS,
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
