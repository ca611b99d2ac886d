// Sixteen floats as one value: the width of a weight tile. Kernels are written once in these operations and
// compiled for each instruction set (one AVX-512 register, two AVX2 registers, or four 16-byte vectors of the
// compiler).
//
// Everything is inline and lives in the namespace of the instruction set. Kernel files must not use std
// templates: the linker keeps one copy of each, and it might be the one compiled for a machine that this one
// is not.
#ifndef LLMPACK_CPU_SIMD_H_
#define LLMPACK_CPU_SIMD_H_

#include <cstdint>
#include <cstring>

#if defined(LLMPACK_ISA_avx2) || defined(LLMPACK_ISA_avx512)
#    include <immintrin.h>
#endif

// Before a loop of up to 16 constant steps over an array of vectors: unrolled, the array stays in registers.
#define LLMPACK_UNROLL_16 _Pragma("GCC unroll 16")
#define LLMPACK_INLINE inline __attribute__((always_inline))
#define LLMPACK_INLINE_LAMBDA __attribute__((always_inline))

namespace llmpack::LLMPACK_ISA {

LLMPACK_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

template <class To, class From>
LLMPACK_INLINE To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}

LLMPACK_INLINE int32_t load_i32(const void* p) {
    int32_t value;
    std::memcpy(&value, p, sizeof(value));
    return value;
}

// max2 and min2 return b when either is NaN, as the x86 instructions do; the kernels rely on it.

#if defined(LLMPACK_ISA_avx512)

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

#elif defined(LLMPACK_ISA_avx2)

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

#else  // portable: vector types of GCC and Clang, which become SSE2 or NEON

typedef float F32x4 __attribute__((vector_size(16)));
typedef int32_t I32x4 __attribute__((vector_size(16)));
typedef uint32_t U32x4 __attribute__((vector_size(16)));

struct F32x16 {
    F32x4 v[4];
};
struct I32x16 {
    I32x4 v[4];
};

#    define LLMPACK_EACH(type, expression)                 \
        type r;                                            \
        for (int i = 0; i < 4; i++) r.v[i] = (expression); \
        return r

LLMPACK_INLINE F32x16 set1(float x) { LLMPACK_EACH(F32x16, (F32x4{x, x, x, x})); }
LLMPACK_INLINE F32x16 load(const float* p) {
    F32x16 r;
    std::memcpy(&r, p, sizeof(r));
    return r;
}
LLMPACK_INLINE void store(float* p, F32x16 a) { std::memcpy(p, &a, sizeof(a)); }
LLMPACK_INLINE F32x16 operator+(F32x16 a, F32x16 b) { LLMPACK_EACH(F32x16, a.v[i] + b.v[i]); }
LLMPACK_INLINE F32x16 operator-(F32x16 a, F32x16 b) { LLMPACK_EACH(F32x16, a.v[i] - b.v[i]); }
LLMPACK_INLINE F32x16 operator*(F32x16 a, F32x16 b) { LLMPACK_EACH(F32x16, a.v[i] * b.v[i]); }
LLMPACK_INLINE F32x16 operator/(F32x16 a, F32x16 b) { LLMPACK_EACH(F32x16, a.v[i] / b.v[i]); }
// Two roundings: a fused one would be a library call on machines without the instruction.
LLMPACK_INLINE F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { LLMPACK_EACH(F32x16, a.v[i] * b.v[i] + c.v[i]); }
LLMPACK_INLINE F32x16 max2(F32x16 a, F32x16 b) { LLMPACK_EACH(F32x16, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
LLMPACK_INLINE F32x16 min2(F32x16 a, F32x16 b) { LLMPACK_EACH(F32x16, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
LLMPACK_INLINE F32x16 select_less(F32x16 a, F32x16 b, F32x16 yes, F32x16 no) {  // a < b ? yes : no
    LLMPACK_EACH(F32x16, a.v[i] < b.v[i] ? yes.v[i] : no.v[i]);
}

LLMPACK_INLINE I32x16 set1_i32(int32_t x) { LLMPACK_EACH(I32x16, (I32x4{x, x, x, x})); }
LLMPACK_INLINE F32x16 to_float(I32x16 a) { LLMPACK_EACH(F32x16, __builtin_convertvector(a.v[i], F32x4)); }
LLMPACK_INLINE I32x16 bits(F32x16 a) { LLMPACK_EACH(I32x16, (I32x4)a.v[i]); }
LLMPACK_INLINE F32x16 from_bits(I32x16 a) { LLMPACK_EACH(F32x16, (F32x4)a.v[i]); }
LLMPACK_INLINE I32x16 operator+(I32x16 a, I32x16 b) { LLMPACK_EACH(I32x16, a.v[i] + b.v[i]); }
LLMPACK_INLINE I32x16 operator&(I32x16 a, I32x16 b) { LLMPACK_EACH(I32x16, a.v[i] & b.v[i]); }
LLMPACK_INLINE I32x16 max2(I32x16 a, I32x16 b) { LLMPACK_EACH(I32x16, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
LLMPACK_INLINE I32x16 shift_left_23(I32x16 a) { LLMPACK_EACH(I32x16, (I32x4)((U32x4)a.v[i] << 23)); }
// PRECOND: |a| < 2^22. Adding 1.5 * 2^23 leaves no fraction bits, so the addition itself rounds, half to
// even; the integer is then the low part of the sum's bits.
LLMPACK_INLINE I32x16 round_to_even(F32x16 a) {
    F32x16 magic = set1(12582912.0f);
    F32x16 sum = a + magic;
    LLMPACK_EACH(I32x16, (I32x4)((U32x4)sum.v[i] - (U32x4)magic.v[i]));
}
LLMPACK_INLINE void store_i32(int32_t* p, I32x16 a) { std::memcpy(p, &a, sizeof(a)); }
LLMPACK_INLINE void store_i8(int8_t* p, I32x16 a) {  // lanes in -128..127
    for (int i = 0; i < 16; i++) p[i] = static_cast<int8_t>(a.v[i / 4][i % 4]);
}

// float16 to float: the exponent is rebiased by a multiplication with 2^112, which also makes subnormals
// normal; infinity and NaN then need their full exponent back.
LLMPACK_INLINE F32x16 load_f16(const uint16_t* p) {
    F32x16 r;
    for (int i = 0; i < 4; i++) {
        U32x4 h = {p[4 * i], p[4 * i + 1], p[4 * i + 2], p[4 * i + 3]};
        F32x4 magnitude = (F32x4)((h & 0x7fffu) << 13) * 0x1p112f;
        U32x4 special = (U32x4)((h & 0x7c00u) == 0x7c00u) & 0x7f800000u;
        r.v[i] = (F32x4)((U32x4)magnitude | special | ((h & 0x8000u) << 16));
    }
    return r;
}

// float to float16, half to even.
LLMPACK_INLINE uint16_t to_f16(float x) {
    uint32_t bits = bit_cast<uint32_t>(x);
    uint32_t sign = (bits >> 16) & 0x8000u;
    uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);   // NaN
    if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65536 and more: infinity
    if (magnitude < 0x38800000u) {  // below 2^-14: subnormal; 0.5 + x rounds x to a multiple of 2^-24
        float sum = bit_cast<float>(magnitude) + 0.5f;
        return static_cast<uint16_t>(sign | (bit_cast<uint32_t>(sum) - 0x3f000000u));
    }
    // Rebias the exponent (-112 << 23), and add just under half of the last place kept, or half if that place
    // is odd.
    magnitude += 0xc8000fffu + ((magnitude >> 13) & 1u);
    return static_cast<uint16_t>(sign | (magnitude >> 13));
}
LLMPACK_INLINE void store_f16(uint16_t* p, F32x16 a) {
    for (int i = 0; i < 16; i++) p[i] = to_f16(a.v[i / 4][i % 4]);
}

#    undef LLMPACK_EACH

#endif

LLMPACK_INLINE F32x16 zero() { return set1(0.0f); }

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

// Sum and maximum of the lanes, in halves: always the same order, (lane i) + (lane i + 8), and so on.
#if defined(LLMPACK_ISA_avx2) || defined(LLMPACK_ISA_avx512)
LLMPACK_INLINE float reduce_add(F32x16 x) {
#    if defined(LLMPACK_ISA_avx512)
    __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
#    else
    __m256 eight = _mm256_add_ps(x.a, x.b);
#    endif
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
#else
LLMPACK_INLINE float reduce_add(F32x16 a) {
    float x[16];
    store(x, a);
    for (int width = 8; width > 0; width /= 2) {
        for (int i = 0; i < width; i++) x[i] += x[i + width];
    }
    return x[0];
}
#endif
#if defined(LLMPACK_ISA_avx512)
// Maxima and integer sums are the same in any order.
LLMPACK_INLINE float reduce_max(F32x16 a) { return _mm512_reduce_max_ps(a.v); }
LLMPACK_INLINE int32_t reduce_max(I32x16 a) { return _mm512_reduce_max_epi32(a.v); }
LLMPACK_INLINE int32_t reduce_add(I32x16 a) { return _mm512_reduce_add_epi32(a.v); }
#elif defined(LLMPACK_ISA_avx2)
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
#else
LLMPACK_INLINE float reduce_max(F32x16 a) {
    float x[16];
    store(x, a);
    for (int width = 8; width > 0; width /= 2) {
        for (int i = 0; i < width; i++) x[i] = x[i] > x[i + width] ? x[i] : x[i + width];
    }
    return x[0];
}
LLMPACK_INLINE int32_t reduce_max(I32x16 a) {
    int32_t x[16];
    store_i32(x, a);
    for (int width = 8; width > 0; width /= 2) {
        for (int i = 0; i < width; i++) x[i] = x[i] > x[i + width] ? x[i] : x[i + width];
    }
    return x[0];
}
LLMPACK_INLINE int32_t reduce_add(I32x16 a) {
    int32_t x[16];
    store_i32(x, a);
    for (int width = 8; width > 0; width /= 2) {
        for (int i = 0; i < width; i++) x[i] += x[i + width];
    }
    return x[0];
}
#endif

// Is some lane of a greater than x? Not where it is NaN.
#if defined(LLMPACK_ISA_avx512)
LLMPACK_INLINE bool any_greater(F32x16 a, float x) {
    return _mm512_cmp_ps_mask(a.v, _mm512_set1_ps(x), _CMP_GT_OQ) != 0;
}
#else
LLMPACK_INLINE bool any_greater(F32x16 a, float x) { return reduce_max(a) > x; }
#endif

// Rows become columns: lane j of vector i and lane i of vector j change places.
#if defined(LLMPACK_ISA_avx512)
LLMPACK_INLINE void transpose(F32x16 (&m)[16]) {
    __m512 a[16], b[16];
    LLMPACK_UNROLL_16 for (int i = 0; i < 16;
                           i += 2) {  // pairs of rows, then pairs of pairs, within each quarter of a register
        a[i] = _mm512_unpacklo_ps(m[i].v, m[i + 1].v);
        a[i + 1] = _mm512_unpackhi_ps(m[i].v, m[i + 1].v);
    }
    LLMPACK_UNROLL_16 for (int i = 0; i < 16; i += 4) {
        LLMPACK_UNROLL_16 for (int k = 0; k < 2; k++) {
            __m512d low = _mm512_castps_pd(a[i + k]), high = _mm512_castps_pd(a[i + 2 + k]);
            b[i + 2 * k] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
            b[i + 2 * k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
        }
    }
    // b[4 r + c]: column 4 q + c of rows 4 r .. 4 r + 3 in quarter q. Now the quarters of four registers.
    LLMPACK_UNROLL_16 for (int c = 0; c < 4; c++) {
        __m512 even0 = _mm512_shuffle_f32x4(b[c], b[4 + c], 0x88),
               odd0 = _mm512_shuffle_f32x4(b[c], b[4 + c], 0xdd);
        __m512 even1 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0x88),
               odd1 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0xdd);
        m[c].v = _mm512_shuffle_f32x4(even0, even1, 0x88);
        m[8 + c].v = _mm512_shuffle_f32x4(even0, even1, 0xdd);
        m[4 + c].v = _mm512_shuffle_f32x4(odd0, odd1, 0x88);
        m[12 + c].v = _mm512_shuffle_f32x4(odd0, odd1, 0xdd);
    }
}
#elif defined(LLMPACK_ISA_avx2)
LLMPACK_INLINE void transpose8(__m256 (&m)[8]) {
    __m256 a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_ps(m[i], m[i + 1]);
        a[i + 1] = _mm256_unpackhi_ps(m[i], m[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        for (int k = 0; k < 2; k++) {
            __m256d low = _mm256_castps_pd(a[i + k]), high = _mm256_castps_pd(a[i + 2 + k]);
            b[i + 2 * k] = _mm256_castpd_ps(_mm256_unpacklo_pd(low, high));
            b[i + 2 * k + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low, high));
        }
    }
    for (int c = 0; c < 4; c++) {
        m[c] = _mm256_permute2f128_ps(b[c], b[4 + c], 0x20);
        m[4 + c] = _mm256_permute2f128_ps(b[c], b[4 + c], 0x31);
    }
}
LLMPACK_INLINE void transpose(F32x16 (&m)[16]) {
    __m256 quarter[2][2][8];  // [upper or lower rows][left or right columns]
    for (int i = 0; i < 16; i++) {
        quarter[i / 8][0][i % 8] = m[i].a;
        quarter[i / 8][1][i % 8] = m[i].b;
    }
    for (auto& half : quarter) {
        transpose8(half[0]);
        transpose8(half[1]);
    }
    for (int i = 0; i < 16; i++) m[i] = {quarter[0][i / 8][i % 8], quarter[1][i / 8][i % 8]};
}
#else
LLMPACK_INLINE void transpose(F32x16 (&m)[16]) {
    float x[16][16];
    for (int i = 0; i < 16; i++) store(x[i], m[i]);
    for (int i = 0; i < 16; i++) {
        for (int j = 0; j < 16; j++) m[i].v[j / 4][j % 4] = x[j][i];
    }
}
#endif

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

}  // namespace llmpack::LLMPACK_ISA

#endif  // LLMPACK_CPU_SIMD_H_
