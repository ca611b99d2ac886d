// Rows of a checkpoint -> quantized row tiles, and the product of row tiles with vectors in float64. Compiled
// once for each instruction set. A vector holds the same input feature of a tile's 16 rows, so that every sum
// runs within a lane and its order is the same for every vector width.
#include "pack/tiles.h"

#include "pack/vectors.h"

namespace llmpack::LLMPACK_ISA {
namespace {

constexpr int64_t kMaxGroup = 128;

// Below this magnitude of a group's largest entry (2^-20), float16 scales are so coarse that nothing is
// searched.
constexpr float kTiny = 9.5367431640625e-7f;
// Scales below this (2^-22) are less than four of float16's smallest steps, and rounded away from zero.
constexpr float kCoarse = 2.384185791015625e-7f;
// From here (2^19) on a scale cannot fit float16 whatever is chosen.
constexpr float kHuge = 524288.0f;

template <int kType>
LLMPACK_INLINE Float load_source(const void* rows, int64_t index) {
    if constexpr (kType == LLMPACK_F32) {
        return load(static_cast<const float*>(rows) + index);
    } else {
        uint16_t narrow[kRows];
        std::memcpy(narrow, static_cast<const uint16_t*>(rows) + index, sizeof(narrow));
        int32_t wide[kRows];
        for (int i = 0; i < kRows; ++i) wide[i] = narrow[i];
        Int value = load(wide);
        return kType == LLMPACK_F16 ? half_to_float(value) : from_bits(shift_left<16>(value));
    }
}

template <int kType>
LLMPACK_INLINE float load_source_one(const void* rows, int64_t index) {
    if constexpr (kType == LLMPACK_F32) {
        return static_cast<const float*>(rows)[index];
    } else {
        int32_t narrow[kRows] = {static_cast<const uint16_t*>(rows)[index]};
        float wide[kRows];
        Int value = load(narrow);
        store(wide, kType == LLMPACK_F16 ? half_to_float(value) : from_bits(shift_left<16>(value)));
        return wide[0];
    }
}

// Columns [first, first + count) of up to 16 rows, transposed: values [count][16]; absent rows are zero.
// Returns the largest |bits| of each lane, which tells infinities and NaN.
template <int kType>
LLMPACK_INLINE Int gather(const LlmpackRows& a, int64_t first_row, int64_t first, int64_t count,
                          float* values) {
    Int largest = all(0);
    int64_t present = a.num_rows - first_row;  // below 0 in tiles behind the last row
    if (present < kRows) std::memset(values, 0, sizeof(float) * kRows * count);
    if (present > kRows) present = kRows;
    int64_t whole = count / kRows * kRows;
    for (int64_t r = 0; r < present; ++r) {
        int64_t start = (first_row + r) * a.row_stride + first;
        float row[kRows];
        for (int64_t k = 0; k < whole; k += kRows) {
            Float value = load_source<kType>(a.rows, start + k);
            largest = max(largest, bits(value) & all(0x7fffffff));
            store(row, value);
            for (int64_t j = 0; j < kRows; ++j) values[(k + j) * kRows + r] = row[j];
        }
        for (int64_t k = whole; k < count; ++k) {
            float value = load_source_one<kType>(a.rows, start + k);
            largest = max(largest, bits(all(value)) & all(0x7fffffff));
            values[k * kRows + r] = value;
        }
    }
    return largest;
}

// q4: 16 uneven levels (FORMAT.md 4.3), and where they meet, as count_below wants them.
alignas(64) constexpr float kLevels[16] = {-64, -52, -42, -32, -24, -18, -11, -5,
                                           0,   6,   12,  19,  26,  34,  44,  56};
constexpr float middle(int i) { return (kLevels[i] + kLevels[i + 1]) / 2; }
alignas(64) constexpr float kMiddles[16] = {
    0,         middle(7), middle(3), middle(11), middle(1), middle(5),  middle(9),  middle(13),
    middle(0), middle(2), middle(4), middle(6),  middle(8), middle(10), middle(12), middle(14)};
// mxfp4: twice E2M1's numbers, and the middles of the positive ones.
alignas(64) constexpr float kMXFP4Levels[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
constexpr float kMXFP4Middles[7] = {0.5f, 1.5f, 2.5f, 3.5f, 5, 7, 10};

template <int kStorage>
struct Levels;
template <>
struct Levels<LLMPACK_Q4> {
    static constexpr float kOutermost = -64;
    static LLMPACK_INLINE Int index(const Float& x) { return count_below(kMiddles, x); }
    static LLMPACK_INLINE Float nearest(const Float& x) { return lookup(kLevels, index(x)); }
};
template <int kLow, int kHigh, int kZero>
struct Uniform {
    static constexpr float kOutermost = kLow;
    static LLMPACK_INLINE Float nearest(const Float& x) {
        return rint(max(min(x, all(static_cast<float>(kHigh))), all(static_cast<float>(kLow))));
    }
    static LLMPACK_INLINE Int index(const Float& x) { return to_int(nearest(x)) + all(kZero); }
};
template <>
struct Levels<LLMPACK_MXFP4> {
    static LLMPACK_INLINE Int index(const Float& x) {
        const Int negative = all(0.0f) > x;
        const Float magnitude = select(negative, all(0.0f) - x, x);
        Int index = negative & all(8);
        for (float middle : kMXFP4Middles) index = index - (magnitude > all(middle));  // a mask is -1
        return index;
    }
};
template <>
struct Levels<LLMPACK_Q6> : Uniform<-32, 31, 32> {};
template <>
struct Levels<LLMPACK_Q8> : Uniform<-127, 127, 128> {};

// The step of each row's group that loses least, [16] floats (llmpack/quantize.py: _search).
template <int kStorage>
LLMPACK_INLINE Float search(const float* values, int64_t count, const Float& extreme, const float* candidates,
                            int64_t num_candidates) {
    Float magnitude = max(extreme, all(0.0f) - extreme);
    Int searched = magnitude >= all(kTiny);
    Float unit = select(searched, extreme, all(1.0f));
    Float best_gain = all(-1.0f), best_step = all(0.0f);
    for (int64_t c = 0; c < num_candidates; ++c) {
        Float inverse = all(candidates[c]) / unit;
        Float products = all(0.0f), squares = all(0.0f);
        for (int64_t k = 0; k < count; ++k) {
            Float value = load(values + k * kRows);
            Float level = Levels<kStorage>::nearest(value * inverse);
            products = products + value * level;
            squares = squares + level * level;
        }
        Float step = products / squares;
        Float gain = products * step;
        Int better = gain > best_gain;
        best_gain = select(better, gain, best_gain);
        best_step = select(better, step, best_step);
    }
    return select(searched, best_step, extreme / all(Levels<kStorage>::kOutermost));
}

LLMPACK_INLINE void store_halves(uint16_t* out, const Int& half) {
    int32_t wide[kRows];
    store(wide, half);
    for (int i = 0; i < kRows; ++i) out[i] = static_cast<uint16_t>(wide[i]);
}

// One group of a tile: values [group_size][16] -> cells of the tile and 16 scales. False: a scale overflows.
template <int kStorage>
bool pack_group(const LlmpackRows& a, const float* values, uint8_t* cells, uint16_t* scales) {
    const int64_t count = a.group_size;
    Float lowest = load(values), highest = lowest;
    for (int64_t k = 1; k < count; ++k) {
        Float value = load(values + k * kRows);
        lowest = min(value, lowest);
        highest = max(value, highest);
    }
    Float negated = all(0.0f) - lowest;
    Float step;
    if constexpr (kStorage == LLMPACK_Q8) {
        step = max(negated, highest) / all(127.0f);
    } else if constexpr (kStorage == LLMPACK_MXFP4) {
        // The power of two that is at most a quarter of the largest magnitude, halved as the levels are
        // doubled; no less than float16's smallest, or 0.
        const Float largest = max(negated, highest);
        const Int exponent = bits(largest) & all(0x7f800000);
        const Int step_bits = exponent - all(3 << 23), least = all((127 - 24) << 23);
        step = from_bits(select(step_bits > least, step_bits, least) & (largest != all(0.0f)));
    } else {
        Float extreme = select(negated >= highest, lowest, highest);
        if (any(max(extreme, all(0.0f) - extreme) >= all(kHuge))) return false;
        step = search<kStorage>(values, count, extreme, a.candidates, a.num_candidates);
    }
    // Adding 0 makes one zero of the two: which of them is the largest depends on the order of comparisons.
    Int half = float_to_half(step + all(0.0f));
    if (any((half & all(0x7fff)) == all(0x7c00))) return false;
    Float wanted = max(step, all(0.0f) - step), rounded = half_to_float(half & all(0x7fff));
    half = half - ((wanted > rounded) & (all(kCoarse) > wanted));  // a mask is -1
    store_halves(scales, half);

    Float unit = half_to_float(half);
    Int nonzero = unit != all(0.0f);
    Float inverse = select(nonzero, all(1.0f) / select(nonzero, unit, all(1.0f)), all(0.0f));
    auto quantize = [&](int64_t k) { return Levels<kStorage>::index(load(values + k * kRows) * inverse); };
    if constexpr (kStorage == LLMPACK_Q4 || kStorage == LLMPACK_MXFP4) {
        for (int64_t k = 0; k < count; k += 8, cells += 4 * kRows) {
            Int cell = quantize(k) | shift_left<4>(quantize(k + 4));
            cell = cell | shift_left<8>(quantize(k + 1) | shift_left<4>(quantize(k + 5)));
            cell = cell | shift_left<16>(quantize(k + 2) | shift_left<4>(quantize(k + 6)));
            cell = cell | shift_left<24>(quantize(k + 3) | shift_left<4>(quantize(k + 7)));
            store(cells, cell);
        }
        return true;
    }
    auto four = [&](int64_t k) {
        return quantize(k) | shift_left<8>(quantize(k + 1)) | shift_left<16>(quantize(k + 2)) |
               shift_left<24>(quantize(k + 3));
    };
    if constexpr (kStorage == LLMPACK_Q6) {
        for (int64_t k = 0; k < count; k += 16, cells += 12 * kRows) {
            const Int fourth = four(k + 12), high_bits = all(static_cast<int32_t>(0xc0c0c0c0));
            store(cells, four(k) | (shift_left<6>(fourth) & high_bits));
            store(cells + 4 * kRows, four(k + 4) | (shift_left<4>(fourth) & high_bits));
            store(cells + 8 * kRows, four(k + 8) | (shift_left<2>(fourth) & high_bits));
        }
    } else {
        for (int64_t k = 0; k < count; k += 4, cells += 4 * kRows) store(cells, four(k));
    }
    return true;
}

bool pack_group(const LlmpackRows& a, const float* values, uint8_t* cells, uint16_t* scales) {
    if (a.storage == LLMPACK_Q4) return pack_group<LLMPACK_Q4>(a, values, cells, scales);
    if (a.storage == LLMPACK_Q6) return pack_group<LLMPACK_Q6>(a, values, cells, scales);
    if (a.storage == LLMPACK_MXFP4) return pack_group<LLMPACK_MXFP4>(a, values, cells, scales);
    return pack_group<LLMPACK_Q8>(a, values, cells, scales);
}

// Bits of a quantized number.
constexpr int64_t bits_of(int32_t storage) {
    return storage == LLMPACK_Q4 || storage == LLMPACK_MXFP4 ? 4 : storage == LLMPACK_Q6 ? 6 : 8;
}

template <int kType>
int pack_rows_of(const LlmpackRows& a) {
    const bool is_quantized = a.storage != LLMPACK_F32 && a.storage != LLMPACK_F16;
    const int64_t group = is_quantized ? a.group_size : kMaxGroup;
    const int64_t num_groups = (a.num_columns + group - 1) / group;
    alignas(64) float values[kMaxGroup * kRows];
    Int largest = all(0);
    bool overflow = false;
    for (int64_t tile = 0; tile < a.num_tiles; ++tile) {
        for (int64_t g = 0; g < num_groups; ++g) {
            const int64_t first = g * group;
            const int64_t count = a.num_columns - first < group ? a.num_columns - first : group;
            largest = max(largest, gather<kType>(a, tile * kRows, first, count, values));
            const int64_t at = (tile * a.num_columns + first) * kRows;  // of the group's first element
            if (is_quantized) {
                auto* cells = static_cast<uint8_t*>(a.weight) + at * bits_of(a.storage) / 8;
                overflow |= !pack_group(a, values, cells, a.scales + (tile * num_groups + g) * kRows);
            } else if (a.storage == LLMPACK_F32) {
                std::memcpy(static_cast<float*>(a.weight) + at, values, sizeof(float) * kRows * count);
            } else {
                for (int64_t k = 0; k < count; ++k) {
                    Int half = float_to_half(load(values + k * kRows));
                    overflow |= any((half & all(0x7fff)) == all(0x7c00));
                    store_halves(static_cast<uint16_t*>(a.weight) + at + k * kRows, half);
                }
            }
        }
        if (any(largest > all(0x7f7fffff))) return LLMPACK_PACK_NOT_FINITE;
        if (overflow) return LLMPACK_PACK_OVERFLOW;
    }
    return LLMPACK_PACK_OK;
}

constexpr int kVectors = 8;  // activation vectors side by side in packed_product

// Sixteen rows as doubles.
struct Double {
    VecD v[kRows / kDoubleLanes];
};

LLMPACK_INLINE Double to_double(const Float& a) {
    float lanes[kRows];
    double wide[kRows];
    store(lanes, a);
    for (int i = 0; i < kRows; ++i) wide[i] = lanes[i];
    Double r;
    std::memcpy(&r, wide, sizeof(r));
    return r;
}

// sums[t] += weight * x[t] for the eight vectors; each a single multiplication and a single addition.
LLMPACK_INLINE void accumulate(Double* sums, const Float& weight, const double* x) {
    Double w = to_double(weight);
    for (int t = 0; t < kVectors; ++t) {
        for (int i = 0; i < kRows / kDoubleLanes; ++i) sums[t].v[i] += w.v[i] * x[t];
    }
}

template <int kStorage>
LLMPACK_INLINE void add_group(const LlmpackProduct& a, int64_t tile, int64_t first, int64_t count,
                              Double* sums) {
    const int64_t at = (tile * a.num_columns + first) * kRows;
    const double* x = a.x + first * kVectors;
    if constexpr (kStorage == LLMPACK_F32) {
        for (int64_t k = 0; k < count; ++k)
            accumulate(sums, load(static_cast<const float*>(a.weight) + at + k * kRows), x + k * kVectors);
    } else if constexpr (kStorage == LLMPACK_F16) {
        for (int64_t k = 0; k < count; ++k)
            accumulate(sums, load_source<LLMPACK_F16>(a.weight, at + k * kRows), x + k * kVectors);
    } else if constexpr (kStorage == LLMPACK_Q8) {
        const uint8_t* cells = static_cast<const uint8_t*>(a.weight) + at;
        for (int64_t k = 0; k < count; k += 4, cells += 4 * kRows) {
            Int cell;
            std::memcpy(&cell, cells, sizeof(cell));
            for (int j = 0; j < 4; ++j) {
                Int level = cell & all(255);
                cell = shift_right<8>(cell);
                accumulate(sums, to_float(level - all(128)), x + (k + j) * kVectors);
            }
        }
    } else if constexpr (kStorage == LLMPACK_Q6) {
        const uint8_t* cells = static_cast<const uint8_t*>(a.weight) + at * 6 / 8;
        for (int64_t k = 0; k < count; k += 16, cells += 12 * kRows) {
            Int fourth = all(0);  // gathered from the last cell to the first
            for (int part = 2; part >= 0; --part) {
                Int cell;
                std::memcpy(&cell, cells + part * 4 * kRows, sizeof(cell));
                fourth = shift_left<2>(fourth) | (shift_right<6>(cell) & all(0x03030303));
            }
            for (int part = 0; part < 4; ++part) {
                Int cell = fourth;
                if (part < 3) std::memcpy(&cell, cells + part * 4 * kRows, sizeof(cell));
                for (int j = 0; j < 4; ++j) {
                    accumulate(sums, to_float((cell & all(63)) - all(32)), x + (k + 4 * part + j) * kVectors);
                    cell = shift_right<8>(cell);
                }
            }
        }
    } else {
        const auto& levels = kStorage == LLMPACK_Q4 ? kLevels : kMXFP4Levels;
        const uint8_t* cells = static_cast<const uint8_t*>(a.weight) + at / 2;
        for (int64_t k = 0; k < count; k += 8, cells += 4 * kRows) {
            Int low, high;
            std::memcpy(&low, cells, sizeof(low));
            high = shift_right<4>(low);
            for (int j = 0; j < 4; ++j) {
                accumulate(sums, lookup(levels, low & all(15)), x + (k + j) * kVectors);
                low = shift_right<8>(low);
            }
            for (int j = 0; j < 4; ++j) {
                accumulate(sums, lookup(levels, high & all(15)), x + (k + 4 + j) * kVectors);
                high = shift_right<8>(high);
            }
        }
    }
}

template <int kStorage>
void product_of(const LlmpackProduct& a) {
    constexpr bool kQuantized = kStorage != LLMPACK_F32 && kStorage != LLMPACK_F16;
    const int64_t group = kQuantized ? a.group_size : a.num_columns;
    const int64_t num_groups = a.num_columns / group;
    for (int64_t tile = 0; tile < a.num_tiles; ++tile) {
        Double totals[kVectors] = {};
        for (int64_t g = 0; g < num_groups; ++g) {
            Double sums[kVectors] = {};
            add_group<kStorage>(a, tile, g * group, group, sums);
            if constexpr (kQuantized) {
                Double scale = to_double(load_source<LLMPACK_F16>(a.scales, (tile * num_groups + g) * kRows));
                for (int t = 0; t < kVectors; ++t) {
                    for (int i = 0; i < kRows / kDoubleLanes; ++i)
                        totals[t].v[i] += sums[t].v[i] * scale.v[i];
                }
            } else {
                for (int t = 0; t < kVectors; ++t) totals[t] = sums[t];
            }
        }
        for (int t = 0; t < kVectors; ++t) {
            double lanes[kRows];
            std::memcpy(lanes, &totals[t], sizeof(lanes));
            for (int r = 0; r < kRows; ++r) a.y[(tile * kRows + r) * kVectors + t] = lanes[r];
        }
    }
}

}  // namespace

int pack_rows(const LlmpackRows& rows) {
    if (rows.source_type == LLMPACK_F32) return pack_rows_of<LLMPACK_F32>(rows);
    if (rows.source_type == LLMPACK_F16) return pack_rows_of<LLMPACK_F16>(rows);
    return pack_rows_of<LLMPACK_BF16>(rows);
}

void packed_product(const LlmpackProduct& product) {
    if (product.storage == LLMPACK_F32) return product_of<LLMPACK_F32>(product);
    if (product.storage == LLMPACK_F16) return product_of<LLMPACK_F16>(product);
    if (product.storage == LLMPACK_Q8) return product_of<LLMPACK_Q8>(product);
    if (product.storage == LLMPACK_Q6) return product_of<LLMPACK_Q6>(product);
    if (product.storage == LLMPACK_MXFP4) return product_of<LLMPACK_MXFP4>(product);
    product_of<LLMPACK_Q4>(product);
}

}  // namespace llmpack::LLMPACK_ISA
