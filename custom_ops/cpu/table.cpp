#include "cpu/families.h"

namespace llmpack::LLMPACK_ISA {

const Kernels& table() {
    static const Kernels kernels = {
        LLMPACK_ISA_NAME, kQuantizedTokenBlock,
        quantize,         matmul_quantized,
        matmul_float,     embedding,
        rms_norm,         glu,
        add_scaled,       attention_write,
        attention_read,   weigh_runs,
        find_above,
    };
    return kernels;
}

}  // namespace llmpack::LLMPACK_ISA
