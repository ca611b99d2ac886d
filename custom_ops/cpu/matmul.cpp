// Matrix products over row tiles: M tokens, N output features, K input features (FORMAT.md 4.3 and 5.1).
//
// A tile is 16 output features side by side, so the lanes of a vector are output features, an input feature
// is broadcast to all of them, and no horizontal sum occurs. A tile is read once for several tokens held in
// registers. Each token's sum runs over the input features in the same order whatever the number of tokens,
// so its result does not depend on the batch.
#include "cpu/families.h"
#include "cpu/simd.h"

namespace llmpack::LLMPACK_ISA {

namespace {

// Tokens whose sums fit in the vector registers: 32 of 64 bytes (AVX-512), 16 of 32 (AVX2) or 16 of 16
// (SSE2).
#if defined(LLMPACK_ISA_avx512)
constexpr int kQuantizedBlock = 8;
constexpr int kFloatBlock = 8;
#elif defined(LLMPACK_ISA_avx2)
constexpr int kQuantizedBlock = 4;
constexpr int kFloatBlock = 3;
#else
constexpr int kQuantizedBlock = 2;
constexpr int kFloatBlock = 2;
#endif

// -----------------------------------------------------------------------------------------------------------
// Integer dot products. dot32 adds, for each of m tokens, the products of 32 input features with the 16 rows
// of a tile:
//   w: Q4 [4, 16, 4] bytes of two nibbles, Q8 [8, 16, 4] bytes;  x: [8, m, 4], in -127..127.
// The sums are exact. kZero is what the stored weights are too large by, as dot32 sees them.

#if defined(LLMPACK_ISA_avx512)

// vpdpbusd multiplies unsigned weights with signed activations and adds four products to each 32-bit lane, no
// saturation.
struct Q4 {
    static constexpr int kZero = 8;
    static constexpr int64_t kBytes32 = 256;
    template <int m>
    static LLMPACK_INLINE void dot32(const uint8_t* w, const int8_t* x, I32x16 (&sum)[m]) {
        const __m512i low_nibble = _mm512_set1_epi8(0x0f);
        for (int s = 0; s < 4; s++) {
            __m512i both = _mm512_loadu_si512(w + 64 * s);
            __m512i low = _mm512_and_si512(both, low_nibble);
            __m512i high = _mm512_and_si512(_mm512_srli_epi16(both, 4), low_nibble);
            for (int t = 0; t < m; t++) {
                sum[t].v =
                    _mm512_dpbusd_epi32(sum[t].v, low, _mm512_set1_epi32(load_i32(x + (2 * s * m + t) * 4)));
            }
            for (int t = 0; t < m; t++) {
                sum[t].v = _mm512_dpbusd_epi32(sum[t].v, high,
                                               _mm512_set1_epi32(load_i32(x + ((2 * s + 1) * m + t) * 4)));
            }
        }
    }
};

struct Q8 {
    static constexpr int kZero = 128;
    static constexpr int64_t kBytes32 = 512;
    template <int m>
    static LLMPACK_INLINE void dot32(const uint8_t* w, const int8_t* x, I32x16 (&sum)[m]) {
        for (int s = 0; s < 8; s++) {
            __m512i weight = _mm512_loadu_si512(w + 64 * s);
            for (int t = 0; t < m; t++) {
                sum[t].v =
                    _mm512_dpbusd_epi32(sum[t].v, weight, _mm512_set1_epi32(load_i32(x + (s * m + t) * 4)));
            }
        }
    }
};

#elif defined(LLMPACK_ISA_avx2)

LLMPACK_INLINE __m256i load_half(const uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

// vpmaddubsw adds two products in 16 bits and saturates there: weights up to 15 give at most 2 * 15 * 127 =
// 3810, and the eight of 32 input features 30480, so nothing saturates and widening waits until the end.
struct Q4 {
    static constexpr int kZero = 8;
    static constexpr int64_t kBytes32 = 256;
    template <int m>
    static LLMPACK_INLINE void dot32(const uint8_t* w, const int8_t* x, I32x16 (&sum)[m]) {
        const __m256i low_nibble = _mm256_set1_epi8(0x0f);
        const __m256i ones = _mm256_set1_epi16(1);
        __m256i a[m], b[m];
        for (int t = 0; t < m; t++) a[t] = b[t] = _mm256_setzero_si256();
        for (int s = 0; s < 4; s++) {
            __m256i both_a = load_half(w + 64 * s), both_b = load_half(w + 64 * s + 32);
            for (int nibble = 0; nibble < 2; nibble++) {
                __m256i weight_a =
                    _mm256_and_si256(nibble ? _mm256_srli_epi16(both_a, 4) : both_a, low_nibble);
                __m256i weight_b =
                    _mm256_and_si256(nibble ? _mm256_srli_epi16(both_b, 4) : both_b, low_nibble);
                for (int t = 0; t < m; t++) {
                    __m256i xs = _mm256_set1_epi32(load_i32(x + ((2 * s + nibble) * m + t) * 4));
                    a[t] = _mm256_add_epi16(a[t], _mm256_maddubs_epi16(weight_a, xs));
                    b[t] = _mm256_add_epi16(b[t], _mm256_maddubs_epi16(weight_b, xs));
                }
            }
        }
        for (int t = 0; t < m; t++) {
            sum[t].a = _mm256_add_epi32(sum[t].a, _mm256_madd_epi16(a[t], ones));
            sum[t].b = _mm256_add_epi32(sum[t].b, _mm256_madd_epi16(b[t], ones));
        }
    }
};

// Weights up to 255 would saturate. As signed numbers their magnitude is at most 128, and 2 * 128 * 127 =
// 32512 does not: the sign of the weight moves to the activation, which is why kZero is 0 here.
struct Q8 {
    static constexpr int kZero = 0;
    static constexpr int64_t kBytes32 = 512;
    template <int m>
    static LLMPACK_INLINE void dot32(const uint8_t* w, const int8_t* x, I32x16 (&sum)[m]) {
        const __m256i sign_bit = _mm256_set1_epi8(static_cast<char>(0x80));
        const __m256i ones = _mm256_set1_epi16(1);
        for (int s = 0; s < 8; s++) {
            __m256i weight_a = _mm256_xor_si256(load_half(w + 64 * s), sign_bit);
            __m256i weight_b = _mm256_xor_si256(load_half(w + 64 * s + 32), sign_bit);
            __m256i size_a = _mm256_abs_epi8(weight_a), size_b = _mm256_abs_epi8(weight_b);
            for (int t = 0; t < m; t++) {
                __m256i xs = _mm256_set1_epi32(load_i32(x + (s * m + t) * 4));
                __m256i pairs_a = _mm256_maddubs_epi16(size_a, _mm256_sign_epi8(xs, weight_a));
                __m256i pairs_b = _mm256_maddubs_epi16(size_b, _mm256_sign_epi8(xs, weight_b));
                sum[t].a = _mm256_add_epi32(sum[t].a, _mm256_madd_epi16(pairs_a, ones));
                sum[t].b = _mm256_add_epi32(sum[t].b, _mm256_madd_epi16(pairs_b, ones));
            }
        }
    }
};

#else

typedef int16_t I16x8 __attribute__((vector_size(16)));
typedef uint16_t U16x8 __attribute__((vector_size(16)));

LLMPACK_INLINE U16x8 load_words(const uint8_t* p) {
    U16x8 words;
    std::memcpy(&words, p, sizeof(words));
    return words;
}
// Even and odd bytes of each 16-bit lane, sign-extended.
LLMPACK_INLINE I16x8 even_bytes(U16x8 words) { return (I16x8)(words << 8) >> 8; }
LLMPACK_INLINE I16x8 odd_bytes(U16x8 words) { return (I16x8)words >> 8; }
LLMPACK_INLINE U16x8 broadcast_words(int32_t four_bytes) {
    return (U16x8)(I32x4{four_bytes, four_bytes, four_bytes, four_bytes});
}
LLMPACK_INLINE I32x4 add_pairs(I16x8 words) {
    return ((I32x4)((U32x4)words << 16) >> 16) + ((I32x4)words >> 16);
}

// As for AVX2: two products are at most 3810 in size, 32 input features 30480, which 16 bits hold.
struct Q4 {
    static constexpr int kZero = 8;
    static constexpr int64_t kBytes32 = 256;
    template <int m>
    static LLMPACK_INLINE void dot32(const uint8_t* w, const int8_t* x, I32x16 (&sum)[m]) {
        I16x8 words[m][4] = {};
        for (int s = 0; s < 4; s++) {
            for (int nibble = 0; nibble < 2; nibble++) {
                for (int t = 0; t < m; t++) {
                    U16x8 xs = broadcast_words(load_i32(x + ((2 * s + nibble) * m + t) * 4));
                    I16x8 even = even_bytes(xs), odd = odd_bytes(xs);
                    for (int i = 0; i < 4; i++) {
                        U16x8 both = load_words(w + 64 * s + 16 * i);
                        U16x8 weight = (nibble ? both >> 4 : both) & 0x0f0f;
                        words[t][i] += (I16x8)(weight & 0xff) * even + (I16x8)(weight >> 8) * odd;
                    }
                }
            }
        }
        for (int t = 0; t < m; t++) {
            for (int i = 0; i < 4; i++) sum[t].v[i] += add_pairs(words[t][i]);
        }
    }
};

// Signed weights, as for AVX2: two products are at most 32512 in size.
struct Q8 {
    static constexpr int kZero = 0;
    static constexpr int64_t kBytes32 = 512;
    template <int m>
    static LLMPACK_INLINE void dot32(const uint8_t* w, const int8_t* x, I32x16 (&sum)[m]) {
        for (int s = 0; s < 8; s++) {
            for (int i = 0; i < 4; i++) {
                U16x8 weight = load_words(w + 64 * s + 16 * i) ^ 0x8080;
                I16x8 even = even_bytes(weight), odd = odd_bytes(weight);
                for (int t = 0; t < m; t++) {
                    U16x8 xs = broadcast_words(load_i32(x + (s * m + t) * 4));
                    sum[t].v[i] += add_pairs(even * even_bytes(xs) + odd * odd_bytes(xs));
                }
            }
        }
    }
};

#endif

// How far ahead of its use a weight is asked for, in bytes. Tiles follow each other in memory, so this also
// fetches the next tile's first bytes, across the page boundaries at which the hardware's prefetcher stops.
// The hardware alone keeps one token's stream full, but not that of several: their work between two lines of
// weights fills the window of instructions in flight (tests/benchmarks/LOG.md).
constexpr int64_t kAhead = 2048;

// PRECOND: none; a prefetch beyond the last tile's page does nothing.
template <int64_t bytes>
LLMPACK_INLINE void prefetch_ahead(const void* p) {
    for (int64_t line = 0; line < bytes; line += 64)
        __builtin_prefetch(static_cast<const char*>(p) + kAhead + line);
}

// Tiles `tile`, `tile` + apart, ..., as many as `streams`, for the m tokens of one block: y[t, row] = sum
// over groups of (integer dot product) * (weight scale * token scale).
template <class Scheme, int streams, int m>
LLMPACK_INLINE void quantized_tiles(const QuantizedMatMul& args, int64_t tile, int64_t apart,
                                    int64_t first_token) {
    const QuantizedActivations& in = *args.x;
    const int64_t groups = in.K / in.group_size;
    const int64_t tile_bytes = in.K / 32 * Scheme::kBytes32, tile_scales = groups * kTileRows;
    const uint8_t* w = args.weight + tile * tile_bytes;
    const uint16_t* scales = args.scales + tile * tile_scales;
    const int8_t* x = in.values + first_token * in.K;          // [K / 4, m, 4]
    const float* x_scales = in.scales + first_token * groups;  // [groups, m]
    const int32_t* x_sums = in.sums + first_token * groups;    // [groups, m]

    const bool from_memory = first_token == 0;  // later tokens find the tile in the cache
    F32x16 y[streams][m];
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
                const uint8_t* ws = w + s * apart * tile_bytes;
                if (from_memory) prefetch_ahead<Scheme::kBytes32>(ws);
                Scheme::template dot32<m>(ws, x, sum[s]);
            }
            w += Scheme::kBytes32;
            x += 32 * m;
        }
        LLMPACK_UNROLL_16 for (int s = 0; s < streams; s++) {
            const uint16_t* stream_scales = scales + s * apart * tile_scales;
            if (from_memory) __builtin_prefetch(stream_scales + kAhead / Scheme::kBytes32 * kTileRows);
            F32x16 scale = load_f16(stream_scales);
            LLMPACK_UNROLL_16 for (int t = 0; t < m; t++) {
                y[s][t] = fma(to_float(sum[s][t]), scale * set1(x_scales[t]), y[s][t]);
            }
        }
        scales += kTileRows;
        x_scales += m;
        x_sums += m;
    }
    for (int s = 0; s < streams; s++) {
        const int64_t row = (tile + s * apart) * kTileRows;
        const int64_t rows = min(kTileRows, args.N - row);
        for (int t = 0; t < m; t++) {
            float* out = args.y + (first_token + t) * args.N + row;
            if (rows == kTileRows) {
                store(out, y[s][t]);
            } else {
                store_first(out, y[s][t], rows);
            }
        }
    }
}

template <class Scheme, int streams>
struct Quantized {
    template <int m>
    struct Tiles {
        static LLMPACK_INLINE void run(const QuantizedMatMul& args, int64_t tile, int64_t apart,
                                       int64_t first_token) {
            quantized_tiles<Scheme, streams, m>(args, tile, apart, first_token);
        }
    };
};

// A few tokens wait for memory. Two streams, through the two halves of the range, reach more of its bandwidth
// than one (and than two that take neighbouring tiles in turn, which lose the hardware's prefetcher at every
// tile). A half must be long enough for the prefetcher to be worth starting.
constexpr int64_t kLeastTilesOfStream = 4;
constexpr int kMostTokensOfTwoStreams = 2;  // with more, arithmetic is what takes the time

template <class Scheme>
void quantized_range(const QuantizedMatMul& args, int64_t begin, int64_t end) {
    const int64_t M = args.x->M, apart = (end - begin) / 2;
    if (M <= kMostTokensOfTwoStreams && apart >= kLeastTilesOfStream) {
        for (int64_t tile = begin; tile < begin + apart; tile++) {
            with_count<kMostTokensOfTwoStreams, Quantized<Scheme, 2>::template Tiles>(M, args, tile, apart,
                                                                                      int64_t{0});
        }
        begin += 2 * apart;
    }
    // Tile outside, tokens inside: a tile (16 KB of q4 for K = 2048) stays in the first-level cache for all
    // tokens.
    for (int64_t tile = begin; tile < end; tile++) {
        for (int64_t token = 0; token < M; token += kQuantizedBlock) {
            with_count<kQuantizedBlock, Quantized<Scheme, 1>::template Tiles>(min(kQuantizedBlock, M - token),
                                                                              args, tile, int64_t{0}, token);
        }
    }
}

// -----------------------------------------------------------------------------------------------------------

LLMPACK_INLINE F32x16 load_weights(const float* p) { return load(p); }
LLMPACK_INLINE F32x16 load_weights(const uint16_t* p) { return load_f16(p); }

// Even and odd input features are summed apart: two chains of additions hide the latency of one.
template <class Weight, int m>
LLMPACK_INLINE void float_tile(const FloatMatMul& args, int64_t tile, int64_t first_token) {
    const int64_t K = args.K;
    const Weight* w = static_cast<const Weight*>(args.weight) + tile * K * kTileRows;
    const float* x = args.x + first_token * K;  // [m, K]
    F32x16 even[m], odd[m];
    for (int t = 0; t < m; t++) even[t] = odd[t] = zero();
    const bool from_memory = first_token == 0;
    int64_t k = 0;
    for (; k + 2 <= K; k += 2) {
        if (from_memory) prefetch_ahead<2 * kTileRows * sizeof(Weight)>(w + k * kTileRows);
        F32x16 w_even = load_weights(w + k * kTileRows), w_odd = load_weights(w + (k + 1) * kTileRows);
        for (int t = 0; t < m; t++) even[t] = fma(w_even, set1(x[t * K + k]), even[t]);
        for (int t = 0; t < m; t++) odd[t] = fma(w_odd, set1(x[t * K + k + 1]), odd[t]);
    }
    if (k < K) {
        F32x16 w_even = load_weights(w + k * kTileRows);
        for (int t = 0; t < m; t++) even[t] = fma(w_even, set1(x[t * K + k]), even[t]);
    }
    const int64_t row = tile * kTileRows;
    const int64_t rows = min(kTileRows, args.N - row);
    for (int t = 0; t < m; t++) {
        float* out = args.y + (first_token + t) * args.N + row;
        if (rows == kTileRows) {
            store(out, even[t] + odd[t]);
        } else {
            store_first(out, even[t] + odd[t], rows);
        }
    }
}

template <class Weight>
struct Float {
    template <int m>
    struct Tile {
        static LLMPACK_INLINE void run(const FloatMatMul& args, int64_t tile, int64_t first_token) {
            float_tile<Weight, m>(args, tile, first_token);
        }
    };
    static void tiles(const FloatMatMul& args, int64_t begin, int64_t end) {
        for (int64_t tile = begin; tile < end; tile++) {
            for (int64_t token = 0; token < args.M; token += kFloatBlock) {
                with_count<kFloatBlock, Tile>(min(kFloatBlock, args.M - token), args, tile, token);
            }
        }
    }
};

// One group of one token. values: every fourth byte group of a block of m tokens, [group_size / 4, m, 4] seen
// from this token. The integers are half-to-even roundings of x * (127 / absmax), the same on every
// instruction set.
LLMPACK_INLINE void quantize_group(const float* x, int64_t group_size, int64_t m, int8_t* values,
                                   float* scale, int32_t* sum) {
    // The largest magnitude, compared as integers: the order of the bits is that of the numbers, with NaN
    // above infinity.
    const I32x16 magnitude_mask = set1_i32(0x7fffffff);
    I32x16 largest = set1_i32(0);
    for (int64_t k = 0; k < group_size; k += 16) largest = max2(largest, bits(load(x + k)) & magnitude_mask);
    const int32_t absmax_bits = reduce_max(largest);
    const float absmax = bit_cast<float>(absmax_bits);

    if (absmax_bits == 0 || absmax_bits >= 0x7f800000) {
        // All zero; or an infinity or NaN, which makes every output NaN (NaN * 0 is NaN).
        for (int64_t k = 0; k < group_size; k += 4) std::memset(values + k * m, 0, 4);
        *scale = absmax_bits == 0 ? 0.0f : __builtin_nanf("");
        *sum = 0;
        return;
    }
    // 127 / absmax would be infinite for the tiniest numbers: those are scaled up first, which is exact.
    const float up = absmax < 0x1p-100f ? 0x1p64f : 1.0f;
    const F32x16 inverse = set1(127.0f / (absmax * up));
    I32x16 total = set1_i32(0);
    for (int64_t k = 0; k < group_size; k += 16) {
        I32x16 q = round_to_even(load(x + k) * set1(up) * inverse);
        total = total + q;
        if (m == 1) {
            store_i8(values + k, q);
            continue;
        }
        int8_t lanes[16];
        store_i8(lanes, q);
        for (int64_t j = 0; j < 4; j++) std::memcpy(values + (k + 4 * j) * m, lanes + 4 * j, 4);
    }
    *scale = absmax / 127.0f;
    *sum = reduce_add(total);
}

}  // namespace

const int64_t kQuantizedTokenBlock = kQuantizedBlock;

// x: [M, K].  PRECOND: group_size divides K and 16 divides group_size.
void quantize(const float* x, const QuantizedActivations& out, int64_t begin, int64_t end) {
    const int64_t K = out.K, groups = K / out.group_size;
    for (int64_t block = begin; block < end; block++) {
        const int64_t first = block * kQuantizedBlock;
        const int64_t m = min(kQuantizedBlock, out.M - first);
        for (int64_t t = 0; t < m; t++) {
            for (int64_t g = 0; g < groups; g++) {
                const int64_t scale = first * groups + g * m + t;
                quantize_group(x + (first + t) * K + g * out.group_size, out.group_size, m,
                               out.values + first * K + g * out.group_size * m + t * 4, out.scales + scale,
                               out.sums + scale);
            }
        }
    }
}

// PRECOND: x was quantized by this instruction set's quantize; group_size is a multiple of 32 and divides K.
void matmul_quantized(WeightType type, const QuantizedMatMul& args, int64_t begin, int64_t end) {
    if (type == WeightType::kQ4) {
        quantized_range<Q4>(args, begin, end);
    } else {
        quantized_range<Q8>(args, begin, end);
    }
}

void matmul_float(WeightType type, const FloatMatMul& args, int64_t begin, int64_t end) {
    if (type == WeightType::kF32) {
        Float<float>::tiles(args, begin, end);
    } else {
        Float<uint16_t>::tiles(args, begin, end);
    }
}

}  // namespace llmpack::LLMPACK_ISA
