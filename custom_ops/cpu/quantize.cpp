// Activations of quantized products: 8 bits, a scale and a sum for each group of input features.
#include "cpu/families.h"
#include "cpu/matmul_tiles.h"

namespace llmpack::LLMPACK_ISA {

namespace {

// One group of one token. values: every fourth byte group of a block of m tokens, [group_size / 4, m, 4] seen
// from this token. The integers are half-to-even roundings of x * (127 / absmax), the same on every
// instruction set.
LLMPACK_INLINE void quantize_group(const float* x, int64_t group_size, int64_t m, int8_t* values,
                                   float* scale, int32_t* sum) {
    // The largest magnitude, compared as integers: the order of the bits is that of the numbers, with NaN
    // above infinity.
    const I32x16 magnitude_mask = set1_i32(0x7fffffff);
    I32x16 largest = set1_i32(0);
    for (int64_t k = 0; k < group_size; k += 16) largest = max2(largest, bits(load(x + k)) & magnitude_mask);
    const int32_t absmax_bits = reduce_max(largest);
    const float absmax = bit_cast<float>(absmax_bits);

    if (absmax_bits == 0 || absmax_bits >= 0x7f800000) {
        // All zero; or an infinity or NaN, which makes every output NaN (NaN * 0 is NaN).
        for (int64_t k = 0; k < group_size; k += 4) std::memset(values + k * m, 0, 4);
        *scale = absmax_bits == 0 ? 0.0f : __builtin_nanf("");
        *sum = 0;
        return;
    }
    // 127 / absmax would be infinite for the tiniest numbers: those are scaled up first, which is exact.
    const float up = absmax < 0x1p-100f ? 0x1p64f : 1.0f;
    const F32x16 inverse = set1(127.0f / (absmax * up));
    I32x16 total = set1_i32(0);
    for (int64_t k = 0; k < group_size; k += 16) {
        I32x16 q = round_to_even(load(x + k) * set1(up) * inverse);
        total = total + q;
        if (m == 1) {
            store_i8(values + k, q);
            continue;
        }
        int8_t lanes[16];
        store_i8(lanes, q);
        for (int64_t j = 0; j < 4; j++) std::memcpy(values + (k + 4 * j) * m, lanes + 4 * j, 4);
    }
    *scale = absmax / 127.0f;
    *sum = reduce_add(total);
}

}  // namespace

const int64_t kQuantizedTokenBlock = kQuantizedBlock;

// x: [M, K].  PRECOND: group_size divides K and 16 divides group_size.
void quantize(const float* x, const QuantizedActivations& out, int64_t begin, int64_t end) {
    const int64_t K = out.K, groups = K / out.group_size;
    for (int64_t block = begin; block < end; block++) {
        const int64_t first = block * kQuantizedBlock;
        const int64_t m = min(kQuantizedBlock, out.M - first);
        for (int64_t t = 0; t < m; t++) {
            for (int64_t g = 0; g < groups; g++) {
                const int64_t scale = first * groups + g * m + t;
                quantize_group(x + (first + t) * K + g * out.group_size, out.group_size, m,
                               out.values + first * K + g * out.group_size * m + t * 4, out.scales + scale,
                               out.sums + scale);
            }
        }
    }
}

}  // namespace llmpack::LLMPACK_ISA
