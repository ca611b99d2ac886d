// What AddRMSNorm, RMSNormAddRMSNorm and the same behind AllReduce (FORMAT.md 5.3, 5.11, 5.15) of a GPU's
// graph have in common.
#ifndef LLMPACK_ORT_GPU_ADD_RMS_NORM_H_
#define LLMPACK_ORT_GPU_ADD_RMS_NORM_H_

#include "ort/gpu_operator.h"

namespace llmpack::ort {

struct Added {
    static constexpr const char* kName = "AddRMSNorm";
    static constexpr const char* kReducedName = "AllReduceAddRMSNorm";
    static constexpr const char* kKernel = "add_rms_norm";
    static constexpr const char* kReducedKernel = "all_reduce_add_rms_norm";
    static constexpr Port kInputs[] = {{"x", kFloat16}, {"residual", kFloat}, {"weight", kFloat}};
    static constexpr size_t kResidual = 1;
};

// x is normalised, by a weight of its own, before it is added.
struct NormedAndAdded {
    static constexpr const char* kName = "RMSNormAddRMSNorm";
    static constexpr const char* kReducedName = "AllReduceRMSNormAddRMSNorm";
    static constexpr const char* kKernel = "norm_add_rms_norm";
    static constexpr const char* kReducedKernel = "all_reduce_norm_add_rms_norm";
    static constexpr Port kInputs[] = {
        {"x", kFloat16}, {"x_weight", kFloat}, {"residual", kFloat}, {"weight", kFloat}};
    static constexpr size_t kResidual = 2;
};

template <class Form>
class GpuAddRMSNorm {
  public:
    static constexpr auto& kInputs = Form::kInputs;
    static constexpr Port kOutputs[] = {{"y", kFloat16}, {"sum", kFloat}};
    static constexpr InPlace kInPlace[] = {{Form::kResidual, 1}};

    // On the device.
    struct Operands {
        int64_t T;
        void *x, *x_weight, *weight, *y, *sum;  // x_weight: null for Added; sum: holds the residual
        gpu::Stream stream;
    };

    explicit GpuAddRMSNorm(const NodeInfo& node)
        : epsilon(node.float_attribute("epsilon")),
          width(node.size_attribute("in_features")),
          norm_(Launcher::current().operation(Form::kKernel, {{"in_features", width}},
                                              {{"x", kPointer},
                                               {"x_weight", kPointer},
                                               {"residual", kPointer},
                                               {"weight", kPointer},
                                               {"y", kPointer},
                                               {"epsilon", kNumber}})) {}

    Operands operands(Context& context) const {
        const Tensor x = context.input(0), residual = context.input(Form::kResidual),
                     weight = context.input(Form::kResidual + 1);
        x.expect_shape({kAnySize, width}, "[tokens, hidden_size]");
        const int64_t T = x.shape[0];
        residual.expect_shape({T, width}, "[tokens, hidden_size]");
        weight.expect_shape({width}, "[hidden_size]");
        void* x_weight = nullptr;
        if constexpr (Form::kResidual > 1) {
            const Tensor own = context.input(1);
            own.expect_shape({width}, "[hidden_size]");
            x_weight = own.data;
        }
        void* y = context.output_memory(0, {T, width});
        float* sum = context.output(1, {T, width});
        const gpu::Stream stream = context.gpu_stream();
        copy_if_apart(residual.data, sum, static_cast<size_t>(T * width) * sizeof(float), stream);
        return {T, x.data, x_weight, weight.data, y, sum, stream};
    }

    // x [T, width]: in place of that of the operands.
    void launch(const Operands& on, void* x) const {
        norm_.launch({on.T}, {x, on.x_weight, on.sum, on.weight, on.y, epsilon}, on.stream);
    }

    const float epsilon;
    const int64_t width;

  private:
    static void copy_if_apart(const void* from, void* to, size_t bytes, gpu::Stream stream) {
        if (from == to) return;
        const gpu::Driver& driver = Launcher::current().driver;
        driver.check(driver.call.copy_within(reinterpret_cast<gpu::DevicePointer>(to),
                                             reinterpret_cast<gpu::DevicePointer>(from), bytes, stream),
                     "copying the residual");
    }

    Operation norm_;
};

}  // namespace llmpack::ort

#endif  // LLMPACK_ORT_GPU_ADD_RMS_NORM_H_
