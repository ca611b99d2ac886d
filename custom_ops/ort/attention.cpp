// PagedAttention: checks of FORMAT.md 3.2 and 5.5, and the division of work. Every index that the kernel will
// follow is checked here, so that a wrong table is an error and never an access outside the cache.
#include <algorithm>
#include <cmath>

#include "cpu/isa.h"
#include "ort/growth.h"
#include "ort/kernel.h"
#include "ort/ops.h"

namespace llmpack::ort {
namespace {

struct PagedAttentionOp {
    static constexpr const char* kName = "PagedAttention";
    // kAny for the caches: float32 and float16 share one registration, compute() tells them apart.
    static constexpr Port kInputs[] = {
        {"qkv", kFloat},       {"cos_sin", kFloat},      {"key_cache", kAny},
        {"value_cache", kAny}, {"slot_mapping", kInt32}, {"query_start", kInt32},
        {"seq_lens", kInt32},  {"block_table", kInt32},  {"sinks", kFloat, false, true}};
    static constexpr Port kOutputs[] = {{"out", kFloat}};

    explicit PagedAttentionOp(const NodeInfo& node)
        : num_heads(node.size_attribute("num_heads")),
          num_kv_heads(node.size_attribute("num_kv_heads")),
          window(node.size_attribute("window", kMaxSize)),
          scale(node.float_attribute("scale")),
          growth(growth_of(node)),
          sinks(node, 8) {
        if (num_heads % num_kv_heads != 0) {
            throw OpError("num_heads is " + std::to_string(num_heads) + " and num_kv_heads " +
                          std::to_string(num_kv_heads) + ", expected a multiple");
        }
        for (size_t cache : {2, 3}) node.expect_no_constant(cache);
    }

    void compute(Context& context) const {
        const Tensor qkv = context.input(0), cos_sin = context.input(1), keys = context.input(2),
                     values = context.input(3), slot_mapping = context.input(4),
                     query_start = context.input(5), seq_lens = context.input(6),
                     block_table = context.input(7);
        if (keys.type != kFloat && keys.type != kFloat16) {
            throw OpError("input key_cache is of neither float32 nor float16, expected one of them");
        }
        if (values.type != keys.type) {
            throw OpError("inputs key_cache and value_cache are of different types, expected one type");
        }
        cos_sin.expect_shape({kAnySize, kAnySize}, "[tokens, head_dim]");
        const int64_t T = cos_sin.shape[0], D = cos_sin.shape[1];
        if (D <= 0 || D % 2 != 0 || D > kMaxHeadDim) {
            throw OpError("input cos_sin has " + std::to_string(D) +
                          " columns (head_dim), expected an even number up to " +
                          std::to_string(kMaxHeadDim));
        }
        qkv.expect_shape({T, (num_heads + 2 * num_kv_heads) * D},
                         "[tokens, (num_heads + 2 * num_kv_heads) * head_dim]");
        keys.expect_shape({kAnySize, num_kv_heads, D, kAnySize},
                          "[num_blocks, num_kv_heads, head_dim, block_size]");
        const int64_t num_blocks = keys.shape[0], block_size = keys.shape[3];
        if (block_size <= 0 || block_size % kPositionGroup != 0 || block_size > kMaxSize) {
            throw OpError("input key_cache has blocks of " + std::to_string(block_size) +
                          " positions, expected a multiple of " + std::to_string(kPositionGroup) + " up to " +
                          std::to_string(kMaxSize));
        }
        values.expect_shape({num_blocks, num_kv_heads, block_size, D},
                            "[num_blocks, num_kv_heads, block_size, head_dim]");
        slot_mapping.expect_shape({T}, "[tokens]");
        seq_lens.expect_shape({kAnySize}, "[sequences]");
        const int64_t B = seq_lens.shape[0];
        query_start.expect_shape({B + 1}, "[sequences + 1]");
        block_table.expect_shape({B, kAnySize}, "[sequences, max_blocks]");
        const int64_t max_blocks = block_table.shape[1];
        const std::optional<Tensor> own_sinks = sinks.of(context);
        if (own_sinks) own_sinks->expect_shape({num_heads}, "[num_heads]");

        struct Sequences;
        int32_t* token_sequence = workspace<int32_t, Sequences>(static_cast<size_t>(T));
        check_tables(slot_mapping.as<int32_t>(), query_start.as<int32_t>(), seq_lens.as<int32_t>(),
                     block_table.as<int32_t>(), T, B, max_blocks, num_blocks, block_size, token_sequence);
        const float* const factors =
            growth ? growth_factors(query_start.as<int32_t>(), seq_lens.as<int32_t>(), T, B) : nullptr;

        struct Tiles;
        int32_t* tile_starts = workspace<int32_t, Tiles>(static_cast<size_t>(T));
        const int64_t tile_tokens = attention_tile_tokens(D, num_heads / num_kv_heads);
        int64_t tiles = 0;
        for (int64_t b = 0; b < B; b++) {
            const int64_t end = query_start.as<int32_t>()[b + 1];
            for (int64_t t = query_start.as<int32_t>()[b]; t < end; t += tile_tokens)
                tile_starts[tiles++] = static_cast<int32_t>(t);
        }

        float* out = context.output(0, {T, num_heads * D});
        const PagedAttention args{qkv.as<float>(),
                                  cos_sin.as<float>(),
                                  keys.data,
                                  values.data,
                                  slot_mapping.as<int32_t>(),
                                  query_start.as<int32_t>(),
                                  seq_lens.as<int32_t>(),
                                  block_table.as<int32_t>(),
                                  own_sinks ? own_sinks->as<float>() : nullptr,
                                  factors,
                                  token_sequence,
                                  tile_starts,
                                  tile_tokens,
                                  out,
                                  keys.type == kFloat16 ? CacheType::kF16 : CacheType::kF32,
                                  num_heads,
                                  num_kv_heads,
                                  D,
                                  block_size,
                                  max_blocks,
                                  window,
                                  scale,
                                  weight_fetch()};
        const Kernels& k = context.kernels;
        // All keys and values are in the cache before any token reads them.
        context.parallel_for(T, 16, [&](int64_t begin, int64_t end) { k.attention_write(args, begin, end); });
        // Items are worth a call of their own at 64K multiply-adds, some 4 us. KV heads of one tile go
        // together, as they lie side by side in the cache, if that leaves work for two threads.
        int64_t longest = 1;
        for (int64_t b = 0; b < B; b++) longest = std::max<int64_t>(longest, seq_lens.as<int32_t>()[b]);
        longest = std::min(longest, window);
        const int64_t work = longest * std::min(tile_tokens, T) * (num_heads / num_kv_heads) * D * 2;
        const int64_t worthwhile = 1 + 65536 / std::max<int64_t>(work, 1);
        const int64_t neighbours =
            std::min(kAttentionHeadsTogether, std::max<int64_t>(1, tiles * num_kv_heads / 2));
        context.parallel_for(tiles * num_kv_heads, std::max(worthwhile, neighbours),
                             [&](int64_t begin, int64_t end) { k.attention_read(args, begin, end); });
    }

    // [T], for each token's query. PRECOND: growth, and check_tables found nothing.
    const float* growth_factors(const int32_t* query_start, const int32_t* seq_lens, int64_t T,
                                int64_t B) const {
        struct Factors;
        float* factors = workspace<float, Factors>(static_cast<size_t>(T));
        for (int64_t b = 0; b < B; b++) {
            const int64_t end = query_start[b + 1];
            for (int64_t t = query_start[b]; t < end; t++) {
                const int64_t steps = (seq_lens[b] - (end - t)) / growth->original_positions;
                factors[t] = static_cast<float>(1 + growth->beta * std::log1p(static_cast<double>(steps)));
            }
        }
        return factors;
    }

    // Throws on the first index outside its range, and fills token_sequence [T].
    static void check_tables(const int32_t* slot_mapping, const int32_t* query_start, const int32_t* seq_lens,
                             const int32_t* block_table, int64_t T, int64_t B, int64_t max_blocks,
                             int64_t num_blocks, int64_t block_size, int32_t* token_sequence) {
        auto text = [](int64_t number) { return std::to_string(number); };
        for (int64_t t = 0; t < T; t++) {
            if (slot_mapping[t] >= num_blocks * block_size) {
                throw OpError("slot_mapping[" + text(t) + "] is " + text(slot_mapping[t]) +
                              ", expected less than " + text(num_blocks * block_size) +
                              ", the slots of the cache");
            }
        }
        if (query_start[0] != 0 || query_start[B] != T) {
            throw OpError("query_start goes from " + text(query_start[0]) + " to " + text(query_start[B]) +
                          ", expected from 0 to " + text(T) + ", the number of tokens");
        }
        for (int64_t b = 0; b < B; b++) {
            const int64_t queries = int64_t{query_start[b + 1]} - query_start[b];
            if (queries < 0 || query_start[b + 1] > T) {
                throw OpError("query_start[" + text(b + 1) + "] is " + text(query_start[b + 1]) + " after " +
                              text(query_start[b]) + ", expected no less, and at most " + text(T));
            }
            if (seq_lens[b] < queries || seq_lens[b] > max_blocks * block_size) {
                throw OpError("seq_lens[" + text(b) + "] is " + text(seq_lens[b]) +
                              ", expected at least its " + text(queries) +
                              " tokens of this step and at most the " + text(max_blocks * block_size) +
                              " positions of block_table");
            }
            if (queries == 0) continue;
            const int64_t used = (seq_lens[b] + block_size - 1) / block_size;
            for (int64_t i = 0; i < used; i++) {
                const int32_t block = block_table[b * max_blocks + i];
                if (block < 0 || block >= num_blocks) {
                    throw OpError("block_table[" + text(b) + ", " + text(i) + "] is " + text(block) +
                                  ", expected a block from 0 to " + text(num_blocks - 1));
                }
            }
            for (int64_t t = query_start[b]; t < query_start[b + 1]; t++)
                token_sequence[t] = static_cast<int32_t>(b);
        }
    }

    int64_t num_heads, num_kv_heads, window;
    float scale;
    std::optional<Growth> growth;
    OptionalInput sinks;
};

}  // namespace

std::vector<const OrtCustomOp*> attention_ops() { return {custom_op<PagedAttentionOp>()}; }

}  // namespace llmpack::ort
