"""Norms, SwiGLU, GeGLU and embedding rows (FORMAT.md 5.2 to 5.4, 5.8, 5.13 to 5.15).

A program takes a row; of SwiGLU and GeGLU a piece of one.
"""

import triton
import triton.language as tl

from llmpack_kernels.decode import PLAIN, offset, unpack_q6, unpack_q8
from llmpack_kernels.matmul import saturate
from llmpack_kernels.overlap import begin

SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)


@triton.jit
def normed(value, weight, epsilon, H: tl.constexpr):
    """Return value [BLOCK] (zero from H on), divided by its root mean square, times weight [BLOCK]."""
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / H + epsilon)
    return value * scale * weight


@triton.jit
def normalise(value, weight, y, epsilon, H: tl.constexpr, BLOCK: tl.constexpr):
    """Write `normed` of value to y [H]."""
    column = tl.arange(0, BLOCK)
    tl.store(y + column, saturate(normed(value, weight, epsilon, H), y), mask=column < H)


@triton.jit
def rms_norm(x, weight, y, epsilon, H: tl.constexpr, BLOCK: tl.constexpr):
    """X float32 [rows, H], weight float32 [H], y float16 [rows, H]."""
    begin()
    start = tl.program_id(0).to(tl.int64) * H
    column = tl.arange(0, BLOCK)
    value = tl.load(x + start + column, mask=column < H, other=0.0)
    w = tl.load(weight + column, mask=column < H, other=0.0)
    normalise(value, w, y + start, epsilon, H, BLOCK)


@triton.jit
def add_rms_norm(x, residual, weight, y, epsilon, H: tl.constexpr, BLOCK: tl.constexpr):
    """Residual += x, y = norm(residual): x float16 [rows, H], residual float32, weight float32 [H], y float16."""
    begin()
    start = tl.program_id(0).to(tl.int64) * H
    column = tl.arange(0, BLOCK)
    inside = column < H
    value = tl.load(residual + start + column, mask=inside, other=0.0)
    value += tl.load(x + start + column, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=inside, other=0.0)  # with the others, not behind the store
    tl.store(residual + start + column, value, mask=inside)
    normalise(value, w, y + start, epsilon, H, BLOCK)


@triton.jit
def norm_add_rms_norm(x, x_weight, residual, weight, y, epsilon, H: tl.constexpr, BLOCK: tl.constexpr):
    """Do the same with norm(x), by x_weight float32 [H], in place of x."""
    begin()
    start = tl.program_id(0).to(tl.int64) * H
    column = tl.arange(0, BLOCK)
    inside = column < H
    added = tl.load(x + start + column, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(residual + start + column, mask=inside, other=0.0)
    x_w = tl.load(x_weight + column, mask=inside, other=0.0)
    w = tl.load(weight + column, mask=inside, other=0.0)
    value += normed(added, x_w, epsilon, H)
    tl.store(residual + start + column, value, mask=inside)
    normalise(value, w, y + start, epsilon, H, BLOCK)


@triton.jit
def qk_norm(
    qkv,
    q_weight,
    k_weight,
    y,
    epsilon,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Qkv and y (may be qkv) float16 [rows, (HEADS + 2 KV_HEADS) D], weights float32 [D]; axis 0 rows, axis 1 heads."""
    begin()
    head = tl.program_id(1)
    start = (tl.program_id(0).to(tl.int64) * (HEADS + 2 * KV_HEADS) + head) * D
    column = tl.arange(0, BLOCK)
    value = tl.load(qkv + start + column, mask=column < D, other=0.0)
    if head < HEADS + KV_HEADS:
        weight = q_weight if head < HEADS else k_weight
        w = tl.load(weight + column, mask=column < D, other=0.0)
        normalise(value.to(tl.float32), w, y + start, epsilon, D, BLOCK)
    else:
        tl.store(y + start + column, value, mask=column < D)


@triton.jit
def _gate_and_up(gate_up, y, F: tl.constexpr, BLOCK: tl.constexpr):
    """Return a program's numbers of both halves, float32 [BLOCK], where its results go, and which there are."""
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + row * (2 * F) + column, mask=column < F, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * F) + F + column, mask=column < F, other=0.0).to(tl.float32)
    return gate, up, y + row * F + column, column < F


@triton.jit
def swiglu(gate_up, y, F: tl.constexpr, BLOCK: tl.constexpr):
    """gate_up float16 [rows, 2 F] -> y float16 [rows, F] = silu(gate) * up; axis 0 pieces of a row, axis 1 rows."""
    begin()
    gate, up, target, mask = _gate_and_up(gate_up, y, F, BLOCK)
    tl.store(target, saturate(gate / (1.0 + tl.exp(-gate)) * up, y), mask=mask)


@triton.jit
def geglu(gate_up, y, F: tl.constexpr, BLOCK: tl.constexpr):
    """Do the same with gelu in place of silu, in its approximation by tanh: (1 + tanh(z)) / 2 = 1 / (1 + exp(-2 z))."""
    begin()
    gate, up, target, mask = _gate_and_up(gate_up, y, F, BLOCK)
    z = SQRT_2_OVER_PI * (gate + 0.044715 * gate * gate * gate)  # of float16, so far from infinite
    tl.store(target, saturate(gate / (1.0 + tl.exp(-2.0 * z)) * up, y), mask=mask)


@triton.jit
def embed_f16(ids, weight, y, H: tl.constexpr, BLOCK: tl.constexpr):
    """Y float32 [rows, H] = rows `ids` int32 [rows] of weight float16 [vocabulary, H]."""
    begin()
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    value = tl.load(weight + tl.load(ids + row).to(tl.int64) * H + column, mask=column < H, other=0.0)
    tl.store(y + row.to(tl.int64) * H + column, value.to(tl.float32), mask=column < H)


@triton.jit
def embed_tiles(
    ids, weight, scales, y, STORAGE: tl.constexpr, H: tl.constexpr, GROUP: tl.constexpr, CHUNKS: tl.constexpr
):
    """Do the same for q6 and q8 rows in tiles (FORMAT.md 4.3): level times scale, rounded once to float32."""
    FEATURES: tl.constexpr = 16 if STORAGE == "q6" else 4
    WORDS: tl.constexpr = 48 if STORAGE == "q6" else 16
    begin()
    row = tl.program_id(0)
    token = tl.load(ids + row)
    chunk = tl.arange(0, CHUNKS)
    inside = chunk < H // FEATURES
    start = (token // 16).to(tl.int64) * (H // FEATURES)
    words = weight.to(tl.pointer_type(tl.int32)) + start * WORDS + token % 16
    scale_at = ((token // 16) * (H // GROUP) + chunk * FEATURES // GROUP) * 16 + token % 16
    scale = tl.load(scales + scale_at, mask=inside, other=0.0).to(tl.float32)
    if STORAGE == "q6":
        part0 = tl.load(words + chunk * WORDS, mask=inside, other=0)
        part1 = tl.load(words + chunk * WORDS + 16, mask=inside, other=0)
        part2 = tl.load(words + chunk * WORDS + 32, mask=inside, other=0)
        values = unpack_q6(part0, part1, part2, PLAIN)
    else:
        values = unpack_q8(tl.load(words + chunk * WORDS, mask=inside, other=0), PLAIN)
    y += row.to(tl.int64) * H
    for i in tl.static_range(FEATURES):
        level = values[i] + offset(STORAGE, PLAIN)
        tl.store(y + chunk * FEATURES + i, level * scale, mask=inside)
