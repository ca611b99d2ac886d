// RMSNorm, AddRMSNorm, QKNorm, SwiGLU, GeGLU: checks of FORMAT.md 5.2 to 5.4, 5.13 and 5.14, and the division
// of work.
#include <algorithm>

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

struct QKNormOp {
    static constexpr const char* kName = "QKNorm";
    static constexpr Port kInputs[] = {{"qkv", kFloat}, {"q_weight", kFloat}, {"k_weight", kFloat}};
    static constexpr Port kOutputs[] = {{"y", kFloat}};
    static constexpr InPlace kInPlace[] = {{0, 0}};

    explicit QKNormOp(const NodeInfo& node)
        : num_heads(node.size_attribute("num_heads")),
          num_kv_heads(node.size_attribute("num_kv_heads")),
          epsilon(node.float_attribute("epsilon")),
          stored_q_weight(node, 1),
          stored_k_weight(node, 2) {}

    void compute(Context& context) const {
        const Tensor qkv = context.input(0), q_weight = stored_q_weight.of(context),
                     k_weight = stored_k_weight.of(context);
        q_weight.expect_shape({kAnySize}, "[head_dim]");
        const int64_t D = q_weight.shape[0];
        if (D > kMaxHeadDim) {
            throw OpError("input q_weight has " + std::to_string(D) + " values (head_dim), expected up to " +
                          std::to_string(kMaxHeadDim));
        }
        const int64_t width = (num_heads + 2 * num_kv_heads) * D;
        k_weight.expect_shape({D}, "[head_dim]");
        qkv.expect_shape({kAnySize, width}, "[tokens, (num_heads + 2 * num_kv_heads) * head_dim]");
        const int64_t T = qkv.shape[0];
        const float* x = qkv.as<float>();
        float* y = context.output(0, {T, width});
        const Kernels& k = context.kernels;
        context.parallel_for(T, row_grain(width), [&](int64_t begin, int64_t end) {
            for (int64_t t = begin; t < end; t++) {
                const auto norm = [&](int64_t first, int64_t heads, const Tensor& weight) {
                    const int64_t at = t * width + first * D;
                    k.rms_norm(x + at, nullptr, weight.as<float>(), epsilon, D, y + at, nullptr, 0, heads);
                };
                norm(0, num_heads, q_weight);
                norm(num_heads, num_kv_heads, k_weight);
                if (x != y) {
                    const int64_t values = num_kv_heads * D, at = (t + 1) * width - values;
                    std::copy_n(x + at, values, y + at);
                }
            }
        });
    }

    int64_t num_heads, num_kv_heads;
    float epsilon;
    StoredInput stored_q_weight, stored_k_weight;
};

template <Gating gating>
struct GLUOp {
    static constexpr const char* kName = gating == Gating::kSwiGLU ? "SwiGLU" : "GeGLU";
    static constexpr Port kInputs[] = {{"gate_up", kFloat}};
    static constexpr Port kOutputs[] = {{"y", kFloat}};

    explicit GLUOp(const NodeInfo&) {}

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
            k.glu(gating, gate_up.as<float>(), F, y, begin, end);
        });
    }
};

}  // namespace

std::vector<const OrtCustomOp*> elementwise_ops() {
    return {custom_op<RMSNormOp>(), custom_op<AddRMSNormOp>(), custom_op<QKNormOp>(),
            custom_op<GLUOp<Gating::kSwiGLU>>(), custom_op<GLUOp<Gating::kGeGLU>>()};
}

}  // namespace llmpack::ort
