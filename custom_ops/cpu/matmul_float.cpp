// Products with float weights: M tokens, N output features, K input features.
#include "cpu/families.h"
#include "cpu/matmul_tiles.h"

namespace llmpack::LLMPACK_ISA {

namespace {

LLMPACK_INLINE F32x16 load_weights(const float* p) { return load(p); }
LLMPACK_INLINE F32x16 load_weights(const uint16_t* p) { return load_f16(p); }

// Even and odd input features are summed apart: two chains of additions hide the latency of one.
template <class Weight, WeightFetch fetch, int m>
LLMPACK_INLINE void float_tile(const FloatMatMul& args, int64_t tile, int64_t first_token, F32x16 (&y)[m]) {
    const int64_t K = args.K;
    const Weight* w = static_cast<const Weight*>(args.weight) + tile * K * kTileRows;
    const float* x = args.x + first_token * K;  // [m, K]
    F32x16 even[m], odd[m];
    for (int t = 0; t < m; t++) even[t] = odd[t] = zero();
    const bool from_memory = first_token == 0;
    int64_t k = 0;
    for (; k + 2 <= K; k += 2) {
        if (from_memory) prefetch_ahead<fetch, 2 * kTileRows * sizeof(Weight)>(w + k * kTileRows);
        F32x16 w_even = load_weights(w + k * kTileRows), w_odd = load_weights(w + (k + 1) * kTileRows);
        for (int t = 0; t < m; t++) even[t] = fma(w_even, set1(x[t * K + k]), even[t]);
        for (int t = 0; t < m; t++) odd[t] = fma(w_odd, set1(x[t * K + k + 1]), odd[t]);
    }
    if (k < K) {
        F32x16 w_even = load_weights(w + k * kTileRows);
        for (int t = 0; t < m; t++) even[t] = fma(w_even, set1(x[t * K + k]), even[t]);
    }
    for (int t = 0; t < m; t++) y[t] = even[t] + odd[t];
}

template <class Weight, WeightFetch fetch>
struct Float {
    template <int m>
    struct Tile {
        static LLMPACK_INLINE void run(const FloatMatMul& args, int64_t tile, int64_t first_token) {
            F32x16 y[m];
            float_tile<Weight, fetch, m>(args, tile, first_token, y);
            if (args.gating == Gating::kNone) return store_tile<m>(y, args.y, args.N, tile, first_token);
            F32x16 up[m];
            float_tile<Weight, fetch, m>(args, tile + args.N / 2 / kTileRows, first_token, up);
            store_gated_tile<m>(args, y, up, tile, first_token);
        }
    };
};

template <class Weight, WeightFetch fetch>
void float_tiles(const FloatMatMul& args, int64_t begin, int64_t end) {
    constexpr int kBlock = block_tokens(fetch, kFloatBlock);
    for (int64_t tile = begin; tile < end; tile++) {
        for (int64_t token = 0; token < args.M; token += kBlock) {
            with_count<kBlock, Float<Weight, fetch>::template Tile>(min(kBlock, args.M - token), args, tile,
                                                                    token);
        }
    }
}

template <class Weight>
void float_range(const FloatMatMul& args, int64_t begin, int64_t end) {
    if (is_past_caches(args.fetch, args.M, kFloatBlock)) {
        float_tiles<Weight, WeightFetch::kPastCaches>(args, begin, end);
    } else {
        float_tiles<Weight, WeightFetch::kThroughCaches>(args, begin, end);
    }
}

}  // namespace

void matmul_float(WeightType type, const FloatMatMul& args, int64_t begin, int64_t end) {
    if (type == WeightType::kF32) {
        float_range<float>(args, begin, end);
    } else {
        float_range<uint16_t>(args, begin, end);
    }
}

}  // namespace llmpack::LLMPACK_ISA
