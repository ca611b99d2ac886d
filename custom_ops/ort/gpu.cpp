// The operators of a GPU's graph (FORMAT.md 5.9), for ONNX Runtime's CUDA and ROCm providers: checks of
// shapes, and the launches of 8.4. A node's kernels are found and loaded when its session is made; a step
// launches and nothing else. Tables of indices stay on the device and are not checked here: rank 0's
// scheduler makes them.
#include <algorithm>

#include "gpu/collectives.h"
#include "gpu/launcher.h"
#include "ort/kernel.h"
#include "ort/ops.h"

namespace llmpack::ort {
namespace {

using gpu::Argument;
using gpu::Launcher;
using gpu::Operation;
using gpu::Step;
using gpu::Value;

constexpr auto kPointer = Argument::kPointer;
constexpr auto kInteger = Argument::kInteger;
constexpr auto kNumber = Argument::kFloat;

int32_t narrow(int64_t number) { return static_cast<int32_t>(number); }

void copy_if_apart(const void* from, void* to, size_t bytes, gpu::Stream stream) {
    if (from == to) return;
    const gpu::Driver& driver = Launcher::current().driver;
    driver.check(driver.call.copy_within(reinterpret_cast<gpu::DevicePointer>(to),
                                         reinterpret_cast<gpu::DevicePointer>(from), bytes, stream),
                 "copying the residual");
}

gpu::Collectives& collectives() {
    auto& made = Launcher::current().collectives;
    if (made == nullptr) {
        throw OpError(
            "the ranks' GPUs are not joined, expected llmpack_ops_gpu_share before a session is made", kFail);
    }
    return *made;
}

// How weights are stored (FORMAT.md 4.3).
enum class Storage { kF16, kQ8, kQ6, kQ4 };

struct EmbeddingF16 {
    static constexpr const char* kName = "EmbeddingF16";
    static constexpr Port kInputs[] = {{"ids", kInt32}, {"weight", kFloat16}};
    static constexpr Port kOutputs[] = {{"y", kFloat}};

    explicit EmbeddingF16(const NodeInfo& node)
        : width(node.int_attribute("in_features")),
          embed(Launcher::current().operation("embed_f16", {{"in_features", width}},
                                              {{"ids", kPointer}, {"weight", kPointer}, {"y", kPointer}})) {}

    void compute(Context& context) const {
        const Tensor ids = context.input(0), weight = context.input(1);
        ids.expect_shape({-1}, "[tokens]");
        weight.expect_shape({-1, width}, "[vocab_size, hidden_size]");
        const int64_t T = ids.shape[0];
        float* y = context.output(0, {T, width});
        embed.launch({T}, {ids.data, weight.data, y}, context.gpu_stream());
    }

    int64_t width;
    Operation embed;
};

template <Storage storage>
struct EmbeddingQ {
    static constexpr const char* kName = storage == Storage::kQ8 ? "EmbeddingQ8" : "EmbeddingQ6";
    static constexpr Port kInputs[] = {{"ids", kInt32}, {"weight", kUInt8}, {"scales", kFloat16}};
    static constexpr Port kOutputs[] = {{"y", kFloat}};

    explicit EmbeddingQ(const NodeInfo& node)
        : width(node.int_attribute("in_features")),
          embed(Launcher::current().operation(
              storage == Storage::kQ8 ? "embed_q8" : "embed_q6",
              {{"in_features", width}, {"group_size", node.int_attribute("group_size")}},
              {{"ids", kPointer}, {"weight", kPointer}, {"scales", kPointer}, {"y", kPointer}})) {}

    void compute(Context& context) const {
        const Tensor ids = context.input(0), weight = context.input(1), scales = context.input(2);
        ids.expect_shape({-1}, "[tokens]");
        const int64_t T = ids.shape[0];
        float* y = context.output(0, {T, width});
        embed.launch({T}, {ids.data, weight.data, scales.data, y}, context.gpu_stream());
    }

    int64_t width;
    Operation embed;
};

struct GpuRMSNorm {
    static constexpr const char* kName = "RMSNormF16";
    static constexpr Port kInputs[] = {{"x", kFloat}, {"weight", kFloat}};
    static constexpr Port kOutputs[] = {{"y", kFloat16}};

    explicit GpuRMSNorm(const NodeInfo& node)
        : epsilon(node.float_attribute("epsilon")),
          width(node.int_attribute("in_features")),
          norm(Launcher::current().operation(
              "rms_norm", {{"in_features", width}},
              {{"x", kPointer}, {"weight", kPointer}, {"y", kPointer}, {"epsilon", kNumber}})) {}

    void compute(Context& context) const {
        const Tensor x = context.input(0), weight = context.input(1);
        x.expect_shape({-1, width}, "[tokens, hidden_size]");
        weight.expect_shape({width}, "[hidden_size]");
        const int64_t T = x.shape[0];
        void* y = context.output_memory(0, {T, width});
        norm.launch({T}, {x.data, weight.data, y, epsilon}, context.gpu_stream());
    }

    float epsilon;
    int64_t width;
    Operation norm;
};

Operation add_rms_norm(int64_t width) {
    return Launcher::current().operation("add_rms_norm", {{"in_features", width}},
                                         {{"x", kPointer},
                                          {"residual", kPointer},
                                          {"weight", kPointer},
                                          {"y", kPointer},
                                          {"epsilon", kNumber}});
}

struct GpuAddRMSNorm {
    static constexpr const char* kName = "AddRMSNorm";
    static constexpr Port kInputs[] = {{"x", kFloat16}, {"residual", kFloat}, {"weight", kFloat}};
    static constexpr Port kOutputs[] = {{"y", kFloat16}, {"sum", kFloat}};
    static constexpr InPlace kInPlace[] = {{1, 1}};

    explicit GpuAddRMSNorm(const NodeInfo& node)
        : epsilon(node.float_attribute("epsilon")),
          width(node.int_attribute("in_features")),
          norm(add_rms_norm(width)) {}

    void compute(Context& context) const {
        const Tensor x = context.input(0), residual = context.input(1), weight = context.input(2);
        x.expect_shape({-1, width}, "[tokens, hidden_size]");
        const int64_t T = x.shape[0];
        residual.expect_shape({T, width}, "[tokens, hidden_size]");
        weight.expect_shape({width}, "[hidden_size]");
        void* y = context.output_memory(0, {T, width});
        float* sum = context.output(1, {T, width});
        const gpu::Stream stream = context.gpu_stream();
        copy_if_apart(residual.data, sum, static_cast<size_t>(T * width) * sizeof(float), stream);
        norm.launch({T}, {x.data, sum, weight.data, y, epsilon}, stream);
    }

    float epsilon;
    int64_t width;
    Operation norm;
};

struct GpuSwiGLU {
    static constexpr const char* kName = "SwiGLU";
    static constexpr Port kInputs[] = {{"gate_up", kFloat16}};
    static constexpr Port kOutputs[] = {{"y", kFloat16}};

    explicit GpuSwiGLU(const NodeInfo& node)
        : width(node.int_attribute("in_features")),
          swiglu(Launcher::current().operation("swiglu", {{"in_features", width}},
                                               {{"gate_up", kPointer}, {"y", kPointer}})) {}

    void compute(Context& context) const {
        const Tensor gate_up = context.input(0);
        gate_up.expect_shape({-1, 2 * width}, "[tokens, 2 * intermediate_size]");
        const int64_t T = gate_up.shape[0];
        void* y = context.output_memory(0, {T, width});
        swiglu.launch({T}, {gate_up.data, y}, context.gpu_stream());
    }

    int64_t width;
    Operation swiglu;
};

// y is float16 between operators and float32 for logits. ONNX Runtime tells operators of one name apart by
// the types of their inputs only, so the name says the type of y where the inputs do not.
template <ElementType type>
struct GpuMatMulF16 {
    static constexpr const char* kName = type == kFloat ? "MatMulF16F32" : "MatMulF16";
    static constexpr Port kInputs[] = {{"x", kFloat16}, {"weight", kFloat16}};
    static constexpr Port kOutputs[] = {{"y", type}};

    explicit GpuMatMulF16(const NodeInfo& node)
        : in_features(node.int_attribute("in_features")),
          out_features(node.int_attribute("out_features")),
          matmul(Launcher::current().operation(
              "matmul_f16",
              {{"in_features", in_features},
               {"out_features", out_features},
               {"y_bits", type == kFloat ? 32 : 16}},
              {{"x", kPointer}, {"weight", kPointer}, {"y", kPointer}, {"num_rows", kInteger}})) {}

    void compute(Context& context) const {
        const Tensor x = context.input(0), weight = context.input(1);
        x.expect_shape({-1, in_features}, "[tokens, in_features]");
        const int64_t T = x.shape[0];
        void* y = context.output_memory(0, {T, out_features});
        matmul.launch({T}, {x.data, weight.data, y, narrow(T)}, context.gpu_stream());
    }

    int64_t in_features, out_features;
    Operation matmul;
};

template <Storage storage, ElementType type>
struct GpuMatMulQ {
    static constexpr const char* kName = type == kFloat ? (storage == Storage::kQ8   ? "MatMulQ8F32"
                                                           : storage == Storage::kQ6 ? "MatMulQ6F32"
                                                                                     : "MatMulQ4F32")
                                                        : (storage == Storage::kQ8   ? "MatMulQ8"
                                                           : storage == Storage::kQ6 ? "MatMulQ6"
                                                                                     : "MatMulQ4");
    static constexpr Port kInputs[] = {{"x", kFloat16}, {"weight", kUInt8}, {"scales", kFloat16}};
    static constexpr Port kOutputs[] = {{"y", type}};

    explicit GpuMatMulQ(const NodeInfo& node)
        : in_features(node.int_attribute("in_features")),
          out_features(node.int_attribute("out_features")),
          matmul(Launcher::current().operation(storage == Storage::kQ8   ? "matmul_q8"
                                               : storage == Storage::kQ6 ? "matmul_q6"
                                                                         : "matmul_q4",
                                               {{"in_features", in_features},
                                                {"out_features", out_features},
                                                {"group_size", node.int_attribute("group_size")},
                                                {"y_bits", type == kFloat ? 32 : 16}},
                                               {{"x", kPointer},
                                                {"weight", kPointer},
                                                {"scales", kPointer},
                                                {"y", kPointer},
                                                {"num_rows", kInteger}})) {}

    void compute(Context& context) const {
        const Tensor x = context.input(0), weight = context.input(1), scales = context.input(2);
        x.expect_shape({-1, in_features}, "[tokens, in_features]");
        const int64_t T = x.shape[0];
        void* y = context.output_memory(0, {T, out_features});
        matmul.launch({T}, {x.data, weight.data, scales.data, y, narrow(T)}, context.gpu_stream());
    }

    int64_t in_features, out_features;
    Operation matmul;
};

struct GpuPagedAttention {
    static constexpr const char* kName = "PagedAttention";
    static constexpr Port kInputs[] = {
        {"qkv", kFloat16},        {"cos_sin", kFloat},     {"key_cache", kFloat16}, {"value_cache", kFloat16},
        {"slot_mapping", kInt32}, {"query_start", kInt32}, {"seq_lens", kInt32},    {"block_table", kInt32}};
    static constexpr Port kOutputs[] = {{"out", kFloat16}};

    explicit GpuPagedAttention(const NodeInfo& node)
        : num_heads(node.int_attribute("num_heads")),
          num_kv_heads(node.int_attribute("num_kv_heads")),
          head_dim(node.int_attribute("head_dim")),
          block_size(node.int_attribute("block_size")),
          scale(node.float_attribute("scale")),
          multiprocessors(Launcher::current().device.multiprocessors) {
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
        any = launcher.operation("attention", shape,
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
                                  {"scale", kNumber}});
        split = launcher.operation("attention_split", shape,
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
                                    {"scale", kNumber}});
        combine = launcher.operation("attention_combine", {{"num_heads", num_heads}, {"head_dim", head_dim}},
                                     {{"out", kPointer}, {"partial", kPointer}, {"num_splits", kInteger}});
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
        cos_sin.expect_shape({-1, head_dim}, "[tokens, head_dim]");
        const int64_t T = cos_sin.shape[0];
        qkv.expect_shape({T, (num_heads + 2 * num_kv_heads) * head_dim},
                         "[tokens, (num_heads + 2 * num_kv_heads) * head_dim]");
        keys.expect_shape({-1, block_size, num_kv_heads, head_dim},
                          "[num_blocks, block_size, num_kv_heads, head_dim]");
        values.expect_shape({keys.shape[0], block_size, num_kv_heads, head_dim},
                            "[num_blocks, block_size, num_kv_heads, head_dim]");
        slot_mapping.expect_shape({T}, "[tokens]");
        seq_lens.expect_shape({-1}, "[sequences]");
        const int64_t B = seq_lens.shape[0];
        query_start.expect_shape({B + 1}, "[sequences + 1]");
        block_table.expect_shape({B, -1}, "[sequences, max_blocks]");
        const int64_t M = block_table.shape[1];
        void* out = context.output_memory(0, {T, num_heads * head_dim});
        const gpu::Stream stream = context.gpu_stream();
        write.launch({T, B}, {qkv.data, cos_sin.data, keys.data, values.data, slot_mapping.data}, stream);
        Launcher& launcher = Launcher::current();
        if (T == B && B <= launcher.settings.max_sequences) {
            const int64_t S = splits_of(B, (M * block_size + kPositionsPerSplit - 1) / kPositionsPerSplit);
            const gpu::DevicePointer partial = launcher.workspace();
            split.launch({T, B, S},
                         {partial, qkv.data, cos_sin.data, keys.data, values.data, query_start.data,
                          seq_lens.data, block_table.data, narrow(M), narrow(S), scale},
                         stream);
            combine.launch({T, B, S}, {out, partial, narrow(S)}, stream);
            return;
        }
        any.launch({T, B},
                   {out, qkv.data, cos_sin.data, keys.data, values.data, query_start.data, seq_lens.data,
                    block_table.data, narrow(M), narrow(B), scale},
                   stream);
    }

    // How many programs share the positions of one sequence and KV head: enough that every multiprocessor has
    // two. From shapes only, so that a captured graph stays right as sequences grow.
    int64_t splits_of(int64_t sequences, int64_t useful) const {
        const int64_t programs = sequences * num_kv_heads;
        const int64_t wanted = (2 * multiprocessors + programs - 1) / programs;
        return std::max<int64_t>(1, std::min({wanted, useful, kMostSplits}));
    }

    static constexpr int64_t kMostSplits = 64;         // FORMAT.md 8.4
    static constexpr int64_t kPositionsPerSplit = 64;  // fewer are not worth a program
    int64_t num_heads, num_kv_heads, head_dim, block_size;
    float scale;
    int64_t multiprocessors;
    Operation write, any, split, combine;
};

// A one-shot kernel and where it meets its peers; absent where the ranks have no mapped memory.
struct OneShot {
    Operation operation;
    const gpu::Meeting* meeting = nullptr;

    void find(const char* op, gpu::Constants constants, std::initializer_list<Argument> arguments,
              int64_t row_bytes) {
        gpu::Collectives& ranks = collectives();
        const gpu::KernelFile& file = Launcher::current().file;
        for (const gpu::KernelRecord& record : file.kernels) {
            if (record.op != op) continue;
            operation = Launcher::current().operation(op, constants, arguments);
            meeting = ranks.meeting(row_bytes, operation.most_rows());
            return;
        }
    }
    bool takes(int64_t rows) const { return meeting != nullptr && rows <= meeting->max_rows; }
};

struct GpuAllReduce {
    static constexpr const char* kName = "AllReduce";
    static constexpr Port kInputs[] = {{"x", kFloat16}};
    static constexpr Port kOutputs[] = {{"y", kFloat16}};
    static constexpr InPlace kInPlace[] = {{0, 0}};

    explicit GpuAllReduce(const NodeInfo& node) : width(node.int_attribute("in_features")) {
        one_shot.find("all_reduce", {{"in_features", width}, {"ranks", collectives().size}},
                      {{"x", kPointer},
                       {"y", kPointer},
                       {"buffers", kPointer},
                       {"flags", kPointer},
                       {"epochs", kPointer},
                       {"rank", kInteger}},
                      width * 2);
    }

    void compute(Context& context) const {
        const Tensor x = context.input(0);
        x.expect_shape({-1, width}, "[tokens, hidden_size]");
        const int64_t T = x.shape[0];
        void* y = context.output_memory(0, {T, width});
        gpu::Collectives& ranks = collectives();
        if (!one_shot.takes(T)) return ranks.all_reduce(x.data, y, T * width, context.gpu_stream());
        const gpu::Meeting& m = *one_shot.meeting;
        one_shot.operation.launch({T}, {x.data, y, m.buffers, m.flags, m.epochs, narrow(ranks.rank)},
                                  context.gpu_stream());
    }

    int64_t width;
    OneShot one_shot;
};

struct GpuAllReduceAddRMSNorm {
    static constexpr const char* kName = "AllReduceAddRMSNorm";
    static constexpr Port kInputs[] = {{"x", kFloat16}, {"residual", kFloat}, {"weight", kFloat}};
    static constexpr Port kOutputs[] = {{"y", kFloat16}, {"sum", kFloat}};
    static constexpr InPlace kInPlace[] = {{1, 1}};

    explicit GpuAllReduceAddRMSNorm(const NodeInfo& node)
        : epsilon(node.float_attribute("epsilon")),
          width(node.int_attribute("in_features")),
          norm(add_rms_norm(width)) {
        one_shot.find("all_reduce_add_rms_norm", {{"in_features", width}, {"ranks", collectives().size}},
                      {{"x", kPointer},
                       {"residual", kPointer},
                       {"weight", kPointer},
                       {"y", kPointer},
                       {"buffers", kPointer},
                       {"flags", kPointer},
                       {"epochs", kPointer},
                       {"rank", kInteger},
                       {"epsilon", kNumber}},
                      width * 2);
        Launcher& launcher = Launcher::current();
        launcher.reserve(static_cast<size_t>(launcher.settings.max_rows * width) * 2);
    }

    void compute(Context& context) const {
        const Tensor x = context.input(0), residual = context.input(1), weight = context.input(2);
        x.expect_shape({-1, width}, "[tokens, hidden_size]");
        const int64_t T = x.shape[0];
        residual.expect_shape({T, width}, "[tokens, hidden_size]");
        weight.expect_shape({width}, "[hidden_size]");
        void* y = context.output_memory(0, {T, width});
        float* sum = context.output(1, {T, width});
        const gpu::Stream stream = context.gpu_stream();
        gpu::Collectives& ranks = collectives();
        copy_if_apart(residual.data, sum, static_cast<size_t>(T * width) * sizeof(float), stream);
        if (one_shot.takes(T)) {
            const gpu::Meeting& m = *one_shot.meeting;
            one_shot.operation.launch(
                {T}, {x.data, sum, weight.data, y, m.buffers, m.flags, m.epochs, narrow(ranks.rank), epsilon},
                stream);
            return;
        }
        const Launcher& launcher = Launcher::current();
        if (T > launcher.settings.max_rows) {
            throw OpError("a step of " + std::to_string(T) + " tokens, expected at most " +
                          std::to_string(launcher.settings.max_rows));
        }
        void* reduced = reinterpret_cast<void*>(launcher.workspace());
        ranks.all_reduce(x.data, reduced, T * width, stream);
        norm.launch({T}, {reduced, sum, weight.data, y, epsilon}, stream);
    }

    float epsilon;
    int64_t width;
    Operation norm;
    OneShot one_shot;
};

struct GpuTopK {
    static constexpr const char* kName = "TopK";
    static constexpr Port kInputs[] = {{"logits", kFloat}};
    static constexpr Port kOutputs[] = {{"top", kInt64}};

    explicit GpuTopK(const NodeInfo& node)
        : columns(node.int_attribute("in_features")),
          k(node.int_attribute("k")),
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
        logits.expect_shape({-1, columns}, "[rows, columns of this rank]");
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

template <class... Ops>
std::vector<const OrtCustomOp*> all_of() {
    std::vector<const OrtCustomOp*> all;
    const auto add = [&](const std::vector<const OrtCustomOp*>& ops) {
        all.insert(all.end(), ops.begin(), ops.end());
    };
    (add(gpu_custom_ops<Ops>()), ...);
    return all;
}

}  // namespace

std::vector<const OrtCustomOp*> gpu_ops() {
    return all_of<EmbeddingF16, EmbeddingQ<Storage::kQ8>, EmbeddingQ<Storage::kQ6>, GpuRMSNorm, GpuAddRMSNorm,
                  GpuSwiGLU, GpuMatMulF16<kFloat16>, GpuMatMulF16<kFloat>, GpuMatMulQ<Storage::kQ8, kFloat16>,
                  GpuMatMulQ<Storage::kQ8, kFloat>, GpuMatMulQ<Storage::kQ6, kFloat16>,
                  GpuMatMulQ<Storage::kQ6, kFloat>, GpuMatMulQ<Storage::kQ4, kFloat16>,
                  GpuMatMulQ<Storage::kQ4, kFloat>, GpuPagedAttention, GpuAllReduce, GpuAllReduceAddRMSNorm,
                  GpuTopK>();
}

}  // namespace llmpack::ort
