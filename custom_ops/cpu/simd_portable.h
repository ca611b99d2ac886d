// Vector types of GCC and Clang, which become SSE2 or NEON; see simd.h, which includes this file.
#ifndef LLMPACK_CPU_SIMD_PORTABLE_H_
#define LLMPACK_CPU_SIMD_PORTABLE_H_

#include "cpu/simd_base.h"

namespace llmpack::LLMPACK_ISA {

typedef float F32x4 __attribute__((vector_size(16)));
typedef int32_t I32x4 __attribute__((vector_size(16)));
typedef uint32_t U32x4 __attribute__((vector_size(16)));

struct F32x16 {
    F32x4 v[4];
};
struct I32x16 {
    I32x4 v[4];
};

#define LLMPACK_EACH(type, expression)                 \
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

// float16 to float. Subnormals are converted as integers, not as subnormal floats, which a thread may have
// set to be flushed to zero; infinity and NaN need their full exponent back.
LLMPACK_INLINE F32x16 load_f16(const uint16_t* p) {
    F32x16 r;
    for (int i = 0; i < 4; i++) {
        U32x4 h = {p[4 * i], p[4 * i + 1], p[4 * i + 2], p[4 * i + 3]};
        I32x4 magnitude = (I32x4)(h & 0x7fffu);
        U32x4 normal = ((U32x4)magnitude << 13) + ((127u - 15u) << 23);
        U32x4 subnormal = (U32x4)(__builtin_convertvector(magnitude, F32x4) * 0x1p-24f);
        U32x4 is_normal = (U32x4)(magnitude > 0x3ff), is_special = (U32x4)(magnitude > 0x7bff);
        r.v[i] = (F32x4)((normal & is_normal) | (subnormal & ~is_normal) | (is_special & 0x7f800000u) |
                         ((h & 0x8000u) << 16));
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

#undef LLMPACK_EACH

LLMPACK_INLINE float reduce_add(F32x16 a) {
    float x[16];
    store(x, a);
    for (int width = 8; width > 0; width /= 2) {
        for (int i = 0; i < width; i++) x[i] += x[i + width];
    }
    return x[0];
}
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
LLMPACK_INLINE bool any_greater(F32x16 a, float x) { return reduce_max(a) > x; }

// -----------------------------------------------------------------------------------------------------------
// Bytes and their dot products.

typedef int16_t I16x8 __attribute__((vector_size(16)));
typedef uint16_t U16x8 __attribute__((vector_size(16)));
struct Bytes {
    U16x8 v[4];
};
LLMPACK_INLINE Bytes load_bytes(const uint8_t* p) {
    Bytes w;
    std::memcpy(&w, p, sizeof(w));
    return w;
}
LLMPACK_INLINE void store_bytes(uint8_t* p, const Bytes& w) { std::memcpy(p, &w, sizeof(w)); }
LLMPACK_INLINE Bytes and_bytes(Bytes w, uint8_t mask) {
    for (int i = 0; i < 4; i++) w.v[i] &= static_cast<uint16_t>(mask * 0x0101);
    return w;
}
template <int bits>
LLMPACK_INLINE Bytes shift_right(Bytes w) {
    for (int i = 0; i < 4; i++) w.v[i] >>= bits;
    return w;
}
LLMPACK_INLINE Bytes or_bytes(Bytes v, const Bytes& w) {
    for (int i = 0; i < 4; i++) v.v[i] |= w.v[i];
    return v;
}
LLMPACK_INLINE Bytes lookup(const uint8_t* table, const Bytes& indices) {
    uint8_t bytes[64];
    store_bytes(bytes, indices);
    for (int i = 0; i < 64; i++) bytes[i] = table[bytes[i] & 15];
    return load_bytes(bytes);
}

// Even and odd bytes of each 16-bit lane, sign-extended.
LLMPACK_INLINE I16x8 even_bytes(U16x8 words) { return (I16x8)(words << 8) >> 8; }
LLMPACK_INLINE I16x8 odd_bytes(U16x8 words) { return (I16x8)words >> 8; }
LLMPACK_INLINE I32x4 add_pairs(I16x8 words) {
    return ((I32x4)((U32x4)words << 16) >> 16) + ((I32x4)words >> 16);
}

template <uint16_t sign_bits, int offset>
struct Portable {
    static constexpr int kOffset = offset;
    static LLMPACK_INLINE void dot4(const Bytes& w, const int8_t* x, I32x16& sum) {
        const int32_t four = load_i32(x);
        const U16x8 xs = (U16x8)(I32x4{four, four, four, four});
        const I16x8 even = even_bytes(xs), odd = odd_bytes(xs);
        for (int i = 0; i < 4; i++) {
            const U16x8 words = w.v[i] ^ sign_bits;
            sum.v[i] += add_pairs(even_bytes(words) * even + odd_bytes(words) * odd);
        }
    }
};
// 16-bit sums of two products, as for AVX2.
typedef Portable<0, 0> SmallBytes;
typedef Portable<0x8080, 128> UnsignedBytes;

}  // namespace llmpack::LLMPACK_ISA

#endif  // LLMPACK_CPU_SIMD_PORTABLE_H_
