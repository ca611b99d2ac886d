// Sixteen numbers as one value: the width of a weight tile. Kernels are written once in these operations and
// compiled for each instruction set, which has a file of its own: one AVX-512 register, two AVX2 registers,
// four NEON registers, or four 16-byte vectors of the compiler.
//
// Everything is inline and lives in the namespace of the instruction set. Kernel files must not use std
// templates: the linker keeps one copy of each, and it might be the one compiled for a machine that this one
// is not.
//
// What each file defines:
//   F32x16, I32x16   arithmetic, loads and stores; float16 to and from memory, rounded half to even.
//                    max2 and min2 return b when either is NaN, as the x86 instructions do; kernels rely on
//                    it. any_greater(a, x): is some lane of a greater than x? Not where it is NaN.
//                    reduce_add and reduce_max: of the lanes; float sums in halves, always in the same order,
//                    (lane i) + (lane i + 8), and so on.
//   Bytes            64 of them, as [16, 4]: four input features of 16 rows. shift_right may let bits of the
//                    neighbour byte come in; lookup takes 16 bytes, 16-aligned, by the lower four bits of
//                    each byte.
//   SmallBytes, UnsignedBytes
//                    dot products of weights up to 127 and up to 255: dot4 adds to each row's sum the
//                    products of its four weights, less kOffset, with four activations in -127..127, exactly.
//                    dot4_shared: the same, for activations that several weights meet in turn.
#ifndef LLMPACK_CPU_SIMD_H_
#define LLMPACK_CPU_SIMD_H_

#if defined(LLMPACK_ISA_avx2_vnni)
#    define LLMPACK_ISA_avx2 1  // but for the dot products
#endif
#if defined(LLMPACK_ISA_avx512_vbmi)
#    define LLMPACK_ISA_avx512 1  // but for lookup
#endif

#include "cpu/simd_base.h"
#if defined(LLMPACK_ISA_avx512)
#    include "cpu/simd_avx512.h"
#elif defined(LLMPACK_ISA_avx2)
#    include "cpu/simd_avx2.h"
#elif defined(LLMPACK_ISA_neon)
#    include "cpu/simd_neon.h"
#else
#    include "cpu/simd_portable.h"
#endif

namespace llmpack::LLMPACK_ISA {

LLMPACK_INLINE F32x16 zero() { return set1(0.0f); }

#if !defined(LLMPACK_ISA_avx512)
template <class Products>
LLMPACK_INLINE void dot4_shared(const Bytes& w, const int8_t* x, I32x16& sum) {
    Products::dot4(w, x, sum);
}
#endif

// The first n lanes from or to memory, n in 1..16; other lanes are zero, or not stored.
LLMPACK_INLINE F32x16 load_first(const float* p, int64_t n) {
    float lanes[16] = {};
    std::memcpy(lanes, p, static_cast<size_t>(n) * sizeof(float));
    return load(lanes);
}
LLMPACK_INLINE F32x16 load_first(const uint16_t* p, int64_t n) {
    uint16_t lanes[16] = {};
    std::memcpy(lanes, p, static_cast<size_t>(n) * sizeof(uint16_t));
    return load_f16(lanes);
}
LLMPACK_INLINE void store_first(float* p, F32x16 a, int64_t n) {
    float lanes[16];
    store(lanes, a);
    std::memcpy(p, lanes, static_cast<size_t>(n) * sizeof(float));
}
LLMPACK_INLINE void store_first(uint16_t* p, F32x16 a, int64_t n) {
    uint16_t lanes[16];
    store_f16(lanes, a);
    std::memcpy(p, lanes, static_cast<size_t>(n) * sizeof(uint16_t));
}

// Calls Body<m>::run(args...) with m = count, in 1..Max: a count known to the compiler keeps arrays of m
// vectors in registers.
template <int Max, template <int> class Body, class... Args>
LLMPACK_INLINE void with_count(int64_t count, Args&&... args) {
    if (count == Max) {
        Body<Max>::run(args...);
    } else if constexpr (Max > 1) {
        with_count<Max - 1, Body>(count, args...);
    }
}

// e^x within 2 units in the last place; 0 below -86.9 (e^x is 1.8e-38 there), infinity above 88.7, NaN for
// NaN. x = n ln 2 + r with |r| <= ln 2 / 2; ln 2 is split in two so that n * ln2_high is exact (Cody and
// Waite). The polynomial is that of Cephes' expf (S. L. Moshier, https://www.netlib.org/cephes/).
LLMPACK_INLINE F32x16 exp(F32x16 x) {
    const F32x16 lowest = set1(-86.9f), highest = set1(88.72283f);
    F32x16 clamped = min2(highest, max2(lowest, x));
    // Kept one below the exponent limit: 2^128 is not a float, so the last doubling is a multiplication.
    I32x16 n = round_to_even(clamped * set1(1.44269504f) + set1(-1.0f));
    F32x16 n_float = to_float(n) + set1(1.0f);
    F32x16 r = fma(n_float, set1(-0.693359375f), clamped);
    r = fma(n_float, set1(2.12194440e-4f), r);
    F32x16 p = set1(1.9875691500e-4f);
    p = fma(p, r, set1(1.3981999507e-3f));
    p = fma(p, r, set1(8.3334519073e-3f));
    p = fma(p, r, set1(4.1665795894e-2f));
    p = fma(p, r, set1(1.6666665459e-1f));
    p = fma(p, r, set1(5.0000001201e-1f));
    p = fma(p, r * r, r + set1(1.0f));
    F32x16 power = from_bits(shift_left_23(n + set1_i32(127)));  // 2^n, n in -126..127
    F32x16 y = p * power * set1(2.0f);
    y = select_less(highest, x, set1(__builtin_inff()), y);
    return select_less(x, lowest, zero(), y);
}

// e^x for x <= 0, as softmax needs it: no overflow to guard against. 0 for minus infinity, NaN for NaN.
#if defined(LLMPACK_ISA_avx512)
LLMPACK_INLINE F32x16 exp_nonpositive(F32x16 x) {
    // Below -200 the scaling at the end underflows to 0 as it would further down; infinity would give NaN on
    // the way.
    x = max2(set1(-200.0f), x);
    F32x16 n = {
        _mm512_roundscale_ps((x * set1(1.44269504f)).v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
    F32x16 r = fma(n, set1(-0.693359375f), x);
    r = fma(n, set1(2.12194440e-4f), r);
    F32x16 p = set1(1.9875691500e-4f);
    p = fma(p, r, set1(1.3981999507e-3f));
    p = fma(p, r, set1(8.3334519073e-3f));
    p = fma(p, r, set1(4.1665795894e-2f));
    p = fma(p, r, set1(1.6666665459e-1f));
    p = fma(p, r, set1(5.0000001201e-1f));
    p = fma(p, r * r, r + set1(1.0f));
    return {_mm512_scalef_ps(p.v, n.v)};
}
#else
LLMPACK_INLINE F32x16 exp_nonpositive(F32x16 x) { return exp(x); }
#endif

// act(gate) * up, where act is x / (1 + e^-z): of SwiGLU with z = x; of GeGLU with the z that makes it gelu's
// approximation by tanh, as tanh(z / 2) = 2 / (1 + e^-z) - 1; of the clamped SwiGLU with z = alpha x, of
// numbers that are cut off, and with up + 1. NaN stays NaN.
LLMPACK_INLINE F32x16 gated(Gating gating, F32x16 gate, F32x16 up, Clamp clamp = {}) {
    if (gating == Gating::kClampedSwiGLU) {
        gate = min2(set1(clamp.limit), gate);
        up = max2(set1(-clamp.limit), min2(set1(clamp.limit), up)) + set1(1.0f);
    }
    F32x16 z = gate;
    if (gating == Gating::kGeGLU) {
        const float twice = 1.5957691216f;  // 2 sqrt(2 / pi)
        z = gate * fma(gate * gate, set1(twice * 0.044715f), set1(twice));
    } else if (gating == Gating::kClampedSwiGLU) {
        z = gate * set1(clamp.alpha);
    }
    return gate / (set1(1.0f) + exp(set1(-0.0f) - z)) * up;
}

}  // namespace llmpack::LLMPACK_ISA

#endif  // LLMPACK_CPU_SIMD_H_
