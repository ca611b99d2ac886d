// RMSNorm, AddRMSNorm, SwiGLU: checks of FORMAT.md 5.2 to 5.4, and the division of work.
#include "cpu/isa.h"
#include "ort/add_rms_norm.h"
#include "ort/kernel.h"
#include "ort/ops.h"

namespace llmpack::ort {
namespace {

struct RMSNormOp {
    static constexpr const char* kName = "RMSNorm";
    static constexpr Port kInputs[] = {{"x", kFloat}, {"weight", kFloat}};
    static constexpr Port kOutputs[] = {{"y", kFloat}};

    explicit RMSNormOp(const NodeInfo& node)
        : epsilon(node.float_attribute("epsilon")), stored_weight(node, 1) {}

    void compute(Context& context) const {
        const Tensor x = context.input(0), weight = stored_weight.of(context);
        x.expect_shape({kAnySize, kAnySize}, "[tokens, hidden_size]");
        const int64_t T = x.shape[0], H = x.shape[1];
        weight.expect_shape({H}, "[hidden_size]");
        float* y = context.output(0, {T, H});
        const Kernels& k = context.kernels;
        context.parallel_for(T, row_grain(H), [&](int64_t begin, int64_t end) {
            k.rms_norm(x.as<float>(), nullptr, weight.as<float>(), epsilon, H, y, nullptr, begin, end);
        });
    }

    float epsilon;
    StoredInput stored_weight;
};

struct AddRMSNormOp {
    static constexpr const char* kName = "AddRMSNorm";
    static constexpr Port kInputs[] = {{"x", kFloat}, {"residual", kFloat}, {"weight", kFloat}};
    static constexpr Port kOutputs[] = {{"y", kFloat}, {"sum", kFloat}};
    static constexpr InPlace kInPlace[] = {{0, 0}, {1, 1}};

    explicit AddRMSNormOp(const NodeInfo& node) : norm(node, 1) {}

    void compute(Context& context) const {
        const Tensor x = context.input(0);
        x.expect_shape({kAnySize, kAnySize}, "[tokens, hidden_size]");
        norm.run(context, x.shape[0], x.shape[1], [&](float*) { return x.as<float>(); });
    }

    AddRMSNorm norm;
};

struct SwiGLUOp {
    static constexpr const char* kName = "SwiGLU";
    static constexpr Port kInputs[] = {{"gate_up", kFloat}};
    static constexpr Port kOutputs[] = {{"y", kFloat}};

    explicit SwiGLUOp(const NodeInfo&) {}

    void compute(Context& context) const {
        const Tensor gate_up = context.input(0);
        gate_up.expect_shape({kAnySize, kAnySize}, "[tokens, 2 * intermediate_size]");
        const int64_t T = gate_up.shape[0], columns = gate_up.shape[1];
        if (columns % 2 != 0) {
            throw OpError("input gate_up has " + std::to_string(columns) +
                          " columns, expected an even number");
        }
        const int64_t F = columns / 2;
        float* y = context.output(0, {T, F});
        const Kernels& k = context.kernels;
        context.parallel_for(T, row_grain(F), [&](int64_t begin, int64_t end) {
            k.swiglu(gate_up.as<float>(), F, y, begin, end);
        });
    }
};

}  // namespace

std::vector<const OrtCustomOp*> elementwise_ops() {
    return {custom_op<RMSNormOp>(), custom_op<AddRMSNormOp>(), custom_op<SwiGLUOp>()};
}

}  // namespace llmpack::ort
