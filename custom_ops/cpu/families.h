// The kernels of one instruction set, by family; table.cpp gathers them. Compiled once for each LLMPACK_ISA.
#ifndef LLMPACK_CPU_FAMILIES_H_
#define LLMPACK_CPU_FAMILIES_H_

#include "cpu/isa.h"

namespace llmpack::LLMPACK_ISA {

extern const int64_t kQuantizedTokenBlock;
void quantize(const float* x, const QuantizedActivations& out, int64_t begin, int64_t end);
void matmul_quantized(WeightType type, const QuantizedMatMul& args, int64_t begin, int64_t end);
void matmul_float(WeightType type, const FloatMatMul& args, int64_t begin, int64_t end);
void embedding(WeightType type, const QuantizedEmbedding& args, int64_t begin, int64_t end);
void rms_norm(const float* x, const float* residual, const float* weight, float epsilon, int64_t H, float* y,
              float* sum, int64_t begin, int64_t end);
void glu(Gating gating, const float* gate_up, int64_t F, float* y, int64_t begin, int64_t end);
void add_scaled(const float* x, float scale, int64_t n, float* y);
void weigh_runs(const float* logits, int64_t n, float highest, float inverse_temperature, double* sums);
int64_t find_above(const float* logits, int64_t n, float threshold, int32_t* ids);
void attention_write(const PagedAttention& args, int64_t begin, int64_t end);
void attention_read(const PagedAttention& args, int64_t begin, int64_t end);

}  // namespace llmpack::LLMPACK_ISA

#endif  // LLMPACK_CPU_FAMILIES_H_
