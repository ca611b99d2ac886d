"""Mixtures of experts (FORMAT.md 5.16, 8.4): the MLPs with SwiGLU of each token's experts, which `routing.py` chose, summed.

A pair is a token and one of its `CHOSEN` experts, in rising order of the experts: pair t * CHOSEN + i is the i-th of token t.
Those that all tokens share are experts as the others, and among those chosen the last.

For few tokens (`*_rows`) time is what reading the weights takes: a program for a pair, or a token, and 16 output features,
which computes on the float32 units as `matmul.matmul_rows`. For more (`*_blocks`) the pairs are sorted by expert, and a program
computes BLOCK_M of them, all of one expert, on the matrix units as `matmul.matmul_blocks`: its weights are read and unpacked
once for all of them. One set for NVIDIA and AMD: nothing here is as `few.py` and `hopper.py`.

Sums begin with the bias, where there is one. What is none of a kernel's parameters (`scales`, `bias`, `alpha`, `limit`) is 0.
"""

import triton
import triton.language as tl

from llmpack_kernels.decode import CUDA, has_nibbles
from llmpack_kernels.matmul import partial, saturate, unpack, weight_block
from llmpack_kernels.overlap import begin, release, wait


@triton.constexpr_function
def features_per_chunk(storage):
    """Input features that are multiplied together, as in `matmul`; float16 has them one by one."""
    return {"q4": 8, "mxfp4": 8, "q8": 4, "f16": 1}[storage]


@triton.jit
def _swiglu(gate, up, alpha, limit, HAS_LIMIT: tl.constexpr):
    if HAS_LIMIT:
        every: tl.constexpr = tl.PropagateNan.ALL
        gate = tl.minimum(gate, limit, every)
        up = tl.minimum(tl.maximum(up, -limit, every), limit, every)
        return gate / (1.0 + tl.exp(-alpha * gate)) * (up + 1.0)
    else:
        return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def _bias_of_rows(bias, tile, is_first):
    """Return float32 [threads' sums, 16] whose sum is a tile's bias: all of it in the one that is first."""
    return tl.where(is_first, tl.load(bias + (tile * 16 + tl.arange(0, 16)[None, :])), 0.0)


@triton.jit
def _bias_of_block(bias, tile, feature, N: tl.constexpr, BLOCK_N: tl.constexpr, SPREAD: tl.constexpr):
    """Return the bias of output features [1, BLOCK_N] from `tile` on, in the order of `matmul.weight_block`."""
    if SPREAD:
        place = tl.arange(0, BLOCK_N)[None, :]
        feature += place % (BLOCK_N // 4) * 4 + place // (BLOCK_N // 4) - place
    return tl.load(bias + (tile * 16 + feature), mask=feature < N, other=0.0)


@triton.jit
def _words(weight, STORAGE: tl.constexpr):
    """Return the pointer that a chunk's 16 rows are counted from."""
    if STORAGE == "f16":
        return weight
    else:
        return weight.to(tl.pointer_type(tl.int32))


@triton.jit
def _scales(scales, tile, K: tl.constexpr, GROUP: tl.constexpr, STORAGE: tl.constexpr):
    """Return where a tile's scales are; float16 weights have none."""
    if STORAGE == "f16":
        return 0
    else:
        return scales + tile * (K // GROUP * 16)


@triton.jit
def _terms(words, scales, x, chunk, mask, STORAGE: tl.constexpr, GROUP: tl.constexpr, BACKEND: tl.constexpr):
    """Return sums over the input features of each chunk: [chunks, 16], of a tile's weights times x; mask None: all."""
    row = tl.arange(0, 16)[None, :]
    other = None if mask is None else 0.0
    if STORAGE == "f16":
        w = tl.load(words + (chunk * 16 + row), mask=mask, other=other).to(tl.float32)
        return w * tl.load(x + chunk, mask=mask, other=other).to(tl.float32)
    else:
        FEATURES: tl.constexpr = features_per_chunk(STORAGE)
        values = unpack(words, chunk * 16 + row, mask, STORAGE, BACKEND)
        scale = tl.load(scales + (chunk * FEATURES // GROUP * 16 + row), mask=mask, other=other).to(tl.float32)
        return partial(values, x, chunk, mask, STORAGE, BACKEND) * scale


@triton.jit
def gate_up_rows(
    x,
    weight,
    scales,
    bias,
    experts,
    h,
    alpha,
    limit,
    STORAGE: tl.constexpr,
    H: tl.constexpr,
    F: tl.constexpr,
    GROUP: tl.constexpr,
    CHOSEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    CHUNKS: tl.constexpr,
    BACKEND: tl.constexpr,
):
    """X float16 [rows, H], experts int32 [rows, CHOSEN] -> h float16 [rows, CHOSEN, F] = act(gate, up).

    Bias float32 [experts, 2 F]. Axis 0 pairs, axis 1 tiles of F: gate and up of the same 16 features.
    """
    TILES: tl.constexpr = F // 16
    COUNT: tl.constexpr = H // features_per_chunk(STORAGE)
    pair, own = tl.program_id(0), tl.program_id(1)
    wait()
    tile = tl.load(experts + pair).to(tl.int64) * (2 * TILES) + own
    words = _words(weight, STORAGE) + tile * (COUNT * 16)
    words_up = words + TILES * COUNT * 16
    scales_up = _scales(scales, tile + TILES, H, GROUP, STORAGE)
    scales = _scales(scales, tile, H, GROUP, STORAGE)
    x += pair // CHOSEN * H
    gate = tl.zeros([CHUNKS, 16], tl.float32)
    up = tl.zeros([CHUNKS, 16], tl.float32)
    if HAS_BIAS:
        is_first = tl.arange(0, CHUNKS)[:, None] == 0
        gate += _bias_of_rows(bias, tile, is_first)
        up += _bias_of_rows(bias, tile + TILES, is_first)
    for start in tl.range(0, COUNT, CHUNKS, loop_unroll_factor=2):
        chunk = start + tl.arange(0, CHUNKS)[:, None]
        inside = (chunk < COUNT) if COUNT % CHUNKS else None
        gate += _terms(words, scales, x, chunk, inside, STORAGE, GROUP, BACKEND)
        up += _terms(words_up, scales_up, x, chunk, inside, STORAGE, GROUP, BACKEND)
    release()
    at = h + pair * F + own * 16 + tl.arange(0, 16)
    tl.store(at, saturate(_swiglu(tl.sum(gate, 0), tl.sum(up, 0), alpha, limit, HAS_LIMIT), h))


@triton.jit
def down_rows(
    h,
    weight,
    scales,
    bias,
    experts,
    routing,
    y,
    STORAGE: tl.constexpr,
    H: tl.constexpr,
    F: tl.constexpr,
    GROUP: tl.constexpr,
    CHOSEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SLOTS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BACKEND: tl.constexpr,
):
    """H float16 [rows, CHOSEN, F], experts int32, routing float32 [rows, CHOSEN] -> y float16 [rows, H]: the weighted sum.

    Bias float32 [experts, H]. Axis 0 rows, axis 1 tiles of H. SLOTS experts are read at a time, CHUNKS of each: to the memory
    one long sum.
    """
    COUNT: tl.constexpr = F // features_per_chunk(STORAGE)
    ALL: tl.constexpr = COUNT % CHUNKS == 0 and CHOSEN % SLOTS == 0
    row, own = tl.program_id(0), tl.program_id(1)
    part = tl.arange(0, SLOTS * CHUNKS)[:, None]
    wait()
    total = tl.zeros([SLOTS * CHUNKS, 16], tl.float32)
    for first in tl.range(0, CHOSEN, SLOTS):
        slot = first + part // CHUNKS
        pair = row * CHOSEN + slot
        is_there = slot < CHOSEN
        tile = tl.load(experts + pair, mask=is_there, other=0).to(tl.int64) * (H // 16) + own
        words = _words(weight, STORAGE) + tile * (COUNT * 16)
        tile_scales = _scales(scales, tile, F, GROUP, STORAGE)
        numbers = h + pair * F
        end = tl.where(is_there, COUNT, 0)
        product = tl.zeros([SLOTS * CHUNKS, 16], tl.float32)
        if HAS_BIAS:
            product += _bias_of_rows(bias, tile, is_there & (part % CHUNKS == 0))
        for start in tl.range(0, COUNT, CHUNKS, loop_unroll_factor=2):
            chunk = start + part % CHUNKS
            inside = None if ALL else chunk < end
            product += _terms(words, tile_scales, numbers, chunk, inside, STORAGE, GROUP, BACKEND)
        total += product * tl.load(routing + pair, mask=is_there, other=0.0)
    release()
    tl.store(y + row * H + own * 16 + tl.arange(0, 16), saturate(tl.sum(total, 0), y))


@triton.jit
def sort(experts, pairs, blocks, num_pairs, E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr):
    """Experts int32 [num_pairs] -> pairs int32 [num_pairs], sorted by expert, and blocks int32 [num_blocks, 3].

    A block is an expert, the place of its first pair among the sorted ones, and the end of the expert's: it has BLOCK_M pairs,
    or as many as there are until then, or none. There are ceil(num_pairs / BLOCK_M) + E: an expert whose pairs begin at p has
    its first at p // BLOCK_M plus its number, so that nobody needs to know how many the others have. A program for each
    expert; no atomics: the same order every time.
    """
    begin()
    own = tl.program_id(0)
    index = tl.arange(0, BLOCK)
    lower = tl.zeros([BLOCK], tl.int32)
    same = tl.zeros([BLOCK], tl.int32)
    for start in range(0, num_pairs, BLOCK):
        found = tl.load(experts + start + index, mask=start + index < num_pairs, other=E)
        lower += (found < own).to(tl.int32)
        same += (found == own).to(tl.int32)
    first = tl.sum(lower, 0)
    end = first + tl.sum(same, 0)
    place = first
    for start in range(0, num_pairs, BLOCK):
        found = tl.load(experts + start + index, mask=start + index < num_pairs, other=E)
        is_own = (found == own).to(tl.int32)
        tl.store(pairs + place + tl.cumsum(is_own, 0) - 1, start + index, mask=is_own > 0)
        place += tl.sum(is_own, 0)
    first_block = first // BLOCK_M + own
    end_block = tl.where(own == E - 1, (num_pairs + BLOCK_M - 1) // BLOCK_M + E, end // BLOCK_M + own + 1)
    for start in range(first_block, end_block, BLOCK):
        block = start + index
        is_own = block < end_block
        tl.store(blocks + block * 3, own, mask=is_own)
        tl.store(blocks + block * 3 + 1, first + (block - first_block) * BLOCK_M, mask=is_own)
        tl.store(blocks + block * 3 + 2, end, mask=is_own)


@triton.jit
def _weights(words, scales, end, start, feature, STORAGE: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
             GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPREAD: tl.constexpr,
             BACKEND: tl.constexpr):  # fmt: skip
    """Return `matmul.weight_block` of one expert's weights; N is a multiple of 16."""
    if STORAGE == "f16":
        k = start + tl.arange(0, BLOCK_K)[:, None]
        at = (feature // 16 * K + k) * 16 + feature % 16
        return tl.load(words + at, mask=(feature < N) & (k < K), other=0.0)
    else:
        return weight_block(words, scales, end, start, feature, STORAGE, K, N, GROUP, BLOCK_N, BLOCK_K, SPREAD, BACKEND)


@triton.jit
def _in_order(total, SPREAD: tl.constexpr):
    """Undo SPREAD of `matmul.weight_block` in the columns of a sum."""
    if SPREAD:
        return total.reshape((total.shape[0], 4, total.shape[1] // 4)).permute((0, 2, 1)).reshape(total.shape)
    else:
        return total


@triton.jit
def gate_up_blocks(
    pairs,
    blocks,
    x,
    weight,
    scales,
    bias,
    h,
    alpha,
    limit,
    STORAGE: tl.constexpr,
    H: tl.constexpr,
    F: tl.constexpr,
    GROUP: tl.constexpr,
    CHOSEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BACKEND: tl.constexpr,
):
    """Do as `gate_up_rows` for pairs in the order of `pairs`, which is that of h float16 [num_pairs, F], too.

    Axis 0 blocks, axis 1 BLOCK_N features of F.
    """
    SPREAD: tl.constexpr = has_nibbles(STORAGE) and BACKEND == CUDA and BLOCK_M >= 64  # as in matmul_blocks
    TILES: tl.constexpr = F // 16
    COUNT: tl.constexpr = H // features_per_chunk(STORAGE)
    feature = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    k = tl.arange(0, BLOCK_K)[None, :]
    block = blocks + tl.program_id(0) * 3
    wait()
    tile = tl.load(block).to(tl.int64) * (2 * TILES)
    first, end = tl.load(block + 1), tl.load(block + 2)
    place = first + tl.arange(0, BLOCK_M)[:, None]
    is_there = place < end
    row = (tl.load(pairs + place, mask=is_there, other=0) // CHOSEN).to(tl.int64)
    words = _words(weight, STORAGE) + tile * (COUNT * 16)
    words_up = words + TILES * COUNT * 16
    scales_up = _scales(scales, tile + TILES, H, GROUP, STORAGE)
    scales = _scales(scales, tile, H, GROUP, STORAGE)
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if HAS_BIAS:
        gate += _bias_of_block(bias, tile, feature, F, BLOCK_N, SPREAD)
        up += _bias_of_block(bias, tile + TILES, feature, F, BLOCK_N, SPREAD)
    for start in range(0, tl.where(first < end, H, 0), BLOCK_K):
        inside = is_there if H % BLOCK_K == 0 else is_there & (start + k < H)
        tokens = tl.load(x + row * H + (start + k), mask=inside, other=0.0)
        w = _weights(words, scales, end, start, feature, STORAGE, H, F, GROUP, BLOCK_N, BLOCK_K, SPREAD, BACKEND)
        gate = tl.dot(tokens, w, gate)
        w = _weights(words_up, scales_up, end, start, feature, STORAGE, H, F, GROUP, BLOCK_N, BLOCK_K, SPREAD, BACKEND)
        up = tl.dot(tokens, w, up)
    release()
    result = _in_order(_swiglu(gate, up, alpha, limit, HAS_LIMIT), SPREAD)
    tl.store(h + place.to(tl.int64) * F + feature, saturate(result, h), mask=is_there & (feature < F))


@triton.jit
def down_blocks(
    pairs,
    blocks,
    routing,
    h,
    weight,
    scales,
    bias,
    z,
    STORAGE: tl.constexpr,
    H: tl.constexpr,
    F: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BACKEND: tl.constexpr,
):
    """H float16 [num_pairs, F], sorted -> z float16 [num_pairs, H], unsorted: down of each pair, times its routing weight.

    Axis 0 blocks, axis 1 BLOCK_N features of H.
    """
    SPREAD: tl.constexpr = has_nibbles(STORAGE) and BACKEND == CUDA and BLOCK_M >= 64
    COUNT: tl.constexpr = F // features_per_chunk(STORAGE)
    feature = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    k = tl.arange(0, BLOCK_K)[None, :]
    block = blocks + tl.program_id(0) * 3
    wait()
    tile = tl.load(block).to(tl.int64) * (H // 16)
    first, end = tl.load(block + 1), tl.load(block + 2)
    place = first + tl.arange(0, BLOCK_M)[:, None]
    is_there = place < end
    words = _words(weight, STORAGE) + tile * (COUNT * 16)
    scales = _scales(scales, tile, F, GROUP, STORAGE)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if HAS_BIAS:
        total += _bias_of_block(bias, tile, feature, H, BLOCK_N, SPREAD)
    for start in range(0, tl.where(first < end, F, 0), BLOCK_K):
        inside = is_there if F % BLOCK_K == 0 else is_there & (start + k < F)
        numbers = tl.load(h + place.to(tl.int64) * F + (start + k), mask=inside, other=0.0)
        w = _weights(words, scales, end, start, feature, STORAGE, F, H, GROUP, BLOCK_N, BLOCK_K, SPREAD, BACKEND)
        total = tl.dot(numbers, w, total)
    release()
    pair = tl.load(pairs + place, mask=is_there, other=0)
    result = _in_order(total * tl.load(routing + pair, mask=is_there, other=0.0), SPREAD)
    tl.store(z + pair.to(tl.int64) * H + feature, saturate(result, z), mask=is_there & (feature < H))


@triton.jit
def combine(z, y, H: tl.constexpr, CHOSEN: tl.constexpr, BLOCK: tl.constexpr):
    """Z float16 [rows, CHOSEN, H] -> y float16 [rows, H]: their sum, in rising order; axis 0 pieces, axis 1 rows."""
    begin()
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for slot in range(CHOSEN):
        total += tl.load(z + (row * CHOSEN + slot) * H + column, mask=column < H, other=0.0).to(tl.float32)
    tl.store(y + row * H + column, saturate(total, y), mask=column < H)
