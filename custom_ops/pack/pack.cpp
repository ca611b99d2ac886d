// Checks the arguments of pack.h's functions and hands them to the instruction set that the kernels use too.
#include "pack/pack.h"

#include <cstring>

#include "pack/tiles.h"

namespace {

constexpr int64_t kTileRows = 16, kMaxGroup = 128, kMaxElements = INT64_C(1) << 40;

bool is_quantized(int32_t storage) { return storage >= LLMPACK_Q8 && storage <= LLMPACK_MXFP4; }

[[maybe_unused]] bool starts_with(const char* text, const char* start) {
    return std::strncmp(text, start, std::strlen(start)) == 0;
}

bool sizes_fit(int32_t storage, int64_t group_size, int64_t num_tiles, int64_t num_columns) {
    if (storage != LLMPACK_F32 && storage != LLMPACK_F16 && !is_quantized(storage)) return false;
    if (num_tiles < 0 || num_columns < 1 || num_columns > kMaxElements) return false;
    if (num_tiles > kMaxElements / num_columns / kTileRows) return false;
    if (!is_quantized(storage)) return true;
    return group_size >= 16 && group_size <= kMaxGroup && group_size % 16 == 0 &&
           num_columns % group_size == 0;
}

}  // namespace

extern "C" {

int llmpack_ops_pack_rows(const LlmpackRows* rows) {
    if (rows == nullptr || rows->struct_size != static_cast<int32_t>(sizeof(LlmpackRows)))
        return LLMPACK_PACK_BAD_ARGUMENT;
    const LlmpackRows& r = *rows;
    bool source_fits =
        r.source_type == LLMPACK_F32 || r.source_type == LLMPACK_F16 || r.source_type == LLMPACK_BF16;
    if (!source_fits || !sizes_fit(r.storage, r.group_size, r.num_tiles, r.num_columns) || r.num_rows < 0 ||
        r.num_rows > r.num_tiles * kTileRows || r.row_stride < r.num_columns ||
        (r.num_rows > 0 && r.rows == nullptr) || r.weight == nullptr ||
        (is_quantized(r.storage) && r.scales == nullptr) ||
        ((r.storage == LLMPACK_Q6 || r.storage == LLMPACK_Q4) &&
         (r.candidates == nullptr || r.num_candidates < 1)))
        return LLMPACK_PACK_BAD_ARGUMENT;
    [[maybe_unused]] const char* isa = llmpack_ops_isa();
#if defined(__x86_64__)
    if (starts_with(isa, "avx512")) return llmpack::avx512::pack_rows(r);
    if (starts_with(isa, "avx2")) return llmpack::avx2::pack_rows(r);
#endif
    return llmpack::portable::pack_rows(r);
}

int llmpack_ops_packed_product(const LlmpackProduct* product) {
    if (product == nullptr || product->struct_size != static_cast<int32_t>(sizeof(LlmpackProduct)))
        return LLMPACK_PACK_BAD_ARGUMENT;
    const LlmpackProduct& p = *product;
    if (!sizes_fit(p.storage, p.group_size, p.num_tiles, p.num_columns) || p.weight == nullptr ||
        (is_quantized(p.storage) && p.scales == nullptr) || p.x == nullptr || p.y == nullptr)
        return LLMPACK_PACK_BAD_ARGUMENT;
    [[maybe_unused]] const char* isa = llmpack_ops_isa();
#if defined(__x86_64__)
    if (starts_with(isa, "avx512")) return llmpack::avx512::packed_product(p), LLMPACK_PACK_OK;
    if (starts_with(isa, "avx2")) return llmpack::avx2::packed_product(p), LLMPACK_PACK_OK;
#endif
    llmpack::portable::packed_product(p);
    return LLMPACK_PACK_OK;
}

}  // extern "C"
