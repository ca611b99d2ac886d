// Reads a kernel file: the GPU code of one target (FORMAT.md 8.2), written by
// packager/llmpack/kernel_file.py. Fixed records, checked against the file's size before anything follows an
// offset. Knows no driver.
#ifndef LLMPACK_GPU_KERNEL_FILE_H_
#define LLMPACK_GPU_KERNEL_FILE_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace llmpack::gpu {

enum class CodeKind : uint32_t { kCubin = 1, kPtx = 2, kHsaco = 3 };

struct Parameter {
    std::string name, type;  // "x", "*fp16"
    uint32_t size, divisor;
    bool is_pointer() const { return type[0] == '*'; }
};

// Programs along an axis: ceil(dimension / divisor) * factor + plus; numbers of FORMAT.md 8.4.
struct GridAxis {
    uint32_t dimension, divisor, factor, plus;
};

constexpr uint32_t kMostConstants = 64, kMostParameters = 64;  // of a kernel

struct KernelRecord {
    std::string op, function;
    uint64_t code_offset, code_size;
    uint32_t num_warps, shared_bytes;
    bool is_cooperative;
    bool waits;  // by itself for the kernels before it (FORMAT.md 8.6)
    std::map<std::string, int64_t> constants;
    std::vector<Parameter> parameters;
    GridAxis grid[3];
};

struct KernelFile {
    std::string path;           // for messages
    std::vector<char> data;     // the whole file, and a zero byte
    std::string backend, arch;  // "cuda", "sm_89"
    CodeKind kind;
    uint32_t warp_size;
    std::vector<KernelRecord> kernels;
};

// Throws GpuError: it cannot be read, is no kernel file of version 1, or asks for what this launcher does not
// give.
KernelFile read_kernel_file(const std::string& path);

}  // namespace llmpack::gpu

#endif  // LLMPACK_GPU_KERNEL_FILE_H_
