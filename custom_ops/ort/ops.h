// Every operator of the domain: the functions give the OrtCustomOp objects, register.cpp adds them to a
// session.
#ifndef LLMPACK_ORT_OPS_H_
#define LLMPACK_ORT_OPS_H_

#include <vector>

#include "ort/abi.h"

namespace llmpack::ort {

std::vector<const OrtCustomOp*> matmul_ops();       // MatMul.. and what is joined with it, Embedding..
std::vector<const OrtCustomOp*> moe_ops();          // MoE..
std::vector<const OrtCustomOp*> elementwise_ops();  // RMSNorm, AddRMSNorm, QKNorm, SwiGLU, GeGLU
std::vector<const OrtCustomOp*> attention_ops();    // PagedAttention
std::vector<const OrtCustomOp*> collective_ops();   // AllReduce, AllReduceAddRMSNorm, AllGather

// For the CUDA and ROCm providers.
std::vector<const OrtCustomOp*> gpu_matmul_ops();       // MatMul.., Embedding..
std::vector<const OrtCustomOp*> gpu_elementwise_ops();  // RMSNormF16, ..AddRMSNorm, QKNorm, SwiGLU, GeGLU
std::vector<const OrtCustomOp*> gpu_attention_ops();    // PagedAttention
std::vector<const OrtCustomOp*> gpu_collective_ops();   // AllReduce, AllReduce..AddRMSNorm
std::vector<const OrtCustomOp*> gpu_top_k_ops();        // TopK
std::vector<const OrtCustomOp*> gpu_moe_ops();          // MoEF16, MoEQ8, MoEQ4

}  // namespace llmpack::ort

#endif  // LLMPACK_ORT_OPS_H_
