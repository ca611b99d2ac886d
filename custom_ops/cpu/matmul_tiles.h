// What products share, whatever their weights are stored as: row tiles, how they are read and where the
// results go (FORMAT.md 4.3 and 5.1).
//
// A tile is 16 output features side by side, so the lanes of a vector are output features, an input feature
// is broadcast to all of them, and no horizontal sum occurs. A tile is read once for several tokens held in
// registers. Each token's sum runs over the input features in the same order whatever the number of tokens,
// so its result does not depend on the batch.
#ifndef LLMPACK_CPU_MATMUL_TILES_H_
#define LLMPACK_CPU_MATMUL_TILES_H_

#include "cpu/isa.h"
#include "cpu/simd.h"

namespace llmpack::LLMPACK_ISA {

// Tokens whose sums fit in the vector registers: 32 of 64 bytes (AVX-512), 16 of 32 (AVX2), 32 of 16 (NEON)
// or 16 of 16 (SSE2).
#if defined(LLMPACK_ISA_avx512)
constexpr int kQuantizedBlock = 8;
constexpr int kFloatBlock = 8;
#elif defined(LLMPACK_ISA_avx2)
constexpr int kQuantizedBlock = 4;
constexpr int kFloatBlock = 3;
#elif defined(LLMPACK_ISA_neon)
constexpr int kQuantizedBlock = 4;
constexpr int kFloatBlock = 2;
#else
constexpr int kQuantizedBlock = 2;
constexpr int kFloatBlock = 2;
#endif

// How far ahead of its use a weight is asked for, in bytes.
//
// kThroughCaches: from memory into the second-level cache, and from there into the first. A core can have
// some 50 lines on their way into the second level and 10 to 16 into the first, so that asking for all in one
// step leaves bandwidth unused (tests/benchmarks/LOG.md, 2026-11-25 and 26). kPastCaches: once, into the
// first-level cache alone. On Zen 5 two steps cost bandwidth, and weights that pass the caches by leave them
// to what will be used again: AMD's third level takes what leaves the second (LOG.md, 2026-11-26, sixth).
//
// Tiles follow each other in memory, so this also fetches the next tile's first bytes, across the page
// boundaries at which the hardware's prefetcher stops.
constexpr int64_t kAhead = 4096, kNear = 2048, kAheadPastCaches = 3072;

// Tokens of one block. Past the caches goes only what one block needs, as the next one would look for the
// tile in them; and no more than wait for memory: eight tokens lose 3 %.
constexpr int block_tokens(WeightFetch fetch, int block) {
    return fetch == WeightFetch::kPastCaches && block > 4 ? 4 : block;
}
constexpr bool is_past_caches(WeightFetch fetch, int64_t M, int block) {
    return fetch == WeightFetch::kPastCaches && M <= block_tokens(fetch, block);
}

// PRECOND: none; a prefetch beyond the last tile's page does nothing.
template <WeightFetch fetch, int64_t bytes>
LLMPACK_INLINE void prefetch_ahead(const void* p) {
    for (int64_t line = 0; line < bytes; line += 64) {
        const char* at = static_cast<const char*>(p) + line;
        if constexpr (fetch == WeightFetch::kPastCaches) {
            __builtin_prefetch(at + kAheadPastCaches, 0, 0);
        } else {
            __builtin_prefetch(at + kAhead, 0, 2);
            __builtin_prefetch(at + kNear);
        }
    }
}

// Columns [16 * tile, ...) of rows first_token and following of y [.., N].
template <int m>
LLMPACK_INLINE void store_tile(const F32x16 (&values)[m], float* y, int64_t N, int64_t tile,
                               int64_t first_token) {
    const int64_t row = tile * kTileRows, rows = min(kTileRows, N - row);
    for (int t = 0; t < m; t++) {
        float* out = y + (first_token + t) * N + row;
        if (rows == kTileRows) {
            store(out, values[t]);
        } else {
            store_first(out, values[t], rows);
        }
    }
}

// Adds the bias, if there is one, to the values of one output tile, gates them, and stores it.
template <int m, class MatMul>
LLMPACK_INLINE void store_gated_tile(const MatMul& args, F32x16 (&gate)[m], F32x16 (&up)[m], int64_t tile,
                                     int64_t first_token) {
    if (args.bias != nullptr) {
        const float* bias = args.bias + tile * kTileRows;
        const F32x16 of_gate = load(bias), of_up = load(bias + args.N / 2);
        for (int t = 0; t < m; t++) {
            gate[t] = gate[t] + of_gate;
            up[t] = up[t] + of_up;
        }
    }
    for (int t = 0; t < m; t++) gate[t] = gated(args.gating, gate[t], up[t], args.clamp);
    store_tile<m>(gate, args.y, args.N / 2, tile, first_token);
}

}  // namespace llmpack::LLMPACK_ISA

#endif  // LLMPACK_CPU_MATMUL_TILES_H_
