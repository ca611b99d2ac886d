// MatMulF32, MatMulF16, MatMulQ8, MatMulQ6, MatMulQ4, the same joined with what follows them, EmbeddingQ8,
// EmbeddingQ6: checks of FORMAT.md 4.3, 5.1, 5.10, 5.12 and 5.15, and the division of work.
#include <algorithm>
#include <array>
#include <type_traits>

#include "cpu/isa.h"
#include "ort/add_rms_norm.h"
#include "ort/call_collective.h"
#include "ort/kernel.h"
#include "ort/ops.h"
#include "ort/products.h"
#include "ort/stored_weights.h"

namespace llmpack::ort {
namespace {

// A gated product's output tile comes of two tiles of the weight.
int64_t out_features_attribute(const NodeInfo& node, Gating gating) {
    const int64_t N = node.size_attribute("out_features");
    if (gating != Gating::kNone && N % (2 * kTileRows) != 0) {
        throw OpError("attribute out_features is " + std::to_string(N) +
                      ", expected a multiple of 32: gate and up in whole tiles");
    }
    return N;
}

// A matrix class holds a product's weight. check: throws OpError unless x [M, K] and the weight go together;
// run: y [M, N], or [M, N / 2] with a gating, = the product.
template <WeightType type>
class FloatMatrix {
  public:
    static constexpr Port kInputs[] = {{"x", kFloat},
                                       {"weight", type == WeightType::kF32 ? kFloat : kFloat16}};

    FloatMatrix(const NodeInfo& node, Gating gating)
        : out_features(out_features_attribute(node, gating)), stored_weight_(node, 1) {}

    FloatMatMul check(const Context& context) const {
        const Tensor x = context.input(0), weight = stored_weight_.of(context);
        x.expect_shape({kAnySize, kAnySize}, "[tokens, in_features]");
        const int64_t M = x.shape[0], K = x.shape[1], N = out_features;
        check_float(weight, N, K);
        return {x.as<float>(), weight.data, nullptr, M, N, K, Gating::kNone, weight_fetch()};
    }

    template <Gating gating>
    void run(const Context& context, FloatMatMul args, float* y) const {
        if (args.M == 0) return;
        args.y = y;
        args.gating = gating;
        const int64_t tiles = (args.N + kTileRows - 1) / kTileRows;
        const Kernels& k = context.kernels;
        constexpr int64_t kTiles = gating == Gating::kNone ? 1 : 2;  // of the weight, for one of y
        context.parallel_for(tiles / kTiles, tile_grain(kTiles * tile_bytes(type, args.K), args.M),
                             [&](int64_t begin, int64_t end) { k.matmul_float(type, args, begin, end); });
    }

    const int64_t out_features;

  private:
    StoredInput stored_weight_;
};

// What a quantized product reads: x as it came, and weight and scales as they are stored.
struct QuantizedOperands {
    const float* x;
    const uint8_t* weight;
    const uint16_t* scales;
    int64_t M, K;
};

template <WeightType type>
class QuantizedMatrix {
  public:
    static constexpr Port kInputs[] = {{"x", kFloat}, {"weight", kUInt8}, {"scales", kFloat16}};

    QuantizedMatrix(const NodeInfo& node, Gating gating)
        : out_features(out_features_attribute(node, gating)),
          group_size_(group_size_attribute(node)),
          stored_weight_(node, 1),
          stored_scales_(node, 2) {}

    QuantizedOperands check(const Context& context) const {
        const Tensor x = context.input(0), weight = stored_weight_.of(context),
                     scales = stored_scales_.of(context);
        x.expect_shape({kAnySize, kAnySize}, "[tokens, in_features]");
        const int64_t M = x.shape[0], K = x.shape[1];
        if (K == 0 || K % group_size_ != 0) {
            throw OpError("input x has " + std::to_string(K) +
                          " in_features, expected a multiple of group_size " + std::to_string(group_size_) +
                          ", at least once");
        }
        check_quantized(type, weight, scales, out_features, K, group_size_);
        return {x.as<float>(), weight.as<uint8_t>(), scales.as<uint16_t>(), M, K};
    }

    template <Gating gating>
    void run(const Context& context, const QuantizedOperands& in, float* y) const {
        const int64_t M = in.M, K = in.K, N = out_features;
        if (M == 0) return;
        const int64_t tiles = (N + kTileRows - 1) / kTileRows;
        const QuantizedActivations activations = activations_workspace(M, K, group_size_);
        const Kernels& k = context.kernels;
        const int64_t blocks = (M + k.quantized_token_block - 1) / k.quantized_token_block;
        context.parallel_for(blocks, 4,
                             [&](int64_t begin, int64_t end) { k.quantize(in.x, activations, begin, end); });
        const QuantizedMatMul args{&activations, in.weight, in.scales, y, N, gating, weight_fetch(), nullptr};
        const int64_t bytes = tile_bytes(type, K);
        if constexpr (gating != Gating::kNone) {
            const int64_t grain = tile_grain(2 * bytes, M);
            const GatingScratch scratch(M, context.places(tiles / 2, grain));
            context.parallel_for_in_places(tiles / 2, grain, [&](int64_t place, int64_t begin, int64_t end) {
                QuantizedMatMul own = args;
                own.scratch = scratch.of(place);
                k.matmul_quantized(type, own, begin, end);
            });
        } else {
            context.parallel_for(tiles, tile_grain(bytes, M), [&](int64_t begin, int64_t end) {
                k.matmul_quantized(type, args, begin, end);
            });
        }
    }

    const int64_t out_features;

  private:
    int64_t group_size_;
    StoredInput stored_weight_, stored_scales_;
};

// A product by the storage of its weight: the operators of FORMAT.md 5.1, 5.10, 5.12 and 5.15.
template <WeightType type>
using Product = std::conditional_t<type == WeightType::kF32 || type == WeightType::kF16, FloatMatrix<type>,
                                   QuantizedMatrix<type>>;

template <WeightType type>
constexpr auto& product_name() {
    if constexpr (type == WeightType::kF32) return "MatMulF32";
    if constexpr (type == WeightType::kF16) return "MatMulF16";
    if constexpr (type == WeightType::kQ8) return "MatMulQ8";
    if constexpr (type == WeightType::kQ6) return "MatMulQ6";  // of heads only, which nothing follows
    if constexpr (type == WeightType::kQ4) return "MatMulQ4";
}

template <size_t first_size, size_t second_size>
constexpr std::array<char, first_size + second_size - 1> joined(const char (&first)[first_size],
                                                                const char (&second)[second_size]) {
    std::array<char, first_size + second_size - 1> text{};
    for (size_t i = 0; i + 1 < first_size; i++) text[i] = first[i];
    for (size_t i = 0; i < second_size; i++) text[first_size - 1 + i] = second[i];
    return text;
}

template <Gating gating>
constexpr auto& gating_name() {
    if constexpr (gating == Gating::kNone) return "";
    if constexpr (gating == Gating::kSwiGLU) return "SwiGLU";
    if constexpr (gating == Gating::kGeGLU) return "GeGLU";
}

template <WeightType type, Gating gating>
struct MatMulOp {
    static constexpr auto kText = joined(product_name<type>(), gating_name<gating>());
    static constexpr const char* kName = kText.data();
    static constexpr auto& kInputs = Product<type>::kInputs;
    static constexpr Port kOutputs[] = {{"y", kFloat}};

    explicit MatMulOp(const NodeInfo& node) : product(node, gating) {}

    void compute(Context& context) const {
        const auto operands = product.check(context);
        const int64_t N = gating == Gating::kNone ? product.out_features : product.out_features / 2;
        product.template run<gating>(context, operands, context.output(0, {operands.M, N}));
    }

    Product<type> product;
};

template <bool reduces, bool norms>
constexpr auto& norm_name() {
    if constexpr (reduces && norms) return "AllReduceRMSNormAddRMSNorm";
    if constexpr (reduces && !norms) return "AllReduceAddRMSNorm";
    if constexpr (!reduces && norms) return "RMSNormAddRMSNorm";
    if constexpr (!reduces && !norms) return "AddRMSNorm";
}

template <bool norms, size_t count>
constexpr auto with_norm(const Port (&inputs)[count]) {
    std::array<Port, count + (norms ? 3 : 2)> all{};
    for (size_t i = 0; i < count; i++) all[i] = inputs[i];
    if constexpr (norms) all[count] = {"x_weight", kFloat};
    all[all.size() - 2] = {"residual", kFloat};
    all[all.size() - 1] = {"norm_weight", kFloat};
    return all;
}

// norms: what is added to the residual is normalized before.
template <WeightType type, bool reduces, bool norms>
struct MatMulAddRMSNormOp {
    static constexpr auto kText = joined(product_name<type>(), norm_name<reduces, norms>());
    static constexpr const char* kName = kText.data();
    static constexpr const char* kProfileName = product_name<type>();
    static constexpr auto kInputs = with_norm<norms>(Product<type>::kInputs);
    static constexpr Port kOutputs[] = {{"y", kFloat}, {"sum", kFloat}};
    static constexpr size_t kResidual = kInputs.size() - 2;
    static constexpr InPlace kInPlace[] = {{static_cast<int>(kResidual), 1}};

    explicit MatMulAddRMSNormOp(const NodeInfo& node)
        : product(node, Gating::kNone),
          norm(node, kResidual, norms),
          norm_time(OpTime::named(profile_name(norm_name<reduces, norms>(), node.name()))) {}

    void compute(Context& context) const {
        const auto operands = product.check(context);
        const int64_t M = operands.M, N = product.out_features;
        norm.run(context, M, N, [&](float* y) {
            product.template run<Gating::kNone>(context, operands, y);
            context.profile.go_on_as(norm_time);
            if constexpr (reduces) call_collective([&] { all_reduce(y, y, M * N); });
            return y;
        });
    }

    Product<type> product;
    AddRMSNorm norm;
    OpTime& norm_time;
};

template <WeightType type>
struct EmbeddingOp {
    static constexpr const char* kName = type == WeightType::kQ6 ? "EmbeddingQ6" : "EmbeddingQ8";
    static constexpr Port kInputs[] = {{"ids", kInt32}, {"weight", kUInt8}, {"scales", kFloat16}};
    static constexpr Port kOutputs[] = {{"y", kFloat}};

    explicit EmbeddingOp(const NodeInfo& node)
        : num_embeddings(node.size_attribute("num_embeddings")), group_size(group_size_attribute(node)) {}

    void compute(Context& context) const {
        const Tensor ids = context.input(0), weight = context.input(1), scales = context.input(2);
        ids.expect_shape({kAnySize}, "[tokens]");
        scales.expect_shape({kAnySize, kAnySize, kTileRows}, "[ceil(num_embeddings / 16), groups, 16]");
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
        const Kernels& k = context.kernels;
        context.parallel_for(T, 16, [&](int64_t begin, int64_t end) { k.embedding(type, args, begin, end); });
    }

    int64_t num_embeddings, group_size;
};

template <WeightType type>
void add_products(std::vector<const OrtCustomOp*>& ops) {
    for (const OrtCustomOp* op :
         {custom_op<MatMulOp<type, Gating::kNone>>(), custom_op<MatMulOp<type, Gating::kSwiGLU>>(),
          custom_op<MatMulOp<type, Gating::kGeGLU>>(), custom_op<MatMulAddRMSNormOp<type, false, false>>(),
          custom_op<MatMulAddRMSNormOp<type, false, true>>(),
          custom_op<MatMulAddRMSNormOp<type, true, false>>(),
          custom_op<MatMulAddRMSNormOp<type, true, true>>()}) {
        ops.push_back(op);
    }
}

}  // namespace

std::vector<const OrtCustomOp*> matmul_ops() {
    std::vector<const OrtCustomOp*> ops{custom_op<MatMulOp<WeightType::kQ6, Gating::kNone>>(),
                                        custom_op<EmbeddingOp<WeightType::kQ8>>(),
                                        custom_op<EmbeddingOp<WeightType::kQ6>>()};
    add_products<WeightType::kF32>(ops);
    add_products<WeightType::kF16>(ops);
    add_products<WeightType::kQ8>(ops);
    add_products<WeightType::kQ4>(ops);
    return ops;
}

}  // namespace llmpack::ort
