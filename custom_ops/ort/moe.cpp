// MoEF32, MoEF16, MoEQ8, MoEQ4, MoEMXFP4: checks of FORMAT.md 5.16, the choice of experts, and the division
// of work.
//
// A step's pairs, of a token and an expert that it is sent to, or that all share, are sorted by expert, then
// token; an expert's are a segment. Experts go in groups, in rising order:
//
//     x of each pair -> quantize -> gate_up, SwiGLU -> quantize -> down -> z of each pair -> add to y by
//     weight
//
// An expert's weights are read once for all its tokens, loops have work for all threads, and memory to work
// in is that of one group.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <optional>
#include <type_traits>

#include "cpu/isa.h"
#include "ort/kernel.h"
#include "ort/ops.h"
#include "ort/products.h"
#include "ort/stored_weights.h"

namespace llmpack::ort {
namespace {

constexpr int64_t kPairsOfGroup = 256;  // fewer if the next expert has too many, more if one alone has

int64_t tiled_attribute(const NodeInfo& node, const char* name, int64_t divisor, const char* divisor_name) {
    const int64_t size = node.size_attribute(name);
    if (size % divisor != 0) {
        throw OpError(std::string("attribute ") + name + " is " + std::to_string(size) +
                      ", expected a multiple of " + divisor_name + std::to_string(divisor));
    }
    return size;
}

// otherwise: where there is no such integer; null: an error.
int64_t bounded_attribute(const NodeInfo& node, const char* name, int64_t least, int64_t most,
                          std::optional<int64_t> otherwise = {}) {
    const int64_t value = otherwise ? node.int_attribute(name, *otherwise) : node.int_attribute(name);
    if (value < least || value > most) {
        throw OpError(std::string("attribute ") + name + " is " + std::to_string(value) + ", expected " +
                      std::to_string(least) + (most == least + 1 ? " or " : " to ") + std::to_string(most));
    }
    return value;
}

// A number whose order is that of the floats, with both zeros equal. Not for NaN.
uint32_t sortable(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    if (bits == 0x80000000u) bits = 0;
    return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

// How tokens are sent to experts. Those that all tokens share are numbered from num_experts on.
struct Routing {
    int64_t num_experts, num_experts_per_tok, num_shared_experts;
    bool norm_topk_prob, sigmoid_scoring;
    double routed_scaling_factor;

    int64_t matrices() const { return num_experts + num_shared_experts; }
    int64_t pairs_per_tok() const { return num_experts_per_tok + num_shared_experts; }

    // experts and weights [pairs_per_tok()] of one token by its logits [num_experts], in rising order of the
    // experts. bias: [num_experts], e_score_correction_bias, null: none. False: a logit is NaN, or the
    // largest infinite, and so is every weight NaN.
    bool choose(const float* logits, const float* bias, int64_t* experts, float* weights) const {
        float highest = logits[0];
        for (int64_t e = 1; e < num_experts; e++) highest = std::max(highest, logits[e]);
        double p[kMostExperts];  // times `unit`
        double sum = 0.0;
        for (int64_t e = 0; e < num_experts; e++) sum += p[e] = odds(logits[e], highest, bias != nullptr);
        if (!std::isfinite(highest) || std::isnan(sum)) return false;
        const double unit = sigmoid_scoring ? 1.0 : sum;

        // One number for each expert, all different: of equal scores that of the lower expert is larger.
        uint64_t order[kMostExperts], sorted[kMostExperts];
        for (int64_t e = 0; e < num_experts; e++) {
            const float score = bias == nullptr ? logits[e] : static_cast<float>(p[e] / unit) + bias[e];
            order[e] = uint64_t{sortable(score)} << 32 | static_cast<uint64_t>(kMostExperts - e);
        }
        std::copy_n(order, num_experts, sorted);
        uint64_t* const last = sorted + num_experts_per_tok - 1;
        std::nth_element(sorted, last, sorted + num_experts, std::greater<uint64_t>());
        double chosen_sum = 0.0;
        for (int64_t e = 0, i = 0; e < num_experts; e++) {
            if (order[e] < *last) continue;
            experts[i++] = e;
            chosen_sum += p[e];
        }
        const double all = norm_topk_prob ? std::max(chosen_sum, kLeastSum * unit) : unit;
        for (int64_t i = 0; i < num_experts_per_tok; i++) {
            weights[i] = static_cast<float>(routed_scaling_factor * p[experts[i]] / all);
        }
        for (int64_t s = 0; s < num_shared_experts; s++) {
            experts[num_experts_per_tok + s] = num_experts + s;
            weights[num_experts_per_tok + s] = 1.0f;
        }
        return true;
    }

  private:
    static constexpr double kLeastSum = 1e-20;

    // What an expert's p is in proportion to, or, with sigmoid_scoring, p. In double where it decides which
    // experts are chosen: last bits of exp differ between releases of the C library, and all ranks must
    // choose the same.
    double odds(float logit, float highest, bool decides) const {
        if (sigmoid_scoring) return 1.0 / (1.0 + std::exp(-double{logit}));
        return decides ? std::exp(double{logit} - highest) : double{std::exp(logit - highest)};
    }
};

// The pairs of one expert in this step.
struct Segment {
    int64_t expert, first, rows;
};

// Some experts' segments, one after another. is_of_one_token: each has one row, and all have the same x.
struct Group {
    const Segment* segments;
    int64_t count;
    bool is_of_one_token;

    int64_t first() const { return segments[0].first; }
    int64_t end() const { return segments[count - 1].first + segments[count - 1].rows; }
    int64_t rows() const { return end() - first(); }
    int64_t most_rows() const {
        return std::max_element(segments, segments + count,
                                [](const Segment& a, const Segment& b) { return a.rows < b.rows; })
            ->rows;
    }

    // Of a loop over items, of which each segment has size(segment): calls body(segment, begin, end) for the
    // segments' parts of [begin, end), each counted from 0.
    template <class Size, class Body>
    void each_part(int64_t begin, int64_t end, const Size& size, const Body& body) const {
        int64_t first = 0;
        for (int64_t i = 0; i < count && first < end; i++) {
            const int64_t next = first + size(segments[i]);
            if (begin < next) {
                body(segments[i], std::max(begin, first) - first, std::min(end, next) - first);
            }
            first = next;
        }
    }
};

// What becomes of a product. bias: [matrices, N], null: none.
struct Gate {
    Gating gating = Gating::kNone;
    Clamp clamp = {};
    const float* bias = nullptr;

    int64_t columns(int64_t N) const { return gating == Gating::kNone ? N : N / 2; }
    const float* bias_of(int64_t expert, int64_t N) const {
        return bias == nullptr ? nullptr : bias + expert * N;
    }
};

// A matrix class holds one matrix [N, K] for each expert, those that tokens share last. of: the weights, or
// throws OpError; run: y [rows, N], or with a gating [rows, N / 2], of x [rows, K], each segment by its
// expert's matrix.
template <WeightType type>
class FloatMatrices {
  public:
    static constexpr ElementType kStored = type == WeightType::kF32 ? kFloat : kFloat16;
    static constexpr Port kInputs[] = {{"x", kFloat},
                                       {"router_logits", kFloat},
                                       {"gate_up", kStored},
                                       {"down", kStored},
                                       {"gate_up_bias", kFloat, false, true},
                                       {"down_bias", kFloat, false, true},
                                       {"e_score_correction_bias", kFloat, false, true}};
    static constexpr size_t kGateUp = 2, kDown = 3;

    FloatMatrices(const NodeInfo& node, size_t input, const char* first_axis, int64_t matrices, int64_t N,
                  int64_t K)
        : first_axis_(first_axis), matrices_(matrices), N_(N), K_(K), stored_weight_(node, input) {}

    const uint8_t* of(const Context& context) const {
        const Tensor weight = stored_weight_.of(context);
        check_float(weight, matrices_ * N_, K_, first_axis_);
        return weight.as<uint8_t>();
    }

    void run(const Context& context, const Group& group, const uint8_t* weight, const float* x,
             const Gate& gate, float* y) const {
        const int64_t columns = gate.columns(N_), tiles = columns / kTileRows;
        const int64_t bytes = tile_bytes(type, K_), expert_bytes = N_ / kTileRows * bytes;
        const Kernels& k = context.kernels;
        const WeightFetch fetch = weight_fetch();
        const int64_t grain = tile_grain(N_ / columns * bytes, group.rows() / group.count);
        context.parallel_for(group.count * tiles, grain, [&](int64_t begin, int64_t end) {
            group.each_part(
                begin, end, [&](const Segment&) { return tiles; },
                [&](const Segment& segment, int64_t first, int64_t last) {
                    const int64_t row = segment.first - group.first();
                    k.matmul_float(type,
                                   {group.is_of_one_token ? x : x + row * K_,
                                    weight + segment.expert * expert_bytes, y + row * columns, segment.rows,
                                    N_, K_, gate.gating, fetch, gate.bias_of(segment.expert, N_), gate.clamp},
                                   first, last);
                });
        });
    }

  private:
    const char* first_axis_;
    int64_t matrices_, N_, K_;
    StoredInput stored_weight_;
};

struct QuantizedWeights {
    const uint8_t* weight;
    const uint16_t* scales;
};

template <WeightType type>
class QuantizedMatrices {
  public:
    static constexpr Port kInputs[] = {{"x", kFloat},
                                       {"router_logits", kFloat},
                                       {"gate_up", kUInt8},
                                       {"gate_up_scales", kFloat16},
                                       {"down", kUInt8},
                                       {"down_scales", kFloat16},
                                       {"gate_up_bias", kFloat, false, true},
                                       {"down_bias", kFloat, false, true},
                                       {"e_score_correction_bias", kFloat, false, true}};
    static constexpr size_t kGateUp = 2, kDown = 4;

    QuantizedMatrices(const NodeInfo& node, size_t input, const char* first_axis, int64_t matrices, int64_t N,
                      int64_t K)
        : first_axis_(first_axis),
          matrices_(matrices),
          N_(N),
          K_(K),
          group_size_(group_size_attribute(node)),
          stored_weight_(node, input),
          stored_scales_(node, input + 1) {}

    QuantizedWeights of(const Context& context) const {
        const Tensor weight = stored_weight_.of(context), scales = stored_scales_.of(context);
        check_quantized(type, weight, scales, matrices_ * N_, K_, group_size_, first_axis_);
        return {weight.as<uint8_t>(), scales.as<uint16_t>()};
    }

    void run(const Context& context, const Group& group, const QuantizedWeights& stored, const float* x,
             const Gate& gate, float* y) const {
        const Kernels& k = context.kernels;
        const int64_t groups = K_ / group_size_;
        const QuantizedActivations all =
            activations_workspace(group.is_of_one_token ? 1 : group.rows(), K_, group_size_);
        // A segment is quantized as if it were alone.
        const auto of_segment = [&](const Segment& segment) {
            const int64_t row = group.is_of_one_token ? 0 : segment.first - group.first();
            return QuantizedActivations{all.values + row * K_,
                                        all.scales + row * groups,
                                        all.sums + row * groups,
                                        segment.rows,
                                        K_,
                                        group_size_};
        };
        if (group.is_of_one_token) {
            k.quantize(x, all, 0, 1);
        } else {
            const auto blocks = [&](const Segment& segment) {
                return (segment.rows + k.quantized_token_block - 1) / k.quantized_token_block;
            };
            int64_t count = 0;
            for (int64_t i = 0; i < group.count; i++) count += blocks(group.segments[i]);
            const int64_t grain = 4 * row_grain(K_ * group.rows() / count);
            context.parallel_for(count, grain, [&](int64_t begin, int64_t end) {
                group.each_part(begin, end, blocks, [&](const Segment& segment, int64_t first, int64_t last) {
                    k.quantize(x + (segment.first - group.first()) * K_, of_segment(segment), first, last);
                });
            });
        }

        const int64_t columns = gate.columns(N_), tiles = columns / kTileRows;
        const int64_t bytes = tile_bytes(type, K_), expert_tiles = N_ / kTileRows;
        const int64_t grain = tile_grain(N_ / columns * bytes, group.rows() / group.count);
        const WeightFetch fetch = weight_fetch();
        const GatingScratch scratch(gate.gating == Gating::kNone ? 0 : group.most_rows(),
                                    context.places(group.count * tiles, grain));
        context.parallel_for_in_places(
            group.count * tiles, grain, [&](int64_t place, int64_t begin, int64_t end) {
                group.each_part(
                    begin, end, [&](const Segment&) { return tiles; },
                    [&](const Segment& segment, int64_t first, int64_t last) {
                        const QuantizedActivations activations = of_segment(segment);
                        const int64_t tile = segment.expert * expert_tiles;
                        k.matmul_quantized(
                            type,
                            {&activations, stored.weight + tile * bytes,
                             stored.scales + tile * groups * kTileRows,
                             y + (segment.first - group.first()) * columns, N_, gate.gating, fetch,
                             scratch.of(place), gate.bias_of(segment.expert, N_), gate.clamp},
                            first, last);
                    });
            });
    }

  private:
    const char* first_axis_;
    int64_t matrices_, N_, K_, group_size_;
    StoredInput stored_weight_, stored_scales_;
};

template <WeightType type>
constexpr const char* moe_name() {
    return type == WeightType::kF32   ? "MoEF32"
           : type == WeightType::kF16 ? "MoEF16"
           : type == WeightType::kQ8  ? "MoEQ8"
           : type == WeightType::kQ4  ? "MoEQ4"
                                      : "MoEMXFP4";
}

// The pairs of a step, k of each token, in memory of the calling thread.
class Pairs {
  public:
    Pairs(const Routing& routing, int64_t num_tokens)
        : T_(num_tokens),
          k_(routing.pairs_per_tok()),
          experts_(workspace<int64_t, struct Experts>(static_cast<size_t>(T_ * k_))),
          weights_(workspace<float, struct Weights>(static_cast<size_t>(T_ * k_))),
          places_(workspace<int64_t, struct Places>(static_cast<size_t>(T_ * k_))),
          tokens_(workspace<int64_t, struct Tokens>(static_cast<size_t>(T_ * k_))),
          next_(workspace<int64_t, struct Next>(static_cast<size_t>(T_))),
          segments_(workspace<Segment, struct Segments>(static_cast<size_t>(routing.matrices()))) {}

    // False: the token has none. Tokens may be sent at the same time.
    bool send(const Routing& routing, int64_t token, const float* logits, const float* bias) {
        const bool is_sent = routing.choose(logits, bias, experts_ + token * k_, weights_ + token * k_);
        next_[token] = is_sent ? 0 : k_;
        return is_sent;
    }

    // Once all tokens are sent.
    void sort() {
        int64_t next[kMostExperts] = {};  // place; at first, how many there are
        for_all([&](int64_t, int64_t i) { next[experts_[i]]++; });
        int64_t first = 0;
        for (int64_t e = 0; e < kMostExperts; e++) {
            const int64_t rows = next[e];
            next[e] = first;
            if (rows > 0) segments_[count_++] = {e, first, rows};
            first += rows;
        }
        for_all([&](int64_t token, int64_t i) {
            places_[i] = next[experts_[i]]++;
            tokens_[places_[i]] = token;
        });
    }

    // The segments from number `begin` on that are computed together.
    Group group(int64_t begin) const {
        int64_t end = begin + 1;
        const auto rows = [&](int64_t last) {
            return segments_[last].first + segments_[last].rows - segments_[begin].first;
        };
        while (end < count_ && rows(end) <= kPairsOfGroup) end++;
        return {segments_ + begin, end - begin, T_ == 1};
    }
    int64_t number_of_segments() const { return count_; }

    int64_t token(int64_t place) const { return tokens_[place]; }

    // Takes the token's pairs before place `end` in rising order of the experts: calls body(place, expert,
    // weight).
    template <class Body>
    void take(int64_t token, int64_t end, const Body& body) {
        for (int64_t& next = next_[token]; next < k_ && places_[token * k_ + next] < end; next++) {
            const int64_t pair = token * k_ + next;
            body(places_[pair], experts_[pair], weights_[pair]);
        }
    }

  private:
    template <class Body>
    void for_all(const Body& body) const {
        for (int64_t t = 0; t < T_; t++) {
            for (int64_t i = next_[t]; i < k_; i++) body(t, t * k_ + i);
        }
    }

    int64_t T_, k_, count_ = 0;
    int64_t* experts_;   // [T, k], rising
    float* weights_;     // [T, k]
    int64_t* places_;    // [T, k], where each is in the order of experts
    int64_t* tokens_;    // [T * k], by place
    int64_t* next_;      // [T], of a token's k the first that was not taken
    Segment* segments_;  // [matrices], of experts with tokens
};

template <WeightType type>
struct MoEOp {
    static constexpr bool kIsQuantized = type != WeightType::kF32 && type != WeightType::kF16;
    using Matrices = std::conditional_t<kIsQuantized, QuantizedMatrices<type>, FloatMatrices<type>>;
    static constexpr const char* kName = moe_name<type>();
    static constexpr auto& kInputs = Matrices::kInputs;
    static constexpr Port kOutputs[] = {{"y", kFloat}};

    explicit MoEOp(const NodeInfo& node)
        : routing(routing_attributes(node)),
          F(size_of_axis(node, "intermediate_size")),
          H(size_of_axis(node, "out_features")),
          gate(gate_attributes(node)),
          gate_up_bias(node, std::size(kInputs) - 3),
          down_bias(node, std::size(kInputs) - 2),
          e_score_correction_bias(node, std::size(kInputs) - 1),
          gate_up(node, Matrices::kGateUp, "(num_experts + num_shared_experts) * 2 * intermediate_size / 16",
                  routing.matrices(), 2 * F, H),
          down(node, Matrices::kDown, "(num_experts + num_shared_experts) * out_features / 16",
               routing.matrices(), H, F) {}

    void compute(Context& context) const {
        const Tensor x = context.input(0), router_logits = context.input(1);
        x.expect_shape({kAnySize, H}, "[tokens, out_features]");
        const int64_t T = x.shape[0], E = routing.num_experts;
        router_logits.expect_shape({T, E}, "[tokens, num_experts]");
        const auto gate_up_weights = gate_up.of(context);
        const auto down_weights = down.of(context);
        Gate gate_of_step = gate;
        gate_of_step.bias = bias_of(context, gate_up_bias, {routing.matrices(), 2 * F},
                                    "[num_experts + num_shared_experts, 2 * intermediate_size]");
        const float* const down_biases = bias_of(context, down_bias, {routing.matrices(), H},
                                                 "[num_experts + num_shared_experts, out_features]");
        const float* const score_bias = bias_of(context, e_score_correction_bias, {E}, "[num_experts]");
        float* const y = context.output(0, {T, H});

        Pairs pairs(routing, T);
        context.parallel_for(T, row_grain(16 * E), [&](int64_t begin, int64_t end) {
            for (int64_t t = begin; t < end; t++) {
                const bool is_sent = pairs.send(routing, t, router_logits.as<float>() + t * E, score_bias);
                std::fill_n(y + t * H, H, is_sent ? 0.0f : std::numeric_limits<float>::quiet_NaN());
            }
        });
        pairs.sort();
        for (int64_t i = 0; i < pairs.number_of_segments();) {
            const Group group = pairs.group(i);
            i += group.count;
            const float* z =
                run_group(context, group, pairs, x.as<float>(), gate_up_weights, gate_of_step, down_weights);
            const int64_t columns = H * (group.rows() + T - 1) / T;  // that are added to a token's row
            context.parallel_for(T, row_grain(columns), [&](int64_t begin, int64_t end) {
                for (int64_t t = begin; t < end; t++) {
                    pairs.take(t, group.end(), [&](int64_t place, int64_t expert, float weight) {
                        context.kernels.add_scaled(z + (place - group.first()) * H, weight, H, y + t * H);
                        if (down_biases != nullptr)
                            context.kernels.add_scaled(down_biases + expert * H, weight, H, y + t * H);
                    });
                }
            });
        }
    }

    // Returns z [rows, H].
    template <class Weights>
    const float* run_group(const Context& context, const Group& group, const Pairs& pairs, const float* x,
                           const Weights& gate_up_weights, const Gate& gate_of_step,
                           const Weights& down_weights) const {
        float* const rows = line_workspace<struct Rows>(group.rows() * H);  // of x, later z
        float* const activations = line_workspace<struct Activations>(group.rows() * F);
        if (!group.is_of_one_token) {
            context.parallel_for(group.rows(), row_grain(H), [&](int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; i++) {
                    std::copy_n(x + pairs.token(group.first() + i) * H, H, rows + i * H);
                }
            });
            x = rows;
        }
        gate_up.run(context, group, gate_up_weights, x, gate_of_step, activations);
        const Group apart{group.segments, group.count, false};  // activations are each expert's own
        down.run(context, apart, down_weights, activations, Gate{}, rows);
        return rows;
    }

    static Routing routing_attributes(const NodeInfo& node) {
        const int64_t E = bounded_attribute(node, "num_experts", 1, kMostExperts);
        return {E,
                bounded_attribute(node, "num_experts_per_tok", 1, E),
                bounded_attribute(node, "num_shared_experts", 0, kMostExperts - E, 0),
                bounded_attribute(node, "norm_topk_prob", 0, 1) == 1,
                bounded_attribute(node, "sigmoid_scoring", 0, 1, 0) == 1,
                scaling_attribute(node)};
    }
    static float scaling_attribute(const NodeInfo& node) {
        const float factor = node.optional_float_attribute("routed_scaling_factor").value_or(1.0f);
        if (factor > 0.0f && std::isfinite(factor)) return factor;
        throw OpError("attribute routed_scaling_factor is " + std::to_string(factor) +
                      ", expected a finite number above 0");
    }
    static Gate gate_attributes(const NodeInfo& node) {
        const std::optional<Clamp> clamp = clamp_attributes(node);
        return clamp ? Gate{Gating::kClampedSwiGLU, *clamp} : Gate{Gating::kSwiGLU};
    }
    // Null: none.
    static const float* bias_of(const Context& context, const OptionalInput& input,
                                std::initializer_list<int64_t> shape, const char* meaning) {
        const std::optional<Tensor> bias = input.of(context);
        if (!bias) return nullptr;
        bias->expect_shape(shape, meaning);
        return bias->as<float>();
    }
    static int64_t size_of_axis(const NodeInfo& node, const char* name) {
        if constexpr (kIsQuantized)
            return tiled_attribute(node, name, group_size_attribute(node), "group_size ");
        return tiled_attribute(node, name, kTileRows, "");
    }

    Routing routing;
    int64_t F, H;
    Gate gate;
    OptionalInput gate_up_bias, down_bias, e_score_correction_bias;
    Matrices gate_up, down;
};

}  // namespace

std::vector<const OrtCustomOp*> moe_ops() {
    return {custom_op<MoEOp<WeightType::kF32>>(), custom_op<MoEOp<WeightType::kF16>>(),
            custom_op<MoEOp<WeightType::kQ8>>(), custom_op<MoEOp<WeightType::kQ4>>(),
            custom_op<MoEOp<WeightType::kMXFP4>>()};
}

}  // namespace llmpack::ort
