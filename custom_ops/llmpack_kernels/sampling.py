"""The k likeliest tokens of each row of logits, on the device, in two passes (FORMAT.md 8.4).

A candidate is one int64: the logit's bits, made to sort like the number, above the id's complement. The largest
number of those is the largest logit, and among equal logits the smallest id. Candidates of several ranks merge by sorting.
Beside them stands the sum of exp(logit - largest) over all of them, for log-probabilities; a logit that is NaN or infinite
makes it NaN, so that the host need not look at the others.
"""

import triton
import triton.language as tl

from llmpack_kernels.overlap import begin


@triton.jit
def _logit(key):
    """Return the logit of a candidate, float32."""
    bits = (key >> 32).to(tl.int32)
    bits ^= (bits >> 31) & 0x7FFFFFFF
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def top_k_first(logits, keys, sums, first_id, num_columns, C: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr):
    """Logits float32 [rows, C] -> keys int64 [rows, ceil(C / CHUNK), K], sums float32 [rows, ceil(C / CHUNK)].

    Axis 0 chunks, axis 1 rows. Column c is token first_id + c; those from num_columns on are none.
    """
    PARTS: tl.constexpr = (C + CHUNK - 1) // CHUNK
    begin()
    part = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    column = part * CHUNK + tl.arange(0, CHUNK)
    known = column < num_columns
    value = tl.load(logits + row * C + column, mask=known, other=float("-inf")) + 0.0  # -0 becomes 0
    is_bad = tl.max(tl.where(known & ~(tl.abs(value) < float("inf")), 1, 0), 0)
    largest = tl.max(tl.where(known, value, float("-inf")), 0)
    total = tl.sum(tl.where(known, tl.exp(value - largest), 0.0), 0)
    tl.store(sums + row * PARTS + part, tl.where(is_bad > 0, float("nan"), total))
    bits = value.to(tl.int32, bitcast=True)
    bits ^= (bits >> 31) & 0x7FFFFFFF
    key = (bits.to(tl.int64) << 32) | (0x7FFFFFFF - first_id - column).to(tl.int64)
    key = tl.where(known, key, -0x7FFFFFFFFFFFFFFF)
    tl.store(keys + (row * PARTS + part) * K + tl.arange(0, K), tl.topk(key, K))


@triton.jit
def _merge(x, LEFT: tl.constexpr, K: tl.constexpr):
    """Int64 [2 LEFT, K], each row sorted, those of even numbers falling, of odd ones rising -> [LEFT, K], likewise.

    Of a falling and a rising row the larger ones, place by place, are the K largest of both; they fall, then rise or the other
    way round, so that log2(K) steps sort them.
    """
    x = tl.max(tl.reshape(x, [LEFT, 2, K]), 1)
    turned = -(tl.arange(0, LEFT) & 1).to(tl.int64)[:, None]  # all bits of odd rows, which rise where these fall
    return tl.bitonic_merge(x ^ turned, descending=True) ^ turned


@triton.jit
def top_k_last(keys, sums, top, PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr, K: tl.constexpr):
    """Keys int64 [rows, PARTS, K], of each part falling, sums float32 [rows, PARTS] -> top int64 [rows, K + 1].

    K candidates, the likeliest first, and the bits of the sum, float32. PARTS_BLOCK >= PARTS: a power of 2.
    """
    begin()
    row = tl.program_id(0).to(tl.int64)
    part, place = tl.arange(0, PARTS_BLOCK), tl.arange(0, K)
    from_end = tl.where((part & 1)[:, None] == 1, K - 1 - place[None, :], place[None, :])
    at = row * (PARTS * K) + part[:, None] * K + from_end
    best = tl.load(keys + at, mask=part[:, None] < PARTS, other=-0x7FFFFFFFFFFFFFFF)
    for i in tl.static_range(1, 32):
        if PARTS_BLOCK >> i > 0:
            best = _merge(best, PARTS_BLOCK >> i, K)
    tl.store(top + row * (K + 1) + place[None, :], best)
    share = tl.load(sums + row * PARTS + part, mask=part < PARTS, other=0.0)
    own = _logit(tl.load(keys + (row * PARTS + part) * K, mask=part < PARTS, other=0))
    total = tl.sum(tl.where(share == 0.0, 0.0, share * tl.exp(own - _logit(tl.max(best)))), 0)
    tl.store(top + row * (K + 1) + K, total.to(tl.int32, bitcast=True).to(tl.int64))
