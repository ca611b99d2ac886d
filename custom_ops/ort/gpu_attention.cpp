// PagedAttention of a GPU's graph.
#include <algorithm>

#include "ort/gpu_operator.h"
#include "ort/growth.h"
#include "ort/ops.h"

namespace llmpack::ort {
namespace {

struct GpuPagedAttention {
    static constexpr const char* kName = "PagedAttention";
    static constexpr Port kInputs[] = {
        {"qkv", kFloat16},         {"cos_sin", kFloat},      {"key_cache", kFloat16},
        {"value_cache", kFloat16}, {"slot_mapping", kInt32}, {"query_start", kInt32},
        {"seq_lens", kInt32},      {"block_table", kInt32},  {"sinks", kFloat, false, true}};
    static constexpr Port kOutputs[] = {{"out", kFloat16}};

    explicit GpuPagedAttention(const NodeInfo& node)
        : num_heads(node.size_attribute("num_heads")),
          num_kv_heads(node.size_attribute("num_kv_heads")),
          head_dim(node.size_attribute("head_dim")),
          block_size(node.size_attribute("block_size")),
          scale(node.float_attribute("scale")),
          window(node.size_attribute("window", kMaxSize)),
          growth(growth_of(node)),
          sinks(node, 8),
          multiprocessors(Launcher::current().device.multiprocessors) {
        for (size_t cache : {2, 3}) node.expect_no_constant(cache);
        Launcher& launcher = Launcher::current();
        write = launcher.operation(
            "cache_write", {{"num_heads", num_heads}, {"num_kv_heads", num_kv_heads}, {"head_dim", head_dim}},
            {{"qkv", kPointer},
             {"cos_sin", kPointer},
             {"key_cache", kPointer},
             {"value_cache", kPointer},
             {"slot_mapping", kPointer}});
        const gpu::Constants shape = {{"num_heads", num_heads},
                                      {"num_kv_heads", num_kv_heads},
                                      {"head_dim", head_dim},
                                      {"block_size", block_size}};
        // Kernels for sinks, or for queries that grow, have a constant that others lack: those of older
        // artifacts do.
        const auto maybe_with_sinks = [&](gpu::Constants constants) {
            if (sinks.is_there()) constants["has_sinks"] = 1;
            return constants;
        };
        const auto maybe_growing = [&](gpu::Constants constants) {
            if (growth) constants["has_growth"] = 1;
            return constants;
        };
        any = launcher.operation("attention", maybe_growing(maybe_with_sinks(shape)),
                                 {{"out", kPointer},
                                  {"qkv", kPointer},
                                  {"cos_sin", kPointer},
                                  {"key_cache", kPointer},
                                  {"value_cache", kPointer},
                                  {"query_start", kPointer},
                                  {"seq_lens", kPointer},
                                  {"block_table", kPointer},
                                  {"table_stride", kInteger},
                                  {"num_sequences", kInteger},
                                  {"scale", kNumber},
                                  {"window", kInteger},
                                  {"sinks", kPointer},
                                  {"llama_4_scaling_beta", kNumber},
                                  {"original_positions", kInteger}});
        split = launcher.operation("attention_split", maybe_growing(shape),
                                   {{"partial", kPointer},
                                    {"qkv", kPointer},
                                    {"cos_sin", kPointer},
                                    {"key_cache", kPointer},
                                    {"value_cache", kPointer},
                                    {"query_start", kPointer},
                                    {"seq_lens", kPointer},
                                    {"block_table", kPointer},
                                    {"table_stride", kInteger},
                                    {"num_splits", kInteger},
                                    {"scale", kNumber},
                                    {"window", kInteger},
                                    {"llama_4_scaling_beta", kNumber},
                                    {"original_positions", kInteger}});
        combine = launcher.operation(
            "attention_combine", maybe_with_sinks({{"num_heads", num_heads}, {"head_dim", head_dim}}),
            {{"out", kPointer}, {"partial", kPointer}, {"num_splits", kInteger}, {"sinks", kPointer}});
        int64_t most = 0;
        for (int64_t b = 1; b <= launcher.settings.max_sequences; b++)
            most = std::max(most, b * splits_of(b, kMostSplits));
        launcher.reserve(static_cast<size_t>(most * num_heads * (head_dim + 2)) * sizeof(float));
    }

    void compute(Context& context) const {
        const Tensor qkv = context.input(0), cos_sin = context.input(1), keys = context.input(2),
                     values = context.input(3), slot_mapping = context.input(4),
                     query_start = context.input(5), seq_lens = context.input(6),
                     block_table = context.input(7);
        cos_sin.expect_shape({kAnySize, head_dim}, "[tokens, head_dim]");
        const int64_t T = cos_sin.shape[0];
        qkv.expect_shape({T, (num_heads + 2 * num_kv_heads) * head_dim},
                         "[tokens, (num_heads + 2 * num_kv_heads) * head_dim]");
        keys.expect_shape({kAnySize, block_size, num_kv_heads, head_dim},
                          "[num_blocks, block_size, num_kv_heads, head_dim]");
        values.expect_shape({keys.shape[0], block_size, num_kv_heads, head_dim},
                            "[num_blocks, block_size, num_kv_heads, head_dim]");
        slot_mapping.expect_shape({T}, "[tokens]");
        seq_lens.expect_shape({kAnySize}, "[sequences]");
        const int64_t B = seq_lens.shape[0];
        query_start.expect_shape({B + 1}, "[sequences + 1]");
        block_table.expect_shape({B, kAnySize}, "[sequences, max_blocks]");
        const int64_t M = block_table.shape[1];
        const std::optional<Tensor> own_sinks = sinks.of(context);
        if (own_sinks) own_sinks->expect_shape({num_heads}, "[num_heads]");
        const void* sinks_data = own_sinks ? own_sinks->data : nullptr;
        const Growth own_growth = growth.value_or(Growth{});  // kernels without growth take neither number
        const int32_t original_positions = narrow(own_growth.original_positions);
        void* out = context.output_memory(0, {T, num_heads * head_dim});
        if (T == 0) return;
        const gpu::Stream stream = context.gpu_stream();
        write.launch({T, B}, {qkv.data, cos_sin.data, keys.data, values.data, slot_mapping.data}, stream);
        Launcher& launcher = Launcher::current();
        if (T == B && B <= launcher.settings.max_sequences) {
            const int64_t seen = std::min(M * block_size, window);
            const int64_t S = splits_of(B, (seen + kPositionsPerSplit - 1) / kPositionsPerSplit);
            const gpu::DevicePointer partial = launcher.workspace();
            split.launch({T, B, S},
                         {partial, qkv.data, cos_sin.data, keys.data, values.data, query_start.data,
                          seq_lens.data, block_table.data, narrow(M), narrow(S), scale, narrow(window),
                          own_growth.beta, original_positions},
                         stream);
            combine.launch({T, B, S}, {out, partial, narrow(S), sinks_data}, stream);
            return;
        }
        any.launch({T, B},
                   {out, qkv.data, cos_sin.data, keys.data, values.data, query_start.data, seq_lens.data,
                    block_table.data, narrow(M), narrow(B), scale, narrow(window), sinks_data,
                    own_growth.beta, original_positions},
                   stream);
    }

    // How many programs share the positions that are seen of one sequence and KV head: enough that every
    // multiprocessor has two. From shapes only, so that a captured graph stays right as sequences grow.
    int64_t splits_of(int64_t sequences, int64_t useful) const {
        const int64_t programs = sequences * num_kv_heads;
        const int64_t wanted = (2 * multiprocessors + programs - 1) / programs;
        return std::max<int64_t>(1, std::min({wanted, useful, kMostSplits}));
    }

    static constexpr int64_t kMostSplits = 64;         // FORMAT.md 8.4
    static constexpr int64_t kPositionsPerSplit = 64;  // fewer are not worth a program
    int64_t num_heads, num_kv_heads, head_dim, block_size;
    float scale;
    int64_t window;
    std::optional<Growth> growth;
    OptionalGpuInput sinks;
    int64_t multiprocessors;
    Operation write, any, split, combine;
};

}  // namespace

std::vector<const OrtCustomOp*> gpu_attention_ops() { return gpu_ops_of<GpuPagedAttention>(); }

}  // namespace llmpack::ort
