// What AddRMSNorm and AllReduceAddRMSNorm (FORMAT.md 5.3, 5.11) have in common.
#ifndef LLMPACK_ORT_ADD_RMS_NORM_H_
#define LLMPACK_ORT_ADD_RMS_NORM_H_

#include "cpu/isa.h"
#include "ort/kernel.h"

namespace llmpack::ort {

struct AddRMSNorm {
    static constexpr Port kInputs[] = {{"x", kFloat}, {"residual", kFloat}, {"weight", kFloat}};
    static constexpr Port kOutputs[] = {{"y", kFloat}, {"sum", kFloat}};
    static constexpr InPlace kInPlace[] = {{0, 0}, {1, 1}};

    explicit AddRMSNorm(const NodeInfo& node)
        : epsilon(node.float_attribute("epsilon")), stored_weight(node, 2) {}

    // Normalizes before(x, y, number of elements), which is x, or y if it wrote there.
    template <class Before>
    void run(Context& context, const Before& before) const {
        const Tensor x = context.input(0), residual = context.input(1), weight = stored_weight.of(context);
        x.expect_shape({-1, -1}, "[tokens, hidden_size]");
        const int64_t T = x.shape[0], H = x.shape[1];
        residual.expect_shape({T, H}, "[tokens, hidden_size]");
        weight.expect_shape({H}, "[hidden_size]");
        float* y = context.output(0, {T, H});
        float* sum = context.output(1, {T, H});
        const float* values = before(x.as<float>(), y, T * H);
        const Kernels& k = kernels();
        context.parallel_for(T, row_grain(H), [&](int64_t begin, int64_t end) {
            k.rms_norm(values, residual.as<float>(), weight.as<float>(), epsilon, H, y, sum, begin, end);
        });
    }

    float epsilon;
    StoredInput stored_weight;
};

}  // namespace llmpack::ort

#endif  // LLMPACK_ORT_ADD_RMS_NORM_H_
