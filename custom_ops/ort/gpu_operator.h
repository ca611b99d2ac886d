// What the operators of a GPU's graph (FORMAT.md 5.9) have in common, for ONNX Runtime's CUDA and ROCm
// providers: they check shapes and launch as 8.4 says. A node's kernels are found and loaded when its session
// is made; a step launches and nothing else. Tables of indices stay on the device and are not checked: rank
// 0's scheduler makes them.
#ifndef LLMPACK_ORT_GPU_OPERATOR_H_
#define LLMPACK_ORT_GPU_OPERATOR_H_

#include <optional>
#include <vector>

#include "gpu/launcher.h"
#include "ort/kernel.h"

namespace llmpack::ort {

using gpu::Argument;
using gpu::Launcher;
using gpu::Operation;

constexpr auto kPointer = Argument::kPointer;
constexpr auto kInteger = Argument::kInteger;
constexpr auto kNumber = Argument::kFloat;

inline int32_t narrow(int64_t number) { return static_cast<int32_t>(number); }

// An input that a node may lack. Asked for at each call: nobody says on which side a constant lies while the
// kernel is made.
class OptionalGpuInput {
  public:
    OptionalGpuInput(const NodeInfo& node, size_t index) : index_(index), is_there_(node.has_input(index)) {}
    bool is_there() const { return is_there_; }
    // Null: the node has none.
    std::optional<Tensor> of(const Context& context) const {
        return is_there_ ? std::optional(context.input(index_)) : std::nullopt;
    }

  private:
    size_t index_;
    bool is_there_;
};

// Of both providers.
template <class... Ops>
std::vector<const OrtCustomOp*> gpu_ops_of() {
    std::vector<const OrtCustomOp*> all;
    const auto add = [&](const std::vector<const OrtCustomOp*>& ops) {
        all.insert(all.end(), ops.begin(), ops.end());
    };
    (add(gpu_custom_ops<Ops>()), ...);
    return all;
}

}  // namespace llmpack::ort

#endif  // LLMPACK_ORT_GPU_OPERATOR_H_
