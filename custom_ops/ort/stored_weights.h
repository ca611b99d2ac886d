// What nodes for CPUs and for GPUs have alike: the shapes of matrices in row tiles (FORMAT.md 4.3), and
// attributes.
#ifndef LLMPACK_ORT_STORED_WEIGHTS_H_
#define LLMPACK_ORT_STORED_WEIGHTS_H_

#include <optional>
#include <string>

#include "cpu/isa.h"
#include "ort/kernel.h"

namespace llmpack::ort {

constexpr int64_t kMostExperts = 1024;  // of a MoE

inline int64_t group_size_attribute(const NodeInfo& node) {
    const int64_t group_size = node.int_attribute("group_size");
    if (group_size != 32 && group_size != 64 && group_size != 128) {
        throw OpError("attribute group_size is " + std::to_string(group_size) + ", expected 32, 64 or 128");
    }
    return group_size;
}

// Of a MoE with a clamped SwiGLU.
inline std::optional<Clamp> clamp_attributes(const NodeInfo& node) {
    const auto alpha = node.optional_float_attribute("swiglu_alpha"),
               limit = node.optional_float_attribute("swiglu_limit");
    if (!alpha && !limit) return std::nullopt;
    if (!alpha || !limit) {
        throw OpError(
            "one of the attributes swiglu_alpha and swiglu_limit is missing, expected both or neither");
    }
    if (!(*limit >= 0.0f)) {
        throw OpError("attribute swiglu_limit is " + std::to_string(*limit) + ", expected at least 0");
    }
    return Clamp{*alpha, *limit};
}

constexpr const char* kTilesOfRows = "ceil(out_features / 16)";

// Refuses weights that are not those of [N, K]. first_axis: what the number of tiles is, in the error.
inline void check_float(const Tensor& weight, int64_t N, int64_t K, const char* first_axis = kTilesOfRows) {
    const int64_t tiles = (N + kTileRows - 1) / kTileRows;
    weight.expect_shape({tiles, K, kTileRows}, {"[", first_axis, ", in_features, 16]"});
}

// The same of weights and scales. PRECOND: group_size divides K.
inline void check_quantized(WeightType type, const Tensor& weight, const Tensor& scales, int64_t N, int64_t K,
                            int64_t group_size, const char* first_axis = kTilesOfRows) {
    const int64_t tiles = (N + kTileRows - 1) / kTileRows;
    if (type == WeightType::kQ4 || type == WeightType::kMXFP4) {
        weight.expect_shape({tiles, K / 8, kTileRows, 4}, {"[", first_axis, ", in_features / 8, 16, 4]"});
    } else if (type == WeightType::kQ6) {
        weight.expect_shape({tiles, K / 16, 3, kTileRows, 4},
                            {"[", first_axis, ", in_features / 16, 3, 16, 4]"});
    } else {
        weight.expect_shape({tiles, K / 4, kTileRows, 4}, {"[", first_axis, ", in_features / 4, 16, 4]"});
    }
    scales.expect_shape({tiles, K / group_size, kTileRows},
                        {"[", first_axis, ", in_features / group_size, 16]"});
}

}  // namespace llmpack::ort

#endif  // LLMPACK_ORT_STORED_WEIGHTS_H_
