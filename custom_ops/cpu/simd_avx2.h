// AVX2, with VNNI or without; see simd.h, which includes this file.
#ifndef LLMPACK_CPU_SIMD_AVX2_H_
#define LLMPACK_CPU_SIMD_AVX2_H_

#include <immintrin.h>

#include "cpu/simd_base.h"

namespace llmpack::LLMPACK_ISA {

struct F32x16 {
    __m256 a, b;
};
struct I32x16 {
    __m256i a, b;
};

LLMPACK_INLINE F32x16 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
LLMPACK_INLINE F32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
LLMPACK_INLINE void store(float* p, F32x16 x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
LLMPACK_INLINE F32x16 load_f16(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
LLMPACK_INLINE void store_f16(uint16_t* p, F32x16 x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}
LLMPACK_INLINE F32x16 operator+(F32x16 x, F32x16 y) {
    return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)};
}
LLMPACK_INLINE F32x16 operator-(F32x16 x, F32x16 y) {
    return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)};
}
LLMPACK_INLINE F32x16 operator*(F32x16 x, F32x16 y) {
    return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)};
}
LLMPACK_INLINE F32x16 operator/(F32x16 x, F32x16 y) {
    return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)};
}
LLMPACK_INLINE F32x16 fma(F32x16 x, F32x16 y, F32x16 z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
LLMPACK_INLINE F32x16 max2(F32x16 x, F32x16 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
LLMPACK_INLINE F32x16 min2(F32x16 x, F32x16 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
LLMPACK_INLINE F32x16 select_less(F32x16 x, F32x16 y, F32x16 yes, F32x16 no) {  // x < y ? yes : no
    return {_mm256_blendv_ps(no.a, yes.a, _mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ)),
            _mm256_blendv_ps(no.b, yes.b, _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ))};
}

LLMPACK_INLINE I32x16 set1_i32(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
LLMPACK_INLINE F32x16 to_float(I32x16 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
LLMPACK_INLINE I32x16 round_to_even(F32x16 x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
LLMPACK_INLINE I32x16 bits(F32x16 x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
LLMPACK_INLINE F32x16 from_bits(I32x16 x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
LLMPACK_INLINE I32x16 operator+(I32x16 x, I32x16 y) {
    return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)};
}
LLMPACK_INLINE I32x16 operator&(I32x16 x, I32x16 y) {
    return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)};
}
LLMPACK_INLINE I32x16 max2(I32x16 x, I32x16 y) {
    return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)};
}
LLMPACK_INLINE I32x16 shift_left_23(I32x16 x) {
    return {_mm256_slli_epi32(x.a, 23), _mm256_slli_epi32(x.b, 23)};
}
LLMPACK_INLINE void store_i32(int32_t* p, I32x16 x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.a);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), x.b);
}
LLMPACK_INLINE void store_i8(int8_t* p, I32x16 x) {  // lanes in -128..127
    // packs works in 128-bit halves: 0..3 8..11 | 4..7 12..15; the permutation puts the quarters in order.
    __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}

LLMPACK_INLINE float reduce_add(F32x16 x) {
    __m256 eight = _mm256_add_ps(x.a, x.b);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
LLMPACK_INLINE float reduce_max(F32x16 x) {
    __m256 eight = _mm256_max_ps(x.a, x.b);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
LLMPACK_INLINE int32_t reduce_max(I32x16 x) {
    __m256i eight = _mm256_max_epi32(x.a, x.b);
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}
LLMPACK_INLINE int32_t reduce_add(I32x16 x) {
    __m256i eight = _mm256_add_epi32(x.a, x.b);
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}
LLMPACK_INLINE bool any_greater(F32x16 a, float x) { return reduce_max(a) > x; }

// -----------------------------------------------------------------------------------------------------------
// Bytes and their dot products.

struct Bytes {
    __m256i a, b;
};
LLMPACK_INLINE Bytes load_bytes(const uint8_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
LLMPACK_INLINE void store_bytes(uint8_t* p, Bytes w) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), w.a);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), w.b);
}
LLMPACK_INLINE Bytes and_bytes(Bytes w, uint8_t mask) {
    const __m256i bits = _mm256_set1_epi8(static_cast<char>(mask));
    return {_mm256_and_si256(w.a, bits), _mm256_and_si256(w.b, bits)};
}
template <int bits>
LLMPACK_INLINE Bytes shift_right(Bytes w) {
    return {_mm256_srli_epi16(w.a, bits), _mm256_srli_epi16(w.b, bits)};
}
LLMPACK_INLINE Bytes or_bytes(Bytes v, Bytes w) {
    return {_mm256_or_si256(v.a, w.a), _mm256_or_si256(v.b, w.b)};
}
LLMPACK_INLINE Bytes lookup(const uint8_t* table, Bytes indices) {
    const __m256i bytes =
        _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table)));
    indices = and_bytes(indices, 15);
    return {_mm256_shuffle_epi8(bytes, indices.a), _mm256_shuffle_epi8(bytes, indices.b)};
}

#if defined(LLMPACK_ISA_avx2_vnni)

// vpdpbusd multiplies unsigned weights with signed activations and adds four products to each 32-bit lane, no
// saturation. This is the VEX encoding (AVX-VNNI); the other one needs AVX-512.
struct UnsignedBytes {
    static constexpr int kOffset = 0;
    static LLMPACK_INLINE void dot4(Bytes w, const int8_t* x, I32x16& sum) {
        const __m256i xs = _mm256_set1_epi32(load_i32(x));
        sum.a = _mm256_dpbusd_avx_epi32(sum.a, w.a, xs);
        sum.b = _mm256_dpbusd_avx_epi32(sum.b, w.b, xs);
    }
};
typedef UnsignedBytes SmallBytes;

#else

// vpmaddubsw adds two products in 16 bits and saturates there: weights of 7 bits give at most 2 * 127 * 127 =
// 32258.
struct SmallBytes {
    static constexpr int kOffset = 0;
    static LLMPACK_INLINE void dot4(Bytes w, const int8_t* x, I32x16& sum) {
        const __m256i xs = _mm256_set1_epi32(load_i32(x)), ones = _mm256_set1_epi16(1);
        sum.a = _mm256_add_epi32(sum.a, _mm256_madd_epi16(_mm256_maddubs_epi16(w.a, xs), ones));
        sum.b = _mm256_add_epi32(sum.b, _mm256_madd_epi16(_mm256_maddubs_epi16(w.b, xs), ones));
    }
};

// Weights up to 255 would saturate. As signed numbers their magnitude is at most 128, and 2 * 128 * 127 =
// 32512 does not: the sign of the weight moves to the activation.
struct UnsignedBytes {
    static constexpr int kOffset = 128;
    static LLMPACK_INLINE void dot4(Bytes w, const int8_t* x, I32x16& sum) {
        const __m256i sign_bit = _mm256_set1_epi8(static_cast<char>(0x80));
        const __m256i xs = _mm256_set1_epi32(load_i32(x)), ones = _mm256_set1_epi16(1);
        const __m256i a = _mm256_xor_si256(w.a, sign_bit), b = _mm256_xor_si256(w.b, sign_bit);
        const __m256i pairs_a = _mm256_maddubs_epi16(_mm256_abs_epi8(a), _mm256_sign_epi8(xs, a));
        const __m256i pairs_b = _mm256_maddubs_epi16(_mm256_abs_epi8(b), _mm256_sign_epi8(xs, b));
        sum.a = _mm256_add_epi32(sum.a, _mm256_madd_epi16(pairs_a, ones));
        sum.b = _mm256_add_epi32(sum.b, _mm256_madd_epi16(pairs_b, ones));
    }
};

#endif

}  // namespace llmpack::LLMPACK_ISA

#endif  // LLMPACK_CPU_SIMD_AVX2_H_
