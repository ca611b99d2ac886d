// The kernels that the CPU offers, as one table of functions per instruction set, and the choice of a table.
//
// A kernel takes plain pointers and sizes and a range of work items; it neither allocates, nor throws, nor
// starts threads. Calls on disjoint ranges may run at the same time. The result of a row is the same bits
// however the work is cut into ranges and whichever other rows are in the batch; between instruction sets
// float results may differ in the last bits, quantized activations and their integer dot products do not.
#ifndef LLMPACK_CPU_ISA_H_
#define LLMPACK_CPU_ISA_H_

#include <cstdint>

namespace llmpack {

constexpr int64_t kTileRows = 16;       // output features of one weight tile (FORMAT.md 4.3)
constexpr int64_t kMaxHeadDim = 256;    // PagedAttention keeps its accumulators on the stack
constexpr int64_t kRunTokens = 256;     // of a row of logits, whose weights make one sum
constexpr int64_t kPositionGroup = 16;  // positions of a vector of scores; cache blocks hold whole groups

enum class WeightType { kF32, kF16, kQ8, kQ6, kQ4, kMXFP4 };

// How a product of few tokens asks for weights ahead of their use: into the caches, or past those that would
// keep them; and attention for keys and values: into the second-level cache, or, nearer to their use, into
// the first. The results are the same.
enum class WeightFetch { kThroughCaches, kPastCaches };

// Activations [M, K] quantized to 8 bits, one scale for each group of input features.
// Tokens are stored in blocks of Kernels::quantized_token_block (the last one may be smaller); with m tokens
// in block b, b * block * K bytes from the start:   values [K / 4, m, 4],  scales and sums [K / group_size,
// m].
struct QuantizedActivations {
    int8_t* values;  // [M * K], in -127..127
    float* scales;   // [M * K / group_size], absmax / 127
    int32_t*
        sums;  // [M * K / group_size], sum of the group's values: the zero point's share of a dot product
    int64_t M, K, group_size;
};

// What makes of a gate and a value, side by side, one number.
enum class Gating { kNone, kSwiGLU, kGeGLU, kClampedSwiGLU };

// Of kClampedSwiGLU: what the gate is multiplied by in the logistic function, and what gate and value are cut
// off at.
struct Clamp {
    float alpha, limit;
};

// y [M, N] = dequantized x [M, K] * W [N, K]^T, W in tiles of 16 rows; or with a `gating`, y [M, N / 2] =
// that of the product. Then 32 divides N, and an output tile comes of one tile of either half of W.
struct QuantizedMatMul {
    const QuantizedActivations* x;
    const uint8_t* weight;   // rounded up: Q8 [N / 16, K / 4, 16, 4]; Q6 [N / 16, K / 16, 3, 16, 4]; Q4
                             // and MXFP4 [N / 16, K / 8, 16, 4]
    const uint16_t* scales;  // [N / 16, K / group_size, 16] float16 bits
    float* y;                // [M, N] or [M, N / 2]
    int64_t N;
    Gating gating;
    WeightFetch fetch;
    float* scratch;               // with a gating and more than two tokens: [M, 32], of this call alone
    const float* bias = nullptr;  // with a gating: [N], added to its input; null: none
    Clamp clamp = {};
};

// y [M, N] = x [M, K] * W [N, K]^T, W in tiles of 16 rows; `gating` as above.
struct FloatMatMul {
    const float* x;      // [M, K]
    const void* weight;  // [N / 16, K, 16], rounded up; float or float16 bits
    float* y;            // [M, N] or [M, N / 2]
    int64_t M, N, K;
    Gating gating;
    WeightFetch fetch;
    const float* bias = nullptr;  // as above
    Clamp clamp = {};
};

// y [T, K] = rows ids of W [N, K], W in tiles as above (Q8 and Q6).
struct QuantizedEmbedding {
    const int32_t* ids;  // [T], in [0, N)
    const uint8_t* weight;
    const uint16_t* scales;
    float* y;
    int64_t K, group_size;
};

// PagedAttention works on tiles of query rows (a row is one head of one token), whose queries and sums take
// up to 16 KB each: enough rows to share the work of reading a key, and still in the caches of a core.
constexpr int64_t kAttentionTileRows = 64;
constexpr int64_t kAttentionTileFloats = 4096;
constexpr int64_t kAttentionHeadsTogether = 4;  // KV heads of a tile, read in turn stretch by stretch
constexpr int64_t attention_tile_rows(int64_t head_dim) {
    const int64_t rows = kAttentionTileFloats / ((head_dim + 15) / 16 * 16);
    return rows < kAttentionTileRows ? rows : kAttentionTileRows;
}
// Tokens of one tile, of which each has heads_per_kv rows.
constexpr int64_t attention_tile_tokens(int64_t head_dim, int64_t heads_per_kv) {
    const int64_t tokens = attention_tile_rows(head_dim) / heads_per_kv;
    return tokens < 1 ? 1 : tokens;
}

enum class CacheType { kF32, kF16 };

struct PagedAttention {
    const float* qkv;               // [T, (num_heads + 2 * num_kv_heads) * head_dim]
    const float* cos_sin;           // [T, head_dim]: cos for the first half of a head, sin for the second
    void* key_cache;                // [num_blocks, num_kv_heads, head_dim, block_size] of cache_type
    void* value_cache;              // [num_blocks, num_kv_heads, block_size, head_dim] of cache_type
    const int32_t* slot_mapping;    // [T], below num_blocks * block_size; negative: do not write
    const int32_t* query_start;     // [B + 1], rising from 0 to T
    const int32_t* seq_lens;        // [B]
    const int32_t* block_table;     // [B, max_blocks], the entries read are in [0, num_blocks)
    const float* sinks;             // [num_heads], a score of each head whose value is zero; null: none
    const float* growth;            // [T], what queries are multiplied by after rotation; null: nothing
    const int32_t* token_sequence;  // [T], sequence of each token
    const int32_t* tile_starts;     // [tiles], first token of each tile; a tile is tile_tokens tokens of one
                                    // sequence, or fewer at the sequence's end
    int64_t tile_tokens;            // attention_tile_tokens(head_dim, num_heads / num_kv_heads)
    float* out;                     // [T, num_heads * head_dim]
    CacheType cache_type;
    int64_t num_heads, num_kv_heads, head_dim, block_size, max_blocks;  // block_size: of whole groups
    int64_t window;  // positions that a token sees at most, its own among them
    float scale;
    WeightFetch fetch;
};

struct Kernels {
    const char* name;
    int64_t quantized_token_block;

    // Quantizes token blocks [begin, end) of x [M, K].
    void (*quantize)(const float* x, const QuantizedActivations& out, int64_t begin, int64_t end);

    // Output tiles [begin, end) of 16 features each, for all tokens. matmul_quantized: kQ8, kQ6,
    // kQ4, kMXFP4. matmul_float: kF32, kF16.
    void (*matmul_quantized)(WeightType type, const QuantizedMatMul& args, int64_t begin, int64_t end);
    void (*matmul_float)(WeightType type, const FloatMatMul& args, int64_t begin, int64_t end);

    // Tokens [begin, end). kQ8, kQ6.
    void (*embedding)(WeightType type, const QuantizedEmbedding& args, int64_t begin, int64_t end);

    // Rows [begin, end) of x [T, H]. With residual [T, H]: normalizes x + residual and stores that sum in sum
    // [T, H], which may be residual itself, and y may be x; without (both null): normalizes x.
    void (*rms_norm)(const float* x, const float* residual, const float* weight, float epsilon, int64_t H,
                     float* y, float* sum, int64_t begin, int64_t end);

    // Rows [begin, end): y [T, F] = act(gate) * up with gate_up [T, 2 F]. kSwiGLU, kGeGLU.
    void (*glu)(Gating gating, const float* gate_up, int64_t F, float* y, int64_t begin, int64_t end);

    // y [n] += scale * x [n].  PRECOND: 16 divides n.
    void (*add_scaled)(const float* x, float scale, int64_t n, float* y);

    // Tokens [begin, end): rotate k and write k and v into the caches.
    void (*attention_write)(const PagedAttention& args, int64_t begin, int64_t end);
    // Work items [begin, end) of tiles * num_kv_heads: attend with the query heads of one KV head, for the
    // tokens of one tile.
    void (*attention_read)(const PagedAttention& args, int64_t begin, int64_t end);

    // Of a row of logits [n], none of them NaN: see llmpack_ops_weigh_runs and llmpack_ops_find_above.
    void (*weigh_runs)(const float* logits, int64_t n, float highest, float inverse_temperature,
                       double* sums);
    int64_t (*find_above)(const float* logits, int64_t n, float threshold, int32_t* ids);
};

// The table in use: for nodes that are made now, and for packing.
const Kernels& kernels();

// Switch to the named table. False: no such name, or this machine cannot run it.
bool set_isa(const char* name);

// The way in use, at first what suits the processor.
WeightFetch weight_fetch();

// "through-caches" or "past-caches".
const char* name_of(WeightFetch fetch);

// Switch to the named way. False: no such name.
bool set_weight_fetch(const char* name);

// Names that this machine can run, best first, separated by a comma and a space.
const char* supported_isas();

}  // namespace llmpack

#endif  // LLMPACK_CPU_ISA_H_
