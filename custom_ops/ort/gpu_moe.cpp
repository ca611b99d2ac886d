// MoEF16, MoEQ8, MoEQ4 and MoEMXFP4 of a GPU's graph: the experts of each token (FORMAT.md 5.16, 8.4).
#include <cmath>
#include <initializer_list>
#include <iterator>
#include <optional>
#include <string>
#include <utility>

#include "ort/gpu_operator.h"
#include "ort/ops.h"
#include "ort/stored_weights.h"

namespace llmpack::ort {
namespace {

struct PlainExperts {
    static constexpr const char* kName = "MoEF16";
    static constexpr const char* kStorage = "f16";
    static constexpr bool kIsQuantized = false;
    static constexpr Port kInputs[] = {{"x", kFloat16},
                                       {"router_logits", kFloat},
                                       {"gate_up", kFloat16},
                                       {"down", kFloat16},
                                       {"gate_up_bias", kFloat, false, true},
                                       {"down_bias", kFloat, false, true},
                                       {"e_score_correction_bias", kFloat, false, true}};
};

template <WeightType type>
struct QuantizedExperts {
    static constexpr const char* kName = type == WeightType::kQ8   ? "MoEQ8"
                                         : type == WeightType::kQ4 ? "MoEQ4"
                                                                   : "MoEMXFP4";
    static constexpr const char* kStorage = type == WeightType::kQ8   ? "q8"
                                            : type == WeightType::kQ4 ? "q4"
                                                                      : "mxfp4";
    static constexpr bool kIsQuantized = true;
    static constexpr WeightType kType = type;
    static constexpr Port kInputs[] = {{"x", kFloat16},
                                       {"router_logits", kFloat},
                                       {"gate_up", kUInt8},
                                       {"gate_up_scales", kFloat16},
                                       {"down", kUInt8},
                                       {"down_scales", kFloat16},
                                       {"gate_up_bias", kFloat, false, true},
                                       {"down_bias", kFloat, false, true},
                                       {"e_score_correction_bias", kFloat, false, true}};
};

// Sizes of one rank, checked: what is read of the weights follows from them alone. routed: the experts that
// tokens choose from; shared: those that all tokens have.
struct ExpertSizes {
    int64_t hidden, intermediate, routed, chosen, shared, is_normed, is_sigmoid, group_size;
    float scaling_factor;

    ExpertSizes(const NodeInfo& node, bool is_quantized)
        : hidden(node.size_attribute("in_features")),
          intermediate(node.size_attribute("intermediate_size")),
          routed(node.size_attribute("num_experts")),
          chosen(node.size_attribute("num_experts_per_tok")),
          shared(node.int_attribute("num_shared_experts", 0)),
          is_normed(node.int_attribute("norm_topk_prob")),
          is_sigmoid(node.int_attribute("sigmoid_scoring", 0)),
          group_size(is_quantized ? group_size_attribute(node) : 1),
          scaling_factor(node.optional_float_attribute("routed_scaling_factor").value_or(1.0f)) {
        expect("out_features", node.size_attribute("out_features"), hidden, hidden, "in_features", &hidden);
        const std::string most = "at most " + std::to_string(kMostExperts);
        expect("num_experts", routed, 1, kMostExperts, most.c_str());
        expect("num_experts_per_tok", chosen, 1, routed, "at most num_experts", &routed);
        const std::string others = "0 to " + std::to_string(kMostExperts) + " less num_experts";
        expect("num_shared_experts", shared, 0, kMostExperts - routed, others.c_str(), &routed);
        expect("norm_topk_prob", is_normed, 0, 1, "0 or 1");
        expect("sigmoid_scoring", is_sigmoid, 0, 1, "0 or 1");
        if (!(scaling_factor > 0.0f && std::isfinite(scaling_factor))) {
            throw OpError("attribute routed_scaling_factor is " + std::to_string(scaling_factor) +
                          ", expected a number above 0");
        }
        for (const auto& [name, size] :
             {std::pair("in_features", hidden), {"intermediate_size", intermediate}}) {
            const int64_t rest = size % kTileRows + size % group_size;
            if (rest != 0) expect(name, size, 0, 0, "a multiple of 16 and of group_size", &group_size);
        }
    }

    int64_t experts() const { return routed + shared; }
    int64_t slots() const { return chosen + shared; }  // of a token: one for each of its experts

  private:
    static void expect(const char* name, int64_t found, int64_t least, int64_t most, const char* expected,
                       const int64_t* number = nullptr) {
        if (least <= found && found <= most) return;
        const std::string said = number == nullptr ? "" : " (" + std::to_string(*number) + ")";
        throw OpError(std::string("attribute ") + name + " is " + std::to_string(found) + ", expected " +
                      expected + said);
    }
};

// Addresses of pieces of the workspace, one after the other.
class Pieces {
  public:
    explicit Pieces(gpu::DevicePointer begin) : next_(begin) {}
    gpu::DevicePointer take(int64_t count, size_t item_bytes) {
        const gpu::DevicePointer piece = next_;
        next_ += (static_cast<uint64_t>(count) * item_bytes + 15) / 16 * 16;
        return piece;
    }
    gpu::DevicePointer end() const { return next_; }

  private:
    gpu::DevicePointer next_;
};

template <class Stored>
struct GpuMoE {
    static constexpr const char* kName = Stored::kName;
    static constexpr auto& kInputs = Stored::kInputs;
    static constexpr Port kOutputs[] = {{"y", kFloat16}};

    // What lies in the workspace, for T tokens and so P = T * slots pairs.
    struct Scratch {
        gpu::DevicePointer experts, routing, h, pairs, blocks, z, end;
    };

    explicit GpuMoE(const NodeInfo& node)
        : sizes(node, Stored::kIsQuantized),
          clamp(clamp_attributes(node)),
          gate_up_bias(node, std::size(kInputs) - 3),
          down_bias(node, std::size(kInputs) - 2),
          correction_bias(node, std::size(kInputs) - 1) {
        Launcher& launcher = Launcher::current();
        // Kernels with a bias, a limit, shared experts or the like have a constant that others lack: those of
        // older artifacts do.
        gpu::Constants of_route{{"num_experts", sizes.routed},
                                {"num_experts_per_tok", sizes.chosen},
                                {"norm_topk_prob", sizes.is_normed}};
        if (sizes.shared > 0) of_route["num_shared_experts"] = sizes.shared;
        if (sizes.is_sigmoid != 0) of_route["sigmoid_scoring"] = 1;
        if (correction_bias.is_there()) of_route["has_correction_bias"] = 1;
        if (sizes.scaling_factor != 1.0f) of_route["has_scaling_factor"] = 1;
        route = launcher.operation("moe_route", of_route,
                                   {{"logits", kPointer},
                                    {"correction_bias", kPointer},
                                    {"experts", kPointer},
                                    {"routing", kPointer},
                                    {"scaling_factor", kNumber}});
        gpu::Constants plain{{"in_features", sizes.hidden},
                             {"intermediate_size", sizes.intermediate},
                             {"num_experts_per_tok", sizes.slots()}};
        if (Stored::kIsQuantized) plain["group_size"] = sizes.group_size;
        gpu::Constants of_gate_up = plain, of_down = plain;
        if (gate_up_bias.is_there()) of_gate_up["has_bias"] = 1;
        if (down_bias.is_there()) of_down["has_bias"] = 1;
        if (clamp) of_gate_up["has_limit"] = 1;
        gate_up = product(launcher, "moe_gate_up_", of_gate_up,
                          {{"x", kPointer},
                           {"weight", kPointer},
                           {"scales", kPointer},
                           {"bias", kPointer},
                           {"experts", kPointer},
                           {"h", kPointer},
                           {"alpha", kNumber},
                           {"limit", kNumber}});
        down = product(launcher, "moe_down_", of_down,
                       {{"h", kPointer},
                        {"weight", kPointer},
                        {"scales", kPointer},
                        {"bias", kPointer},
                        {"experts", kPointer},
                        {"routing", kPointer},
                        {"y", kPointer}});
        sort = launcher.operation(
            "moe_sort", {{"num_experts", sizes.experts()}},
            {{"experts", kPointer}, {"pairs", kPointer}, {"blocks", kPointer}, {"num_pairs", kInteger}},
            {"block"});
        grouped_gate_up = product(launcher, "moe_grouped_gate_up_", of_gate_up,
                                  {{"pairs", kPointer},
                                   {"blocks", kPointer},
                                   {"x", kPointer},
                                   {"weight", kPointer},
                                   {"scales", kPointer},
                                   {"bias", kPointer},
                                   {"h", kPointer},
                                   {"alpha", kNumber},
                                   {"limit", kNumber}});
        grouped_down = product(launcher, "moe_grouped_down_", of_down,
                               {{"pairs", kPointer},
                                {"blocks", kPointer},
                                {"routing", kPointer},
                                {"h", kPointer},
                                {"weight", kPointer},
                                {"scales", kPointer},
                                {"bias", kPointer},
                                {"z", kPointer}});
        combine = launcher.operation("moe_combine",
                                     {{"in_features", sizes.hidden}, {"num_experts_per_tok", sizes.slots()}},
                                     {{"z", kPointer}, {"y", kPointer}});
        launcher.reserve(static_cast<size_t>(scratch(0, launcher.settings.max_rows).end));
    }

    void compute(Context& context) const {
        const Tensor x = context.input(0), logits = context.input(1);
        x.expect_shape({kAnySize, sizes.hidden}, "[tokens, hidden_size]");
        const int64_t T = x.shape[0], P = T * sizes.slots();
        logits.expect_shape({T, sizes.routed}, "[tokens, num_experts]");
        constexpr size_t kDown = Stored::kIsQuantized ? 4 : 3;
        const auto [gate_up_weight, gate_up_scales] =
            weights(context, 2, 2 * sizes.intermediate, sizes.hidden);
        const auto [down_weight, down_scales] = weights(context, kDown, sizes.hidden, sizes.intermediate);
        const void* const b = optional(context, gate_up_bias, {sizes.experts(), 2 * sizes.intermediate},
                                       {"[", kAllExperts, ", 2 * intermediate_size]"});
        const void* const down_b = optional(context, down_bias, {sizes.experts(), sizes.hidden},
                                            {"[", kAllExperts, ", out_features]"});
        const void* const correction = optional(context, correction_bias, {sizes.routed}, {"[num_experts]"});
        const Launcher& launcher = Launcher::current();
        if (T > launcher.settings.max_rows) {
            throw OpError("x has " + std::to_string(T) + " tokens, expected at most " +
                          std::to_string(launcher.settings.max_rows));
        }
        const auto [alpha, limit] = clamp.value_or(Clamp{});
        void* y = context.output_memory(0, {T, sizes.hidden});
        if (T == 0) return;
        const gpu::Stream stream = context.gpu_stream();
        const Scratch at = scratch(launcher.workspace(), T);
        route.launch({T}, {logits.data, correction, at.experts, at.routing, sizes.scaling_factor}, stream);
        if (T <= gate_up.most_rows()) {
            gate_up.launch({T}, {x.data, gate_up_weight, gate_up_scales, b, at.experts, at.h, alpha, limit},
                           stream);
            down.launch({T}, {at.h, down_weight, down_scales, down_b, at.experts, at.routing, y}, stream);
            return;
        }
        const gpu::Step grouped{P, 1, 1, sizes.experts()};
        sort.launch(grouped, {at.experts, at.pairs, at.blocks, narrow(P)}, stream);
        grouped_gate_up.launch(
            grouped, {at.pairs, at.blocks, x.data, gate_up_weight, gate_up_scales, b, at.h, alpha, limit},
            stream);
        grouped_down.launch(
            grouped, {at.pairs, at.blocks, at.routing, at.h, down_weight, down_scales, down_b, at.z}, stream);
        combine.launch({T}, {at.z, y}, stream);
    }

    static constexpr int64_t kLeastBlock = 16;  // pairs of a block (FORMAT.md 8.4)
    ExpertSizes sizes;
    std::optional<Clamp> clamp;
    OptionalGpuInput gate_up_bias, down_bias, correction_bias;
    Operation route, gate_up, down, sort, grouped_gate_up, grouped_down, combine;

  private:
    static Operation product(Launcher& launcher, const char* op, const gpu::Constants& constants,
                             std::initializer_list<Argument> arguments) {
        return launcher.operation(std::string(op) + Stored::kStorage, constants, arguments, {"block"});
    }

    static constexpr const char* kAllExperts = "num_experts + num_shared_experts";

    // An input that the node may lack; null: it does.
    static const void* optional(const Context& context, const OptionalGpuInput& input,
                                std::initializer_list<int64_t> shape,
                                std::initializer_list<const char*> meaning) {
        const std::optional<Tensor> found = input.of(context);
        if (!found) return nullptr;
        found->expect_shape(shape, meaning);
        return found->data;
    }

    // The weights and scales (null: none) of all experts, [N, K] each, from input `index` on.
    std::pair<void*, void*> weights(const Context& context, size_t index, int64_t N, int64_t K) const {
        const Tensor weight = context.input(index);
        if constexpr (Stored::kIsQuantized) {
            const Tensor scales = context.input(index + 1);
            check_quantized(Stored::kType, weight, scales, sizes.experts() * N, K, sizes.group_size);
            return {weight.data, scales.data};
        } else {
            check_float(weight, sizes.experts() * N, K);
            return {weight.data, nullptr};
        }
    }

    Scratch scratch(gpu::DevicePointer begin, int64_t T) const {
        const int64_t P = T * sizes.slots();
        Pieces pieces(begin);
        Scratch at{};
        at.experts = pieces.take(P, sizeof(int32_t));
        at.routing = pieces.take(P, sizeof(float));
        at.h = pieces.take(P * sizes.intermediate, sizeof(uint16_t));
        at.pairs = pieces.take(P, sizeof(int32_t));
        at.blocks = pieces.take(3 * ((P + kLeastBlock - 1) / kLeastBlock + sizes.experts()), sizeof(int32_t));
        at.z = pieces.take(P * sizes.hidden, sizeof(uint16_t));
        at.end = pieces.end();
        return at;
    }
};

}  // namespace

std::vector<const OrtCustomOp*> gpu_moe_ops() {
    return gpu_ops_of<GpuMoE<PlainExperts>, GpuMoE<QuantizedExperts<WeightType::kQ8>>,
                      GpuMoE<QuantizedExperts<WeightType::kQ4>>,
                      GpuMoE<QuantizedExperts<WeightType::kMXFP4>>>();
}

}  // namespace llmpack::ort
