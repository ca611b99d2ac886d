// Sixteen numbers, one for each row of a tile, in the compiler's own vectors of the width at hand. Only
// single IEEE operations: no fused multiply-add, no estimate, nothing that differs between instruction sets.
#ifndef LLMPACK_PACK_VECTORS_H_
#define LLMPACK_PACK_VECTORS_H_

#include <cstdint>
#include <cstring>

#if defined(LLMPACK_ISA_avx2) || defined(LLMPACK_ISA_avx512)
#    include <immintrin.h>
#endif

#define LLMPACK_INLINE inline __attribute__((always_inline))

namespace llmpack::LLMPACK_ISA {

#if defined(LLMPACK_ISA_avx512)
constexpr int kVectorBytes = 64;
#elif defined(LLMPACK_ISA_avx2)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

typedef float VecF __attribute__((vector_size(kVectorBytes)));
typedef int32_t VecI __attribute__((vector_size(kVectorBytes)));
typedef double VecD __attribute__((vector_size(kVectorBytes)));

constexpr int kRows = 16;
constexpr int kLanes = kVectorBytes / 4;
constexpr int kParts = kRows / kLanes;
constexpr int kDoubleLanes = kVectorBytes / 8;

struct Int {
    VecI v[kParts];
};
struct Float {
    VecF v[kParts];
};

#define LLMPACK_EACH for (int i = 0; i < kParts; ++i)

LLMPACK_INLINE Float load(const float* p) {
    Float r;
    std::memcpy(&r, p, sizeof(r));
    return r;
}
LLMPACK_INLINE void store(float* p, const Float& a) { std::memcpy(p, &a, sizeof(a)); }
LLMPACK_INLINE Int load(const int32_t* p) {
    Int r;
    std::memcpy(&r, p, sizeof(r));
    return r;
}
LLMPACK_INLINE void store(void* p, const Int& a) { std::memcpy(p, &a, sizeof(a)); }

LLMPACK_INLINE Float all(float x) {
    Float r;
    LLMPACK_EACH r.v[i] = x - VecF{};
    return r;
}
LLMPACK_INLINE Int all(int32_t x) {
    Int r;
    LLMPACK_EACH r.v[i] = x - VecI{};
    return r;
}

#define LLMPACK_OPERATOR(Type, op)                                  \
    LLMPACK_INLINE Type operator op(const Type& a, const Type& b) { \
        Type r;                                                     \
        LLMPACK_EACH r.v[i] = a.v[i] op b.v[i];                     \
        return r;                                                   \
    }
LLMPACK_OPERATOR(Float, +)
LLMPACK_OPERATOR(Float, -)
LLMPACK_OPERATOR(Float, *)
LLMPACK_OPERATOR(Float, /)
LLMPACK_OPERATOR(Int, +)
LLMPACK_OPERATOR(Int, -)
LLMPACK_OPERATOR(Int, &)
LLMPACK_OPERATOR(Int, |)
#undef LLMPACK_OPERATOR

// Masks: -1 where true, 0 elsewhere.
#define LLMPACK_COMPARE(Type, op)                                  \
    LLMPACK_INLINE Int operator op(const Type& a, const Type& b) { \
        Int r;                                                     \
        LLMPACK_EACH r.v[i] = a.v[i] op b.v[i];                    \
        return r;                                                  \
    }
LLMPACK_COMPARE(Float, >)
LLMPACK_COMPARE(Float, >=)
LLMPACK_COMPARE(Float, !=)
LLMPACK_COMPARE(Int, >)
LLMPACK_COMPARE(Int, ==)
#undef LLMPACK_COMPARE

template <int kBits>
LLMPACK_INLINE Int shift_left(const Int& a) {
    Int r;
    LLMPACK_EACH r.v[i] = a.v[i] << kBits;
    return r;
}
// Of non-negative numbers.
template <int kBits>
LLMPACK_INLINE Int shift_right(const Int& a) {
    Int r;
    LLMPACK_EACH r.v[i] = a.v[i] >> kBits;
    return r;
}
LLMPACK_INLINE Float select(const Int& mask, const Float& yes, const Float& no) {
    Float r;
    LLMPACK_EACH r.v[i] = mask.v[i] ? yes.v[i] : no.v[i];
    return r;
}
LLMPACK_INLINE Int select(const Int& mask, const Int& yes, const Int& no) {
    Int r;
    LLMPACK_EACH r.v[i] = mask.v[i] ? yes.v[i] : no.v[i];
    return r;
}
// Operands are finite, or the second is.
LLMPACK_INLINE Float min(const Float& a, const Float& b) {
    Float r;
    LLMPACK_EACH r.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
    return r;
}
LLMPACK_INLINE Float max(const Float& a, const Float& b) {
    Float r;
    LLMPACK_EACH r.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
    return r;
}
LLMPACK_INLINE Int max(const Int& a, const Int& b) { return select(a > b, a, b); }
LLMPACK_INLINE Int bits(const Float& a) {
    Int r;
    std::memcpy(&r, &a, sizeof(r));
    return r;
}
LLMPACK_INLINE Float from_bits(const Int& a) {
    Float r;
    std::memcpy(&r, &a, sizeof(r));
    return r;
}
LLMPACK_INLINE Float to_float(const Int& a) {
    Float r;
    LLMPACK_EACH r.v[i] = __builtin_convertvector(a.v[i], VecF);
    return r;
}
// Truncates; operands fit an int32.
LLMPACK_INLINE Int to_int(const Float& a) {
    Int r;
    LLMPACK_EACH r.v[i] = __builtin_convertvector(a.v[i], VecI);
    return r;
}
LLMPACK_INLINE bool any(const Int& mask) {
    VecI all_parts = mask.v[0];
    for (int i = 1; i < kParts; ++i) all_parts |= mask.v[i];
    int32_t lanes[kLanes], found = 0;
    std::memcpy(lanes, &all_parts, sizeof(lanes));
    for (int i = 0; i < kLanes; ++i) found |= lanes[i];
    return found != 0;
}
#undef LLMPACK_EACH

// Rounds to the nearest integer, ties to even, for |a| < 2^22: the sum has no bits below the units.
LLMPACK_INLINE Float rint(const Float& a) {
    const Float magic = all(12582912.0f);  // 1.5 * 2^23
    return (a + magic) - magic;
}

// float16 bits (0..65535) -> float, exactly. Subnormals are converted as integers, not as subnormal floats,
// which a thread may have set to be flushed to zero.
LLMPACK_INLINE Float half_to_float(const Int& half) {
    Int magnitude = half & all(0x7fff);
    Int sign = shift_left<16>(half & all(0x8000));
    Int normal = shift_left<13>(magnitude) + all((127 - 15) << 23);
    normal = select(magnitude > all(0x7bff), normal + all((128 - 16) << 23), normal);  // infinity and NaN
    Int subnormal = bits(to_float(magnitude) * all(5.9604644775390625e-8f));           // 2^-24
    return from_bits(select(magnitude > all(0x03ff), normal, subnormal) | sign);
}

// float -> float16 bits, rounded to nearest even; 0x7c00 (with sign) where beyond the range. No NaN.
LLMPACK_INLINE Int float_to_half(const Float& value) {
    Int magnitude = bits(value) & all(0x7fffffff);
    Int sign = shift_right<16>(bits(value) & all(INT32_MIN)) & all(0x8000);
    Int odd = shift_right<13>(magnitude) & all(1);
    Int normal = shift_right<13>(magnitude - all((127 - 15) << 23) + all(0xfff) + odd);
    // 0.5 has units of 2^-24, the float16 subnormals' own: the addition rounds.
    Int subnormal = bits(from_bits(magnitude) + all(0.5f)) - bits(all(0.5f));
    Int half = select(magnitude > all(0x387fffff), normal, subnormal);
    return select(magnitude > all(0x477fefff), all(0x7c00), half) | sign;
}

// Sixteen numbers by index 0..15. table: 64-byte aligned.
LLMPACK_INLINE Float lookup(const float* table, const Int& index) {
    Float r;
#if defined(LLMPACK_ISA_avx512)
    r.v[0] = (VecF)_mm512_permutexvar_ps((__m512i)index.v[0], _mm512_load_ps(table));
#elif defined(LLMPACK_ISA_avx2)
    for (int i = 0; i < kParts; ++i) {
        const __m256i lanes = (__m256i)index.v[i];
        const __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(table), lanes);
        const __m256 high = _mm256_permutevar8x32_ps(_mm256_load_ps(table + 8), lanes);
        r.v[i] = (VecF)_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(lanes, 28)));
    }
#else
    int32_t lanes[kRows];
    float found[kRows];
    store(lanes, index);
    for (int i = 0; i < kRows; ++i) found[i] = table[lanes[i]];
    r = load(found);
#endif
    return r;
}

// How many of 15 rising numbers lie below x: each of 16 lanes by itself, in four comparisons. tree: 64-byte
// aligned, the numbers in the order in which a binary search asks for them, [1..15]; [0] is not read.
LLMPACK_INLINE Int count_below(const float* tree, const Float& x) {
    Int node = all(1);
    for (int depth = 0; depth < 4; ++depth) {
        Int greater = x > lookup(tree, node);
        node = node + node;
        for (int i = 0; i < kParts; ++i) node.v[i] -= greater.v[i];
    }
    return node & all(15);
}

}  // namespace llmpack::LLMPACK_ISA

#endif  // LLMPACK_PACK_VECTORS_H_
