// How queries grow along a sequence (FORMAT.md 5.5), as the attributes of a PagedAttention have it.
#ifndef LLMPACK_ORT_GROWTH_H_
#define LLMPACK_ORT_GROWTH_H_

#include <limits>
#include <optional>
#include <string>

#include "ort/kernel.h"

namespace llmpack::ort {

// A query at position p is multiplied by 1 + beta * ln(1 + floor(p / original_positions)).
struct Growth {
    float beta;
    int64_t original_positions;
};

// Null: queries do not grow. Throws OpError where one of the two attributes is missing, or is no such number.
inline std::optional<Growth> growth_of(const NodeInfo& node) {
    constexpr const char* kBeta = "llama_4_scaling_beta";
    constexpr const char* kPositions = "original_max_position_embeddings";
    const std::optional<float> beta = node.optional_float_attribute(kBeta);
    constexpr int64_t kNone = std::numeric_limits<int64_t>::min();
    const bool has_positions = node.int_attribute(kPositions, kNone) != kNone;
    if (!beta && !has_positions) return std::nullopt;
    if (!beta || !has_positions) {
        const std::string one = beta ? kBeta : kPositions, other = beta ? kPositions : kBeta;
        throw OpError("attribute " + one + " is there and " + other + " is not, expected both or neither");
    }
    if (!(*beta > 0 && *beta <= std::numeric_limits<float>::max())) {
        throw OpError(std::string("attribute ") + kBeta + " is " + std::to_string(*beta) +
                      ", expected a finite number above 0");
    }
    return Growth{*beta, node.size_attribute(kPositions)};
}

}  // namespace llmpack::ort

#endif  // LLMPACK_ORT_GROWTH_H_
