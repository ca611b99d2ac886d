// Every operator of the domain: the functions give the OrtCustomOp objects, register.cpp adds them to a
// session.
#ifndef LLMPACK_ORT_OPS_H_
#define LLMPACK_ORT_OPS_H_

#include <vector>

#include "ort/abi.h"

namespace llmpack::ort {

std::vector<const OrtCustomOp*> matmul_ops();       // MatMul.. and what is joined with it, Embedding..
std::vector<const OrtCustomOp*> elementwise_ops();  // RMSNorm, AddRMSNorm, SwiGLU
std::vector<const OrtCustomOp*> attention_ops();    // PagedAttention
std::vector<const OrtCustomOp*> collective_ops();   // AllReduce, AllReduceAddRMSNorm, AllGather
std::vector<const OrtCustomOp*> gpu_ops();          // all of these and more, for the CUDA and ROCm providers

}  // namespace llmpack::ort

#endif  // LLMPACK_ORT_OPS_H_
