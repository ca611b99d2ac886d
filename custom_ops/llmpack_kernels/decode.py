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
# The same of mxfp4, of 4 * level + 48: its levels are small, and what is added to them takes part in the rounding of sums.
E2M1_0 = tl.constexpr(0x3C383430)
E2M1_4 = tl.constexpr(0x60504840)
E2M1_8 = tl.constexpr(0x24282C30)
E2M1_12 = tl.constexpr(0x00101820)


@triton.constexpr_function
def has_nibbles(storage):
    """Whether a byte holds two weights, each the number of one of sixteen levels."""
    return storage in ("q4", "mxfp4")


@triton.constexpr_function
def levels(storage, first):
    """Return the bytes of four levels from `first` on."""
    q4 = {0: LEVELS_0, 4: LEVELS_4, 8: LEVELS_8, 12: LEVELS_12}
    mxfp4 = {0: E2M1_0, 4: E2M1_4, 8: E2M1_8, 12: E2M1_12}
    return {"q4": q4, "mxfp4": mxfp4}[storage][first].value


@triton.constexpr_function
def negative_levels(storage, first):
    """Return the same with bit 7 set."""
    return levels(storage, first) | SIGN_BITS.value


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
def _lookup_cuda(word, STORAGE: tl.constexpr):
    """Nibbles 0..3 of `word` -> four bytes of the levels, with bit 7 set.

    Both halves of the table are looked up by the whole nibble. Where its top bit asks for the other half, the byte is all ones,
    because every byte of the table is negative: so `&` joins them.
    """
    low = prmt(_constant(word, negative_levels(STORAGE, 0)), _constant(word, negative_levels(STORAGE, 4)), word)
    flipped = word ^ _constant(word, 0x88888888)
    return low & prmt(
        _constant(word, negative_levels(STORAGE, 8)), _constant(word, negative_levels(STORAGE, 12)), flipped
    )


@triton.jit
def _lookup_hip(word, STORAGE: tl.constexpr):
    """Low nibbles of the four bytes of `word` -> four bytes of the levels."""
    index = word & 0x07070707
    low = v_perm(_constant(word, levels(STORAGE, 4)), _constant(word, levels(STORAGE, 0)), index)
    high = v_perm(_constant(word, levels(STORAGE, 12)), _constant(word, levels(STORAGE, 8)), index)
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
def _level_of(q, STORAGE: tl.constexpr):
    """q4 or mxfp4 by selection, for PLAIN."""
    first = tl.where(q < 4, levels(STORAGE, 0), levels(STORAGE, 4))
    byte = tl.where(q < 8, first, tl.where(q < 12, levels(STORAGE, 8), levels(STORAGE, 12)))
    return ((byte >> ((q & 3) * 8)) & 0xFF).to(tl.float32)


@triton.jit
def unpack_nibbles(word, STORAGE: tl.constexpr, BACKEND: tl.constexpr):
    """One word of q4 or mxfp4 -> 8 input features."""
    if BACKEND == CUDA:
        a = _lookup_cuda(word, STORAGE)  # features 0 4 1 5
        b = _lookup_cuda(word >> 16, STORAGE)  # features 2 6 3 7
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
        a = _lookup_hip(word, STORAGE)
        b = _lookup_hip(word >> 4, STORAGE)
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
            _level_of(word & 15, STORAGE),
            _level_of((word >> 8) & 15, STORAGE),
            _level_of((word >> 16) & 15, STORAGE),
            _level_of((word >> 24) & 15, STORAGE),
            _level_of((word >> 4) & 15, STORAGE),
            _level_of((word >> 12) & 15, STORAGE),
            _level_of((word >> 20) & 15, STORAGE),
            _level_of((word >> 28) & 15, STORAGE),
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


def with_levels(text, storage="q4"):
    """Put the two parts of the table that assembly has as constants into it, negative as `_lookup_cuda` wants them."""
    fourth, twelfth = (str(negative_levels(storage, first)) for first in (4, 12))
    return text.replace("LEVELS_4", fourth).replace("LEVELS_12", twelfth)


_UNPACK_HALF = """{ .reg .b32 a, b, c, d, s, z;
    mov.b32 s, {$9, $9}; mov.b32 z, ZEROS;
    xor.b32 c, $8, 0x88888888;
    prmt.b32 a, $10, LEVELS_4, $8; prmt.b32 b, $11, LEVELS_12, c; and.b32 a, a, b;
    shr.u32 d, $8, 16; shr.u32 c, c, 16;
    prmt.b32 d, $10, LEVELS_4, d; prmt.b32 b, $11, LEVELS_12, c; and.b32 d, d, b;
    prmt.b32 b, a, EXPONENTS, $12; sub.f16x2 b, b, z; mul.f16x2 b, b, s; mov.b32 {$0, $1}, b;
    prmt.b32 b, d, EXPONENTS, $12; sub.f16x2 b, b, z; mul.f16x2 b, b, s; mov.b32 {$2, $3}, b;
    prmt.b32 b, a, EXPONENTS, $13; sub.f16x2 b, b, z; mul.f16x2 b, b, s; mov.b32 {$4, $5}, b;
    prmt.b32 b, d, EXPONENTS, $13; sub.f16x2 b, b, z; mul.f16x2 b, b, s; mov.b32 {$6, $7}, b; }"""


def _unpack_half(storage, exponents, zeros):
    return with_levels(_UNPACK_HALF.replace("EXPONENTS", exponents).replace("ZEROS", zeros), storage)


UNPACK_Q4_HALF = tl.constexpr(_unpack_half("q4", "0x64646464", "0x64C064C0"))
UNPACK_MXFP4_HALF = tl.constexpr(_unpack_half("mxfp4", "0x5C5C5C5C", "0x5CB05CB0"))


@triton.jit
def unpack_half(word, scale, num_rows, STORAGE: tl.constexpr):
    """Word of q4 or mxfp4 and scale, float16 -> 8 input features as float16, each level * scale rounded once; for CUDA.

    A byte 0x80 | level + 64 below 0x64 is the float16 1216 + level, one 0x80 | 4 * level + 48 below 0x5C is 300 + level: two
    features are two instructions from there.
    """
    if INTERPRETED:
        f0, f1, f2, f3, f4, f5, f6, f7 = unpack_nibbles(word, STORAGE, CUDA)
        m = scale.to(tl.float32) * factor(STORAGE, CUDA)
        o = scale.to(tl.float32) * offset(STORAGE, CUDA)
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
            UNPACK_Q4_HALF if STORAGE == "q4" else UNPACK_MXFP4_HALF,
            "=h,=h,=h,=h,=h,=h,=h,=h,r,h,r,r,r,r",
            [
                word,
                scale,
                kept(negative_levels(STORAGE, 0), num_rows),
                kept(negative_levels(STORAGE, 8), num_rows),
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
    whole = 128.0 if backend == CUDA.value and storage != "q8" else 1.0
    return whole / 4 if storage == "mxfp4" else whole


@triton.constexpr_function
def offset(storage, backend):
    """OFFSET of level = v * FACTOR + OFFSET."""
    zero_point = {"q4": 64.0, "q6": 32.0, "q8": 128.0, "mxfp4": 12.0}[storage]
    if backend != CUDA.value:
        return -zero_point
    return 0.0 if storage == "q8" else -zero_point - factor(storage, backend)
