// AVX-512 with VNNI, and with VBMI or without; see simd.h, which includes this file.
#ifndef LLMPACK_CPU_SIMD_AVX512_H_
#define LLMPACK_CPU_SIMD_AVX512_H_

#include <immintrin.h>

#include "cpu/simd_base.h"

namespace llmpack::LLMPACK_ISA {

struct F32x16 {
    __m512 v;
};
struct I32x16 {
    __m512i v;
};

LLMPACK_INLINE F32x16 set1(float x) { return {_mm512_set1_ps(x)}; }
LLMPACK_INLINE F32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
LLMPACK_INLINE void store(float* p, F32x16 a) { _mm512_storeu_ps(p, a.v); }
LLMPACK_INLINE F32x16 load_f16(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
LLMPACK_INLINE void store_f16(uint16_t* p, F32x16 a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
LLMPACK_INLINE F32x16 operator+(F32x16 a, F32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
LLMPACK_INLINE F32x16 operator-(F32x16 a, F32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
LLMPACK_INLINE F32x16 operator*(F32x16 a, F32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
LLMPACK_INLINE F32x16 operator/(F32x16 a, F32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
LLMPACK_INLINE F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
LLMPACK_INLINE F32x16 max2(F32x16 a, F32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
LLMPACK_INLINE F32x16 min2(F32x16 a, F32x16 b) { return {_mm512_min_ps(a.v, b.v)}; }
LLMPACK_INLINE F32x16 select_less(F32x16 a, F32x16 b, F32x16 yes, F32x16 no) {  // a < b ? yes : no
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}

LLMPACK_INLINE I32x16 set1_i32(int32_t x) { return {_mm512_set1_epi32(x)}; }
LLMPACK_INLINE F32x16 to_float(I32x16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
LLMPACK_INLINE I32x16 round_to_even(F32x16 a) { return {_mm512_cvtps_epi32(a.v)}; }
LLMPACK_INLINE I32x16 bits(F32x16 a) { return {_mm512_castps_si512(a.v)}; }
LLMPACK_INLINE F32x16 from_bits(I32x16 a) { return {_mm512_castsi512_ps(a.v)}; }
LLMPACK_INLINE I32x16 operator+(I32x16 a, I32x16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
LLMPACK_INLINE I32x16 operator&(I32x16 a, I32x16 b) { return {_mm512_and_si512(a.v, b.v)}; }
LLMPACK_INLINE I32x16 max2(I32x16 a, I32x16 b) { return {_mm512_max_epi32(a.v, b.v)}; }
LLMPACK_INLINE I32x16 shift_left_23(I32x16 a) { return {_mm512_slli_epi32(a.v, 23)}; }
LLMPACK_INLINE void store_i32(int32_t* p, I32x16 a) { _mm512_storeu_si512(p, a.v); }
LLMPACK_INLINE void store_i8(int8_t* p, I32x16 a) {  // lanes in -128..127
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}

LLMPACK_INLINE float reduce_add(F32x16 x) {
    __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
LLMPACK_INLINE float reduce_max(F32x16 a) { return _mm512_reduce_max_ps(a.v); }
LLMPACK_INLINE int32_t reduce_max(I32x16 a) { return _mm512_reduce_max_epi32(a.v); }
LLMPACK_INLINE int32_t reduce_add(I32x16 a) { return _mm512_reduce_add_epi32(a.v); }
LLMPACK_INLINE bool any_greater(F32x16 a, float x) {
    return _mm512_cmp_ps_mask(a.v, _mm512_set1_ps(x), _CMP_GT_OQ) != 0;
}

// -----------------------------------------------------------------------------------------------------------
// Bytes and their dot products.

typedef __m512i Bytes;  // [16, 4], unsigned
LLMPACK_INLINE Bytes load_bytes(const uint8_t* p) {
    Bytes a = _mm512_loadu_si512(p);
#if defined(LLMPACK_ISA_avx512_vbmi)
    asm("" : "+v"(a));  // else GCC 12 lets a shift of it load again: 2.5 % of the bandwidth
#endif
    return a;
}
LLMPACK_INLINE void store_bytes(uint8_t* p, Bytes a) { _mm512_storeu_si512(p, a); }
LLMPACK_INLINE Bytes and_bytes(Bytes a, uint8_t mask) {
    return _mm512_and_si512(a, _mm512_set1_epi8(static_cast<char>(mask)));
}
template <int bits>
LLMPACK_INLINE Bytes shift_right(Bytes a) {
    return _mm512_srli_epi16(a, bits);
}
LLMPACK_INLINE Bytes or_bytes(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
LLMPACK_INLINE Bytes lookup(const uint8_t* table, Bytes indices) {
    const __m512i bytes = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(table)));
#if defined(LLMPACK_ISA_avx512_vbmi)
    return _mm512_permutexvar_epi8(indices, bytes);  // by six bits, and the table is there four times
#else
    return _mm512_shuffle_epi8(bytes, and_bytes(indices, 15));
#endif
}

// vpdpbusd multiplies unsigned weights with signed activations and adds four products to each 32-bit lane, no
// saturation.
struct UnsignedBytes {
    static constexpr int kOffset = 0;
    // In assembly because GCC 12 copies the sum and loads x apart from the intrinsic: 8 tokens take 9 %
    // longer.
    static LLMPACK_INLINE void dot4(Bytes w, const int8_t* x, I32x16& sum) {
        asm("vpdpbusd %2%{1to16%}, %1, %0"
            : "+v"(sum.v)
            : "v"(w), "m"(*reinterpret_cast<const int8_t (*)[4]>(x)));
    }
};
typedef UnsignedBytes SmallBytes;

template <class>
LLMPACK_INLINE void dot4_shared(Bytes w, const int8_t* x, I32x16& sum) {
    sum.v = _mm512_dpbusd_epi32(sum.v, w, _mm512_set1_epi32(load_i32(x)));
}

}  // namespace llmpack::LLMPACK_ISA

#endif  // LLMPACK_CPU_SIMD_AVX512_H_
