#include "gpu/launcher.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>

#include "gpu/collectives.h"

namespace llmpack::gpu {

namespace {

std::unique_ptr<Launcher>& instance() {
    // Never destroyed at exit: the driver may be gone by then.
    static auto& launcher = *new std::unique_ptr<Launcher>;
    return launcher;
}

std::string words(const std::map<std::string, int64_t>& constants) {
    std::string text;
    for (const auto& [name, value] : constants)
        text += (text.empty() ? "" : ", ") + name + " " + std::to_string(value);
    return text;
}

// For comparisons on one machine.
bool is_overlap_wanted() {
    const char* no = std::getenv("LLMPACK_NO_PDL");
    return no == nullptr || *no == 0 || std::strcmp(no, "0") == 0;
}

// CUDA_ERROR_INVALID_IMAGE, _NO_BINARY_FOR_GPU, _UNSUPPORTED_PTX_VERSION
constexpr std::array<int, 3> kRefused{200, 209, 222};
constexpr int kTegra = 87;  // runs no code of the desktop's chips

// FORMAT.md 8.1: of compute capability 8.x, the cubin of a smaller 8.y runs too.
bool runs_on(const KernelFile& file, const std::string& chip) {
    if (file.arch == chip) return true;
    if (file.backend != "cuda" || chip.rfind("sm_", 0) != 0 || file.arch.rfind("sm_", 0) != 0) return false;
    const int found = std::atoi(file.arch.c_str() + 3), wanted = std::atoi(chip.c_str() + 3);
    const bool is_near = found / 10 == 8 && wanted / 10 == 8 && wanted != kTegra;
    return found <= wanted && (file.kind == CodeKind::kPtx || is_near);
}

}  // namespace

Value::Value(float number) : bits(0) { std::memcpy(&bits, &number, sizeof(number)); }

Launcher& Launcher::open(const Settings& settings) {
    if (instance() != nullptr)
        throw GpuError("a GPU is in use by this process already, expected one for each process");
    instance().reset(new Launcher(settings));
    return *instance();
}

Launcher& Launcher::current() {
    if (instance() == nullptr) {
        throw GpuError("no GPU is in use, expected llmpack_ops_gpu_open before a session is made");
    }
    return *instance();
}

bool Launcher::is_open() { return instance() != nullptr; }

void Launcher::close() { instance().reset(); }

Launcher::Launcher(const Settings& wanted)
    : settings(wanted),
      driver(Driver::get(wanted.vendor)),
      device([&] {
          const int count = driver.device_count();
          if (wanted.device < 0 || wanted.device >= count) {
              throw GpuError("there is no GPU " + std::to_string(wanted.device) + ": the driver shows " +
                             std::to_string(count));
          }
          return driver.device_facts(wanted.device);
      }()),
      file(read_kernel_file(wanted.kernels)),
      may_overlap(driver.can_overlap() && is_overlap_wanted()) {
    const bool is_hip = file.backend == "hip";
    if (is_hip != (settings.vendor == Vendor::kHip) || !runs_on(file, device.chip)) {
        throw GpuError(file.path + " holds code for " + file.arch + ", and GPU " +
                       std::to_string(device.ordinal) + " (" + device.name + ") is " + device.chip +
                       ", which does not run it: copy the artifact again, or pack it again");
    }
    driver.make_current(device.ordinal);
    // A driver that is too old for the code shall refuse it here, where other code can be tried.
    if (!file.kernels.empty()) module_of(file.kernels.front());
    driver.check(driver.call.stream_create(&stream_, kNonBlockingStream), "making a stream");
}

Launcher::~Launcher() {
    try {
        driver.make_current(device.ordinal);  // whichever thread closes
    } catch (const GpuError&) {
        return;  // the device is lost, and what it held
    }
    collectives.reset();
    for (DevicePointer memory : allocations_) driver.call.release(memory);
    if (workspace_ != 0) driver.call.release(workspace_);
    for (const auto& [offset, module] : modules_) driver.call.module_unload(module);
    if (stream_ != nullptr) driver.call.stream_destroy(stream_);
    driver.forget_error();
}

Module Launcher::module_of(const KernelRecord& record) {
    Module& module = modules_[record.code_offset];
    if (module != nullptr) return module;
    const std::string what = "loading " + record.function + " from " + file.path +
                             (file.kind == CodeKind::kPtx ? " (PTX, compiled by the driver)" : "");
    const int code = driver.call.module_load(&module, file.data.data() + record.code_offset);
    const bool is_refused =
        driver.vendor == Vendor::kCuda && std::find(kRefused.begin(), kRefused.end(), code) != kRefused.end();
    try {
        driver.check(code, what);
    } catch (const GpuError& error) {
        if (!is_refused) throw;
        throw RefusedCode(error.what() + std::string(": install a newer driver"));
    }
    return module;
}

Function Launcher::function_of(const KernelRecord& record) {
    driver.make_current(device.ordinal);
    Module module = module_of(record);
    Function function = nullptr;
    driver.check(driver.call.module_function(&function, module, record.function.c_str()),
                 "finding " + record.function + " in " + file.path);
    driver.allow_shared_memory(function, record.shared_bytes);
    return function;
}

Operation Launcher::operation(const std::string& op, const Constants& constants,
                              std::initializer_list<Argument> arguments,
                              std::initializer_list<const char*> free) {
    Operation operation;
    operation.driver_ = &driver;
    operation.warp_size_ = file.warp_size;
    operation.may_overlap_ = may_overlap;
    operation.arguments_.assign(arguments);
    for (const KernelRecord& record : file.kernels) {
        if (record.op != op) continue;
        auto own = record.constants;
        const int64_t max_rows = own.count("max_rows") != 0 ? own.at("max_rows") : 0;
        own.erase("max_rows");
        for (const char* name : free) own.erase(name);
        if (own != constants) continue;
        Operation::Variant variant{&record, function_of(record), max_rows, {}};
        for (const Parameter& p : record.parameters) {
            int index = -1;
            for (size_t i = 0; i < arguments.size(); i++) {
                const Argument& a = arguments.begin()[i];
                const bool fits = a.kind == Argument::kPointer   ? p.is_pointer()
                                  : a.kind == Argument::kInteger ? p.type == "i32"
                                                                 : p.type == "fp32";
                if (p.name == a.name && fits) index = static_cast<int>(i);
            }
            const bool is_scratch = p.name == "global_scratch" || p.name == "profile_scratch";
            if (index < 0 && !is_scratch) {
                throw GpuError(
                    file.path + ": " + record.function + " has the parameter " + p.name + " (" + p.type +
                    "), which this release does not know; install the one that the artifact was packed with");
            }
            variant.bindings.push_back(index);
        }
        operation.variants_.push_back(std::move(variant));
    }
    if (operation.variants_.empty()) {
        throw GpuError(file.path + " has no " + op + " with " + words(constants) +
                       ": it belongs to another model; copy the artifact again");
    }
    std::sort(operation.variants_.begin(), operation.variants_.end(), [](const auto& a, const auto& b) {
        return static_cast<uint64_t>(a.max_rows - 1) < static_cast<uint64_t>(b.max_rows - 1);  // 0 comes last
    });
    return operation;
}

int64_t Operation::most_rows() const { return variants_.back().max_rows; }

int64_t Operation::constant(const std::string& name) const {
    const KernelRecord& record = *variants_.back().record;
    const auto found = record.constants.find(name);
    if (found != record.constants.end() && found->second > 0) return found->second;
    throw GpuError(record.op + " has no " + name +
                   " above 0: the kernel file is damaged, copy the artifact again");
}

void Operation::launch(const Step& step, std::initializer_list<Value> values, Stream stream) const {
    const Variant* variant = nullptr;
    for (const Variant& candidate : variants_) {
        variant = &candidate;
        if (candidate.max_rows == 0 || step.rows <= candidate.max_rows) break;
    }
    const KernelRecord& record = *variant->record;
    if (variant->max_rows != 0 && step.rows > variant->max_rows) {
        throw GpuError(record.op + " of " + std::to_string(step.rows) + " rows, expected at most " +
                       std::to_string(variant->max_rows));
    }
    static const uint64_t null = 0;
    void* parameters[kMostParameters];
    const size_t count = record.parameters.size();
    if (values.size() != arguments_.size()) {
        throw GpuError(record.op + ": " + std::to_string(values.size()) + " arguments, expected " +
                       std::to_string(arguments_.size()));
    }
    for (size_t i = 0; i < count; i++) {
        const Parameter& parameter = record.parameters[i];
        const int index = variant->bindings[i];
        const uint64_t& bits = index < 0 ? null : values.begin()[index].bits;
        if (bits % parameter.divisor != 0) {
            throw GpuError(record.op + ": " + parameter.name + " is " + std::to_string(bits) +
                           ", expected a multiple of " + std::to_string(parameter.divisor));
        }
        parameters[i] = const_cast<uint64_t*>(&bits);
    }
    const int64_t dimensions[] = {1, step.rows, step.sequences, step.splits, step.experts};
    unsigned grid[3];
    for (int axis = 0; axis < 3; axis++) {
        const GridAxis& a = record.grid[axis];
        int64_t programs = (dimensions[a.dimension] + a.divisor - 1) / a.divisor * a.factor;
        if (a.plus != 0) programs += dimensions[a.plus];
        if (programs == 0) return;  // no row, nothing to do
        if (programs > (axis == 0 ? 2147483647 : 65535)) {
            throw GpuError(record.op + ": " + std::to_string(programs) + " programs along axis " +
                           std::to_string(axis) + ", more than a GPU takes");
        }
        grid[axis] = static_cast<unsigned>(programs);
    }
    const unsigned threads = record.num_warps * warp_size_;
    const auto& call = driver_->call;
    int code = 0;
    if (record.is_cooperative) {
        code = call.launch_cooperative(variant->function, grid[0], grid[1], grid[2], threads, 1, 1,
                                       record.shared_bytes, stream, parameters);
    } else if (record.waits && may_overlap_) {
        LaunchAttribute overlap{kProgrammaticSerialization, {}, {1}};
        const LaunchConfig config{
            {grid[0], grid[1], grid[2]}, {threads, 1, 1}, record.shared_bytes, stream, &overlap, 1};
        code = call.launch_with(&config, variant->function, parameters, nullptr);
    } else {
        code = call.launch(variant->function, grid[0], grid[1], grid[2], threads, 1, 1, record.shared_bytes,
                           stream, parameters, nullptr);
    }
    if (code != 0) driver_->check(code, "launching " + record.function);
}

void Launcher::reserve(size_t bytes) {
    if (bytes <= workspace_bytes_) return;
    driver.make_current(device.ordinal);
    if (workspace_ != 0) driver.check(driver.call.release(workspace_), "freeing GPU memory");
    workspace_ = 0;
    workspace_bytes_ = 0;
    driver.check(driver.call.allocate(&workspace_, bytes),
                 "allocating " + std::to_string(bytes) + " bytes of GPU memory");
    workspace_bytes_ = bytes;
}

DevicePointer Launcher::allocate_zeroed(size_t bytes, bool is_shared) {
    driver.make_current(device.ordinal);
    DevicePointer memory = 0;
    const bool is_uncached = is_shared && driver.vendor == Vendor::kHip;
    driver.check(is_uncached ? driver.call.allocate_as(&memory, bytes, kUncached)
                             : driver.call.allocate(&memory, bytes),
                 "allocating " + std::to_string(bytes) + " bytes of GPU memory");
    // What a peer may have open still must not be freed; it goes with the process.
    if (!is_shared) allocations_.push_back(memory);
    fill(memory, 0, bytes);
    return memory;
}

void Launcher::release(DevicePointer memory) {
    const auto found = std::find(allocations_.begin(), allocations_.end(), memory);
    if (found == allocations_.end()) throw GpuError("the memory is not this GPU's");
    allocations_.erase(found);
    driver.make_current(device.ordinal);
    driver.check(driver.call.release(memory), "freeing GPU memory");
}

void Launcher::fill(DevicePointer memory, unsigned char byte, size_t bytes) {
    driver.make_current(device.ordinal);
    driver.check(driver.call.fill(memory, byte, bytes, stream_), "filling GPU memory");
    driver.check(driver.call.stream_synchronize(stream_), "filling GPU memory");
}

void Launcher::copy(DevicePointer to, DevicePointer from, void* host, size_t bytes) {
    driver.check(driver.call.copy_within(to, from, bytes, stream_), "copying between GPUs");
    driver.check(driver.call.copy_out(host, to, bytes, stream_), "copying from the GPU");
    driver.check(driver.call.stream_synchronize(stream_), "copying between GPUs");
}

void Launcher::upload(DevicePointer to, const void* from, size_t bytes) {
    driver.check(driver.call.copy_in(to, from, bytes, stream_), "copying to the GPU");
    driver.check(driver.call.stream_synchronize(stream_), "copying to the GPU");
}

}  // namespace llmpack::gpu
