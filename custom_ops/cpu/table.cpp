#include "cpu/families.h"

#define LLMPACK_STRING_(x) #x
#define LLMPACK_STRING(x) LLMPACK_STRING_(x)

namespace llmpack::LLMPACK_ISA {

const Kernels& table() {
    static const Kernels kernels = {
        LLMPACK_STRING(LLMPACK_ISA),
        kQuantizedTokenBlock,
        quantize,
        matmul_quantized,
        matmul_float,
        embedding,
        rms_norm,
        swiglu,
        attention_write,
        attention_read,
    };
    return kernels;
}

}  // namespace llmpack::LLMPACK_ISA
