// RMSNorm, AddRMSNorm, RMSNormAddRMSNorm, QKNorm, SwiGLU and GeGLU of a GPU's graph.
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

template <class Form>
struct GpuAddRMSNormOp : GpuAddRMSNorm<Form> {
    static constexpr const char* kName = Form::kName;
    using GpuAddRMSNorm<Form>::GpuAddRMSNorm;

    void compute(Context& context) const {
        const auto on = this->operands(context);
        this->launch(on, on.x);
    }
};

struct GpuQKNorm {
    static constexpr const char* kName = "QKNorm";
    static constexpr Port kInputs[] = {{"qkv", kFloat16}, {"q_weight", kFloat}, {"k_weight", kFloat}};
    static constexpr Port kOutputs[] = {{"y", kFloat16}};
    static constexpr InPlace kInPlace[] = {{0, 0}};

    explicit GpuQKNorm(const NodeInfo& node)
        : epsilon(node.float_attribute("epsilon")),
          num_heads(node.size_attribute("num_heads")),
          num_kv_heads(node.size_attribute("num_kv_heads")),
          head_dim(node.size_attribute("head_dim")),
          norm(Launcher::current().operation(
              "qk_norm", {{"num_heads", num_heads}, {"num_kv_heads", num_kv_heads}, {"head_dim", head_dim}},
              {{"qkv", kPointer},
               {"q_weight", kPointer},
               {"k_weight", kPointer},
               {"y", kPointer},
               {"epsilon", kNumber}})) {}

    void compute(Context& context) const {
        const Tensor qkv = context.input(0), q_weight = context.input(1), k_weight = context.input(2);
        const int64_t width = (num_heads + 2 * num_kv_heads) * head_dim;
        qkv.expect_shape({kAnySize, width}, "[tokens, (num_heads + 2 * num_kv_heads) * head_dim]");
        q_weight.expect_shape({head_dim}, "[head_dim]");
        k_weight.expect_shape({head_dim}, "[head_dim]");
        const int64_t T = qkv.shape[0];
        void* y = context.output_memory(0, {T, width});
        norm.launch({T}, {qkv.data, q_weight.data, k_weight.data, y, epsilon}, context.gpu_stream());
    }

    float epsilon;
    int64_t num_heads, num_kv_heads, head_dim;
    Operation norm;
};

// SwiGLU and GeGLU.
struct GpuGated {
    static constexpr Port kInputs[] = {{"gate_up", kFloat16}};
    static constexpr Port kOutputs[] = {{"y", kFloat16}};

    GpuGated(const NodeInfo& node, const char* op)
        : width(node.size_attribute("in_features")),
          gated(Launcher::current().operation(op, {{"in_features", width}},
                                              {{"gate_up", kPointer}, {"y", kPointer}})) {}

    void compute(Context& context) const {
        const Tensor gate_up = context.input(0);
        gate_up.expect_shape({kAnySize, 2 * width}, "[tokens, 2 * intermediate_size]");
        const int64_t T = gate_up.shape[0];
        void* y = context.output_memory(0, {T, width});
        gated.launch({T}, {gate_up.data, y}, context.gpu_stream());
    }

    int64_t width;
    Operation gated;
};

struct GpuSwiGLU : GpuGated {
    static constexpr const char* kName = "SwiGLU";
    explicit GpuSwiGLU(const NodeInfo& node) : GpuGated(node, "swiglu") {}
};

struct GpuGeGLU : GpuGated {
    static constexpr const char* kName = "GeGLU";
    explicit GpuGeGLU(const NodeInfo& node) : GpuGated(node, "geglu") {}
};

}  // namespace

std::vector<const OrtCustomOp*> gpu_elementwise_ops() {
    return gpu_ops_of<GpuRMSNorm, GpuAddRMSNormOp<Added>, GpuAddRMSNormOp<NormedAndAdded>, GpuQKNorm,
                      GpuSwiGLU, GpuGeGLU>();
}

}  // namespace llmpack::ort
