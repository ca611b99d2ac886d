#include "gpu/kernel_file.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>

#include "gpu/driver.h"

namespace llmpack::gpu {

namespace {

constexpr size_t kHeaderBytes = 64, kKernelBytes = 224, kConstantBytes = 32, kParameterBytes = 48;
constexpr uint32_t kVersion = 1, kDimensions = 5, kCooperative = 1, kWaits = 2;

class Reader {
  public:
    explicit Reader(const KernelFile& file) : file_(file) {}

    [[noreturn]] void refuse(const std::string& what) const {
        throw GpuError(file_.path + ": not a kernel file that this launcher reads: " + what +
                       "; copy the artifact again, or install the release that it was packed with");
    }
    void expect(bool holds, const std::string& what) const {
        if (!holds) refuse(what);
    }
    template <class T>
    T number(size_t at) const {
        T value;
        std::memcpy(&value, file_.data.data() + at, sizeof(value));
        return value;
    }
    uint32_t word(size_t at) const { return number<uint32_t>(at); }
    std::string text(size_t at, size_t size) const {
        const size_t length = strnlen(file_.data.data() + at, size);
        const std::string found(file_.data.data() + at, length);
        const bool is_text =
            std::all_of(found.begin(), found.end(), [](char c) { return c > ' ' && c <= '~'; });
        expect(length > 0 && length < size && is_text, "a name is empty, does not end, or is no text");
        return found;
    }

  private:
    const KernelFile& file_;
};

KernelRecord read_record(const KernelFile& file, const Reader& reader, size_t at, size_t constants,
                         size_t parameters, uint32_t num_constants, uint32_t num_parameters) {
    KernelRecord record{};
    record.op = reader.text(at, 32);
    record.function = reader.text(at + 32, 64);
    record.code_offset = reader.number<uint64_t>(at + 96);
    record.code_size = reader.number<uint64_t>(at + 104);
    const uint64_t size = file.data.size();
    reader.expect(
        record.code_size > 0 && record.code_offset <= size && record.code_size <= size - record.code_offset,
        "the code of " + record.function + " ends after the file");
    reader.expect(file.kind != CodeKind::kPtx || file.data[record.code_offset + record.code_size - 1] == 0,
                  "the PTX of " + record.function + " has no end");
    record.num_warps = reader.word(at + 112);
    record.shared_bytes = reader.word(at + 116);
    reader.expect(record.num_warps >= 1 && record.num_warps <= 1024 / file.warp_size,
                  record.function + " has " + std::to_string(record.num_warps) + " warps");
    reader.expect(reader.word(at + 120) == 1, record.function + " needs clusters");
    record.is_cooperative = (reader.word(at + 124) & kCooperative) != 0;
    record.waits = (reader.word(at + 124) & kWaits) != 0;
    reader.expect(reader.word(at + 128) == 0 && reader.word(at + 132) == 0,
                  record.function + " needs scratch memory");
    const uint32_t first_constant = reader.word(at + 136), count_constants = reader.word(at + 140);
    const uint32_t first_parameter = reader.word(at + 144), count_parameters = reader.word(at + 148);
    reader.expect(first_constant <= num_constants && count_constants <= num_constants - first_constant &&
                      first_parameter <= num_parameters &&
                      count_parameters <= num_parameters - first_parameter,
                  "the tables of " + record.function + " end after the file's");
    // Kernels may share records: without a bound, a small file could take all memory.
    const auto expect_few = [&](uint32_t count, uint32_t most, const char* what) {
        reader.expect(count <= most, record.function + " has " + std::to_string(count) + " " + what +
                                         ", expected at most " + std::to_string(most));
    };
    expect_few(count_constants, kMostConstants, "constants");
    expect_few(count_parameters, kMostParameters, "parameters");
    for (uint32_t i = first_constant; i < first_constant + count_constants; i++) {
        const size_t place = constants + i * kConstantBytes;
        const std::string name = reader.text(place, 24);
        const int64_t value = reader.number<int64_t>(place + 24);
        reader.expect(value >= 0 && value <= INT32_MAX, record.function + " has " + name + " " +
                                                            std::to_string(value) + ", expected 0 to " +
                                                            std::to_string(INT32_MAX));
        record.constants[name] = value;
    }
    for (uint32_t i = first_parameter; i < first_parameter + count_parameters; i++) {
        const size_t place = parameters + i * kParameterBytes;
        Parameter p{reader.text(place, 24), reader.text(place + 24, 16), reader.word(place + 40),
                    reader.word(place + 44)};
        reader.expect(p.divisor >= 1 && (p.is_pointer() ? p.size == 8 : p.type == "i32" || p.type == "fp32"),
                      record.function + " has the parameter " + p.name + " of type " + p.type);
        record.parameters.push_back(std::move(p));
    }
    for (size_t axis = 0; axis < 3; axis++) {
        const size_t place = at + 152 + axis * 16;
        GridAxis& grid = record.grid[axis];
        grid = {reader.word(place), reader.word(place + 4), reader.word(place + 8), reader.word(place + 12)};
        reader.expect(
            grid.dimension < kDimensions && grid.plus < kDimensions && grid.divisor >= 1 && grid.factor >= 1,
            record.function + " has a grid of unknown numbers");
    }
    return record;
}

}  // namespace

KernelFile read_kernel_file(const std::string& path) {
    KernelFile file{path, {}, "", "", CodeKind::kCubin, 0, {}};
    const std::unique_ptr<FILE, int (*)(FILE*)> stream(std::fopen(path.c_str(), "rb"), std::fclose);
    if (stream == nullptr) throw GpuError(path + ": cannot be opened: " + std::strerror(errno));
    char piece[1 << 16];
    while (const size_t count = std::fread(piece, 1, sizeof(piece), stream.get())) {
        file.data.insert(file.data.end(), piece, piece + count);
    }
    const Reader reader(file);
    reader.expect(file.data.size() >= kHeaderBytes && std::memcmp(file.data.data(), "LLMPKGPU", 8) == 0,
                  "it does not begin as one");
    reader.expect(reader.word(8) == kVersion, "version " + std::to_string(reader.word(8)) + ", expected 1");
    const uint64_t num_kernels = reader.word(12), num_constants = reader.word(16),
                   num_parameters = reader.word(20);
    file.backend = reader.text(24, 16);
    file.arch = reader.text(40, 16);
    const uint32_t kind = reader.word(56);
    file.warp_size = reader.word(60);
    reader.expect(kind >= 1 && kind <= 3 && (file.backend == (kind == 3 ? "hip" : "cuda")),
                  "code of kind " + std::to_string(kind) + " for " + file.backend);
    file.kind = static_cast<CodeKind>(kind);
    reader.expect(file.warp_size == 32 || file.warp_size == 64, "warps of " + std::to_string(file.warp_size));
    const uint64_t constants = kHeaderBytes + num_kernels * kKernelBytes;
    const uint64_t parameters = constants + num_constants * kConstantBytes;
    reader.expect(parameters + num_parameters * kParameterBytes <= file.data.size(),
                  "its tables end after the file");
    for (uint64_t i = 0; i < num_kernels; i++) {
        file.kernels.push_back(read_record(file, reader, kHeaderBytes + i * kKernelBytes, constants,
                                           parameters, static_cast<uint32_t>(num_constants),
                                           static_cast<uint32_t>(num_parameters)));
    }
    // Drivers are told no size, and take for PTX what looks so, whatever the file calls it: text must end.
    file.data.push_back(0);
    return file;
}

}  // namespace llmpack::gpu
