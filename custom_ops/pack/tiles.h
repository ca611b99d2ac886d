// The packing functions of one instruction set. Arguments were checked by pack.cpp.
#ifndef LLMPACK_PACK_TILES_H_
#define LLMPACK_PACK_TILES_H_

#include "pack/pack.h"

namespace llmpack {
namespace portable {
int pack_rows(const LlmpackRows& rows);
void packed_product(const LlmpackProduct& product);
}  // namespace portable
#if defined(__x86_64__)
namespace avx2 {
int pack_rows(const LlmpackRows& rows);
void packed_product(const LlmpackProduct& product);
}  // namespace avx2
namespace avx512 {
int pack_rows(const LlmpackRows& rows);
void packed_product(const LlmpackProduct& product);
}  // namespace avx512
#endif
}  // namespace llmpack

#endif  // LLMPACK_PACK_TILES_H_
