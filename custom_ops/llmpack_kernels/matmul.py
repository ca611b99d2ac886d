"""y = x · Wᵀ over row tiles (FORMAT.md 4.3, 8.4): `matmul_rows` for one to four rows of x, `matmul_blocks` for more.

x is float16, sums are float32. The weights are read once, in the order in which they lie, 16 bytes a thread.

`matmul_rows`: a program per tile of 16 output features; its threads share the input features, four rows of the tile each, and
multiply on the float32 units: unpacking costs less than the memory takes, and no word has to change threads.
`matmul_blocks`: weights become float16 in the shape that the matrix units take, rounded once, as level * scale.
On NVIDIA's chips q4 has `few.py` for up to 16 rows, and on sm_90 `hopper.py` for more than 64.
"""

import triton
import triton.language as tl

from llmpack_kernels.decode import CUDA, factor, has_nibbles, offset, unpack_half, unpack_nibbles, unpack_q6, unpack_q8
from llmpack_kernels.overlap import release, wait


@triton.constexpr_function
def features_per_chunk(storage):
    """Input features in the words of one row that are unpacked together."""
    return {"q4": 8, "mxfp4": 8, "q6": 16, "q8": 4}[storage]


@triton.jit
def saturate(value, pointer):
    """Round to the element type of `pointer`; float16 ends at its largest number, not at infinity. NaN stays NaN."""
    if pointer.dtype.element_ty == tl.float16:
        every: tl.constexpr = tl.PropagateNan.ALL  # else the chips take the other operand
        value = tl.minimum(tl.maximum(value, -65504.0, every), 65504.0, every)
    return value.to(pointer.dtype.element_ty)


@triton.jit
def _limit(num_rows, row: tl.constexpr, size: tl.constexpr):
    """How much of row `row` there is."""
    return tl.where(num_rows > row, size, 0)


@triton.jit
def unpack(words, at, mask, STORAGE: tl.constexpr, BACKEND: tl.constexpr):
    """Load and unpack the chunks `at` (offsets in words of each chunk's first); mask None: all."""
    other = None if mask is None else 0
    if STORAGE == "q6":
        part0 = tl.load(words + at, mask=mask, other=other)
        part1 = tl.load(words + at + 16, mask=mask, other=other)
        part2 = tl.load(words + at + 32, mask=mask, other=other)
        return unpack_q6(part0, part1, part2, BACKEND)
    elif has_nibbles(STORAGE):
        return unpack_nibbles(tl.load(words + at, mask=mask, other=other), STORAGE, BACKEND)
    else:
        return unpack_q8(tl.load(words + at, mask=mask, other=other), BACKEND)


@triton.jit
def partial(values, x, chunk, mask, STORAGE: tl.constexpr, BACKEND: tl.constexpr):
    """Return sums over the input features of each chunk: [chunks, 16], of levels times x."""
    FEATURES: tl.constexpr = features_per_chunk(STORAGE)
    quads = x.to(tl.pointer_type(tl.int64)) + chunk * (FEATURES // 4)
    product = values[0] * 0.0
    total = tl.zeros(chunk.shape, tl.float32)
    for i in tl.static_range(FEATURES // 4):
        quad = tl.load(quads + i, mask=mask, other=None if mask is None else 0)
        for j in tl.static_range(4):
            feature = (quad >> (16 * j)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            product += values[4 * i + j] * feature
            total += feature
    return product * factor(STORAGE, BACKEND) + total * offset(STORAGE, BACKEND)


@triton.jit
def matmul_rows(
    x,
    weight,
    scales,
    y,
    num_rows,
    STORAGE: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BACKEND: tl.constexpr,
):
    """X float16 [num_rows <= ROWS <= 4, K], weight and scales of FORMAT.md 4.3, y [num_rows, N]; a program per tile."""
    FEATURES: tl.constexpr = features_per_chunk(STORAGE)
    WORDS: tl.constexpr = 48 if STORAGE == "q6" else 16  # of all rows of one chunk
    COUNT: tl.constexpr = K // FEATURES
    tile = tl.program_id(0)
    row = tl.arange(0, 16)[None, :]
    words = weight.to(tl.pointer_type(tl.int32)) + tile.to(tl.int64) * (COUNT * WORDS)
    scales += tile * (K // GROUP * 16)
    wait()
    sum0 = tl.zeros([CHUNKS, 16], tl.float32)
    sum1 = tl.zeros([CHUNKS, 16], tl.float32)
    sum2 = tl.zeros([CHUNKS, 16], tl.float32)
    sum3 = tl.zeros([CHUNKS, 16], tl.float32)
    for start in tl.range(0, COUNT, CHUNKS, loop_unroll_factor=2):
        chunk = start + tl.arange(0, CHUNKS)[:, None]
        inside = (chunk < COUNT) if COUNT % CHUNKS else None
        values = unpack(words, chunk * WORDS + row, inside, STORAGE, BACKEND)
        zero = 0.0 if COUNT % CHUNKS else None
        scale = tl.load(scales + chunk * FEATURES // GROUP * 16 + row, mask=inside, other=zero).to(tl.float32)
        sum0 += partial(values, x, chunk, inside, STORAGE, BACKEND) * scale
        if ROWS > 1:
            sum1 += partial(values, x + K, chunk, chunk < _limit(num_rows, 1, COUNT), STORAGE, BACKEND) * scale
        if ROWS > 2:
            sum2 += partial(values, x + 2 * K, chunk, chunk < _limit(num_rows, 2, COUNT), STORAGE, BACKEND) * scale
            sum3 += partial(values, x + 3 * K, chunk, chunk < _limit(num_rows, 3, COUNT), STORAGE, BACKEND) * scale
    release()
    feature = tile * 16 + tl.arange(0, 16)
    tl.store(y + feature, saturate(tl.sum(sum0, 0), y), mask=feature < N)
    if ROWS > 1:
        tl.store(y + N + feature, saturate(tl.sum(sum1, 0), y), mask=feature < _limit(num_rows, 1, N))
    if ROWS > 2:
        tl.store(y + 2 * N + feature, saturate(tl.sum(sum2, 0), y), mask=feature < _limit(num_rows, 2, N))
        tl.store(y + 3 * N + feature, saturate(tl.sum(sum3, 0), y), mask=feature < _limit(num_rows, 3, N))


@triton.jit
def matmul_f16_rows(x, weight, y, num_rows, K: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr):
    """Do the same for float16 weights [ceil(N / 16), K, 16]."""
    tile = tl.program_id(0)
    row = tl.arange(0, 16)[None, :]
    weight += tile.to(tl.int64) * (K * 16)
    wait()
    sum0 = tl.zeros([CHUNKS, 16], tl.float32)
    sum1 = tl.zeros([CHUNKS, 16], tl.float32)
    sum2 = tl.zeros([CHUNKS, 16], tl.float32)
    sum3 = tl.zeros([CHUNKS, 16], tl.float32)
    for start in tl.range(0, K, CHUNKS, loop_unroll_factor=4):
        k = start + tl.arange(0, CHUNKS)[:, None]
        w = tl.load(weight + k * 16 + row, mask=k < K, other=0.0).to(tl.float32)
        sum0 += w * tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        if ROWS > 1:
            sum1 += w * tl.load(x + K + k, mask=k < _limit(num_rows, 1, K), other=0.0).to(tl.float32)
        if ROWS > 2:
            sum2 += w * tl.load(x + 2 * K + k, mask=k < _limit(num_rows, 2, K), other=0.0).to(tl.float32)
            sum3 += w * tl.load(x + 3 * K + k, mask=k < _limit(num_rows, 3, K), other=0.0).to(tl.float32)
    release()
    feature = tile * 16 + tl.arange(0, 16)
    tl.store(y + feature, saturate(tl.sum(sum0, 0), y), mask=feature < N)
    if ROWS > 1:
        tl.store(y + N + feature, saturate(tl.sum(sum1, 0), y), mask=feature < _limit(num_rows, 1, N))
    if ROWS > 2:
        tl.store(y + 2 * N + feature, saturate(tl.sum(sum2, 0), y), mask=feature < _limit(num_rows, 2, N))
        tl.store(y + 3 * N + feature, saturate(tl.sum(sum3, 0), y), mask=feature < _limit(num_rows, 3, N))


@triton.jit
def _stack(a, b, c, d):
    """Four [chunks, BLOCK_N] -> [chunks, BLOCK_N, 2, 2], the first index of the pair the higher bit."""
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def weight_block(words, scales, num_rows, start, feature, STORAGE: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
           GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPREAD: tl.constexpr,
           BACKEND: tl.constexpr):  # fmt: skip
    """Weights of input features [start, start + BLOCK_K) and output features [1, BLOCK_N] as float16 [BLOCK_K, BLOCK_N].

    SPREAD: column 4 a + b is at b * BLOCK_N / 4 + a; `matmul_blocks` says why.
    """
    FEATURES: tl.constexpr = features_per_chunk(STORAGE)
    WORDS: tl.constexpr = 48 if STORAGE == "q6" else 16
    TILES: tl.constexpr = (N + 15) // 16
    C: tl.constexpr = BLOCK_K // FEATURES
    # Of q6 the same spills registers on sm_86 and sm_89.
    IS_WHOLE: tl.constexpr = STORAGE != "q6" and K % BLOCK_K == 0 and TILES * 16 % BLOCK_N == 0
    tile = feature // 16
    row = feature % 16
    chunk = start // FEATURES + tl.arange(0, C)[:, None]
    inside = None if IS_WHOLE else (feature < TILES * 16) & (chunk < K // FEATURES)
    zero: tl.constexpr = None if IS_WHOLE else 0.0
    at = (tile * (K // FEATURES) + chunk) * WORDS + row
    if IS_WHOLE and GROUP % BLOCK_K == 0:
        scale = tl.load(scales + (tile * (K // GROUP) + start // GROUP) * 16 + row)
    else:
        scale = tl.load(scales + (tile * (K // GROUP) + chunk * FEATURES // GROUP) * 16 + row, mask=inside, other=zero)
    if has_nibbles(STORAGE) and BACKEND == CUDA:
        word, scale = tl.broadcast(tl.load(words + at, mask=inside, other=None if IS_WHOLE else 0), scale)
        h0, h1, h2, h3, h4, h5, h6, h7 = unpack_half(word, scale, num_rows, STORAGE)
        halves = tl.join(_stack(h0, h1, h2, h3), _stack(h4, h5, h6, h7))
        if SPREAD:
            halves = halves.reshape((C, BLOCK_N // 4, 4, 2, 2, 2)).permute((0, 5, 3, 4, 2, 1))
        else:
            halves = halves.permute((0, 4, 2, 3, 1))
        return halves.reshape((BLOCK_K, BLOCK_N))
    values = unpack(words, at, inside, STORAGE, BACKEND)
    scale = scale.to(tl.float32)
    m = scale * factor(STORAGE, BACKEND)
    o = scale * offset(STORAGE, BACKEND)
    # Each feature is one fused multiply-add: exact but for one rounding, and then the rounding to float16.
    f0, f1 = (values[0] * m + o).to(tl.float16), (values[1] * m + o).to(tl.float16)
    f2, f3 = (values[2] * m + o).to(tl.float16), (values[3] * m + o).to(tl.float16)
    block = _stack(f0, f1, f2, f3)
    if STORAGE == "q8":
        return block.permute((0, 2, 3, 1)).reshape((C * FEATURES, BLOCK_N))
    else:
        f4, f5 = (values[4] * m + o).to(tl.float16), (values[5] * m + o).to(tl.float16)
        f6, f7 = (values[6] * m + o).to(tl.float16), (values[7] * m + o).to(tl.float16)
        if has_nibbles(STORAGE):
            # [C, BLOCK_N, bit 1, bit 0, bit 2]
            block = tl.join(block, _stack(f4, f5, f6, f7))
            return block.permute((0, 4, 2, 3, 1)).reshape((C * FEATURES, BLOCK_N))
        else:
            f8, f9 = (values[8] * m + o).to(tl.float16), (values[9] * m + o).to(tl.float16)
            f10, f11 = (values[10] * m + o).to(tl.float16), (values[11] * m + o).to(tl.float16)
            f12, f13 = (values[12] * m + o).to(tl.float16), (values[13] * m + o).to(tl.float16)
            f14, f15 = (values[14] * m + o).to(tl.float16), (values[15] * m + o).to(tl.float16)
            low = tl.join(block, _stack(f4, f5, f6, f7))
            high = tl.join(_stack(f8, f9, f10, f11), _stack(f12, f13, f14, f15))
            # [C, BLOCK_N, bit 1, bit 0, bit 2, bit 3]
            block = tl.join(low, high)
            return block.permute((0, 5, 4, 2, 3, 1)).reshape((C * FEATURES, BLOCK_N))


@triton.jit
def matmul_blocks(
    x,
    weight,
    scales,
    y,
    num_rows,
    STORAGE: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BACKEND: tl.constexpr,
):
    """Like `matmul_rows` for any number of rows; a program per BLOCK_M rows (axis 0) and BLOCK_N output features (axis 1)."""
    # Threads load 16 bytes, a word of four output features. On NVIDIA's chips they then write to shared memory what the matrix
    # units read there, rows of one output feature: of those beside each other, not of every fourth, for the sake of its banks.
    SPREAD: tl.constexpr = STORAGE == "q4" and BACKEND == CUDA and BLOCK_M >= 64
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    first = tl.program_id(1) * BLOCK_N
    feature = first + tl.arange(0, BLOCK_N)[None, :]
    words = weight.to(tl.pointer_type(tl.int32))
    wait()
    k = tl.arange(0, BLOCK_K)[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        w = weight_block(
            words, scales, num_rows, start, feature, STORAGE, K, N, GROUP, BLOCK_N, BLOCK_K, SPREAD, BACKEND
        )
        there = (token < num_rows) if K % BLOCK_K == 0 else (token < num_rows) & (start + k < K)
        tokens = tl.load(x + token.to(tl.int64) * K + (start + k), mask=there, other=0.0)
        total = tl.dot(tokens, w, total)
    release()
    if SPREAD:
        total = total.reshape((BLOCK_M, 4, BLOCK_N // 4)).permute((0, 2, 1)).reshape((BLOCK_M, BLOCK_N))
    tl.store(y + token.to(tl.int64) * N + feature, saturate(total, y), mask=(token < num_rows) & (feature < N))


@triton.jit
def matmul_f16_blocks(
    x,
    weight,
    y,
    num_rows,
    K: tl.constexpr,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Do the same for float16 weights [ceil(N / 16), K, 16]."""
    TILES: tl.constexpr = (N + 15) // 16
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    feature = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    wait()
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        at = ((feature // 16).to(tl.int64) * K + k[:, None]) * 16 + feature % 16
        w = tl.load(weight + at, mask=(feature < TILES * 16) & (k[:, None] < K), other=0.0)
        there = (token < num_rows) & (k[None, :] < K)
        tokens = tl.load(x + token.to(tl.int64) * K + k[None, :], mask=there, other=0.0)
        total = tl.dot(tokens, w, total)
    release()
    tl.store(y + token.to(tl.int64) * N + feature, saturate(total, y), mask=(token < num_rows) & (feature < N))
