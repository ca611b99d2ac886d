"""Paged attention (FORMAT.md 5.5, 8.4): `cache_write`, then `attention`, or `attention_split` and `attention_combine`.

`attention`: any step. A program takes BLOCK_M queries of one sequence and head, and passes over the keys that they see with a
running maximum and sum (Milakov and Gimelshein 2018; FlashAttention-2's order of loops).
`attention_split`: meant for one query a sequence. The query heads of a KV head are the rows of one product; the keys of a
sequence, those that the query sees, are cut into S equal parts, a program each, so that a long context fills the device
(flash-decoding); `attention_combine` joins the parts.
A query sees the `window` positions that end with its own. What no row of a program sees is not read: its blocks may hold
anything by now.
Kernels with HAS_SINKS take `sinks` float32 [H]: a score of each head more, whose value is zero. Where keys are
split it joins in `attention_combine`, once. Others lack the parameter.
Kernels with HAS_GROWTH multiply queries by more the later they stand; others lack the two parameters of that.

Keys and queries are held as two halves: element j is rotated with j + D / 2, and a score is the sum of two products.
Queries are rotated in float32 and rounded to float16 for the matrix units. Exponents are of base 2. Exponentials are LIFT
higher than softmax's, sums of them too, so that those of keys far below the maximum are normal numbers of float16: the matrix
units of MI200 take smaller ones for 0 (AMD's "MI200 MFMA behavior specifics"), and the sum of many is not.
"""

import triton
import triton.language as tl

from llmpack_kernels.matmul import saturate
from llmpack_kernels.overlap import begin

LOG2E = tl.constexpr(1.4426950408889634)
LIFT = tl.constexpr(8.0)  # in base 2: the largest exponential is 256


@triton.jit
def cache_write(
    qkv,
    cos_sin,
    key_cache,
    value_cache,
    slot_mapping,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
):
    """Rotate k, write k and v of token `axis 0`, KV head `axis 1` to its slot; negative: nowhere. HALF >= D / 2, power of 2."""
    begin()
    token = tl.program_id(0)
    head = tl.program_id(1)
    slot = tl.load(slot_mapping + token)
    if slot >= 0:
        j = tl.arange(0, HALF)
        inside = j < D // 2
        source = qkv + token.to(tl.int64) * ((HEADS + 2 * KV_HEADS) * D) + (HEADS + head) * D
        cos = tl.load(cos_sin + token * D + j, mask=inside, other=0.0)
        sin = tl.load(cos_sin + token * D + D // 2 + j, mask=inside, other=0.0)
        a = tl.load(source + j, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(source + D // 2 + j, mask=inside, other=0.0).to(tl.float32)
        target = (slot.to(tl.int64) * KV_HEADS + head) * D + j
        tl.store(key_cache + target, saturate(a * cos - b * sin, key_cache), mask=inside)
        tl.store(key_cache + target + D // 2, saturate(b * cos + a * sin, key_cache), mask=inside)
        source += KV_HEADS * D
        tl.store(value_cache + target, tl.load(source + j, mask=inside, other=0.0), mask=inside)
        tl.store(value_cache + target + D // 2, tl.load(source + D // 2 + j, mask=inside, other=0.0), mask=inside)


@triton.jit
def _growth(position, llama_4_scaling_beta, original_positions):
    """Return what queries at `position` are multiplied by."""
    return 1 + llama_4_scaling_beta * tl.log(1 + (position // original_positions).to(tl.float32))


@triton.jit
def _rotated(
    qkv,
    cos_sin,
    token,
    head,
    mask,
    growth,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    j,
):
    """Return queries [rows, 1] of `token` and `head`, rotated, times `growth` if any: two halves, float16 [rows, HALF]."""
    source = qkv + token.to(tl.int64) * ((HEADS + 2 * KV_HEADS) * D) + head * D + j
    cos = tl.load(cos_sin + token * D + j, mask=mask, other=0.0)
    sin = tl.load(cos_sin + token * D + D // 2 + j, mask=mask, other=0.0)
    a = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(source + D // 2, mask=mask, other=0.0).to(tl.float32)
    if growth is not None:
        cos *= growth
        sin *= growth
    return (a * cos - b * sin).to(tl.float16), (b * cos + a * sin).to(tl.float16)


@triton.jit
def _pass_over(
    q0,
    q1,
    last,
    begin,
    end,
    key_cache,
    value_cache,
    blocks,
    kv_head,
    scale,
    window,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Attend to positions begin to end: rows of q0, q1 see those up to `last` [rows], `window` of them at most.

    Returns: weighted values [rows, WIDTH] not yet divided, maxima [rows] in base 2, sums [rows]; values and sums lifted.
    """
    ROWS: tl.constexpr = q0.shape[0]
    top = tl.full([ROWS], float("-inf"), tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    j = tl.arange(0, HALF)
    d = tl.arange(0, WIDTH)
    oldest = tl.min(last, 0) - window + 1
    for start in range(begin, end, BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        known = (position >= oldest) & (position < end)
        block = tl.load(blocks + position // BLOCK_SIZE, mask=known, other=0).to(tl.int64)
        slot = ((block * BLOCK_SIZE + position % BLOCK_SIZE) * KV_HEADS + kv_head) * D
        there = known[None, :] & (j < D // 2)[:, None]
        k0 = tl.load(key_cache + slot[None, :] + j[:, None], mask=there, other=0.0)
        k1 = tl.load(key_cache + slot[None, :] + (j + D // 2)[:, None], mask=there, other=0.0)
        scores = (tl.dot(q0, k0) + tl.dot(q1, k1)) * (scale * LOG2E)
        # Both ends by one comparison: without a sign what is negative is large. All that a real row sees is known.
        seen = (last[:, None] - position[None, :]).to(tl.uint32) < window.to(tl.uint32)
        scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # A row that has seen nothing yet has no maximum: 0 keeps the exponents finite.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink = tl.exp2(top - base)
        p = tl.exp2(scores - (base - LIFT)[:, None])
        norm = norm * shrink + tl.sum(p, 1)
        v = tl.load(value_cache + slot[:, None] + d[None, :], mask=known[:, None] & (d < D)[None, :], other=0.0)
        total = total * shrink[:, None]
        total = tl.dot(p.to(tl.float16), v, total)
        top = new_top
    return total, top, norm


@triton.jit
def _with_sink(top, norm, sink):
    """Return what values summed so far are multiplied by, and the sum of exponentials with a sink's; `sink` in base e."""
    sink = sink * LOG2E
    new_top = tl.maximum(top, sink)
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    shrink = tl.exp2(top - base)
    return shrink, norm * shrink + tl.exp2(sink - (base - LIFT))


@triton.jit
def attention(
    out,
    qkv,
    cos_sin,
    key_cache,
    value_cache,
    query_start,
    seq_lens,
    block_table,
    table_stride,
    num_sequences,
    scale,
    window,
    sinks,
    llama_4_scaling_beta,
    original_positions,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_GROWTH: tl.constexpr,
):
    """Write out float16 [T, H D]; axis 0: ceil(T / BLOCK_M) + num_sequences pieces of queries; axis 1: heads."""
    begin()
    piece = tl.program_id(0)
    head = tl.program_id(1)
    # The sequence whose pieces `piece` is among; num_sequences: none.
    sequence = piece * 0
    before = piece * 0
    pieces = (tl.load(query_start + 1) - tl.load(query_start) + BLOCK_M - 1) // BLOCK_M
    while (sequence < num_sequences) & (piece >= before + pieces):
        before += pieces
        sequence += 1
        if sequence < num_sequences:
            count = tl.load(query_start + sequence + 1) - tl.load(query_start + sequence)
            pieces = (count + BLOCK_M - 1) // BLOCK_M
    if sequence < num_sequences:
        first = tl.load(query_start + sequence)
        count = tl.load(query_start + sequence + 1) - first
        i = (piece - before) * BLOCK_M + tl.arange(0, BLOCK_M)
        j = tl.arange(0, HALF)
        token = first + i
        mask = (i < count)[:, None] & (j < D // 2)[None, :]
        growth = None
        if HAS_GROWTH:
            position = tl.load(seq_lens + sequence) - count + i
            growth = _growth(position, llama_4_scaling_beta, original_positions)[:, None]
        q0, q1 = _rotated(qkv, cos_sin, token[:, None], head, mask, growth, HEADS, KV_HEADS, D, j[None, :])
        last = tl.load(seq_lens + sequence) - count + i
        # A multiple of BLOCK_N: the order of a token's sums depends on its position, not on the tokens beside it.
        start = tl.maximum(tl.min(last, 0) - window + 1, 0) // BLOCK_N * BLOCK_N
        end = tl.minimum(tl.load(seq_lens + sequence), tl.max(last, 0) + 1)
        total, top, norm = _pass_over(
            q0, q1, last, start, end, key_cache, value_cache, block_table + sequence.to(tl.int64) * table_stride,
            head // (HEADS // KV_HEADS), scale, window, KV_HEADS, D, HALF, WIDTH, BLOCK_SIZE, BLOCK_N,
        )  # fmt: skip
        if HAS_SINKS:
            shrink, norm = _with_sink(top, norm, tl.load(sinks + head))
            total = total * shrink[:, None]
        d = tl.arange(0, WIDTH)
        target = out + token.to(tl.int64)[:, None] * (HEADS * D) + head * D + d[None, :]
        tl.store(target, saturate(total / norm[:, None], out), mask=(i < count)[:, None] & (d < D)[None, :])


@triton.jit
def attention_split(
    partial,
    qkv,
    cos_sin,
    key_cache,
    value_cache,
    query_start,
    seq_lens,
    block_table,
    table_stride,
    num_splits,
    scale,
    window,
    llama_4_scaling_beta,
    original_positions,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_GROWTH: tl.constexpr,
):
    """Write partial float32 [T, H, num_splits, D + 2]: values, maximum, sum; axes: sequences, KV heads, splits."""
    begin()
    sequence = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    HEADS_HERE: tl.constexpr = HEADS // KV_HEADS
    first = tl.load(query_start + sequence)
    end_token = tl.load(query_start + sequence + 1)
    length = tl.load(seq_lens + sequence)
    g = tl.arange(0, GROUP)
    j = tl.arange(0, HALF)
    d = tl.arange(0, WIDTH)
    head = kv_head * HEADS_HERE + g
    real = g < HEADS_HERE
    for i in range(end_token - first):
        token = first + i
        position = length - (end_token - token)
        oldest = tl.maximum(position - window + 1, 0)
        seen = position + 1 - oldest
        share = ((seen + num_splits - 1) // num_splits + BLOCK_N - 1) // BLOCK_N * BLOCK_N
        start = oldest + split * share
        row = (token + g * 0)[:, None]
        mask = real[:, None] & (j < D // 2)[None, :]
        growth = None
        if HAS_GROWTH:
            growth = _growth(position, llama_4_scaling_beta, original_positions)
        q0, q1 = _rotated(qkv, cos_sin, row, head[:, None], mask, growth, HEADS, KV_HEADS, D, j[None, :])
        total, top, norm = _pass_over(
            q0, q1, position + g * 0, start, tl.minimum(start + share, position + 1), key_cache, value_cache,
            block_table + sequence.to(tl.int64) * table_stride, kv_head, scale, window,
            KV_HEADS, D, HALF, WIDTH, BLOCK_SIZE, BLOCK_N,
        )  # fmt: skip
        target = partial + ((token.to(tl.int64) * HEADS + head) * num_splits + split) * (D + 2)
        tl.store(target[:, None] + d[None, :], total, mask=real[:, None] & (d < D)[None, :])
        tl.store(target + D, top, mask=real)
        tl.store(target + D + 1, norm, mask=real)


@triton.jit
def attention_combine(out, partial, num_splits, sinks, HEADS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
                      HAS_SINKS: tl.constexpr):  # fmt: skip
    """Join the splits of token `axis 0`, head `axis 1`: out float16 [T, H D]."""
    begin()
    at = tl.program_id(0).to(tl.int64) * HEADS + tl.program_id(1)
    d = tl.arange(0, WIDTH)
    top = tl.full([], float("-inf"), tl.float32)
    norm = tl.zeros([], tl.float32)
    total = tl.zeros([WIDTH], tl.float32)
    for split in range(num_splits):
        source = partial + (at * num_splits + split) * (D + 2)
        part_top = tl.load(source + D)
        part_norm = tl.load(source + D + 1)
        new_top = tl.maximum(top, part_top)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink = tl.exp2(top - base)
        grow = tl.exp2(part_top - base)
        total = total * shrink + tl.load(source + d, mask=d < D, other=0.0) * grow
        norm = norm * shrink + part_norm * grow
        top = new_top
    if HAS_SINKS:
        shrink, norm = _with_sink(top, norm, tl.load(sinks + tl.program_id(1)))
        total = total * shrink
    tl.store(out + at * D + d, saturate(total / norm, out), mask=d < D)
