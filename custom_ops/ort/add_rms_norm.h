// What AddRMSNorm (FORMAT.md 5.3) and the operators that end with it (5.11, 5.12, 5.15) have in common.
#ifndef LLMPACK_ORT_ADD_RMS_NORM_H_
#define LLMPACK_ORT_ADD_RMS_NORM_H_

#include <optional>

#include "cpu/isa.h"
#include "ort/kernel.h"

namespace llmpack::ort {

class AddRMSNorm {
  public:
    // `residual`: the index of that input; the norm's weight follows it. With `norms`, what is added is
    // normalized too, by the weight in front of it.
    AddRMSNorm(const NodeInfo& node, size_t residual, bool norms = false)
        : epsilon_(node.float_attribute("epsilon")), residual_(residual), stored_weight_(node, residual + 1) {
        if (norms) stored_x_weight_.emplace(node, residual - 1);
    }

    // Normalizes values_of(y) [T, H], which may be y itself, into the outputs.
    template <class ValuesOf>
    void run(Context& context, int64_t T, int64_t H, const ValuesOf& values_of) const {
        const Tensor residual = context.input(residual_), weight = stored_weight_.of(context);
        residual.expect_shape({T, H}, "[tokens, hidden_size]");
        weight.expect_shape({H}, "[hidden_size]");
        const float* x_weight = nullptr;
        if (stored_x_weight_) {
            const Tensor tensor = stored_x_weight_->of(context);
            tensor.expect_shape({H}, "[hidden_size]");
            x_weight = tensor.as<float>();
        }
        float* y = context.output(0, {T, H});
        float* sum = context.output(1, {T, H});
        const float* values = values_of(y);
        const Kernels& k = context.kernels;
        context.parallel_for(T, row_grain(H), [&](int64_t begin, int64_t end) {
            const float* x = values;
            if (x_weight != nullptr) {
                k.rms_norm(x, nullptr, x_weight, epsilon_, H, y, nullptr, begin, end);
                x = y;
            }
            k.rms_norm(x, residual.as<float>(), weight.as<float>(), epsilon_, H, y, sum, begin, end);
        });
    }

  private:
    float epsilon_;
    size_t residual_;
    StoredInput stored_weight_;
    std::optional<StoredInput> stored_x_weight_;
};

}  // namespace llmpack::ort

#endif  // LLMPACK_ORT_ADD_RMS_NORM_H_
