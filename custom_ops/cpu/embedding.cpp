// Rows of a quantized embedding (FORMAT.md 5.8): one lane of a tile for each token.
#include "cpu/families.h"
#include "cpu/simd.h"

namespace llmpack::LLMPACK_ISA {

namespace {

// 16 input features of one row, as levels. w: the row's first byte of the tile's 16 features.
LLMPACK_INLINE void q6_levels(const uint8_t* w, int32_t* levels) {
    constexpr int kPart = 4 * kTileRows;
    for (int j = 0; j < 4; j++) {
        const uint8_t a = w[j], b = w[kPart + j], c = w[2 * kPart + j];
        levels[j] = (a & 63) - 32;
        levels[4 + j] = (b & 63) - 32;
        levels[8 + j] = (c & 63) - 32;
        levels[12 + j] = (a >> 6 | b >> 6 << 2 | c >> 6 << 4) - 32;
    }
}

LLMPACK_INLINE void q8_levels(const uint8_t* w, int32_t* levels) {
    for (int cell = 0; cell < 4; cell++) {
        for (int j = 0; j < 4; j++) levels[4 * cell + j] = w[cell * 4 * kTileRows + j] - 128;
    }
}

}  // namespace

// PRECOND: 16 divides group_size, which divides K.
void embedding(WeightType type, const QuantizedEmbedding& args, int64_t begin, int64_t end) {
    const int64_t K = args.K, groups = K / args.group_size;
    const int64_t bits = type == WeightType::kQ6 ? 6 : 8;
    for (int64_t t = begin; t < end; t++) {
        const int64_t tile = args.ids[t] / kTileRows, row = args.ids[t] % kTileRows;
        const uint8_t* w = args.weight + tile * K * kTileRows * bits / 8 + 4 * row;
        const uint16_t* scales = args.scales + tile * groups * kTileRows;
        for (int64_t k = 0; k < K; k += 16, w += 2 * bits * kTileRows) {
            float scale_of_rows[kTileRows];
            store(scale_of_rows, load_f16(scales + k / args.group_size * kTileRows));
            int32_t levels[16];
            if (type == WeightType::kQ6) {
                q6_levels(w, levels);
            } else {
                q8_levels(w, levels);
            }
            for (int i = 0; i < 16; i++)
                args.y[t * K + k + i] = static_cast<float>(levels[i]) * scale_of_rows[row];
        }
    }
}

}  // namespace llmpack::LLMPACK_ISA
