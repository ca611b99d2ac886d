// What operators that multiply with row tiles share: how much of a loop is worth a call, and memory to work
// in.
#ifndef LLMPACK_ORT_PRODUCTS_H_
#define LLMPACK_ORT_PRODUCTS_H_

#include "cpu/isa.h"
#include "ort/kernel.h"

namespace llmpack::ort {

// Bytes of a tile of K input features, without scales.
constexpr int64_t tile_bytes(WeightType type, int64_t K) {
    const int64_t bits = type == WeightType::kF32   ? 32
                         : type == WeightType::kF16 ? 16
                         : type == WeightType::kQ8  ? 8
                         : type == WeightType::kQ6  ? 6
                                                    : 4;
    return K * kTileRows * bits / 8;
}

// Tiles that are worth a call of their own: about 32 KB of weights, or, with many tokens, as much work.
// Never one alone: the kernels take tiles in pairs.
inline int64_t tile_grain(int64_t bytes, int64_t tokens) {
    const int64_t work = bytes * (1 + tokens / 8);
    return 2 * (work >= 16384 ? 1 : 16384 / (work < 1 ? 1 : work));
}

// Floats of a thread's workspace, from the beginning of a pair of cache lines on.
template <class Tag>
float* line_workspace(int64_t count) {
    constexpr size_t kBytes = 128;
    const float* raw = workspace<float, Tag>(static_cast<size_t>(count) + kBytes / sizeof(float));
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(raw) + kBytes - 1) / kBytes * kBytes);
}

// Memory for x [M, K], quantized. It is the thread's only one.
inline QuantizedActivations activations_workspace(int64_t M, int64_t K, int64_t group_size) {
    struct Values;
    struct Scales;
    struct Sums;
    const size_t values = static_cast<size_t>(M * K), groups = static_cast<size_t>(M * (K / group_size));
    return {workspace<int8_t, Values>(values),
            workspace<float, Scales>(groups),
            workspace<int32_t, Sums>(groups),
            M,
            K,
            group_size};
}

// What a gated product of up to M tokens needs for each place of its loop, which is made before the loop, in
// which nothing may fail. In whole pairs of cache lines: no place has a part of another's, and no vector is
// in two.
class GatingScratch {
  public:
    GatingScratch(int64_t M, int64_t places) : apart_(M * 2 * kTileRows) {
        struct Scratch;
        if (M > 2) all_ = line_workspace<Scratch>(places * apart_);
    }
    float* of(int64_t place) const { return all_ == nullptr ? nullptr : all_ + place * apart_; }

  private:
    int64_t apart_;
    float* all_ = nullptr;
};

}  // namespace llmpack::ort

#endif  // LLMPACK_ORT_PRODUCTS_H_
