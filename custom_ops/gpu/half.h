// float16 on the host, without the processor's help: for values that pass through it on their way between
// GPUs.
#ifndef LLMPACK_GPU_HALF_H_
#define LLMPACK_GPU_HALF_H_

#include <cstdint>
#include <cstring>

namespace llmpack::gpu {

// Subnormals are converted as integers: a thread may have set subnormal floats to be flushed to zero.
inline float half_to_float(uint16_t half) {
    const uint32_t magnitude = half & 0x7fff;
    float value = static_cast<float>(magnitude) * 0x1p-24f;
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    if (magnitude > 0x3ff) bits = (magnitude << 13) + ((127 - 15) << 23);
    if (magnitude > 0x7bff) bits |= 0x7f800000;  // infinity, NaN
    bits |= static_cast<uint32_t>(half & 0x8000) << 16;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

// Rounds to nearest, ties to even; saturates at 65504, as the kernels do (FORMAT.md 8.4). NaN stays NaN.
inline uint16_t float_to_half(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    const uint32_t size = bits & 0x7fffffff;
    if (size > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
    if (size >= 0x477fe000) return static_cast<uint16_t>(sign | 0x7bff);  // 65504 and beyond
    if (size < 0x38800000) {  // below 2^-14: a multiple of 2^-24, found by the addition's own rounding
        float magnitude, half_unit = 0.5f;
        std::memcpy(&magnitude, &size, sizeof(magnitude));
        magnitude += half_unit;  // 0.5 has a last place of 2^-24
        uint32_t sum;
        std::memcpy(&sum, &magnitude, sizeof(sum));
        return static_cast<uint16_t>(sign | (sum - 0x3f000000));
    }
    const uint32_t rounded = size + 0xfff + (size >> 13 & 1);
    const uint32_t half = (rounded >> 13) - ((127 - 15) << 10);
    return static_cast<uint16_t>(sign | (half > 0x7bff ? 0x7bff : half));
}

}  // namespace llmpack::gpu

#endif  // LLMPACK_GPU_HALF_H_
