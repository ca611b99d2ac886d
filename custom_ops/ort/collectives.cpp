// AllReduce, AllReduceAddRMSNorm and AllGather: checks of FORMAT.md 5.6, 5.7 and 5.11.
#include "ort/add_rms_norm.h"
#include "ort/call_collective.h"
#include "ort/kernel.h"
#include "ort/ops.h"

namespace llmpack::ort {
namespace {

struct AllReduceOp {
    static constexpr const char* kName = "AllReduce";
    static constexpr Port kInputs[] = {{"x", kFloat}};
    static constexpr Port kOutputs[] = {{"y", kFloat}};
    static constexpr InPlace kInPlace[] = {{0, 0}};

    explicit AllReduceOp(const NodeInfo&) {}

    void compute(Context& context) const {
        const Tensor x = context.input(0);
        x.expect_shape({kAnySize, kAnySize}, "[tokens, hidden_size]");
        float* y = context.output(0, {x.shape[0], x.shape[1]});
        call_collective([&] { all_reduce(x.as<float>(), y, x.shape[0] * x.shape[1]); });
    }
};

struct AllReduceAddRMSNormOp {
    static constexpr const char* kName = "AllReduceAddRMSNorm";
    static constexpr Port kInputs[] = {{"x", kFloat}, {"residual", kFloat}, {"weight", kFloat}};
    static constexpr Port kOutputs[] = {{"y", kFloat}, {"sum", kFloat}};
    static constexpr InPlace kInPlace[] = {{0, 0}, {1, 1}};

    explicit AllReduceAddRMSNormOp(const NodeInfo& node) : norm(node, 1) {}

    void compute(Context& context) const {
        const Tensor x = context.input(0);
        x.expect_shape({kAnySize, kAnySize}, "[tokens, hidden_size]");
        const int64_t T = x.shape[0], H = x.shape[1];
        norm.run(context, T, H, [&](float* y) {
            call_collective([&] { all_reduce(x.as<float>(), y, T * H); });
            return y;
        });
    }

    AddRMSNorm norm;
};

struct AllGatherOp {
    static constexpr const char* kName = "AllGather";
    static constexpr Port kInputs[] = {{"x", kFloat}};
    static constexpr Port kOutputs[] = {{"y", kFloat}};

    explicit AllGatherOp(const NodeInfo& node) : out_features(node.size_attribute("out_features")) {}

    void compute(Context& context) const {
        const Tensor x = context.input(0);
        x.expect_shape({kAnySize, kAnySize}, "[rows, columns of this rank]");
        float* y = context.output(0, {x.shape[0], out_features});
        call_collective([&] { all_gather(x.as<float>(), y, x.shape[0], x.shape[1], out_features); });
    }

    int64_t out_features;
};

}  // namespace

std::vector<const OrtCustomOp*> collective_ops() {
    return {custom_op<AllReduceOp>(), custom_op<AllReduceAddRMSNormOp>(), custom_op<AllGatherOp>()};
}

}  // namespace llmpack::ort
