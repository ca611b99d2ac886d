// What AddRMSNorm and AllReduceAddRMSNorm (FORMAT.md 5.3, 5.11) of a GPU's graph have in common.
#ifndef LLMPACK_ORT_GPU_ADD_RMS_NORM_H_
#define LLMPACK_ORT_GPU_ADD_RMS_NORM_H_

#include "ort/gpu_operator.h"

namespace llmpack::ort {

class GpuAddRMSNorm {
  public:
    static constexpr Port kInputs[] = {{"x", kFloat16}, {"residual", kFloat}, {"weight", kFloat}};
    static constexpr Port kOutputs[] = {{"y", kFloat16}, {"sum", kFloat}};
    static constexpr InPlace kInPlace[] = {{1, 1}};

    // On the device.
    struct Operands {
        int64_t T;
        void *x, *weight, *y, *sum;  // sum: holds the residual
        gpu::Stream stream;
    };

    explicit GpuAddRMSNorm(const NodeInfo& node)
        : epsilon(node.float_attribute("epsilon")),
          width(node.size_attribute("in_features")),
          norm_(Launcher::current().operation("add_rms_norm", {{"in_features", width}},
                                              {{"x", kPointer},
                                               {"residual", kPointer},
                                               {"weight", kPointer},
                                               {"y", kPointer},
                                               {"epsilon", kNumber}})) {}

    Operands operands(Context& context) const {
        const Tensor x = context.input(0), residual = context.input(1), weight = context.input(2);
        x.expect_shape({kAnySize, width}, "[tokens, hidden_size]");
        const int64_t T = x.shape[0];
        residual.expect_shape({T, width}, "[tokens, hidden_size]");
        weight.expect_shape({width}, "[hidden_size]");
        void* y = context.output_memory(0, {T, width});
        float* sum = context.output(1, {T, width});
        const gpu::Stream stream = context.gpu_stream();
        copy_if_apart(residual.data, sum, static_cast<size_t>(T * width) * sizeof(float), stream);
        return {T, x.data, weight.data, y, sum, stream};
    }

    // x [T, width]: in place of that of the operands.
    void launch(const Operands& on, void* x) const {
        norm_.launch({on.T}, {x, on.sum, on.weight, on.y, epsilon}, on.stream);
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
