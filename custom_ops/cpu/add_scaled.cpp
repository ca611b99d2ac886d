// The sum of what experts give, by weight (FORMAT.md 5.16).
#include "cpu/families.h"
#include "cpu/simd.h"

namespace llmpack::LLMPACK_ISA {

void add_scaled(const float* x, float scale, int64_t n, float* y) {
    const F32x16 factor = set1(scale);
    for (int64_t i = 0; i < n; i += 16) store(y + i, fma(load(x + i), factor, load(y + i)));
}

}  // namespace llmpack::LLMPACK_ISA
