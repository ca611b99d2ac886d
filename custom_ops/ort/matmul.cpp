// MatMulF32, MatMulF16, MatMulQ8, MatMulQ6, MatMulQ4, the same followed by SwiGLU, EmbeddingQ8, EmbeddingQ6:
// checks of FORMAT.md 4.3, 5.1 and 5.10, and the division of work.
#include <algorithm>

#include "cpu/isa.h"
#include "ort/kernel.h"
#include "ort/ops.h"

namespace llmpack::ort {
namespace {

int64_t positive_attribute(const NodeInfo& node, const char* name) {
    const int64_t value = node.int_attribute(name);
    if (value <= 0)
        throw OpError(std::string("attribute ") + name + " is " + std::to_string(value) +
                      ", expected a positive number");
    return value;
}

// Tiles that are worth a call of their own: about 32 KB of weights, or, with many tokens, as much work.
// Never one alone: the kernels take tiles in pairs.
int64_t tile_grain(int64_t tile_bytes, int64_t tokens) {
    const int64_t work = tile_bytes * (1 + tokens / 8);
    return 2 * (work >= 16384 ? 1 : 16384 / (work < 1 ? 1 : work));
}

// With one or two tokens a call is bound by memory and reads its range as two streams, of which each must be
// long: at least eight tiles a call, and at most 16 calls.
int64_t stream_grain(int64_t tiles, int64_t tokens) {
    return tokens <= 2 ? std::max<int64_t>(8, (tiles + 15) / 16) : 1;
}

// A gated product's output tile comes of two tiles of the weight.
int64_t out_features_attribute(const NodeInfo& node, bool gated) {
    const int64_t N = positive_attribute(node, "out_features");
    if (gated && N % (2 * kTileRows) != 0) {
        throw OpError("attribute out_features is " + std::to_string(N) +
                      ", expected a multiple of 32: gate and up in whole tiles");
    }
    return N;
}

template <WeightType type, bool gated>
struct FloatMatMulOp {
    static constexpr const char* kName = type == WeightType::kF32 ? (gated ? "MatMulF32SwiGLU" : "MatMulF32")
                                                                  : (gated ? "MatMulF16SwiGLU" : "MatMulF16");
    static constexpr Port kInputs[] = {{"x", kFloat},
                                       {"weight", type == WeightType::kF32 ? kFloat : kFloat16}};
    static constexpr Port kOutputs[] = {{"y", kFloat}};

    explicit FloatMatMulOp(const NodeInfo& node)
        : out_features(out_features_attribute(node, gated)), stored_weight(node, 1) {}

    void compute(Context& context) const {
        const Tensor x = context.input(0), weight = stored_weight.of(context);
        x.expect_shape({-1, -1}, "[tokens, in_features]");
        const int64_t M = x.shape[0], K = x.shape[1], N = out_features;
        const int64_t tiles = (N + kTileRows - 1) / kTileRows;
        weight.expect_shape({tiles, K, kTileRows}, "[ceil(out_features / 16), in_features, 16]");
        float* y = context.output(0, {M, gated ? N / 2 : N});
        const FloatMatMul args{x.as<float>(), weight.data, y, M, N, K, gated};
        if (M == 0) return;
        const Kernels& k = kernels();
        const int64_t bytes = K * kTileRows * (type == WeightType::kF32 ? 4 : 2);
        context.parallel_for(gated ? tiles / 2 : tiles, tile_grain(gated ? 2 * bytes : bytes, M),
                             [&](int64_t begin, int64_t end) { k.matmul_float(type, args, begin, end); });
    }

    int64_t out_features;
    StoredInput stored_weight;
};

int64_t group_size_attribute(const NodeInfo& node) {
    const int64_t group_size = node.int_attribute("group_size");
    if (group_size != 32 && group_size != 64 && group_size != 128) {
        throw OpError("attribute group_size is " + std::to_string(group_size) + ", expected 32, 64 or 128");
    }
    return group_size;
}

// Refuses weights and scales that are not those of [N, K] (FORMAT.md 4.3).
void check_quantized(WeightType type, const Tensor& weight, const Tensor& scales, int64_t N, int64_t K,
                     int64_t group_size) {
    const int64_t tiles = (N + kTileRows - 1) / kTileRows;
    if (type == WeightType::kQ4) {
        weight.expect_shape({tiles, K / 8, kTileRows, 4},
                            "[ceil(out_features / 16), in_features / 8, 16, 4]");
    } else if (type == WeightType::kQ6) {
        weight.expect_shape({tiles, K / 16, 3, kTileRows, 4},
                            "[ceil(out_features / 16), in_features / 16, 3, 16, 4]");
    } else {
        weight.expect_shape({tiles, K / 4, kTileRows, 4},
                            "[ceil(out_features / 16), in_features / 4, 16, 4]");
    }
    scales.expect_shape({tiles, K / group_size, kTileRows},
                        "[ceil(out_features / 16), in_features / group_size, 16]");
}

template <WeightType type, bool gated>
struct QuantizedMatMulOp {
    static constexpr int64_t kBits = type == WeightType::kQ4 ? 4 : type == WeightType::kQ6 ? 6 : 8;
    static_assert(!gated || kBits != 6, "q6 is for heads");
    static constexpr const char* kName = kBits == 4   ? (gated ? "MatMulQ4SwiGLU" : "MatMulQ4")
                                         : kBits == 8 ? (gated ? "MatMulQ8SwiGLU" : "MatMulQ8")
                                                      : "MatMulQ6";
    static constexpr Port kInputs[] = {{"x", kFloat}, {"weight", kUInt8}, {"scales", kFloat16}};
    static constexpr Port kOutputs[] = {{"y", kFloat}};

    explicit QuantizedMatMulOp(const NodeInfo& node)
        : out_features(out_features_attribute(node, gated)),
          group_size(group_size_attribute(node)),
          stored_weight(node, 1),
          stored_scales(node, 2) {}

    void compute(Context& context) const {
        const Tensor x = context.input(0), weight = stored_weight.of(context),
                     scales = stored_scales.of(context);
        x.expect_shape({-1, -1}, "[tokens, in_features]");
        const int64_t M = x.shape[0], K = x.shape[1], N = out_features;
        if (K % group_size != 0) {
            throw OpError("input x has " + std::to_string(K) +
                          " in_features, expected a multiple of group_size " + std::to_string(group_size));
        }
        const int64_t tiles = (N + kTileRows - 1) / kTileRows, groups = K / group_size;
        check_quantized(type, weight, scales, N, K, group_size);
        float* y = context.output(0, {M, gated ? N / 2 : N});
        if (M == 0) return;

        struct Values;
        struct Scales;
        struct Sums;
        const QuantizedActivations activations{workspace<int8_t, Values>(static_cast<size_t>(M * K)),
                                               workspace<float, Scales>(static_cast<size_t>(M * groups)),
                                               workspace<int32_t, Sums>(static_cast<size_t>(M * groups)),
                                               M,
                                               K,
                                               group_size};
        const Kernels& k = kernels();
        const int64_t blocks = (M + k.quantized_token_block - 1) / k.quantized_token_block;
        context.parallel_for(blocks, 4, [&](int64_t begin, int64_t end) {
            k.quantize(x.as<float>(), activations, begin, end);
        });
        const QuantizedMatMul args{&activations, weight.as<uint8_t>(), scales.as<uint16_t>(), y, N, gated,
                                   nullptr};
        const int64_t bytes = K * kTileRows * kBits / 8;
        if constexpr (gated) {
            struct Scratch;
            const int64_t grain = std::max(tile_grain(2 * bytes, M), stream_grain(tiles, M) / 2);
            context.parallel_for(tiles / 2, grain, [&](int64_t begin, int64_t end) {
                QuantizedMatMul own = args;
                if (M > 2) own.scratch = workspace<float, Scratch>(static_cast<size_t>(M * 2 * kTileRows));
                k.matmul_quantized(type, own, begin, end);
            });
        } else {
            context.parallel_for(
                tiles, std::max(tile_grain(bytes, M), stream_grain(tiles, M)),
                [&](int64_t begin, int64_t end) { k.matmul_quantized(type, args, begin, end); });
        }
    }

    int64_t out_features, group_size;
    StoredInput stored_weight, stored_scales;
};

template <WeightType type>
struct EmbeddingOp {
    static constexpr const char* kName = type == WeightType::kQ6 ? "EmbeddingQ6" : "EmbeddingQ8";
    static constexpr Port kInputs[] = {{"ids", kInt32}, {"weight", kUInt8}, {"scales", kFloat16}};
    static constexpr Port kOutputs[] = {{"y", kFloat}};

    explicit EmbeddingOp(const NodeInfo& node)
        : num_embeddings(positive_attribute(node, "num_embeddings")),
          group_size(group_size_attribute(node)) {}

    void compute(Context& context) const {
        const Tensor ids = context.input(0), weight = context.input(1), scales = context.input(2);
        ids.expect_shape({-1}, "[tokens]");
        scales.expect_shape({-1, -1, kTileRows}, "[ceil(num_embeddings / 16), groups, 16]");
        const int64_t T = ids.shape[0], K = scales.shape[1] * group_size;
        check_quantized(type, weight, scales, num_embeddings, K, group_size);
        const QuantizedEmbedding args{
            ids.as<int32_t>(), weight.as<uint8_t>(), scales.as<uint16_t>(), context.output(0, {T, K}), K,
            group_size};
        for (int64_t t = 0; t < T; t++) {
            if (args.ids[t] < 0 || args.ids[t] >= num_embeddings) {
                throw OpError("input ids has " + std::to_string(args.ids[t]) + " at " + std::to_string(t) +
                              ", expected 0 to " + std::to_string(num_embeddings - 1));
            }
        }
        const Kernels& k = kernels();
        context.parallel_for(T, 16, [&](int64_t begin, int64_t end) { k.embedding(type, args, begin, end); });
    }

    int64_t num_embeddings, group_size;
};

}  // namespace

std::vector<const OrtCustomOp*> matmul_ops() {
    return {custom_op<FloatMatMulOp<WeightType::kF32, false>>(),
            custom_op<FloatMatMulOp<WeightType::kF16, false>>(),
            custom_op<QuantizedMatMulOp<WeightType::kQ8, false>>(),
            custom_op<QuantizedMatMulOp<WeightType::kQ6, false>>(),
            custom_op<QuantizedMatMulOp<WeightType::kQ4, false>>(),
            custom_op<FloatMatMulOp<WeightType::kF32, true>>(),
            custom_op<FloatMatMulOp<WeightType::kF16, true>>(),
            custom_op<QuantizedMatMulOp<WeightType::kQ8, true>>(),
            custom_op<QuantizedMatMulOp<WeightType::kQ4, true>>(),
            custom_op<EmbeddingOp<WeightType::kQ8>>(),
            custom_op<EmbeddingOp<WeightType::kQ6>>()};
}

}  // namespace llmpack::ort
