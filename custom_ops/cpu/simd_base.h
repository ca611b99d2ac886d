// What the files of simd.h share.
#ifndef LLMPACK_CPU_SIMD_BASE_H_
#define LLMPACK_CPU_SIMD_BASE_H_

#include <cstdint>
#include <cstring>

// Before a loop of up to 16 constant steps over an array of vectors: unrolled, the array stays in registers.
#define LLMPACK_UNROLL_16 _Pragma("GCC unroll 16")
#define LLMPACK_INLINE inline __attribute__((always_inline))
#define LLMPACK_INLINE_LAMBDA __attribute__((always_inline))

namespace llmpack::LLMPACK_ISA {

LLMPACK_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
LLMPACK_INLINE int64_t max(int64_t a, int64_t b) { return a < b ? b : a; }

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

}  // namespace llmpack::LLMPACK_ISA

#endif  // LLMPACK_CPU_SIMD_BASE_H_
