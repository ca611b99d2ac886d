"""y = x · Wᵀ for many rows of x and q4 weights on sm_90, in Gluon: Triton with layouts written down.

A wgmma of 64 output features takes its first operand, the weights, from the registers of the threads that unpack them: they
never pass through shared memory, as in `matmul.matmul_blocks`. One wgmma is always under way while the next weights are
unpacked; Triton's own pipeline waits for each, because its operand is not a load.

Unpacked, a thread holds two input features of eight, of every chunk of its rows: so the four threads of a row each read all its
words, keep their nibbles and look them up eight at a time. Tiles are copied STAGES - 2 ahead.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from llmpack_kernels.decode import LEVELS_0, LEVELS_8, SIGN_BITS, with_levels
from llmpack_kernels.few import kept
from llmpack_kernels.matmul import saturate

# Words of chunks 0 to 3 of a row ($4, $6, $8, $10), its scale twice ($12) -> this thread's two input features of each, float16.
# $16 and $24: which bytes and which nibbles are this thread's. $32 to $56: halves of the table (decode.py), selectors.
# A byte 0x80 | level + 64 below 0x64 is the float16 1216 + level.
UNPACK = gl.constexpr(
    with_levels("""{ .reg .b32 a, b, c, d, y, z;
mov.b32 z, 0x64C064C0;
prmt.b32 a, $4, $6, $16; prmt.b32 b, $8, $10, $16;
shr.u32 a, a, $24; sub.u32 c, 4, $24; shl.b32 b, b, c;
lop3.b32 y, a, b, 0x0F0F0F0F, 0xE4;
xor.b32 c, y, 0x88888888;
prmt.b32 a, $32, LEVELS_4, y; prmt.b32 b, $40, LEVELS_12, c; and.b32 a, a, b;
shr.u32 d, y, 16; shr.u32 c, c, 16;
prmt.b32 d, $32, LEVELS_4, d; prmt.b32 b, $40, LEVELS_12, c; and.b32 d, d, b;
prmt.b32 b, a, 0x64646464, $48; sub.f16x2 b, b, z; mul.f16x2 $0, b, $12;
prmt.b32 b, d, 0x64646464, $48; sub.f16x2 b, b, z; mul.f16x2 $1, b, $12;
prmt.b32 b, a, 0x64646464, $56; sub.f16x2 b, b, z; mul.f16x2 $2, b, $12;
prmt.b32 b, d, 0x64646464, $56; sub.f16x2 b, b, z; mul.f16x2 $3, b, $12; }""")
)
CONSTRAINTS = gl.constexpr("=&r,=&r,=&r,=&r" + ",r" * 60)
BYTES = gl.constexpr("{ .reg .b32 t; mov.u32 t, %laneid; and.b32 t, t, 1; mad.lo.s32 $0, t, 0x2222, 0x5410; }")
NIBBLES = gl.constexpr("{ .reg .b32 t; mov.u32 t, %laneid; shl.b32 t, t, 1; and.b32 $0, t, 4; }")
# For `kept`, as int32: levels 0 to 3 and 8 to 11 of the table, bytes 0 and 2, bytes 1 and 3.
LOW, HIGH = (gl.constexpr((v.value | SIGN_BITS.value) - (1 << 32)) for v in (LEVELS_0, LEVELS_8))
EVEN, ODD = gl.constexpr(0x4240), gl.constexpr(0x4341)


@gluon.constexpr_function
def _fragment(features, warps):
    """[features, chunk, input feature] as wgmma's first operand; a thread has four chunks of a row after each other."""
    registers = [[0, 0, 1], [0, 1, 0], [0, 2, 0], [8, 0, 0], [0, 4, 0]]
    registers += [[16 * warps << i, 0, 0] for i in range((features // (16 * warps)).bit_length() - 1)]
    lanes = [[0, 0, 2], [0, 0, 4], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    of_warps = [[16 << i, 0, 0] for i in range(warps.bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, lanes, of_warps, [], [features, 8, 8])


@gluon.jit
def _copy(x, words, scales, xs, ws, ss, tile, stage, num_rows, K: gl.constexpr, N: gl.constexpr, GROUP: gl.constexpr,
          BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr):  # fmt: skip
    """Begin to copy 64 input features of x, words and scales; zeros where there are none."""
    WARPS: gl.constexpr = gl.num_warps()
    X: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    W: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
    S: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [1, WARPS], [1, 0])
    ROWS: gl.constexpr = (N + 15) // 16 * 16
    is_there = tile < K // BLOCK_K
    token = gl.program_id(0) * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(1, X))[:, None]
    k = tile * BLOCK_K + gl.arange(0, BLOCK_K, gl.SliceLayout(0, X))[None, :]
    async_copy.async_load(xs.index(stage), x + token.to(gl.int64) * K + k, mask=(token < num_rows) & is_there)
    feature = gl.program_id(1) * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, W))[None, :]
    chunk = tile * (BLOCK_K // 8) + gl.arange(0, BLOCK_K // 8, gl.SliceLayout(1, W))[:, None]
    at = (feature // 16 * (K // 8) + chunk) * 16 + feature % 16
    async_copy.async_load(ws.index(stage), words + at, mask=(feature < ROWS) & is_there)
    feature = gl.program_id(1) * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, S))[None, :]
    at = (feature // 16 * (K // GROUP) + tile * BLOCK_K // GROUP) * 16 + feature % 16
    async_copy.async_load(ss.index(stage), scales + at, mask=(feature < ROWS) & is_there)
    async_copy.commit_group()


@gluon.jit
def _read(ws, ss, stage, P: gl.constexpr, BLOCK_N: gl.constexpr):
    word = ws.index(stage).permute((1, 0)).load(gl.SliceLayout(2, P))
    scale = ss.index(stage).reshape((BLOCK_N,)).load(gl.SliceLayout(1, gl.SliceLayout(2, P)))
    return gl.expand_dims(word, 2), gl.expand_dims(gl.expand_dims(scale, 1), 2)


@gluon.jit
def _unpack(word, scale, which, nibbles, low, high, even, odd, A: gl.constexpr, BLOCK_N: gl.constexpr,
            BLOCK_K: gl.constexpr):  # fmt: skip
    word, scale = gl.broadcast(word, which)[0], gl.broadcast(scale, which)[0]
    arguments = [word, scale, which, nibbles, low, high, even, odd]
    half = gl.inline_asm_elementwise(UNPACK, CONSTRAINTS, arguments, dtype=gl.float16, is_pure=True, pack=8)
    return gl.convert_layout(half.reshape((BLOCK_N, BLOCK_K)), A, assert_trivial=True)


@gluon.jit
def matmul_q4(
    x,
    weight,
    scales,
    y,
    num_rows,
    K: gl.constexpr,
    N: gl.constexpr,
    GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Like `matmul.matmul_blocks`; K and GROUP are multiples of BLOCK_K, 64. At least four stages."""
    WARPS: gl.constexpr = gl.num_warps()
    P: gl.constexpr = _fragment(BLOCK_N, WARPS)
    C: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_M, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, C, 2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    xs = gl.allocate_shared_memory(gl.float16, [STAGES, BLOCK_M, BLOCK_K], gl.NVMMASharedLayout(128, 16, 2))
    ws = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK_K // 8, BLOCK_N], plain)
    ss = gl.allocate_shared_memory(gl.float16, [STAGES, 1, BLOCK_N], plain)
    words = weight.to(gl.pointer_type(gl.int32), bitcast=True)
    zero = gl.full([BLOCK_N, 8, 8], 0, gl.int32, P)
    which = gl.inline_asm_elementwise(BYTES, "=r,r", [zero], dtype=gl.int32, is_pure=True, pack=1)
    nibbles = gl.inline_asm_elementwise(NIBBLES, "=r,r", [zero], dtype=gl.int32, is_pure=True, pack=1)
    low, high = kept(num_rows, zero, LOW), kept(num_rows, zero, HIGH)
    even, odd = kept(num_rows, zero, EVEN), kept(num_rows, zero, ODD)
    for i in gl.static_range(STAGES - 2):
        _copy(x, words, scales, xs, ws, ss, i, i, num_rows, K, N, GROUP, BLOCK_M, BLOCK_N, BLOCK_K)
    async_copy.wait_group(STAGES - 3)
    gl.barrier()
    word, scale = _read(ws, ss, 0, P, BLOCK_N)
    w = _unpack(word, scale, which, nibbles, low, high, even, odd, A, BLOCK_N, BLOCK_K)
    idle = w
    total = warpgroup_mma_init(gl.zeros([BLOCK_N, BLOCK_M], gl.float32, C))
    stage = 0
    # Two tiles, so that weights being read and being written have registers of their own. A tile too many is zero.
    for i in range(0, K // BLOCK_K, 2):
        for j in gl.static_range(2):
            following = gl.where(stage == STAGES - 1, 0, stage + 1)
            async_copy.wait_group(STAGES - 4)
            gl.barrier()
            fence_async_shared()
            word, scale = _read(ws, ss, following, P, BLOCK_N)
            total = warpgroup_mma(w, xs.index(stage).permute((1, 0)), total, is_async=True)
            total, idle = warpgroup_mma_wait(1, deps=[total, idle])
            total = warpgroup_mma_init(total)
            # Every warp has waited for tile i + j - 2 before the barrier above: what comes next takes its place.
            free = gl.where(stage < 2, stage + STAGES - 2, stage - 2)
            ahead = i + j + STAGES - 2
            _copy(x, words, scales, xs, ws, ss, ahead, free, num_rows, K, N, GROUP, BLOCK_M, BLOCK_N, BLOCK_K)
            idle = w
            w = _unpack(word, scale, which, nibbles, low, high, even, odd, A, BLOCK_N, BLOCK_K)
            stage = following
    total, idle = warpgroup_mma_wait(0, deps=[total, idle])
    Y: gl.constexpr = gl.BlockedLayout([8, 1], [16, 2], [1, WARPS], [0, 1])
    result = gl.convert_layout(saturate(total, y), Y)
    token = gl.program_id(0) * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(0, Y))[None, :]
    feature = gl.program_id(1) * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(1, Y))[:, None]
    gl.store(y + token.to(gl.int64) * N + feature, result, mask=(token < num_rows) & (feature < N))
