// Products and embeddings of a GPU's graph.
#include "ort/gpu_operator.h"
#include "ort/ops.h"
#include "ort/stored_weights.h"

namespace llmpack::ort {
namespace {

int64_t group_size_of(const NodeInfo& node, int64_t in_features) {
    const int64_t group_size = group_size_attribute(node);
    if (in_features % group_size != 0) {
        throw OpError("attribute in_features is " + std::to_string(in_features) +
                      ", expected a multiple of group_size " + std::to_string(group_size));
    }
    return group_size;
}

struct EmbeddingF16 {
    static constexpr const char* kName = "EmbeddingF16";
    static constexpr Port kInputs[] = {{"ids", kInt32}, {"weight", kFloat16}};
    static constexpr Port kOutputs[] = {{"y", kFloat}};

    explicit EmbeddingF16(const NodeInfo& node)
        : width(node.size_attribute("in_features")),
          embed(Launcher::current().operation("embed_f16", {{"in_features", width}},
                                              {{"ids", kPointer}, {"weight", kPointer}, {"y", kPointer}})) {}

    void compute(Context& context) const {
        const Tensor ids = context.input(0), weight = context.input(1);
        ids.expect_shape({kAnySize}, "[tokens]");
        weight.expect_shape({kAnySize, width}, "[vocab_size, hidden_size]");
        const int64_t T = ids.shape[0];
        float* y = context.output(0, {T, width});
        embed.launch({T}, {ids.data, weight.data, y}, context.gpu_stream());
    }

    int64_t width;
    Operation embed;
};

template <WeightType storage>
struct EmbeddingQ {
    static constexpr const char* kName = storage == WeightType::kQ8 ? "EmbeddingQ8" : "EmbeddingQ6";
    static constexpr Port kInputs[] = {{"ids", kInt32}, {"weight", kUInt8}, {"scales", kFloat16}};
    static constexpr Port kOutputs[] = {{"y", kFloat}};

    explicit EmbeddingQ(const NodeInfo& node)
        : num_embeddings(node.size_attribute("num_embeddings")),
          width(node.size_attribute("in_features")),
          group_size(group_size_of(node, width)),
          embed(Launcher::current().operation(
              storage == WeightType::kQ8 ? "embed_q8" : "embed_q6",
              {{"in_features", width}, {"group_size", group_size}},
              {{"ids", kPointer}, {"weight", kPointer}, {"scales", kPointer}, {"y", kPointer}})) {}

    void compute(Context& context) const {
        const Tensor ids = context.input(0), weight = context.input(1), scales = context.input(2);
        ids.expect_shape({kAnySize}, "[tokens]");
        check_quantized(storage, weight, scales, num_embeddings, width, group_size);
        const int64_t T = ids.shape[0];
        float* y = context.output(0, {T, width});
        embed.launch({T}, {ids.data, weight.data, scales.data, y}, context.gpu_stream());
    }

    int64_t num_embeddings, width, group_size;
    Operation embed;
};

// y is float16 between operators and float32 for logits. ONNX Runtime tells operators of one name apart by
// the types of their inputs only, so the name says the type of y where the inputs do not.
template <ElementType type>
struct GpuMatMulF16 {
    static constexpr const char* kName = type == kFloat ? "MatMulF16F32" : "MatMulF16";
    static constexpr Port kInputs[] = {{"x", kFloat16}, {"weight", kFloat16}};
    static constexpr Port kOutputs[] = {{"y", type}};

    explicit GpuMatMulF16(const NodeInfo& node)
        : in_features(node.size_attribute("in_features")),
          out_features(node.size_attribute("out_features")),
          matmul(Launcher::current().operation(
              "matmul_f16",
              {{"in_features", in_features},
               {"out_features", out_features},
               {"y_bits", type == kFloat ? 32 : 16}},
              {{"x", kPointer}, {"weight", kPointer}, {"y", kPointer}, {"num_rows", kInteger}})) {}

    void compute(Context& context) const {
        const Tensor x = context.input(0), weight = context.input(1);
        x.expect_shape({kAnySize, in_features}, "[tokens, in_features]");
        check_float(weight, out_features, in_features);
        const int64_t T = x.shape[0];
        void* y = context.output_memory(0, {T, out_features});
        matmul.launch({T}, {x.data, weight.data, y, narrow(T)}, context.gpu_stream());
    }

    int64_t in_features, out_features;
    Operation matmul;
};

template <WeightType storage, ElementType type>
struct GpuMatMulQ {
    static constexpr const char* kName = type == kFloat ? (storage == WeightType::kQ8   ? "MatMulQ8F32"
                                                           : storage == WeightType::kQ6 ? "MatMulQ6F32"
                                                                                        : "MatMulQ4F32")
                                                        : (storage == WeightType::kQ8   ? "MatMulQ8"
                                                           : storage == WeightType::kQ6 ? "MatMulQ6"
                                                                                        : "MatMulQ4");
    static constexpr Port kInputs[] = {{"x", kFloat16}, {"weight", kUInt8}, {"scales", kFloat16}};
    static constexpr Port kOutputs[] = {{"y", type}};

    explicit GpuMatMulQ(const NodeInfo& node)
        : in_features(node.size_attribute("in_features")),
          out_features(node.size_attribute("out_features")),
          group_size(group_size_of(node, in_features)),
          matmul(Launcher::current().operation(storage == WeightType::kQ8   ? "matmul_q8"
                                               : storage == WeightType::kQ6 ? "matmul_q6"
                                                                            : "matmul_q4",
                                               {{"in_features", in_features},
                                                {"out_features", out_features},
                                                {"group_size", group_size},
                                                {"y_bits", type == kFloat ? 32 : 16}},
                                               {{"x", kPointer},
                                                {"weight", kPointer},
                                                {"scales", kPointer},
                                                {"y", kPointer},
                                                {"num_rows", kInteger}})) {}

    void compute(Context& context) const {
        const Tensor x = context.input(0), weight = context.input(1), scales = context.input(2);
        x.expect_shape({kAnySize, in_features}, "[tokens, in_features]");
        check_quantized(storage, weight, scales, out_features, in_features, group_size);
        const int64_t T = x.shape[0];
        void* y = context.output_memory(0, {T, out_features});
        matmul.launch({T}, {x.data, weight.data, scales.data, y, narrow(T)}, context.gpu_stream());
    }

    int64_t in_features, out_features, group_size;
    Operation matmul;
};

}  // namespace

std::vector<const OrtCustomOp*> gpu_matmul_ops() {
    return gpu_ops_of<EmbeddingF16, EmbeddingQ<WeightType::kQ8>, EmbeddingQ<WeightType::kQ6>,
                      GpuMatMulF16<kFloat16>, GpuMatMulF16<kFloat>, GpuMatMulQ<WeightType::kQ8, kFloat16>,
                      GpuMatMulQ<WeightType::kQ8, kFloat>, GpuMatMulQ<WeightType::kQ6, kFloat16>,
                      GpuMatMulQ<WeightType::kQ6, kFloat>, GpuMatMulQ<WeightType::kQ4, kFloat16>,
                      GpuMatMulQ<WeightType::kQ4, kFloat>>();
}

}  // namespace llmpack::ort
