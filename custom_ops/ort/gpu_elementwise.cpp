// RMSNorm, AddRMSNorm and SwiGLU of a GPU's graph.
#include "ort/gpu_add_rms_norm.h"
#include "ort/gpu_operator.h"
#include "ort/ops.h"

namespace llmpack::ort {
namespace {

struct GpuRMSNorm {
    static constexpr const char* kName = "RMSNormF16";
    static constexpr Port kInputs[] = {{"x", kFloat}, {"weight", kFloat}};
    static constexpr Port kOutputs[] = {{"y", kFloat16}};

    explicit GpuRMSNorm(const NodeInfo& node)
        : epsilon(node.float_attribute("epsilon")),
          width(node.size_attribute("in_features")),
          norm(Launcher::current().operation(
              "rms_norm", {{"in_features", width}},
              {{"x", kPointer}, {"weight", kPointer}, {"y", kPointer}, {"epsilon", kNumber}})) {}

    void compute(Context& context) const {
        const Tensor x = context.input(0), weight = context.input(1);
        x.expect_shape({kAnySize, width}, "[tokens, hidden_size]");
        weight.expect_shape({width}, "[hidden_size]");
        const int64_t T = x.shape[0];
        void* y = context.output_memory(0, {T, width});
        norm.launch({T}, {x.data, weight.data, y, epsilon}, context.gpu_stream());
    }

    float epsilon;
    int64_t width;
    Operation norm;
};

struct GpuAddRMSNormOp : GpuAddRMSNorm {
    static constexpr const char* kName = "AddRMSNorm";
    using GpuAddRMSNorm::GpuAddRMSNorm;

    void compute(Context& context) const {
        const Operands on = operands(context);
        launch(on, on.x);
    }
};

struct GpuSwiGLU {
    static constexpr const char* kName = "SwiGLU";
    static constexpr Port kInputs[] = {{"gate_up", kFloat16}};
    static constexpr Port kOutputs[] = {{"y", kFloat16}};

    explicit GpuSwiGLU(const NodeInfo& node)
        : width(node.size_attribute("in_features")),
          swiglu(Launcher::current().operation("swiglu", {{"in_features", width}},
                                               {{"gate_up", kPointer}, {"y", kPointer}})) {}

    void compute(Context& context) const {
        const Tensor gate_up = context.input(0);
        gate_up.expect_shape({kAnySize, 2 * width}, "[tokens, 2 * intermediate_size]");
        const int64_t T = gate_up.shape[0];
        void* y = context.output_memory(0, {T, width});
        swiglu.launch({T}, {gate_up.data, y}, context.gpu_stream());
    }

    int64_t width;
    Operation swiglu;
};

}  // namespace

std::vector<const OrtCustomOp*> gpu_elementwise_ops() {
    return gpu_ops_of<GpuRMSNorm, GpuAddRMSNormOp, GpuSwiGLU>();
}

}  // namespace llmpack::ort
