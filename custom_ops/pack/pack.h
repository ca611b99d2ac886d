// What libllmpack_ops.so exports for the packager, which calls it by ctypes: weights into their packed form,
// and a float64 product with packed weights for the packager's self-check.
//
// Plain pointers and sizes. No function allocates, starts threads or keeps state; calls that write to
// disjoint memory may run at the same time, which is how the packager uses all cores. Each result is made of
// single IEEE operations in a fixed order, with round to nearest and without fused multiply-adds, so it is
// the same bits on every machine and for every instruction set (FORMAT.md 2.6). The truth of pack_rows is
// packager/llmpack/quantize.py with layout.py; nothing here shares code with the kernels in cpu/.
#ifndef LLMPACK_PACK_PACK_H_
#define LLMPACK_PACK_PACK_H_

#include <stdint.h>

#include "llmpack_ops.h"

#ifdef __cplusplus
extern "C" {
#endif

// Element types of checkpoints; also the storage of unquantized weights (F32, F16 only).
enum {
    LLMPACK_F32 = 0,
    LLMPACK_F16 = 1,
    LLMPACK_BF16 = 2,
    LLMPACK_Q8 = 3,
    LLMPACK_Q4 = 4,
    LLMPACK_Q6 = 5,
    LLMPACK_MXFP4 = 6
};

// What the functions return.
enum {
    LLMPACK_PACK_OK = 0,
    LLMPACK_PACK_BAD_ARGUMENT = -1,
    LLMPACK_PACK_NOT_FINITE = 1,  // a source value is NaN or infinite
    LLMPACK_PACK_OVERFLOW = 2     // a value, or a group's scale, is beyond float16's range
};

// Rows of a matrix, to become row tiles (FORMAT.md 4.3).
typedef struct {
    int32_t struct_size;      // sizeof(LlmpackRows), so that a stale caller is refused
    int32_t source_type;      // LLMPACK_F32, F16 or BF16
    int32_t storage;          // any of the types but LLMPACK_BF16
    int32_t group_size;       // input features that share a scale, a multiple of 16 up to 128; not F32, F16
    int64_t num_rows;         // rows given, at most 16 * num_tiles; the tiles' other rows become zero weights
    int64_t num_columns;      // input features; a multiple of group_size
    int64_t row_stride;       // elements from one source row to the next
    int64_t num_tiles;        // tiles of 16 rows to write
    const void* rows;         // [num_rows, row_stride], of which num_columns are read
    const float* candidates;  // Q6, Q4: steps to try, as (largest entry of the group) / step; |c| >= 4
    int64_t num_candidates;   // at least 1
    void* weight;      // F32, F16: [num_tiles, num_columns, 16]; Q8: [.., / 4, 16, 4]; Q6: [.., / 16, 3, 16,
                       // 4]; Q4, MXFP4: [.., / 8, 16, 4]
    uint16_t* scales;  // not F32, F16: [num_tiles, num_columns / group_size, 16], float16 bits
} LlmpackRows;

LLMPACK_EXPORT int llmpack_ops_pack_rows(const LlmpackRows* rows);

// y [num_tiles * 16, 8] = dequantized weight * x [num_columns, 8], in float64: eight activation vectors side
// by side. Sums run over the input features of a group in order, then over the groups in order.
typedef struct {
    int32_t struct_size;  // sizeof(LlmpackProduct)
    int32_t storage;      // any of the types but LLMPACK_BF16
    int32_t group_size;   // not F32, F16
    int32_t reserved;     // 0
    int64_t num_tiles;
    int64_t num_columns;  // a multiple of 8, and of group_size
    const void* weight;   // tiles, as above
    const uint16_t* scales;
    const double* x;  // [num_columns, 8]
    double* y;        // [num_tiles * 16, 8]
} LlmpackProduct;

LLMPACK_EXPORT int llmpack_ops_packed_product(const LlmpackProduct* product);

#ifdef __cplusplus
}
#endif

#endif  // LLMPACK_PACK_PACK_H_
