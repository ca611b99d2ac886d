// SwiGLU and GeGLU (FORMAT.md 5.4, 5.14): y = act(gate) * up.
#include "cpu/families.h"
#include "cpu/simd.h"

namespace llmpack::LLMPACK_ISA {

// gate_up: [T, 2 F], gate in the first F columns.  y: [T, F].
void glu(Gating gating, const float* gate_up, int64_t F, float* y, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
        const float* gate = gate_up + row * 2 * F;
        const float* up = gate + F;
        float* out = y + row * F;
        const int64_t whole = F / 16 * 16;
        for (int64_t i = 0; i < whole; i += 16) store(out + i, gated(gating, load(gate + i), load(up + i)));
        if (whole < F) {
            const int64_t n = F - whole;
            store_first(out + whole, gated(gating, load_first(gate + whole, n), load_first(up + whole, n)),
                        n);
        }
    }
}

}  // namespace llmpack::LLMPACK_ISA
