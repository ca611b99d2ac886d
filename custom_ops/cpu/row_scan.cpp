// What sampling asks of a row of logits: read once, and nothing as long as the row is written.
#include "cpu/families.h"
#include "cpu/simd.h"

namespace llmpack::LLMPACK_ISA {

namespace {

constexpr int64_t kStretch = 64;  // tokens that are looked at together: few of a row are likely
static_assert(kRunTokens % 16 == 0, "runs of whole vectors");

}  // namespace

// sums: [runs], of e^((logit - highest) * inverse_temperature) in each run of kRunTokens.
void weigh_runs(const float* logits, int64_t n, float highest, float inverse_temperature, double* sums) {
    const F32x16 top = set1(highest), factor = set1(inverse_temperature);
    const auto weights = [&](const float* p)
                             LLMPACK_INLINE_LAMBDA { return exp_nonpositive((load(p) - top) * factor); };
    for (int64_t begin = 0; begin < n; begin += kRunTokens) {
        const int64_t end = min(n, begin + kRunTokens), whole = begin + (end - begin) / 16 * 16;
        F32x16 sum = zero();
        for (int64_t i = begin; i < whole; i += 16) sum = sum + weights(logits + i);
        if (whole < end) {
            float lanes[16];
            store(lanes, set1(-__builtin_inff()));
            std::memcpy(lanes, logits + whole, static_cast<size_t>(end - whole) * sizeof(float));
            sum = sum + weights(lanes);
        }
        *sums++ = static_cast<double>(reduce_add(sum));
    }
}

// ids: [n], of the logits above the threshold, ascending. Returns how many.
int64_t find_above(const float* logits, int64_t n, float threshold, int32_t* ids) {
    int64_t count = 0, i = 0;
    const auto look_at = [&](int64_t end) LLMPACK_INLINE_LAMBDA {
        for (; i < end; i++) {
            ids[count] = static_cast<int32_t>(i);
            count += logits[i] > threshold;
        }
    };
    while (i + kStretch <= n) {
        const float* p = logits + i;
        const F32x16 largest = max2(max2(load(p), load(p + 16)), max2(load(p + 32), load(p + 48)));
        if (any_greater(largest, threshold)) {
            look_at(i + kStretch);
        } else {
            i += kStretch;
        }
    }
    look_at(n);
    return count;
}

}  // namespace llmpack::LLMPACK_ISA
