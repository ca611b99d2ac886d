// RMSNorm and AddRMSNorm (FORMAT.md 5.2, 5.3): y = x / sqrt(mean(x^2) + epsilon) * weight.
#include <cmath>

#include "cpu/families.h"
#include "cpu/simd.h"

namespace llmpack::LLMPACK_ISA {

namespace {

// One row of H values. residual may be null; sum may be residual. The mean square is summed in 16 lanes, lane
// i taking the values i, i + 16, ..., and the lanes are added in halves.
LLMPACK_INLINE void normalize(const float* x, const float* residual, const float* weight, float epsilon,
                              int64_t H, float* y, float* sum) {
    const int64_t whole = H / 16 * 16;
    F32x16 squares = zero();
    for (int64_t i = 0; i < whole; i += 16) {
        F32x16 v = load(x + i);
        if (residual != nullptr) {
            v = v + load(residual + i);
            store(sum + i, v);
        }
        squares = fma(v, v, squares);
    }
    if (whole < H) {
        F32x16 v = load_first(x + whole, H - whole);
        if (residual != nullptr) {
            v = v + load_first(residual + whole, H - whole);
            store_first(sum + whole, v, H - whole);
        }
        squares = fma(v, v, squares);
    }
    const float* values = residual == nullptr ? x : sum;
    const F32x16 inverse = set1(1.0f / std::sqrt(reduce_add(squares) / static_cast<float>(H) + epsilon));
    for (int64_t i = 0; i < whole; i += 16) store(y + i, load(values + i) * inverse * load(weight + i));
    if (whole < H) {
        F32x16 v = load_first(values + whole, H - whole) * inverse * load_first(weight + whole, H - whole);
        store_first(y + whole, v, H - whole);
    }
}

}  // namespace

void rms_norm(const float* x, const float* residual, const float* weight, float epsilon, int64_t H, float* y,
              float* sum, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
        normalize(x + row * H, residual == nullptr ? nullptr : residual + row * H, weight, epsilon, H,
                  y + row * H, residual == nullptr ? nullptr : sum + row * H);
    }
}

}  // namespace llmpack::LLMPACK_ISA
