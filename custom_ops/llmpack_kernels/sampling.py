"""The k largest logits of each row, on the device, in two passes (FORMAT.md 8.4). k = 1 is argmax.

A candidate is one int64: the logit's bits, made to sort like the number, above the id's complement. The largest
number of those is the largest logit, and among equal logits the smallest id.
"""

import triton
import triton.language as tl


@triton.jit
def _largest(keys, K: tl.constexpr):
    """Return the K largest of a power of two of keys, in descending order."""
    if K == 1:
        return tl.max(keys, 0) + tl.zeros([1], tl.int64)
    else:
        return tl.topk(keys, K)


@triton.jit
def top_k_first(logits, keys, V: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr):
    """Logits float32 [rows, V] -> keys int64 [rows, ceil(V / CHUNK), K]; axis 0 chunks, axis 1 rows."""
    PARTS: tl.constexpr = (V + CHUNK - 1) // CHUNK
    part = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    token = part * CHUNK + tl.arange(0, CHUNK)
    value = tl.load(logits + row * V + token, mask=token < V, other=float("-inf")) + 0.0  # -0 becomes 0
    bits = value.to(tl.int32, bitcast=True)
    bits ^= (bits >> 31) & 0x7FFFFFFF
    key = (bits.to(tl.int64) << 32) | (0x7FFFFFFF - token).to(tl.int64)
    key = tl.where(token < V, key, -0x7FFFFFFFFFFFFFFF)
    tl.store(keys + (row * PARTS + part) * K + tl.arange(0, K), _largest(key, K))


@triton.jit
def top_k_last(keys, values, ids, COUNT: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr):
    """Turn keys int64 [rows, COUNT] into values float32 [rows, K], ids int32 [rows, K]; COUNT: parts times K; BLOCK: power of 2."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    key = _largest(tl.load(keys + row * COUNT + at, mask=at < COUNT, other=-0x7FFFFFFFFFFFFFFF), K)
    bits = (key >> 32).to(tl.int32)
    bits ^= (bits >> 31) & 0x7FFFFFFF
    place = row * K + tl.arange(0, K)
    tl.store(values + place, bits.to(tl.float32, bitcast=True))
    tl.store(ids + place, 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32))
