"""Stored weights -> numbers, on the device: words of a row tile (FORMAT.md 4.3) to float32, with no table in memory.

A word holds some input features of one row. `unpack_*` gives a tuple of float32 tensors v, one for each input feature in order,
and level = v * FACTOR + OFFSET exactly, with the constants of `factor` and `offset`: a kernel folds them into sums that it does
anyway, instead of two more instructions for each weight.

Sixteen levels are four registers of bytes; the two vendors pick bytes by `prmt` (PTX ISA) and `v_perm_b32` (CDNA and RDNA ISA).
Triton's interpreter runs neither, so each has its definition beside it, written out, which then stands in for it.
Costs, counted in the code: tests/benchmarks/LOG.md.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# BACKEND of a kernel: which spelling it is compiled with. PLAIN uses neither.
PLAIN = tl.constexpr(0)
CUDA = tl.constexpr(1)
HIP = tl.constexpr(2)

# LEVELS[q] + 64, four to a word, q = 0 in the lowest byte; with bit 7 set for CUDA.
LEVELS_0 = tl.constexpr(0x20160C00)
LEVELS_4 = tl.constexpr(0x3B352E28)
LEVELS_8 = tl.constexpr(0x534C4640)
LEVELS_12 = tl.constexpr(0x786C625A)
SIGN_BITS = tl.constexpr(0x80808080)


@triton.jit
def _constant(like, value: tl.constexpr):
    """Return an int32 tensor of a 32-bit pattern."""
    return tl.full(like.shape, value if value < 0x80000000 else value - 0x100000000, tl.int32)


@triton.jit
def _byte_of(pool, index):
    return ((pool >> (index * 8).to(tl.uint64)) & 0xFF).to(tl.uint32)


@triton.jit
def _prmt_by_definition(low, high, selector):
    """Nibble i of `selector` names byte i of the result among 8; its top bit asks for eight copies of that byte's sign."""
    pool = (high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | low.to(tl.uint32, bitcast=True).to(tl.uint64)
    selector = selector.to(tl.uint32, bitcast=True)
    result = selector & 0
    for i in tl.static_range(4):
        nibble = (selector >> (4 * i)) & 0xF
        byte = _byte_of(pool, nibble & 7)
        result |= tl.where(nibble >= 8, (byte >> 7) * 0xFF, byte) << (8 * i)
    return result.to(tl.int32, bitcast=True)


@triton.jit
def _v_perm_by_definition(high, low, selector):
    """Byte i of `selector`, 0 to 7, names byte i of the result: 0 to 3 are bytes of `low`, 4 to 7 of `high`."""
    pool = (high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | low.to(tl.uint32, bitcast=True).to(tl.uint64)
    selector = selector.to(tl.uint32, bitcast=True)
    result = selector & 0
    for i in tl.static_range(4):
        result |= _byte_of(pool, (selector >> (8 * i)) & 0xFF) << (8 * i)
    return result.to(tl.int32, bitcast=True)


@triton.jit
def prmt(low, high, selector):
    """NVIDIA's byte permutation of int32."""
    if INTERPRETED:
        return _prmt_by_definition(low, high, selector)
    else:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, selector], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def v_perm(high, low, selector):
    """AMD's byte permutation of int32."""
    if INTERPRETED:
        return _v_perm_by_definition(high, low, selector)
    else:
        return tl.inline_asm_elementwise(
            "v_perm_b32 $0, $1, $2, $3", "=v,v,v,v", [high, low, selector], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def _lookup_cuda(word):
    """Nibbles 0..3 of `word` -> four bytes 0x80 | level + 64.

    Both halves of the table are looked up by the whole nibble. Where its top bit asks for the other half, the byte is all ones,
    because every byte of the table is negative: so `&` joins them.
    """
    low = prmt(_constant(word, LEVELS_0 | SIGN_BITS), _constant(word, LEVELS_4 | SIGN_BITS), word)
    flipped = word ^ _constant(word, 0x88888888)
    return low & prmt(_constant(word, LEVELS_8 | SIGN_BITS), _constant(word, LEVELS_12 | SIGN_BITS), flipped)


@triton.jit
def _lookup_hip(word):
    """Low nibbles of the four bytes of `word` -> four bytes level + 64."""
    index = word & 0x07070707
    low = v_perm(_constant(word, LEVELS_4), _constant(word, LEVELS_0), index)
    high = v_perm(_constant(word, LEVELS_12), _constant(word, LEVELS_8), index)
    return v_perm(high, low, ((word >> 1) & 0x04040404) | 0x03020100)


@triton.jit
def _unit_float(bytes, i: tl.constexpr):
    """Byte i, 0x80 | u, u < 128 -> 1 + u / 128: the byte becomes the top of the mantissa of a float32 in [1, 2)."""
    return prmt(bytes, _constant(bytes, 0x3F000000), _constant(bytes, 0x7044 + (i << 8))).to(tl.float32, bitcast=True)


@triton.jit
def _byte_float(bytes, i: tl.constexpr):
    """Byte i, unsigned; one instruction on AMD (v_cvt_f32_ubyte)."""
    return ((bytes >> (8 * i)) & 0xFF).to(tl.float32)


@triton.jit
def _level_of(q):
    """q4 by selection, for PLAIN."""
    byte = tl.where(q < 4, LEVELS_0, tl.where(q < 8, LEVELS_4, tl.where(q < 12, LEVELS_8, LEVELS_12)))
    return ((byte >> ((q & 3) * 8)) & 0xFF).to(tl.float32)


@triton.jit
def unpack_q4(word, BACKEND: tl.constexpr):
    """One word -> 8 input features."""
    if BACKEND == CUDA:
        a = _lookup_cuda(word)  # features 0 4 1 5
        b = _lookup_cuda(word >> 16)  # features 2 6 3 7
        return (
            _unit_float(a, 0),
            _unit_float(a, 2),
            _unit_float(b, 0),
            _unit_float(b, 2),
            _unit_float(a, 1),
            _unit_float(a, 3),
            _unit_float(b, 1),
            _unit_float(b, 3),
        )
    elif BACKEND == HIP:
        a = _lookup_hip(word)
        b = _lookup_hip(word >> 4)
        return (
            _byte_float(a, 0),
            _byte_float(a, 1),
            _byte_float(a, 2),
            _byte_float(a, 3),
            _byte_float(b, 0),
            _byte_float(b, 1),
            _byte_float(b, 2),
            _byte_float(b, 3),
        )
    else:
        return (
            _level_of(word & 15),
            _level_of((word >> 8) & 15),
            _level_of((word >> 16) & 15),
            _level_of((word >> 24) & 15),
            _level_of((word >> 4) & 15),
            _level_of((word >> 12) & 15),
            _level_of((word >> 20) & 15),
            _level_of((word >> 28) & 15),
        )


# $2, which ptxas does not know and so keeps in a register: known constants it moves there before every `prmt`, 24 instructions
# for 32 weights. $1 is never negative.
KEPT = tl.constexpr("{ .reg .b32 t; mov.u32 t, %laneid; add.s32 t, t, $1; shr.u32 t, t, 31; add.u32 $0, t, $2; }")


@triton.jit
def kept(value: tl.constexpr, num_rows):
    """Return a 32-bit pattern by KEPT."""
    return tl.inline_asm_elementwise(
        KEPT,
        "=r,r,r",
        [num_rows, value if value < 0x80000000 else value - 0x100000000],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


def with_levels(text):
    """Put the two parts of the table that assembly has as constants into it, negative as `_lookup_cuda` wants them."""
    return text.replace("LEVELS_4", str(LEVELS_4.value | SIGN_BITS.value)).replace(
        "LEVELS_12", str(LEVELS_12.value | SIGN_BITS.value)
    )


_UNPACK_HALF = tl.constexpr(
    with_levels("""{ .reg .b32 a, b, c, d, s, z;
    mov.b32 s, {$9, $9}; mov.b32 z, 0x64C064C0;
    xor.b32 c, $8, 0x88888888;
    prmt.b32 a, $10, LEVELS_4, $8; prmt.b32 b, $11, LEVELS_12, c; and.b32 a, a, b;
    shr.u32 d, $8, 16; shr.u32 c, c, 16;
    prmt.b32 d, $10, LEVELS_4, d; prmt.b32 b, $11, LEVELS_12, c; and.b32 d, d, b;
    prmt.b32 b, a, 0x64646464, $12; sub.f16x2 b, b, z; mul.f16x2 b, b, s; mov.b32 {$0, $1}, b;
    prmt.b32 b, d, 0x64646464, $12; sub.f16x2 b, b, z; mul.f16x2 b, b, s; mov.b32 {$2, $3}, b;
    prmt.b32 b, a, 0x64646464, $13; sub.f16x2 b, b, z; mul.f16x2 b, b, s; mov.b32 {$4, $5}, b;
    prmt.b32 b, d, 0x64646464, $13; sub.f16x2 b, b, z; mul.f16x2 b, b, s; mov.b32 {$6, $7}, b; }""")
)


@triton.jit
def unpack_q4_half(word, scale, num_rows):
    """Word and scale, float16 -> 8 input features as float16, each level * scale rounded once; for CUDA.

    A byte 0x80 | level + 64 below 0x64 is the float16 1216 + level: two features are two instructions from there.
    """
    if INTERPRETED:
        f0, f1, f2, f3, f4, f5, f6, f7 = unpack_q4(word, CUDA)
        m = scale.to(tl.float32) * 128.0
        o = scale.to(tl.float32) * -192.0
        return (
            (f0 * m + o).to(tl.float16),
            (f1 * m + o).to(tl.float16),
            (f2 * m + o).to(tl.float16),
            (f3 * m + o).to(tl.float16),
            (f4 * m + o).to(tl.float16),
            (f5 * m + o).to(tl.float16),
            (f6 * m + o).to(tl.float16),
            (f7 * m + o).to(tl.float16),
        )
    else:
        return tl.inline_asm_elementwise(
            _UNPACK_HALF,
            "=h,=h,=h,=h,=h,=h,=h,=h,r,h,r,r,r,r",
            [
                word,
                scale,
                kept(LEVELS_0 | SIGN_BITS, num_rows),
                kept(LEVELS_8 | SIGN_BITS, num_rows),
                kept(0x4240, num_rows),
                kept(0x4341, num_rows),
            ],
            dtype=(
                tl.float16,
                tl.float16,
                tl.float16,
                tl.float16,
                tl.float16,
                tl.float16,
                tl.float16,
                tl.float16,
            ),
            is_pure=True,
            pack=1,
        )


@triton.jit
def _six_bits(bytes, i: tl.constexpr, BACKEND: tl.constexpr):
    if BACKEND == CUDA:
        return _unit_float(bytes, i)
    else:
        return _byte_float(bytes, i)


@triton.jit
def unpack_q6(word0, word1, word2, BACKEND: tl.constexpr):
    """Three words -> 16 input features."""
    fourth = ((word0 >> 6) & 0x03030303) | ((word1 >> 4) & 0x0C0C0C0C) | ((word2 >> 2) & 0x30303030)
    word0, word1, word2 = word0 & 0x3F3F3F3F, word1 & 0x3F3F3F3F, word2 & 0x3F3F3F3F
    if BACKEND == CUDA:
        sign = _constant(word0, SIGN_BITS)
        word0, word1, word2, fourth = word0 | sign, word1 | sign, word2 | sign, fourth | sign
    return (
        _six_bits(word0, 0, BACKEND),
        _six_bits(word0, 1, BACKEND),
        _six_bits(word0, 2, BACKEND),
        _six_bits(word0, 3, BACKEND),
        _six_bits(word1, 0, BACKEND),
        _six_bits(word1, 1, BACKEND),
        _six_bits(word1, 2, BACKEND),
        _six_bits(word1, 3, BACKEND),
        _six_bits(word2, 0, BACKEND),
        _six_bits(word2, 1, BACKEND),
        _six_bits(word2, 2, BACKEND),
        _six_bits(word2, 3, BACKEND),
        _six_bits(fourth, 0, BACKEND),
        _six_bits(fourth, 1, BACKEND),
        _six_bits(fourth, 2, BACKEND),
        _six_bits(fourth, 3, BACKEND),
    )


@triton.jit
def _eight_bits(word, i: tl.constexpr, BACKEND: tl.constexpr):
    if BACKEND == CUDA:
        # Integer to float conversion runs at a quarter of the rate of this pair: 2^23 + q, less 2^23 + 128.
        bits = prmt(word, _constant(word, 0x4B000000), _constant(word, 0x7440 + i))
        return bits.to(tl.float32, bitcast=True) - 8388736.0
    else:
        return _byte_float(word, i)


@triton.jit
def unpack_q8(word, BACKEND: tl.constexpr):
    """One word -> 4 input features."""
    return (
        _eight_bits(word, 0, BACKEND),
        _eight_bits(word, 1, BACKEND),
        _eight_bits(word, 2, BACKEND),
        _eight_bits(word, 3, BACKEND),
    )


@triton.constexpr_function
def factor(storage, backend):
    """FACTOR of level = v * FACTOR + OFFSET."""
    return 128.0 if backend == CUDA.value and storage in ("q4", "q6") else 1.0


@triton.constexpr_function
def offset(storage, backend):
    """OFFSET of level = v * FACTOR + OFFSET."""
    zero_point = {"q4": 64.0, "q6": 32.0, "q8": 128.0}[storage]
    if backend != CUDA.value:
        return -zero_point
    return 0.0 if storage == "q8" else -zero_point - 128.0
