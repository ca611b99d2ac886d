// PagedAttention (FORMAT.md 3.2 and 5.5): rotary embedding, write into the block cache, causal grouped-query
// attention over it.
//
// Attention reads every key and value from the cache, those of this step's own tokens too, after all of them
// are written. A token therefore sees the same numbers whether its sequence came in one step or in chunks,
// alone or in a batch. Softmax is computed online (Milakov and Gimelshein, https://arxiv.org/abs/1805.02867)
// over stretches of 64 positions counted from position 0, and a score adds its products feature after
// feature, so the order of each sum depends on the token's position alone.
//
// A work item is a tile of a sequence's tokens and one KV head. Its rows are the query heads of that KV head,
// token after token; each stretch of the cache is read once for all of them (FlashAttention's order of loops,
// https://arxiv.org/abs/2205.14135). The cache holds keys feature by feature, so that the lanes of a score
// vector are positions: no horizontal sums, and softmax works on whole vectors.
#include <cstddef>

#include "cpu/families.h"
#include "cpu/simd.h"

namespace llmpack::LLMPACK_ISA {

namespace {

constexpr int64_t kStretch = 64;                    // positions per step of the softmax
constexpr int kGroups = kStretch / kPositionGroup;  // of a vector each
static_assert(kPositionGroup == 16, "a vector of scores for each group");

// Rows and vectors of each row whose sums fit in the registers.
#if defined(LLMPACK_ISA_avx512)
constexpr int kRowsTogether = 8, kVectors = 2;
#elif defined(LLMPACK_ISA_avx2) || defined(LLMPACK_ISA_neon)
constexpr int kRowsTogether = 6, kVectors = 1;
#else
constexpr int kRowsTogether = 2, kVectors = 1;
#endif

// Vectors of each of n rows that are summed at once, a power of two up to `most`: a sum is a chain of
// additions, and fewer rows take more vectors to hide their latency.
constexpr int vectors_at_once(int n, int most) {
    return most == 1 || n * most <= kRowsTogether * kVectors ? most : vectors_at_once(n, most / 2);
}

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
    const int64_t D = args.head_dim, H = args.num_heads, KV = args.num_kv_heads, size = args.block_size;
    for (int64_t token = begin; token < end; token++) {
        const int64_t slot = args.slot_mapping[token];
        if (slot < 0) continue;
        const int64_t block = slot / size * KV * D * size, offset = slot % size;
        Cached* const keys = static_cast<Cached*>(args.key_cache) + block + offset;
        Cached* const values = static_cast<Cached*>(args.value_cache) + block + offset * D;
        const float* k = args.qkv + (token * (H + 2 * KV) + H) * D;  // [KV, D]
        const float* v = k + KV * D;                                 // [KV, D]
        for (int64_t head = 0; head < KV; head++) {
            float rotated[kMaxHeadDim];
            Cached rounded[kMaxHeadDim];
            rotate(k + head * D, args.cos_sin + token * D, D, 1.0f, rotated);
            write_head(rotated, D, rounded);
            for (int64_t j = 0; j < D; j++) keys[(head * D + j) * size] = rounded[j];
            write_head(v + head * D, D, values + head * size * D);
        }
    }
}

// The rows of one work item, in memory that stays in the first-level caches.
struct Rows {
    alignas(64) float q[kAttentionTileFloats];    // [rows, padded], rotated and scaled
    alignas(64) float out[kAttentionTileFloats];  // [rows, padded], values weighted by e^(score - highest),
                                                  // summed
    alignas(64) float weights[kAttentionTileRows *
                              kStretch];                // [rows, kStretch]: scores, then e^(score - highest)
    alignas(64) float totals[kAttentionTileRows * 16];  // [rows, 16]: sums of the weights, lane by lane
    float highest[kAttentionTileRows];
    int64_t D, padded, block_size;  // padded: head_dim rounded up to whole vectors
};

// A stretch of the cache, of one KV head.
template <class Cached>
struct Stretch {
    const Cached* keys[kGroups];    // each [D, block_size], from a group's first position
    const Cached* values[kGroups];  // each [16, D]
    int64_t count;                  // positions that hold something

    LLMPACK_INLINE int64_t groups() const { return (count + kPositionGroup - 1) / kPositionGroup; }

    LLMPACK_INLINE void advance(int64_t elements) {
        for (int64_t g = 0; g < groups(); g++) keys[g] += elements, values[g] += elements;
    }
};

// Positions [start, start + count) of a sequence whose blocks are given, of a KV head. count: up to kStretch,
// none if below 1.
template <class Cached>
LLMPACK_INLINE Stretch<Cached> find_stretch(const PagedAttention& args, const int32_t* blocks,
                                            int64_t kv_head, int64_t start, int64_t count) {
    const int64_t D = args.head_dim, KV = args.num_kv_heads, size = args.block_size;
    Stretch<Cached> found;
    found.count = count < 0 ? 0 : min(count, kStretch);
    int64_t block = start / size, offset = start % size;
    for (int64_t g = 0; g < found.groups(); g++) {
        const int64_t head = (blocks[block] * KV + kv_head) * D * size;
        found.keys[g] = static_cast<const Cached*>(args.key_cache) + head + offset;
        found.values[g] = static_cast<const Cached*>(args.value_cache) + head + offset * D;
        offset += kPositionGroup;
        if (offset == size) {
            offset = 0;
            block++;
        }
    }
    return found;
}

// What is asked for while a stretch is multiplied, at the pace of that: keys or values of a stretch. A core
// can wait for 10 to 16 lines at once, and would stand still for the rest.
template <class Cached>
struct Asked {
    const Cached* const* places;  // of each group
    int64_t groups;
    int64_t apart;  // of 16 numbers that belong together, by 16: block_size / 16 for keys, 1 for values
    bool is_near;   // into the first-level cache, else into the second

    LLMPACK_INLINE const Cached* of(int64_t group, const Cached* otherwise) const {
        return group < groups ? places[group] : otherwise;
    }
};

LLMPACK_INLINE void ask_for(const void* line, bool is_near) {
    if (is_near) {
        __builtin_prefetch(line, 0, 3);
    } else {
        __builtin_prefetch(line, 0, 2);
    }
}

// Scores of n rows with groups [first, first + vectors) of a stretch, into weights.
template <int n, int vectors, class Cached>
LLMPACK_INLINE void score_groups(const Stretch<Cached>& here, int64_t first, Rows& rows, int64_t row,
                                 const Asked<Cached>& asked) {
    const float* q = rows.q + row * rows.padded;
    F32x16 dot[n][vectors];
    LLMPACK_UNROLL_16 for (int r = 0; r < n; r++) {
        LLMPACK_UNROLL_16 for (int v = 0; v < vectors; v++) dot[r][v] = zero();
    }
    const Cached *keys[vectors], *ask[vectors];
    LLMPACK_UNROLL_16 for (int v = 0; v < vectors; v++) {
        keys[v] = here.keys[first + v];
        ask[v] = asked.of(first + v, keys[v]);  // without a branch in the loop: what is at hand costs little
    }
    // D is even. In blocks of 16, what `pack` makes, a line holds two features of float16 keys.
    for (int64_t j = 0; j < rows.D; j += 2) {
        LLMPACK_UNROLL_16 for (int v = 0; v < vectors; v++) {
            ask_for(ask[v] + j * kPositionGroup * asked.apart, asked.is_near);
        }
        LLMPACK_UNROLL_16 for (int k = 0; k < 2; k++) {
            F32x16 key[vectors];
            LLMPACK_UNROLL_16 for (int v = 0; v < vectors; v++) {
                key[v] = load_cached(keys[v] + (j + k) * rows.block_size);
            }
            LLMPACK_UNROLL_16 for (int r = 0; r < n; r++) {
                const F32x16 feature = set1(q[r * rows.padded + j + k]);
                LLMPACK_UNROLL_16 for (int v = 0; v < vectors; v++) dot[r][v] =
                    fma(key[v], feature, dot[r][v]);
            }
        }
    }
    LLMPACK_UNROLL_16 for (int r = 0; r < n; r++) {
        LLMPACK_UNROLL_16 for (int v = 0; v < vectors; v++) {
            store(rows.weights + (row + r) * kStretch + 16 * (first + v), dot[r][v]);
        }
    }
}

// Scores of n rows with groups [first, groups) of a stretch.
template <class Cached>
struct Keys {
    template <int n>
    struct Score {
        static LLMPACK_INLINE void run(const Stretch<Cached>& here, int64_t first, int64_t groups, Rows& rows,
                                       int64_t row, const Asked<Cached>& asked) {
            pieces<vectors_at_once(n, kGroups)>(here, first, groups, rows, row, asked);
        }

        template <int vectors>
        static LLMPACK_INLINE void pieces(const Stretch<Cached>& here, int64_t first, int64_t groups,
                                          Rows& rows, int64_t row, const Asked<Cached>& asked) {
            for (; first + vectors <= groups; first += vectors) {
                score_groups<n, vectors>(here, first, rows, row, asked);
            }
            if constexpr (vectors > 1) pieces<vectors / 2>(here, first, groups, rows, row, asked);
        }
    };
};

// One step of the online softmax: the scores of positions [first, count) become weights, relative to the
// highest score so far. Those of other positions of the first and the last group become zero.
LLMPACK_INLINE void softmax_step(Rows& rows, int64_t row, int64_t first, int64_t count) {
    alignas(64) static constexpr float kLanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    float* weights = rows.weights + row * kStretch;
    const int64_t begin = first / 16 * 16, whole = count / 16 * 16, end = (count + 15) / 16 * 16;
    if (begin < first) {
        const F32x16 hidden = set1(static_cast<float>(first - begin));
        store(weights + begin,
              select_less(load(kLanes), hidden, set1(-__builtin_inff()), load(weights + begin)));
    }
    if (whole < end) {
        const F32x16 seen = set1(static_cast<float>(count - whole));
        store(weights + whole,
              select_less(load(kLanes), seen, load(weights + whole), set1(-__builtin_inff())));
    }
    F32x16 most = load(weights + begin);
    for (int64_t i = begin + 16; i < end; i += 16) most = max2(most, load(weights + i));
    float* totals = rows.totals + row * 16;
    // Mostly the highest score came earlier, and one comparison tells.
    if (any_greater(most, rows.highest[row])) {
        const float highest = reduce_max(most);
        const F32x16 shrink = exp_nonpositive(set1(rows.highest[row]) - set1(highest));
        store(totals, load(totals) * shrink);
        float* out = rows.out + row * rows.padded;
        for (int64_t j = 0; j < rows.padded; j += 16) store(out + j, load(out + j) * shrink);
        rows.highest[row] = highest;
    }
    const F32x16 highest = set1(rows.highest[row]);
    F32x16 total = load(totals);
    for (int64_t i = begin; i < end; i += 16) {
        const F32x16 weight = exp_nonpositive(load(weights + i) - highest);
        store(weights + i, weight);
        total = total + weight;
    }
    store(totals, total);
}

template <class Cached>
LLMPACK_INLINE F32x16 load_padded(const Cached* p, int64_t n) {  // n values, zero beyond
    return n >= 16 ? load_cached(p) : load_first(p, n);
}

// Adds the values of positions [begin, end) of a stretch to n rows, columns j to j + 16 * vectors, of which
// the last may end beyond D.
template <int n, int vectors, class Cached>
LLMPACK_INLINE void add_columns(const Stretch<Cached>& here, int64_t begin, int64_t end, Rows& rows,
                                int64_t row, int64_t j, const Asked<Cached>& asked) {
    constexpr int64_t kLine = 64 / sizeof(Cached);
    float* out = rows.out + row * rows.padded + j;
    const float* weights = rows.weights + row * kStretch;
    F32x16 sum[n][vectors];
    LLMPACK_UNROLL_16 for (int r = 0; r < n; r++) {
        LLMPACK_UNROLL_16 for (int v = 0; v < vectors; v++) sum[r][v] = load(out + r * rows.padded + 16 * v);
    }
    for (int64_t i = begin; i < end;) {
        const int64_t group = i / kPositionGroup, group_end = min(end, (group + 1) * kPositionGroup);
        const Cached* p = here.values[group] + i % kPositionGroup * rows.D + j;
        // May be more than there is of this group, or beyond it: then it is only of no use.
        const Cached* ask =
            asked.of(group, here.values[group]) + (i % kPositionGroup * rows.D + j) * asked.apart;
        for (; i < group_end; i++, p += rows.D, ask += rows.D * asked.apart) {
            for (int64_t line = 0; line < 16 * vectors; line += kLine)
                ask_for(ask + line * asked.apart, asked.is_near);
            F32x16 value[vectors];
            LLMPACK_UNROLL_16 for (int v = 0; v < vectors; v++) {
                value[v] = v + 1 < vectors || j + 16 * vectors <= rows.D
                               ? load_cached(p + 16 * v)
                               : load_padded(p + 16 * v, rows.D - j - 16 * v);
            }
            LLMPACK_UNROLL_16 for (int r = 0; r < n; r++) {
                const F32x16 weight = set1(weights[r * kStretch + i]);
                LLMPACK_UNROLL_16 for (int v = 0; v < vectors; v++) sum[r][v] =
                    fma(value[v], weight, sum[r][v]);
            }
        }
    }
    LLMPACK_UNROLL_16 for (int r = 0; r < n; r++) {
        LLMPACK_UNROLL_16 for (int v = 0; v < vectors; v++) store(out + r * rows.padded + 16 * v, sum[r][v]);
    }
}

// Adds the values of positions [begin, end) of a stretch to n rows.
template <class Cached>
struct Values {
    template <int n>
    struct Add {
        static LLMPACK_INLINE void run(const Stretch<Cached>& here, int64_t begin, int64_t end, Rows& rows,
                                       int64_t row, const Asked<Cached>& asked) {
            pieces<vectors_at_once(n, 8)>(here, begin, end, rows, row, 0, asked);
        }

        template <int vectors>
        static LLMPACK_INLINE void pieces(const Stretch<Cached>& here, int64_t begin, int64_t end, Rows& rows,
                                          int64_t row, int64_t j, const Asked<Cached>& asked) {
            for (; j + 16 * vectors <= rows.padded; j += 16 * vectors) {
                add_columns<n, vectors>(here, begin, end, rows, row, j, asked);
            }
            if constexpr (vectors > 1) pieces<vectors / 2>(here, begin, end, rows, row, j, asked);
        }
    };
};

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

    Rows rows;
    rows.D = D;
    rows.padded = (D + 15) / 16 * 16;
    rows.block_size = args.block_size;
    const int64_t rows_per_kv_head = (end - begin) * heads;
    const int64_t count_rows = rows_per_kv_head * kv_heads;  // KV head, token, query head
    auto token_of = [&](int64_t row) { return begin + row % rows_per_kv_head / heads; };
    auto head_of = [&](int64_t row) { return first_head + row / rows_per_kv_head * shared + row % heads; };
    for (int64_t row = 0; row < count_rows; row++) {
        const float* head = args.qkv + (token_of(row) * (H + 2 * KV) + head_of(row)) * D;
        const float growth = args.growth == nullptr ? 1.0f : args.growth[token_of(row)];
        rotate(head, args.cos_sin + token_of(row) * D, D, growth * args.scale, rows.q + row * rows.padded);
        for (int64_t j = 0; j < rows.padded; j += 16) store(rows.out + row * rows.padded + j, zero());
        // The softmax begins with the sink; none is as minus infinity. Finite: where all scores so far are
        // minus infinity, their weights are e^-inf = 0, and no e^NaN.
        const float sink = args.sinks == nullptr ? -__builtin_inff() : args.sinks[head_of(row)];
        const float highest = sink > -__FLT_MAX__ ? sink : -__FLT_MAX__;
        rows.highest[row] = highest;
        store(rows.totals + row * 16, zero());
        // Its weight: e^0, as it is the highest, or e^-inf; NaN where it is infinity or NaN.
        rows.totals[row * 16] = sink < highest ? 0.0f : 1.0f + (sink - highest);
    }

    // A head's stretch: first its keys are read, then its values. Near: what is read next is asked for, into
    // the first-level cache. Else what is read after that, into the second.
    const bool is_near = args.fetch == WeightFetch::kPastCaches;
    const int64_t keys_apart = args.block_size / kPositionGroup;
    const Asked<Cached> nothing{nullptr, 0, 1, is_near};
    auto stretch_at = [&](int64_t start) {
        return find_stretch<Cached>(args, blocks, first_kv_head, start, last_length - start);
    };
    const int64_t window = args.window;
    const int64_t first_start = max(0, first_length - window) / kStretch * kStretch;
    Stretch<Cached> next = stretch_at(first_start);  // of the first KV head
    for (int64_t start = first_start; start < last_length; start += kStretch) {
        Stretch<Cached> here = next;
        next = stretch_at(start + kStretch);
        for (int64_t g = 0; g < kv_heads; g++) {
            const int64_t first_row = g * rows_per_kv_head;
            // Positions [from, seen) of this stretch are what a row sees; rows of earlier tokens see none of
            // it, nor do those of tokens whose window begins behind it.
            auto length = [&](int64_t row) { return first_length + (row - first_row) / heads - start; };
            auto from = [&](int64_t row) { return max(0, length(row) - window); };
            auto seen = [&](int64_t row) { return min(kStretch, length(row)); };
            const int64_t end_row =
                first_row + min(rows_per_kv_head, (start + kStretch + window - first_length) * heads);
            // This stretch of the next head, or the next stretch of the first one.
            Stretch<Cached> after = g + 1 == kv_heads ? next : here;
            if (g + 1 < kv_heads) after.advance(D * args.block_size);
            const Asked<Cached> keys{after.keys, after.groups(), keys_apart, is_near};
            const Asked<Cached> values{is_near ? here.values : after.values,
                                       is_near ? here.groups() : after.groups(), 1, is_near};
            bool is_asked = false;
            int64_t row = first_row + (start < first_length ? 0 : (start - first_length + 1) * heads);
            for (; row < end_row; row += kRowsTogether) {
                const int64_t together = min(kRowsTogether, end_row - row);
                const int64_t groups = (seen(row + together - 1) + kPositionGroup - 1) / kPositionGroup;
                with_count<kRowsTogether, Keys<Cached>::template Score>(
                    together, here, from(row) / kPositionGroup, groups, rows, row,
                    is_asked  ? nothing
                    : is_near ? values
                              : keys);
                for (int64_t r = row; r < row + together; r++) softmax_step(rows, r, from(r), seen(r));
                // In the order of positions: what earlier rows see besides, what all these rows see, what
                // later ones see besides. A position that a row does not see must not be multiplied by zero:
                // it might be infinite.
                const int64_t begin = min(from(row + together - 1), seen(row)), common = seen(row);
                auto add_alone = [&](int64_t r, int64_t first, int64_t last) {
                    if (first < last) {
                        Values<Cached>::template Add<1>::run(here, first, last, rows, r, nothing);
                    }
                };
                for (int64_t r = row; r < row + together; r++) add_alone(r, from(r), begin);
                with_count<kRowsTogether, Values<Cached>::template Add>(together, here, begin, common, rows,
                                                                        row,
                                                                        is_asked  ? nothing
                                                                        : is_near ? keys
                                                                                  : values);
                is_asked = true;
                for (int64_t r = row; r < row + together; r++) add_alone(r, max(common, from(r)), seen(r));
            }
            here = after;
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

// Some successive items of one tile go together: the heads of a block lie side by side in memory. More of
// them (32 query heads of 8, 128 wide) lose 5 to 10 %, as their rows leave the first-level cache.
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
        const int64_t kv_heads = min(min(min(fit, kAttentionHeadsTogether), KV - kv_head), end - item);
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
