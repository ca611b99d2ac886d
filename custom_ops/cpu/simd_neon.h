// NEON (AArch64) with dot products; see simd.h, which includes this file.
#ifndef LLMPACK_CPU_SIMD_NEON_H_
#define LLMPACK_CPU_SIMD_NEON_H_

#include <arm_neon.h>

#include "cpu/simd_base.h"

namespace llmpack::LLMPACK_ISA {

struct F32x16 {
    float32x4_t v[4];
};
struct I32x16 {
    int32x4_t v[4];
};

// A function whose four quarters are `expression` of i. Written out: indices are constants from the start,
// and the quarters stay in registers.
#define LLMPACK_QUARTER(n, expression) \
    {                                  \
        constexpr int i = n;           \
        r.v[i] = (expression);         \
    }
#define LLMPACK_EACH(type, expression) \
    type r;                            \
    LLMPACK_QUARTER(0, expression)     \
    LLMPACK_QUARTER(1, expression)     \
    LLMPACK_QUARTER(2, expression)     \
    LLMPACK_QUARTER(3, expression)     \
    return r

LLMPACK_INLINE F32x16 set1(float x) { LLMPACK_EACH(F32x16, vdupq_n_f32(x)); }
LLMPACK_INLINE F32x16 load(const float* p) { LLMPACK_EACH(F32x16, vld1q_f32(p + 4 * i)); }
LLMPACK_INLINE void store(float* p, F32x16 a) {
    vst1q_f32(p, a.v[0]);
    vst1q_f32(p + 4, a.v[1]);
    vst1q_f32(p + 8, a.v[2]);
    vst1q_f32(p + 12, a.v[3]);
}
LLMPACK_INLINE F32x16 load_f16(const uint16_t* p) {
    LLMPACK_EACH(F32x16, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))));
}
LLMPACK_INLINE void store_f16(uint16_t* p, F32x16 a) {
    for (int i = 0; i < 4; i++) vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(a.v[i])));
}
LLMPACK_INLINE F32x16 operator+(F32x16 a, F32x16 b) { LLMPACK_EACH(F32x16, vaddq_f32(a.v[i], b.v[i])); }
LLMPACK_INLINE F32x16 operator-(F32x16 a, F32x16 b) { LLMPACK_EACH(F32x16, vsubq_f32(a.v[i], b.v[i])); }
LLMPACK_INLINE F32x16 operator*(F32x16 a, F32x16 b) { LLMPACK_EACH(F32x16, vmulq_f32(a.v[i], b.v[i])); }
LLMPACK_INLINE F32x16 operator/(F32x16 a, F32x16 b) { LLMPACK_EACH(F32x16, vdivq_f32(a.v[i], b.v[i])); }
LLMPACK_INLINE F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
    LLMPACK_EACH(F32x16, vfmaq_f32(c.v[i], a.v[i], b.v[i]));
}
// Comparisons and selections: fmax and fmin return NaN when either is.
LLMPACK_INLINE F32x16 max2(F32x16 a, F32x16 b) {
    LLMPACK_EACH(F32x16, vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]));
}
LLMPACK_INLINE F32x16 min2(F32x16 a, F32x16 b) {
    LLMPACK_EACH(F32x16, vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]));
}
LLMPACK_INLINE F32x16 select_less(F32x16 a, F32x16 b, F32x16 yes, F32x16 no) {  // a < b ? yes : no
    LLMPACK_EACH(F32x16, vbslq_f32(vcltq_f32(a.v[i], b.v[i]), yes.v[i], no.v[i]));
}

LLMPACK_INLINE I32x16 set1_i32(int32_t x) { LLMPACK_EACH(I32x16, vdupq_n_s32(x)); }
LLMPACK_INLINE F32x16 to_float(I32x16 a) { LLMPACK_EACH(F32x16, vcvtq_f32_s32(a.v[i])); }
LLMPACK_INLINE I32x16 round_to_even(F32x16 a) { LLMPACK_EACH(I32x16, vcvtnq_s32_f32(a.v[i])); }
LLMPACK_INLINE I32x16 bits(F32x16 a) { LLMPACK_EACH(I32x16, vreinterpretq_s32_f32(a.v[i])); }
LLMPACK_INLINE F32x16 from_bits(I32x16 a) { LLMPACK_EACH(F32x16, vreinterpretq_f32_s32(a.v[i])); }
LLMPACK_INLINE I32x16 operator+(I32x16 a, I32x16 b) { LLMPACK_EACH(I32x16, vaddq_s32(a.v[i], b.v[i])); }
LLMPACK_INLINE I32x16 operator&(I32x16 a, I32x16 b) { LLMPACK_EACH(I32x16, vandq_s32(a.v[i], b.v[i])); }
LLMPACK_INLINE I32x16 max2(I32x16 a, I32x16 b) { LLMPACK_EACH(I32x16, vmaxq_s32(a.v[i], b.v[i])); }
LLMPACK_INLINE I32x16 shift_left_23(I32x16 a) { LLMPACK_EACH(I32x16, vshlq_n_s32(a.v[i], 23)); }
LLMPACK_INLINE void store_i32(int32_t* p, I32x16 a) {
    for (int i = 0; i < 4; i++) vst1q_s32(p + 4 * i, a.v[i]);
}
LLMPACK_INLINE void store_i8(int8_t* p, I32x16 a) {  // lanes in -128..127
    const int16x8_t low = vcombine_s16(vmovn_s32(a.v[0]), vmovn_s32(a.v[1]));
    const int16x8_t high = vcombine_s16(vmovn_s32(a.v[2]), vmovn_s32(a.v[3]));
    vst1q_s8(p, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
}

LLMPACK_INLINE float reduce_add(F32x16 a) {
    const float32x4_t four = vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3]));
    const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
LLMPACK_INLINE float reduce_max(F32x16 a) {  // of the lanes that are numbers
    return vmaxnmvq_f32(vmaxnmq_f32(vmaxnmq_f32(a.v[0], a.v[1]), vmaxnmq_f32(a.v[2], a.v[3])));
}
LLMPACK_INLINE int32_t reduce_max(I32x16 a) {
    return vmaxvq_s32(vmaxq_s32(vmaxq_s32(a.v[0], a.v[1]), vmaxq_s32(a.v[2], a.v[3])));
}
LLMPACK_INLINE int32_t reduce_add(I32x16 a) {
    return vaddvq_s32(vaddq_s32(vaddq_s32(a.v[0], a.v[1]), vaddq_s32(a.v[2], a.v[3])));
}
LLMPACK_INLINE bool any_greater(F32x16 a, float x) {
    const float32x4_t xs = vdupq_n_f32(x);
    const uint32x4_t low = vorrq_u32(vcgtq_f32(a.v[0], xs), vcgtq_f32(a.v[1], xs));
    const uint32x4_t high = vorrq_u32(vcgtq_f32(a.v[2], xs), vcgtq_f32(a.v[3], xs));
    return vmaxvq_u32(vorrq_u32(low, high)) != 0;
}

// -----------------------------------------------------------------------------------------------------------
// Bytes and their dot products.

struct Bytes {
    uint8x16_t v[4];
};
LLMPACK_INLINE Bytes load_bytes(const uint8_t* p) { LLMPACK_EACH(Bytes, vld1q_u8(p + 16 * i)); }
LLMPACK_INLINE void store_bytes(uint8_t* p, Bytes w) {
    for (int i = 0; i < 4; i++) vst1q_u8(p + 16 * i, w.v[i]);
}
LLMPACK_INLINE Bytes and_bytes(Bytes w, uint8_t mask) { LLMPACK_EACH(Bytes, w.v[i] & mask); }
template <int bits>
LLMPACK_INLINE Bytes shift_right(Bytes w) {
    LLMPACK_EACH(Bytes, w.v[i] >> bits);  // zeros come in; the compiler then leaves out a mask that says so
}
LLMPACK_INLINE Bytes or_bytes(Bytes a, Bytes b) { LLMPACK_EACH(Bytes, a.v[i] | b.v[i]); }
LLMPACK_INLINE Bytes lookup(const uint8_t* table, Bytes indices) {
    const uint8x16_t bytes = vld1q_u8(table);
    LLMPACK_EACH(Bytes, vqtbl1q_u8(bytes, vandq_u8(indices.v[i], vdupq_n_u8(15))));
}

// sdot multiplies signed numbers and adds four products to each 32-bit lane, no saturation. sign_bit makes
// unsigned weights signed ones, less 128.
template <uint8_t sign_bit>
struct SignedBytes {
    static constexpr int kOffset = sign_bit;
    static LLMPACK_INLINE void dot4(Bytes w, const int8_t* x, I32x16& sum) {
        const int8x16_t xs = vreinterpretq_s8_s32(vdupq_n_s32(load_i32(x)));
        auto quarter = [&](int i) LLMPACK_INLINE_LAMBDA {
            return vdotq_s32(sum.v[i], vreinterpretq_s8_u8(w.v[i] ^ sign_bit), xs);
        };
        sum = {{quarter(0), quarter(1), quarter(2), quarter(3)}};
    }
};
typedef SignedBytes<0> SmallBytes;
typedef SignedBytes<0x80> UnsignedBytes;

#undef LLMPACK_EACH
#undef LLMPACK_QUARTER

}  // namespace llmpack::LLMPACK_ISA

#endif  // LLMPACK_CPU_SIMD_NEON_H_
