// Launches compiled kernels: one GPU and one kernel file in a process. Modules are loaded once, when the
// first operator that needs them is made; a launch allocates nothing and waits for nothing, so it may be
// captured into a graph. Knows no ONNX Runtime.
#ifndef LLMPACK_GPU_LAUNCHER_H_
#define LLMPACK_GPU_LAUNCHER_H_

#include <cstdint>
#include <initializer_list>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gpu/driver.h"
#include "gpu/kernel_file.h"

namespace llmpack::gpu {

class Collectives;
class Launcher;

struct Settings {
    Vendor vendor;
    int device;           // as the driver counts
    std::string kernels;  // path of the kernel file
    int64_t max_rows;     // tokens in one step, at most: sizes the workspace
    int64_t max_sequences;
};

// What a grid is made of (FORMAT.md 8.4).
struct Step {
    int64_t rows = 1, sequences = 1, splits = 1, experts = 1;
};

// An argument of a kernel, as a name and a kind; its value is given at each launch, in the same order.
struct Argument {
    enum Kind { kPointer, kInteger, kFloat };
    const char* name;
    Kind kind;
};

struct Value {
    uint64_t bits;
    Value(const void* pointer) : bits(reinterpret_cast<uint64_t>(pointer)) {}
    Value(DevicePointer pointer) : bits(pointer) {}
    Value(int32_t number) : bits(static_cast<uint32_t>(number)) {}
    Value(float number);
};

using Constants = std::map<std::string, int64_t>;

// An operation with its constants decided: the variants of it in the kernel file, ready to launch.
class Operation {
  public:
    // Throws GpuError: more rows than any variant takes, or an argument that breaks a kernel's divisor.
    void launch(const Step& step, std::initializer_list<Value> values, Stream stream) const;
    // The most rows that a variant takes; 0: any number.
    int64_t most_rows() const;
    // A constant that the file decided, such as `chunk`; above 0. Throws GpuError: there is none.
    int64_t constant(const std::string& name) const;

  private:
    friend class Launcher;
    struct Variant {
        const KernelRecord* record;
        Function function;
        int64_t max_rows;
        std::vector<int> bindings;  // for each parameter the index of its argument; -1: null
    };
    const Driver* driver_ = nullptr;
    unsigned warp_size_ = 0;
    bool may_overlap_ = false;
    std::vector<Variant> variants_;  // in order of max_rows, with 0 (any) at the end
    std::vector<Argument> arguments_;
};

class Launcher {
  public:
    // Opens the process's launcher. Throws GpuError: no such GPU, a file for another chip, or one is open
    // already.
    static Launcher& open(const Settings& settings);
    static Launcher& current();  // throws GpuError if none is open
    static bool is_open();
    static void close();  // unloads; no session may use it any more

    ~Launcher();

    // The variants of `op` whose constants are these, and any `max_rows`; `free`: constants that the file
    // decides. Throws GpuError: none, or a parameter that `arguments` does not name.
    Operation operation(const std::string& op, const Constants& constants,
                        std::initializer_list<Argument> arguments,
                        std::initializer_list<const char*> free = {});

    // One piece of device memory for all operators, as they run one after the other. Reserved while operators
    // are made; never during a step.
    void reserve(size_t bytes);
    DevicePointer workspace() const { return workspace_; }

    // Lives as long as the launcher, or until `release`; `is_shared`, which peers' kernels read while ours
    // write, as the process.
    DevicePointer allocate_zeroed(size_t bytes, bool is_shared = false);
    void release(DevicePointer memory);                                 // which is not shared
    void fill(DevicePointer memory, unsigned char byte, size_t bytes);  // waits until it is done
    void upload(DevicePointer to, const void* from, size_t bytes);      // waits until it is there
    // Copies within the device's reach and then to the host; waits until it is there.
    void copy(DevicePointer to, DevicePointer from, void* host, size_t bytes);

    const Settings settings;
    const Driver& driver;
    const DeviceFacts device;
    const KernelFile file;
    // Kernels that wait by themselves begin while the one before ends (FORMAT.md 8.6); of operations made
    // from now on.
    bool may_overlap;
    std::unique_ptr<Collectives> collectives;  // set by llmpack_ops_gpu_share

  private:
    explicit Launcher(const Settings& settings);
    Module module_of(const KernelRecord& record);  // loaded once
    Function function_of(const KernelRecord& record);

    Stream stream_ = nullptr;             // for what happens before the first step, and between steps
    std::map<uint64_t, Module> modules_;  // by the code's offset
    std::vector<DevicePointer> allocations_;
    DevicePointer workspace_ = 0;
    size_t workspace_bytes_ = 0;
};

}  // namespace llmpack::gpu

#endif  // LLMPACK_GPU_LAUNCHER_H_
