// PagedAttention (FORMAT.md 5.5): rotary embedding, write into the block cache, causal grouped-query
// attention over it.
//
// Attention reads every key and value from the cache, those of this step's own tokens too, after all of them
// are written. A token therefore sees the same numbers whether its sequence came in one step or in chunks,
// alone or in a batch. Softmax is computed online (Milakov and Gimelshein, https://arxiv.org/abs/1805.02867)
// over stretches of 32 positions counted from position 0, so the order of each sum depends on the token's
// position alone.
//
// A work item is a tile of a sequence's tokens and one KV head. Its rows are the query heads of that KV head,
// token after token; each stretch of the cache is read once for all of them (FlashAttention's order of loops,
// https://arxiv.org/abs/2205.14135). A stretch of keys is transposed first, so that the lanes of a score
// vector are positions: no horizontal sums, and softmax works on whole vectors.
#include <cstddef>

#include "cpu/families.h"
#include "cpu/simd.h"

namespace llmpack::LLMPACK_ISA {

namespace {

constexpr int64_t kStretch = 32;  // positions per step of the softmax

// Rows and vectors of each row whose sums fit in the registers.
#if defined(LLMPACK_ISA_avx512)
constexpr int kRowsTogether = 8, kVectors = 2;
#elif defined(LLMPACK_ISA_avx2) || defined(LLMPACK_ISA_neon)
constexpr int kRowsTogether = 6, kVectors = 1;
#else
constexpr int kRowsTogether = 2, kVectors = 1;
#endif

// Rotates one head. in, out: [D]; cos_sin: [D]. Element j is paired with j + D / 2. The result is multiplied
// by scale.
LLMPACK_INLINE void rotate(const float* in, const float* cos_sin, int64_t D, float scale, float* out) {
    const int64_t half = D / 2;
    const float* cos = cos_sin;
    const float* sin = cos_sin + half;
    int64_t j = 0;
    for (; j + 16 <= half; j += 16) {
        F32x16 a = load(in + j), b = load(in + half + j), c = load(cos + j), s = load(sin + j);
        store(out + j, (a * c - b * s) * set1(scale));
        store(out + half + j, (b * c + a * s) * set1(scale));
    }
    for (; j < half; j++) {
        float a = in[j], b = in[j + half];
        out[j] = (a * cos[j] - b * sin[j]) * scale;
        out[j + half] = (b * cos[j] + a * sin[j]) * scale;
    }
}

LLMPACK_INLINE F32x16 load_cached(const float* p) { return load(p); }
LLMPACK_INLINE F32x16 load_cached(const uint16_t* p) { return load_f16(p); }
LLMPACK_INLINE void store_cached(float* p, F32x16 a) { store(p, a); }
LLMPACK_INLINE void store_cached(uint16_t* p, F32x16 a) { store_f16(p, a); }

// values: [D], rounded to the cache's type.
template <class Cached>
LLMPACK_INLINE void write_head(const float* values, int64_t D, Cached* cache) {
    int64_t j = 0;
    for (; j + 16 <= D; j += 16) store_cached(cache + j, load(values + j));
    if (j < D) store_first(cache + j, load_first(values + j, D - j), D - j);
}

template <class Cached>
void write_tokens(const PagedAttention& args, int64_t begin, int64_t end) {
    const int64_t D = args.head_dim, H = args.num_heads, KV = args.num_kv_heads;
    Cached* const keys = static_cast<Cached*>(args.key_cache);
    Cached* const values = static_cast<Cached*>(args.value_cache);
    for (int64_t token = begin; token < end; token++) {
        const int64_t slot = args.slot_mapping[token];
        if (slot < 0) continue;
        const float* k = args.qkv + (token * (H + 2 * KV) + H) * D;  // [KV, D]
        const float* v = k + KV * D;                                 // [KV, D]
        for (int64_t head = 0; head < KV; head++) {
            float rotated[kMaxHeadDim];
            rotate(k + head * D, args.cos_sin + token * D, D, 1.0f, rotated);
            write_head(rotated, D, keys + (slot * KV + head) * D);
            write_head(v + head * D, D, values + (slot * KV + head) * D);
        }
    }
}

// What a stretch of keys is transposed to.
template <class Cached>
struct TransposedOf {
    using Key = float;
};
#if defined(LLMPACK_ISA_avx512)
template <>
struct TransposedOf<uint16_t> {
    using Key = uint16_t;
};
#endif

// The rows of one work item, in memory that stays in the first-level caches.
template <class Key>
struct Rows {
    alignas(64) float q[kAttentionTileFloats];     // [rows, padded], rotated and scaled
    alignas(64) float out[kAttentionTileFloats];   // [rows, padded], values weighted by e^(score - highest),
                                                   // summed
    alignas(64) Key keys[kMaxHeadDim * kStretch];  // [D, kStretch]
    alignas(64) float weights[kAttentionTileRows *
                              kStretch];                // [rows, kStretch]: scores, then e^(score - highest)
    alignas(64) float totals[kAttentionTileRows * 16];  // [rows, 16]: sums of the weights, lane by lane
    float highest[kAttentionTileRows];
    int64_t D, padded;  // head_dim, and rounded up to whole vectors
};

template <class Cached>
LLMPACK_INLINE F32x16 load_padded(const Cached* p, int64_t n) {  // n values, zero beyond
    return n >= 16 ? load_cached(p) : load_first(p, n);
}

// keys [D, kStretch] from `count` positions of the cache; zero for those beyond. Room for D rounded up to 32.
template <class Cached>
LLMPACK_INLINE void transpose_keys(const Cached* cache, const int64_t* slots, int64_t count, int64_t D,
                                   float* keys) {
    for (int64_t first = 0; first < kStretch; first += 16) {
        const int64_t* from = slots + first;
        for (int64_t j = 0; j < D; j += 16) {
            F32x16 m[16];
            if (first + 16 <= count && j + 16 <= D) {
                LLMPACK_UNROLL_16 for (int i = 0; i < 16; i++) m[i] = load_cached(cache + from[i] + j);
            } else {
                for (int64_t i = 0; i < 16; i++) {
                    m[i] = first + i < count ? load_padded(cache + from[i] + j, D - j) : zero();
                }
            }
            transpose(m);
            LLMPACK_UNROLL_16 for (int i = 0; i < 16; i++) store(keys + (j + i) * kStretch + first, m[i]);
        }
    }
}

#if defined(LLMPACK_ISA_avx512)
// float16 keys stay float16: half as many shuffles and stores. Interleaved, two positions' halves are one
// 32-bit element, so that a transposition of 32-bit elements leaves the 32 positions of an input feature in
// order.
template <bool whole>
LLMPACK_INLINE void transpose_halves(const uint16_t* cache, const int64_t* slots, int64_t count, int64_t D,
                                     uint16_t* keys) {
    for (int64_t j = 0; j < D; j += 32) {
        const __mmask32 features = D - j >= 32 ? 0xffffffffu : (1u << (D - j)) - 1;
        auto row = [&](int64_t i) {
            if (whole) return _mm512_loadu_si512(cache + slots[i] + j);
            return i < count ? _mm512_maskz_loadu_epi16(features, cache + slots[i] + j)
                             : _mm512_setzero_si512();
        };
        F32x16 m[16];
        LLMPACK_UNROLL_16 for (int i = 0; i < 16; i++) {
            m[i].v = _mm512_castsi512_ps(_mm512_unpacklo_epi16(row(2 * i), row(2 * i + 1)));
        }
        transpose(m);
        // unpacklo and unpackhi take the lower and the upper four of each eight features.
        LLMPACK_UNROLL_16 for (int c = 0; c < 16; c++) {
            _mm512_store_ps(keys + (j + c / 4 * 8 + c % 4) * kStretch, m[c].v);
        }
        LLMPACK_UNROLL_16 for (int i = 0; i < 16; i++) {
            m[i].v = _mm512_castsi512_ps(_mm512_unpackhi_epi16(row(2 * i), row(2 * i + 1)));
        }
        transpose(m);
        LLMPACK_UNROLL_16 for (int c = 0; c < 16; c++) {
            _mm512_store_ps(keys + (j + c / 4 * 8 + 4 + c % 4) * kStretch, m[c].v);
        }
    }
}

LLMPACK_INLINE void transpose_keys(const uint16_t* cache, const int64_t* slots, int64_t count, int64_t D,
                                   uint16_t* keys) {
    if (count == kStretch && D % 32 == 0) {
        transpose_halves<true>(cache, slots, count, D, keys);
    } else {
        transpose_halves<false>(cache, slots, count, D, keys);
    }
}
#endif

// Keys or values that are read next, [count] positions of one head. They are asked for one position at a time
// between pieces of arithmetic: a core can wait for 10 to 16 lines at once, and would stand still for the
// rest of a stretch's 64 or more. Into the second-level cache: rows of one head lie a few hundred bytes
// apart, so that a stretch of them falls into few sets of the first level and would push itself out.
template <class Cached>
struct Ahead {
    const Cached* head;
    const int64_t* slots;
    int64_t count;

    // Asks for columns [j, j + columns) of position i, if there is such a position.
    LLMPACK_INLINE void ask(int64_t i, int64_t j, int64_t columns) const {
        constexpr int64_t kLine = 64 / sizeof(Cached);
        if (i >= count) return;
        for (const int64_t end = j + columns; j < end; j += kLine) {
            __builtin_prefetch(head + slots[i] + j, 0, 2);
        }
    }
};

// Scores of n rows with a stretch of keys, into weights.
template <int n>
struct Scores {
    template <class Key, class Cached>
    static LLMPACK_INLINE void run(Rows<Key>& rows, int64_t row, const Ahead<Cached>& ahead) {
        const float* q = rows.q + row * rows.padded;
        for (int64_t first = 0; first < kStretch; first += 16 * kVectors) {
            F32x16 dot[n][kVectors];
            LLMPACK_UNROLL_16 for (int r = 0; r < n; r++) {
                LLMPACK_UNROLL_16 for (int v = 0; v < kVectors; v++) dot[r][v] = zero();
            }
            for (int64_t i = 0; i < kStretch; i++) {  // as many pieces as there are positions to ask for
                if (first == 0) ahead.ask(i, 0, rows.D);
                const int64_t end = (i + 1) * rows.D / kStretch;
                for (int64_t j = i * rows.D / kStretch; j < end; j++) {
                    F32x16 key[kVectors];
                    LLMPACK_UNROLL_16 for (int v = 0; v < kVectors; v++) key[v] =
                        load_cached(rows.keys + j * kStretch + first + 16 * v);
                    LLMPACK_UNROLL_16 for (int r = 0; r < n; r++) {
                        LLMPACK_UNROLL_16 for (int v = 0; v < kVectors; v++) {
                            dot[r][v] = fma(key[v], set1(q[r * rows.padded + j]), dot[r][v]);
                        }
                    }
                }
            }
            LLMPACK_UNROLL_16 for (int r = 0; r < n; r++) {
                LLMPACK_UNROLL_16 for (int v = 0; v < kVectors; v++) {
                    store(rows.weights + (row + r) * kStretch + first + 16 * v, dot[r][v]);
                }
            }
        }
    }
};

// One step of the online softmax: the scores of the first `count` positions become weights, relative to the
// highest score so far.
template <class Key>
LLMPACK_INLINE void softmax_step(Rows<Key>& rows, int64_t row, int64_t count) {
    static_assert(kStretch == 32, "two vectors of scores");
    alignas(64) static constexpr float kLanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    float* weights = rows.weights + row * kStretch;
    F32x16 low = load(weights), high = load(weights + 16);
    if (count < kStretch) {
        const F32x16 lanes = load(kLanes), nothing = set1(-__builtin_inff());
        low = select_less(lanes, set1(static_cast<float>(count)), low, nothing);
        high = select_less(lanes, set1(static_cast<float>(count - 16)), high, nothing);
    }
    float* totals = rows.totals + row * 16;
    // Mostly the highest score came earlier, and one comparison tells.
    const F32x16 both = max2(low, high);
    if (any_greater(both, rows.highest[row])) {
        const float highest = reduce_max(both);
        const F32x16 shrink = exp_nonpositive(set1(rows.highest[row]) - set1(highest));
        store(totals, load(totals) * shrink);
        float* out = rows.out + row * rows.padded;
        for (int64_t j = 0; j < rows.padded; j += 16) store(out + j, load(out + j) * shrink);
        rows.highest[row] = highest;
    }
    const F32x16 highest = set1(rows.highest[row]);
    low = exp_nonpositive(low - highest);
    high = exp_nonpositive(high - highest);
    store(weights, low);
    store(weights + 16, high);
    store(totals, load(totals) + (low + high));
}

// Adds the values of positions [begin, end) of a stretch to n rows, columns j to j + 16 * vectors, of which
// the last may end beyond D.
template <int n, int vectors, class Cached, class Key>
LLMPACK_INLINE void add_columns(const Cached* cache, const int64_t* slots, int64_t begin, int64_t end,
                                Rows<Key>& rows, int64_t row, int64_t j, const Ahead<Cached>& ahead) {
    float* out = rows.out + row * rows.padded + j;
    const float* weights = rows.weights + row * kStretch;
    F32x16 sum[n][vectors];
    LLMPACK_UNROLL_16 for (int r = 0; r < n; r++) {
        LLMPACK_UNROLL_16 for (int v = 0; v < vectors; v++) sum[r][v] = load(out + r * rows.padded + 16 * v);
    }
    auto add = [&](int64_t i, const F32x16(&value)[vectors]) LLMPACK_INLINE_LAMBDA {
        LLMPACK_UNROLL_16 for (int r = 0; r < n; r++) {
            const F32x16 weight = set1(weights[r * kStretch + i]);
            LLMPACK_UNROLL_16 for (int v = 0; v < vectors; v++) sum[r][v] = fma(value[v], weight, sum[r][v]);
        }
    };
    F32x16 value[vectors];
    if (j + 16 * vectors <= rows.D) {
        for (int64_t i = begin; i < end; i++) {
            ahead.ask(i, j, 16 * vectors);
            const Cached* p = cache + slots[i] + j;
            LLMPACK_UNROLL_16 for (int v = 0; v < vectors; v++) value[v] = load_cached(p + 16 * v);
            add(i, value);
        }
    } else {
        for (int64_t i = begin; i < end; i++) {
            const Cached* p = cache + slots[i] + j;
            LLMPACK_UNROLL_16 for (int v = 0; v < vectors; v++) {
                value[v] = load_padded(p + 16 * v, rows.D - j - 16 * v);
            }
            add(i, value);
        }
    }
    LLMPACK_UNROLL_16 for (int r = 0; r < n; r++) {
        LLMPACK_UNROLL_16 for (int v = 0; v < vectors; v++) store(out + r * rows.padded + 16 * v, sum[r][v]);
    }
}

template <class Cached>
struct Values {
    template <int n>
    struct Add {
        template <class Key>
        static LLMPACK_INLINE void run(const Cached* cache, const int64_t* slots, int64_t begin, int64_t end,
                                       Rows<Key>& rows, int64_t row, const Ahead<Cached>& ahead) {
            // A sum is a chain of additions: few rows take more columns at once, to hide their latency.
            constexpr int kWide = kVectors * (n == 1 ? 4 : n == 2 ? 2 : 1);
            int64_t j = 0;
            for (; j + 16 * kWide <= rows.padded; j += 16 * kWide) {
                add_columns<n, kWide>(cache, slots, begin, end, rows, row, j, ahead);
            }
            for (; j + 16 * kVectors <= rows.padded; j += 16 * kVectors) {
                add_columns<n, kVectors>(cache, slots, begin, end, rows, row, j, ahead);
            }
            for (; j < rows.padded; j += 16) add_columns<n, 1>(cache, slots, begin, end, rows, row, j, ahead);
        }
    };
};

// Element offsets of positions [start, start + count) in the cache, seen from their KV head.
LLMPACK_INLINE void find_slots(const PagedAttention& args, const int32_t* blocks, int64_t start,
                               int64_t count, int64_t* slots) {
    const int64_t stride = args.num_kv_heads * args.head_dim;
    int64_t block = start / args.block_size, offset = start % args.block_size;
    for (int64_t i = 0; i < count; i++) {
        slots[i] = (blocks[block] * args.block_size + offset) * stride;
        if (++offset == args.block_size) {
            offset = 0;
            block++;
        }
    }
}

// Attends with `heads` query heads of each of kv_heads KV heads, for tokens [begin, end) of one sequence. The
// query heads are first_head and those that follow it, of which `shared` belong to each KV head, the first
// `heads` of them are meant. PRECOND: (end - begin) * heads * kv_heads rows fit in Rows.
template <class Cached>
void attend(const PagedAttention& args, int64_t begin, int64_t end, int64_t first_kv_head, int64_t kv_heads,
            int64_t first_head, int64_t heads) {
    const int64_t D = args.head_dim, H = args.num_heads, KV = args.num_kv_heads, shared = H / KV;
    const int64_t sequence = args.token_sequence[begin];
    // Positions that the first token sees, from the end of its sequence (FORMAT.md 5.5); each later one sees
    // one more.
    const int64_t first_length = args.seq_lens[sequence] - (args.query_start[sequence + 1] - begin) + 1;
    const int64_t last_length = first_length + (end - begin) - 1;
    const int32_t* blocks = args.block_table + sequence * args.max_blocks;
    const Cached* const keys = static_cast<const Cached*>(args.key_cache) + first_kv_head * D;
    const Cached* const values = static_cast<const Cached*>(args.value_cache) + first_kv_head * D;

    Rows<typename TransposedOf<Cached>::Key> rows;
    rows.D = D;
    rows.padded = (D + 15) / 16 * 16;
    const int64_t rows_per_kv_head = (end - begin) * heads;
    const int64_t count_rows = rows_per_kv_head * kv_heads;  // KV head, token, query head
    auto token_of = [&](int64_t row) { return begin + row % rows_per_kv_head / heads; };
    auto head_of = [&](int64_t row) { return first_head + row / rows_per_kv_head * shared + row % heads; };
    for (int64_t row = 0; row < count_rows; row++) {
        const float* head = args.qkv + (token_of(row) * (H + 2 * KV) + head_of(row)) * D;
        rotate(head, args.cos_sin + token_of(row) * D, D, args.scale, rows.q + row * rows.padded);
        for (int64_t j = 0; j < rows.padded; j += 16) store(rows.out + row * rows.padded + j, zero());
        rows.highest[row] = -__builtin_inff();
        store(rows.totals + row * 16, zero());
    }

    int64_t slots[2][kStretch];  // of this stretch and of the next
    find_slots(args, blocks, 0, min(kStretch, last_length), slots[0]);
    for (int64_t start = 0; start < last_length; start += kStretch) {
        const int64_t count = min(kStretch, last_length - start);
        const int64_t* here = slots[start / kStretch % 2];
        int64_t* next = slots[(start / kStretch + 1) % 2];
        const int64_t next_count = min(kStretch, last_length - start - kStretch);
        find_slots(args, blocks, start + kStretch, next_count, next);
        for (int64_t g = 0; g < kv_heads; g++) {
            transpose_keys(keys + g * D, here, count, D, rows.keys);
            const int64_t first_row = g * rows_per_kv_head, end_row = first_row + rows_per_kv_head;
            // Positions of this stretch that a row sees; rows of earlier tokens see none of it.
            auto seen = [&](int64_t row) {
                return min(kStretch, first_length + (row - first_row) / heads - start);
            };
            // What is read next: this stretch of the next head, or the next stretch of the first one.
            const bool last_head = g + 1 == kv_heads;
            const int64_t* ahead = last_head ? next : here;
            const int64_t ahead_offset = last_head ? 0 : (g + 1) * D;
            int64_t to_ask = last_head ? next_count : count;
            int64_t row = first_row + (start < first_length ? 0 : (start - first_length + 1) * heads);
            for (; row < end_row; row += kRowsTogether) {
                const int64_t together = min(kRowsTogether, end_row - row);
                const Ahead<Cached> next_keys{keys + ahead_offset, ahead, to_ask};
                const Ahead<Cached> next_values{values + ahead_offset, ahead, to_ask};
                const Ahead<Cached> nothing{nullptr, nullptr, 0};
                to_ask = 0;
                with_count<kRowsTogether, Scores>(together, rows, row, next_keys);
                for (int64_t r = row; r < row + together; r++) softmax_step(rows, r, seen(r));
                // First what all these rows see, then what the later ones see besides. A position that a row
                // does not see must not be multiplied by zero: it might be infinite.
                const int64_t common = seen(row);
                with_count<kRowsTogether, Values<Cached>::template Add>(
                    together, values + g * D, here, int64_t{0}, common, rows, row, next_values);
                for (int64_t r = row + 1; r < row + together; r++) {
                    if (seen(r) <= common) continue;
                    Values<Cached>::template Add<1>::run(values + g * D, here, common, seen(r), rows, r,
                                                         nothing);
                }
            }
        }
    }

    for (int64_t row = 0; row < count_rows; row++) {
        float* y = args.out + (token_of(row) * H + head_of(row)) * D;
        const float* out = rows.out + row * rows.padded;
        const F32x16 inverse = set1(1.0f / reduce_add(load(rows.totals + row * 16)));
        int64_t j = 0;
        for (; j + 16 <= D; j += 16) store(y + j, load(out + j) * inverse);
        if (j < D) store_first(y + j, load(out + j) * inverse, D - j);
    }
}

// Successive items of one tile go together while their rows fit: the heads of a position lie side by side in
// memory.
template <class Cached>
void read_items(const PagedAttention& args, int64_t begin, int64_t end) {
    const int64_t KV = args.num_kv_heads, shared = args.num_heads / KV;  // query heads of one KV head
    const int64_t most = attention_tile_rows(args.head_dim);
    for (int64_t item = begin; item < end;) {
        const int64_t tile = item / KV, kv_head = item % KV;
        const int64_t first = args.tile_starts[tile];
        const int64_t last = min(first + args.tile_tokens, args.query_start[args.token_sequence[first] + 1]);
        if (shared > most) {
            for (int64_t h = 0; h < shared; h += most) {
                attend<Cached>(args, first, last, kv_head, 1, kv_head * shared + h, min(most, shared - h));
            }
            item++;
            continue;
        }
        const int64_t fit = most / ((last - first) * shared);
        const int64_t kv_heads = min(min(fit, KV - kv_head), end - item);
        attend<Cached>(args, first, last, kv_head, kv_heads, kv_head * shared, shared);
        item += kv_heads;
    }
}

}  // namespace

void attention_write(const PagedAttention& args, int64_t begin, int64_t end) {
    if (args.cache_type == CacheType::kF16) {
        write_tokens<uint16_t>(args, begin, end);
    } else {
        write_tokens<float>(args, begin, end);
    }
}

void attention_read(const PagedAttention& args, int64_t begin, int64_t end) {
    if (args.cache_type == CacheType::kF16) {
        read_items<uint16_t>(args, begin, end);
    } else {
        read_items<float>(args, begin, end);
    }
}

}  // namespace llmpack::LLMPACK_ISA
