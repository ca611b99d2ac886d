// TopK of a GPU's graph: the likeliest tokens of a rank's columns.
#include <algorithm>

#include "ort/gpu_operator.h"
#include "ort/ops.h"

namespace llmpack::ort {
namespace {

struct GpuTopK {
    static constexpr const char* kName = "TopK";
    static constexpr Port kInputs[] = {{"logits", kFloat}};
    static constexpr Port kOutputs[] = {{"top", kInt64}};

    explicit GpuTopK(const NodeInfo& node)
        : columns(node.size_attribute("in_features")),
          k(node.size_attribute("k")),
          first_id(node.int_attribute("first_id")),
          known(std::clamp<int64_t>(node.int_attribute("vocab_size") - first_id, 0, columns)) {
        Launcher& launcher = Launcher::current();
        first = launcher.operation("top_k_first", {{"in_features", columns}, {"k", k}},
                                   {{"logits", kPointer},
                                    {"keys", kPointer},
                                    {"sums", kPointer},
                                    {"first_id", kInteger},
                                    {"num_columns", kInteger}},
                                   {"chunk"});
        last = launcher.operation("top_k_last", {{"in_features", columns}, {"k", k}},
                                  {{"keys", kPointer}, {"sums", kPointer}, {"top", kPointer}}, {"chunk"});
        const int64_t chunk = first.constant("chunk");
        parts = (columns + chunk - 1) / chunk;
        launcher.reserve(static_cast<size_t>(launcher.settings.max_rows) * bytes_of_row());
    }

    void compute(Context& context) const {
        const Tensor logits = context.input(0);
        logits.expect_shape({kAnySize, columns}, "[rows, columns of this rank]");
        const int64_t R = logits.shape[0];
        const Launcher& launcher = Launcher::current();
        if (R > launcher.settings.max_rows) {
            throw OpError("logits of " + std::to_string(R) + " rows, expected at most " +
                          std::to_string(launcher.settings.max_rows));
        }
        void* top = context.output_memory(0, {R, k + 1});
        const gpu::DevicePointer keys = launcher.workspace();
        const gpu::DevicePointer sums = keys + align(static_cast<uint64_t>(R * parts * k) * sizeof(int64_t));
        const gpu::Stream stream = context.gpu_stream();
        first.launch({R}, {logits.data, keys, sums, narrow(first_id), narrow(known)}, stream);
        last.launch({R}, {keys, sums, top}, stream);
    }

    static uint64_t align(uint64_t bytes) { return (bytes + 15) / 16 * 16; }
    size_t bytes_of_row() const {
        return align(static_cast<uint64_t>(parts * k) * sizeof(int64_t)) +
               align(static_cast<uint64_t>(parts) * sizeof(float));
    }

    int64_t columns, k, first_id, known, parts = 0;
    Operation first, last;
};

}  // namespace

std::vector<const OrtCustomOp*> gpu_top_k_ops() { return gpu_ops_of<GpuTopK>(); }

}  // namespace llmpack::ort
