// Products with quantized weights and activations: M tokens, N output features, K input features.
#include "cpu/families.h"
#include "cpu/matmul_tiles.h"

namespace llmpack::LLMPACK_ISA {

namespace {

// Integer dot products. A scheme's decode turns the bytes of kStep input features of a tile's 16 rows into
// vectors of four features each, [kStep / 4][16, 4], for dot4 (simd.h). kZero is what the weights that dot4
// multiplies with are too large by.

// Levels of four bits, offset so that they are not negative (FORMAT.md 4.3).
template <int zero>
constexpr uint8_t level(int value) {
    return static_cast<uint8_t>(value + zero);
}
alignas(64) constexpr uint8_t kQ4Levels[16] = {level<64>(-64), level<64>(-52), level<64>(-42), level<64>(-32),
                                               level<64>(-24), level<64>(-18), level<64>(-11), level<64>(-5),
                                               level<64>(0),   level<64>(6),   level<64>(12),  level<64>(19),
                                               level<64>(26),  level<64>(34),  level<64>(44),  level<64>(56)};
alignas(64) constexpr uint8_t kMXFP4Levels[16] = {
    level<12>(0),  level<12>(1),  level<12>(2),  level<12>(3),  level<12>(4),  level<12>(6),
    level<12>(8),  level<12>(12), level<12>(0),  level<12>(-1), level<12>(-2), level<12>(-3),
    level<12>(-4), level<12>(-6), level<12>(-8), level<12>(-12)};

template <const uint8_t (&levels)[16], int zero>
struct Codebook : SmallBytes {
    static constexpr int kZero = zero, kStep = 8;
    static constexpr int64_t kBytes32 = 256;
    static LLMPACK_INLINE void decode(const uint8_t* w, Bytes (&q)[2]) {
        const Bytes both = load_bytes(w);
        q[0] = lookup(levels, both);
        q[1] = lookup(levels, shift_right<4>(both));
    }
};
using Q4 = Codebook<kQ4Levels, 64>;
using MXFP4 = Codebook<kMXFP4Levels, 12>;

struct Q6 : SmallBytes {
    static constexpr int kZero = 32, kStep = 16;
    static constexpr int64_t kBytes32 = 384;
    static LLMPACK_INLINE void decode(const uint8_t* w, Bytes (&q)[4]) {
        const Bytes a = load_bytes(w), b = load_bytes(w + 64), c = load_bytes(w + 128);
        q[0] = and_bytes(a, 63);
        q[1] = and_bytes(b, 63);
        q[2] = and_bytes(c, 63);
        q[3] = or_bytes(or_bytes(and_bytes(shift_right<6>(a), 3), and_bytes(shift_right<4>(b), 12)),
                        and_bytes(shift_right<2>(c), 48));
    }
};

struct Q8 : UnsignedBytes {
    static constexpr int kZero = 128 - UnsignedBytes::kOffset, kStep = 4;
    static constexpr int64_t kBytes32 = 512;
    static LLMPACK_INLINE void decode(const uint8_t* w, Bytes (&q)[1]) { q[0] = load_bytes(w); }
};

// Adds, for each of m tokens, the products of 32 input features with the 16 rows of a tile. x: [8, m, 4].
template <class Scheme, int m>
LLMPACK_INLINE void dot32(const uint8_t* w, const int8_t* x, I32x16 (&sum)[m]) {
    constexpr int kVectors = Scheme::kStep / 4;
    LLMPACK_UNROLL_16 for (int k = 0; k < 32; k += Scheme::kStep) {
        Bytes q[kVectors];
        Scheme::decode(w + k * Scheme::kBytes32 / 32, q);
        LLMPACK_UNROLL_16 for (int i = 0; i < kVectors; i++) {
            LLMPACK_UNROLL_16 for (int t = 0; t < m; t++)
                Scheme::dot4(q[i], x + ((k / 4 + i) * m + t) * 4, sum[t]);
        }
    }
}

constexpr int64_t kScalesAhead = 32 * kTileRows;  // how far ahead scales are asked for: 1 KB

// Tiles `tile`, `tile` + apart, ..., as many as `streams`, for the m tokens of one block: y[s][t] = sum over
// groups of (integer dot product) * (weight scale * token scale).
//
// What waits for memory is kept to few instructions: a core looks a fixed number of them ahead, and eight
// no-ops a line of weights cost 5 % of the bandwidth.
template <class Scheme, WeightFetch fetch, int streams, int m>
LLMPACK_INLINE void quantized_tiles(const QuantizedMatMul& args, int64_t tile, int64_t apart,
                                    int64_t first_token, F32x16 (&y)[streams][m]) {
    const QuantizedActivations& in = *args.x;
    const int64_t groups = in.K / in.group_size;
    const int64_t tile_bytes = in.K / 32 * Scheme::kBytes32, tile_scales = groups * kTileRows;
    const uint8_t* w[streams];
    const uint16_t* scales[streams];
    LLMPACK_UNROLL_16 for (int s = 0; s < streams; s++) {
        w[s] = args.weight + (tile + s * apart) * tile_bytes;
        scales[s] = args.scales + (tile + s * apart) * tile_scales;
        // Else GCC takes one pointer for all streams and an addition for each access of the others.
        asm("" : "+r"(w[s]), "+r"(scales[s]));
    }
    const int8_t* x = in.values + first_token * in.K;          // [K / 4, m, 4]
    const float* x_scales = in.scales + first_token * groups;  // [groups, m]
    const int32_t* x_sums = in.sums + first_token * groups;    // [groups, m]

    // Later blocks of tokens find the tile in the cache; several streams have one, or no branch for the last.
    const bool from_memory = streams > 1 || first_token == 0;
    LLMPACK_UNROLL_16 for (int s = 0; s < streams; s++) {
        LLMPACK_UNROLL_16 for (int t = 0; t < m; t++) y[s][t] = zero();
    }
    for (int64_t g = 0; g < groups; g++) {
        I32x16 sum[streams][m];
        LLMPACK_UNROLL_16 for (int s = 0; s < streams; s++) {
            LLMPACK_UNROLL_16 for (int t = 0; t < m; t++) sum[s][t] = set1_i32(-Scheme::kZero * x_sums[t]);
        }
        for (int64_t k = 0; k < in.group_size; k += 32) {
            LLMPACK_UNROLL_16 for (int s = 0; s < streams; s++) {
                if (from_memory) prefetch_ahead<fetch, Scheme::kBytes32>(w[s]);
                dot32<Scheme, m>(w[s], x, sum[s]);
                w[s] += Scheme::kBytes32;
            }
            x += 32 * m;
        }
        LLMPACK_UNROLL_16 for (int s = 0; s < streams; s++) {
            if (from_memory) __builtin_prefetch(scales[s] + kScalesAhead);
            F32x16 scale = load_f16(scales[s]);
            scales[s] += kTileRows;
            LLMPACK_UNROLL_16 for (int t = 0; t < m; t++) {
                y[s][t] = fma(to_float(sum[s][t]), scale * set1(x_scales[t]), y[s][t]);
            }
        }
        x_scales += m;
        x_sums += m;
    }
}

template <class Scheme, WeightFetch fetch, int streams>
struct Quantized {
    template <int m>
    struct Tiles {
        static LLMPACK_INLINE void run(const QuantizedMatMul& args, int64_t tile, int64_t apart,
                                       int64_t first_token) {
            F32x16 y[streams][m];
            quantized_tiles<Scheme, fetch, streams, m>(args, tile, apart, first_token, y);
            for (int s = 0; s < streams; s++)
                store_tile<m>(y[s], args.y, args.N, tile + s * apart, first_token);
        }
    };
};

// A few tokens wait for memory. Two streams, through the two halves of the range, reach more of its bandwidth
// than one (and than two that take neighbouring tiles in turn, which lose the hardware's prefetcher at every
// tile). A half must be long enough for the prefetcher to be worth starting.
constexpr int64_t kLeastTilesOfStream = 4;
constexpr int kMostTokensOfTwoStreams = 2;  // with more, arithmetic is what takes the time

// Gate and up are the two streams, where few tokens make them worth it.
template <class Scheme, WeightFetch fetch>
struct GatedQuantized {
    template <int m>
    struct Tiles {
        static LLMPACK_INLINE void run(const QuantizedMatMul& args, int64_t tile, int64_t apart,
                                       int64_t first_token) {
            if constexpr (m <= kMostTokensOfTwoStreams) {
                F32x16 y[2][m];
                quantized_tiles<Scheme, fetch, 2, m>(args, tile, apart, first_token, y);
                store_gated_tile<m>(args, y[0], y[1], tile, first_token);
            } else {
                F32x16 gate[1][m], up[1][m];
                quantized_tiles<Scheme, fetch, 1, m>(args, tile, 0, first_token, gate);
                quantized_tiles<Scheme, fetch, 1, m>(args, tile + apart, 0, first_token, up);
                store_gated_tile<m>(args, gate[0], up[0], tile, first_token);
            }
        }
    };
};

// Many tokens: a stretch of a tile's input features is decoded once, to stay in the first-level cache while
// all tokens meet it; their sums wait in memory between the stretches. Tiles go in pairs where the registers
// hold the sums of both, so that each activation is fetched once for 32 rows.
constexpr int64_t kStretch = 512;
constexpr int64_t kLeastTokensToDecode = 2 * kQuantizedBlock + 1;
#if defined(LLMPACK_ISA_avx512)
constexpr int kTilesTogether = 2;
#else
constexpr int kTilesTogether = 1;
#endif

// Adds the products of `features` input features. decoded: [tiles], kStretch * 16 bytes apart, [features / 4,
// 16, 4]; x: [features / 4, m, 4].
template <class Scheme, int tiles, int m, int features>
LLMPACK_INLINE void dot_decoded(const uint8_t* decoded, const int8_t* x, I32x16 (&sum)[tiles][m]) {
    LLMPACK_UNROLL_16 for (int s = 0; s < features / 4; s++) {
        Bytes w[tiles];
        LLMPACK_UNROLL_16 for (int i = 0; i < tiles; i++) w[i] =
            load_bytes(decoded + i * kStretch * 16 + 64 * s);
        LLMPACK_UNROLL_16 for (int t = 0; t < m; t++) {
            LLMPACK_UNROLL_16 for (int i = 0; i < tiles; i++)
                dot4_shared<Scheme>(w[i], x + 4 * (s * m + t), sum[i][t]);
        }
    }
}

// Tiles that go together, and where their sums are: those of tile + i * apart in columns [16 * i, ...) of y
// [M], rows `stride` apart.
struct Together {
    int64_t tile, apart;
    float* y;
    int64_t stride;
};

// `tiles` tiles, features [first, last), the m tokens of one block. decoded: [tiles, kStretch / 4, 16, 4], of
// which last - first features are used.
template <class Scheme, int tiles, int m, int group>
LLMPACK_INLINE void stretch_of_tiles(const QuantizedMatMul& args, const Together& at, const uint8_t* decoded,
                                     int64_t first, int64_t last, int64_t first_token) {
    const QuantizedActivations& in = *args.x;
    const int64_t groups = in.K / in.group_size, first_group = first / in.group_size;
    const uint16_t* scales = args.scales + (at.tile * groups + first_group) * kTileRows;
    const int64_t scales_apart = at.apart * groups * kTileRows;
    const int8_t* x = in.values + first_token * in.K + first * m;                // [features / 4, m, 4]
    const float* x_scales = in.scales + first_token * groups + first_group * m;  // [groups, m]
    const int32_t* x_sums = in.sums + first_token * groups + first_group * m;    // [groups, m]

    F32x16 y[tiles][m];
    for (int i = 0; i < tiles; i++) {
        const int64_t rows = min(kTileRows, args.N - (at.tile + i * at.apart) * kTileRows);
        for (int t = 0; t < m; t++) {
            const float* sum = at.y + (first_token + t) * at.stride + i * kTileRows;
            y[i][t] = first == 0 ? zero() : rows == kTileRows ? load(sum) : load_first(sum, rows);
        }
    }
    for (int64_t k = first; k < last; k += in.group_size) {
        I32x16 sum[tiles][m];
        LLMPACK_UNROLL_16 for (int i = 0; i < tiles; i++) {
            LLMPACK_UNROLL_16 for (int t = 0; t < m; t++) sum[i][t] = set1_i32(-Scheme::kZero * x_sums[t]);
        }
        // Without a loop where it can be: GCC copies every sum once in each round, on the ports of dot4.
        if constexpr (group == 64) {
            dot_decoded<Scheme, tiles, m, 64>(decoded, x, sum);
        } else {
            for (int64_t j = 0; j < in.group_size; j += 32)
                dot_decoded<Scheme, tiles, m, 32>(decoded + 16 * j, x + j * m, sum);
        }
        decoded += 16 * in.group_size;
        x += in.group_size * m;
        LLMPACK_UNROLL_16 for (int i = 0; i < tiles; i++) {
            const F32x16 scale = load_f16(scales + i * scales_apart);
            LLMPACK_UNROLL_16 for (int t = 0; t < m; t++) {
                y[i][t] = fma(to_float(sum[i][t]), scale * set1(x_scales[t]), y[i][t]);
            }
        }
        scales += kTileRows;
        x_scales += m;
        x_sums += m;
    }
    for (int i = 0; i < tiles; i++) {
        const int64_t rows = min(kTileRows, args.N - (at.tile + i * at.apart) * kTileRows);
        for (int t = 0; t < m; t++) {
            float* sum = at.y + (first_token + t) * at.stride + i * kTileRows;
            if (rows == kTileRows) {
                store(sum, y[i][t]);
            } else {
                store_first(sum, y[i][t], rows);
            }
        }
    }
}

template <class Scheme, int tiles>
struct Stretch {
    template <int m>
    struct Tiles {
        static LLMPACK_INLINE void run(const QuantizedMatMul& args, const Together& at,
                                       const uint8_t* decoded, int64_t first, int64_t last,
                                       int64_t first_token) {
            if (m == kQuantizedBlock && args.x->group_size == 64) {
                stretch_of_tiles<Scheme, tiles, m, 64>(args, at, decoded, first, last, first_token);
            } else {
                stretch_of_tiles<Scheme, tiles, m, 0>(args, at, decoded, first, last, first_token);
            }
        }
    };
};

template <class Scheme>
void decode_stretch(const QuantizedMatMul& args, int64_t tile, int64_t first, int64_t last,
                    uint8_t* decoded) {
    const uint8_t* w = args.weight + (tile * args.x->K + first) / 32 * Scheme::kBytes32;
    for (int64_t k = first; k < last; k += Scheme::kStep, w += Scheme::kStep * Scheme::kBytes32 / 32) {
        Bytes q[Scheme::kStep / 4];
        prefetch_ahead<WeightFetch::kThroughCaches, Scheme::kStep * Scheme::kBytes32 / 32>(w);
        Scheme::decode(w, q);
        for (int i = 0; i < Scheme::kStep / 4; i++, decoded += 64) store_bytes(decoded, q[i]);
    }
}

template <class Scheme, int tiles>
void tiles_of_many_tokens(const QuantizedMatMul& args, const Together& at) {
    alignas(64) uint8_t decoded[tiles * kStretch * 16];
    const int64_t M = args.x->M, K = args.x->K;
    for (int64_t first = 0; first < K; first += kStretch) {
        const int64_t last = min(K, first + kStretch);
        for (int i = 0; i < tiles; i++)
            decode_stretch<Scheme>(args, at.tile + i * at.apart, first, last, decoded + i * kStretch * 16);
        for (int64_t token = 0; token < M; token += kQuantizedBlock) {
            with_count<kQuantizedBlock, Stretch<Scheme, tiles>::template Tiles>(
                min(kQuantizedBlock, M - token), args, at, decoded, first, last, token);
        }
    }
}

template <class Scheme>
void many_tokens(const QuantizedMatMul& args, int64_t begin, int64_t end) {
    if (args.gating == Gating::kNone) {
        const auto at = [&](int64_t tile) { return Together{tile, 1, args.y + tile * kTileRows, args.N}; };
        for (; begin + kTilesTogether <= end; begin += kTilesTogether)
            tiles_of_many_tokens<Scheme, kTilesTogether>(args, at(begin));
        for (; begin < end; begin++) tiles_of_many_tokens<Scheme, 1>(args, at(begin));
        return;
    }
    constexpr int64_t kStride = 2 * kTileRows;
    const int64_t apart = args.N / 2 / kTileRows;
    for (int64_t tile = begin; tile < end; tile++) {
        if constexpr (kTilesTogether == 2) {
            tiles_of_many_tokens<Scheme, 2>(args, {tile, apart, args.scratch, kStride});
        } else {
            tiles_of_many_tokens<Scheme, 1>(args, {tile, 0, args.scratch, kStride});
            tiles_of_many_tokens<Scheme, 1>(args, {tile + apart, 0, args.scratch + kTileRows, kStride});
        }
        for (int64_t t = 0; t < args.x->M; t++) {
            const float* sums = args.scratch + t * kStride;
            F32x16 gate[1] = {load(sums)}, up[1] = {load(sums + kTileRows)};
            store_gated_tile<1>(args, gate, up, tile, t);
        }
    }
}

// Tile outside, tokens inside: a tile (16 KB of q4 for K = 2048) stays in the first-level cache for all
// tokens.
template <class Scheme, WeightFetch fetch>
void few_tokens(const QuantizedMatMul& args, int64_t begin, int64_t end) {
    constexpr int kBlock = block_tokens(fetch, kQuantizedBlock);
    const int64_t M = args.x->M;
    if (args.gating != Gating::kNone) {
        const int64_t apart = args.N / 2 / kTileRows;
        for (int64_t tile = begin; tile < end; tile++) {
            for (int64_t token = 0; token < M; token += kBlock) {
                with_count<kBlock, GatedQuantized<Scheme, fetch>::template Tiles>(min(kBlock, M - token),
                                                                                  args, tile, apart, token);
            }
        }
        return;
    }
    const int64_t apart = (end - begin) / 2;
    if (M <= kMostTokensOfTwoStreams && apart >= kLeastTilesOfStream) {
        for (int64_t tile = begin; tile < begin + apart; tile++) {
            with_count<kMostTokensOfTwoStreams, Quantized<Scheme, fetch, 2>::template Tiles>(
                M, args, tile, apart, int64_t{0});
        }
        begin += 2 * apart;
    }
    for (int64_t tile = begin; tile < end; tile++) {
        for (int64_t token = 0; token < M; token += kBlock) {
            with_count<kBlock, Quantized<Scheme, fetch, 1>::template Tiles>(min(kBlock, M - token), args,
                                                                            tile, int64_t{0}, token);
        }
    }
}

template <class Scheme>
void quantized_range(const QuantizedMatMul& args, int64_t begin, int64_t end) {
    if (args.x->M >= kLeastTokensToDecode) {
        many_tokens<Scheme>(args, begin, end);
    } else if (is_past_caches(args.fetch, args.x->M, kQuantizedBlock)) {
        few_tokens<Scheme, WeightFetch::kPastCaches>(args, begin, end);
    } else {
        few_tokens<Scheme, WeightFetch::kThroughCaches>(args, begin, end);
    }
}

}  // namespace

// PRECOND: x was quantized by this instruction set's quantize; group_size is a multiple of 32 and divides K.
void matmul_quantized(WeightType type, const QuantizedMatMul& args, int64_t begin, int64_t end) {
    if (type == WeightType::kQ4) {
        quantized_range<Q4>(args, begin, end);
    } else if (type == WeightType::kQ6) {
        quantized_range<Q6>(args, begin, end);
    } else if (type == WeightType::kMXFP4) {
        quantized_range<MXFP4>(args, begin, end);
    } else {
        quantized_range<Q8>(args, begin, end);
    }
}

}  // namespace llmpack::LLMPACK_ISA
