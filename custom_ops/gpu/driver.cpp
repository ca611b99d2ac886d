#include "gpu/driver.h"

#include <dlfcn.h>

#include <array>
#include <cstring>
#include <map>
#include <mutex>

namespace llmpack::gpu {

namespace {

// A cubin runs on every driver of its major CUDA version and of later ones; ours come from CUDA 12 (Triton's
// assembler). hipGetDevicePropertiesR0600 and code object version 5 came with HIP 6.
constexpr int kOldestCuda = 12000;
constexpr int kOldestHip = 60000000;
// Graphs have programmatic edges since CUDA 12.3, a release with few drivers; what earlier ones do with such
// a launch while they capture is not written.
constexpr int kOldestOverlap = 12040;

// enum CUdevice_attribute; hipDeviceAttribute_t of HIP 5.5 and later.
constexpr int kCudaMultiprocessors = 16, kCudaMajor = 75, kCudaMinor = 76, kHipMultiprocessors = 63;
constexpr int kMaxDynamicSharedSize = 8;        // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr int kPeerAccessAlreadyEnabled = 704;  // CUDA_ERROR_... and hipErrorPeerAccessAlreadyEnabled
constexpr int kNoDevice = 100;                  // CUDA_ERROR_NO_DEVICE, hipErrorNoDevice
constexpr unsigned kSharedMemoryWithoutAsking = 48 * 1024;

template <class Function>
void find(void* handle, const std::string& library, const char* symbol, Function& function) {
    void* address = dlsym(handle, symbol);
    if (address == nullptr) {
        throw GpuError(library + " lacks the function " + symbol +
                       ": the driver is too old, install a newer one");
    }
    std::memcpy(&function, &address, sizeof(function));
}

}  // namespace

void* open_library(const std::vector<const char*>& names, std::string& found, std::string& why) {
    for (const char* name : names) {
        if (void* handle = dlopen(name, RTLD_NOW | RTLD_LOCAL)) {
            found = name;
            return handle;
        }
        const char* text = dlerror();
        // A library that is there but cannot be loaded says more than one that is not.
        const std::string said = text != nullptr ? text : "no reason given";
        if (why.empty() || said.find("No such file") == std::string::npos) why = said;
    }
    return nullptr;
}

std::string version_text(Vendor vendor, int version) {
    if (vendor == Vendor::kCuda) {
        return "CUDA " + std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
    }
    return "HIP " + std::to_string(version / 10000000) + "." + std::to_string(version / 100000 % 100);
}

const char* vendor_name(Vendor vendor) { return vendor == Vendor::kCuda ? "CUDA" : "ROCm"; }

const Driver& Driver::get(Vendor vendor) {
    // Never closed: a driver has threads of its own. A failure is found again at the next call.
    static std::mutex mutex;
    static std::map<Vendor, Driver*>& drivers = *new std::map<Vendor, Driver*>;
    const std::lock_guard<std::mutex> lock(mutex);
    auto& driver = drivers[vendor];
    if (driver == nullptr) driver = new Driver(vendor);
    return *driver;
}

Driver::Driver(Vendor wanted) : vendor(wanted) {
    const bool is_cuda = vendor == Vendor::kCuda;
    std::string why;
    void* handle =
        is_cuda ? open_library({"libcuda.so.1"}, library, why)
                : open_library({"libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so"}, library, why);
    if (handle == nullptr) {
        throw GpuError(std::string("no ") + (is_cuda ? "NVIDIA" : "AMD") + " driver (" + why + "): install " +
                       (is_cuda ? "the NVIDIA driver" : "ROCm 6 or 7") + ", or use --provider cpu");
    }
#define LLMPACK_GPU_FIND(name, cuda, hip, parameters) find(handle, library, is_cuda ? cuda : hip, call.name);
    LLMPACK_GPU_BOTH(LLMPACK_GPU_FIND)
#undef LLMPACK_GPU_FIND
#define LLMPACK_GPU_FIND(name, symbol, parameters) find(handle, library, symbol, call.name);
    if (is_cuda) {
        LLMPACK_GPU_CUDA(LLMPACK_GPU_FIND)
    } else {
        LLMPACK_GPU_HIP(LLMPACK_GPU_FIND)
        find(handle, library, "hipGetErrorString", call.hip_error_text);
    }
#undef LLMPACK_GPU_FIND
    const int code = call.init(0);
    if (code == kNoDevice) {
        throw GpuError(std::string("no ") + (is_cuda ? "NVIDIA" : "AMD") + " GPU: " + library +
                       " is installed and finds none; use --provider cpu");
    }
    check(code, "initialising " + library);
    check(call.driver_version(&version), "asking for the driver's version");
    const int oldest = is_cuda ? kOldestCuda : kOldestHip;
    if (version < oldest) {
        throw GpuError(library + " supports " + version_text(vendor, version) + ", expected " +
                       version_text(vendor, oldest) + " or later: install a newer driver");
    }
}

void Driver::check(int code, const std::string& what) const {
    if (code == 0) return;
    const char* text = nullptr;
    if (vendor == Vendor::kCuda && call.cuda_error_text != nullptr) {
        if (call.cuda_error_text(code, &text) != 0) text = nullptr;
    } else if (call.hip_error_text != nullptr) {
        text = call.hip_error_text(code);
    }
    forget_error();
    throw GpuError(what + ": the driver says '" + (text != nullptr ? text : "nothing more") + "' (error " +
                   std::to_string(code) + ")");
}

void Driver::forget_error() const {
    if (call.take_last_error != nullptr) call.take_last_error();
}

int Driver::device_count() const {
    int count = 0;
    check(call.device_count(&count), "counting GPUs");
    return count;
}

std::string Driver::chip_of(int device) const {
    if (vendor == Vendor::kCuda) {
        int major = 0, minor = 0;
        check(call.device_attribute(&major, kCudaMajor, device), "asking for a GPU's compute capability");
        check(call.device_attribute(&minor, kCudaMinor, device), "asking for a GPU's compute capability");
        return "sm_" + std::to_string(major) + std::to_string(minor);
    }
    // hipDeviceProp_t: the place of gcnArchName ("gfx90a:sramecc+:xnack-") is not part of what we rely on; it
    // is the only text after the name that begins with gfx. The struct has 1,472 bytes in HIP 6 and 7.
    std::array<char, 16384> properties{};
    check(call.properties(properties.data(), device), "asking for a GPU's properties");
    constexpr size_t kAfterName = 256;
    for (size_t i = kAfterName; i + 64 < properties.size(); i++) {
        if (std::memcmp(properties.data() + i, "gfx", 3) != 0) continue;
        std::string chip(properties.data() + i, strnlen(properties.data() + i, 63));
        return chip.substr(0, chip.find(':'));
    }
    throw GpuError("the driver names no chip for GPU " + std::to_string(device) + ", expected gfx...");
}

DeviceFacts Driver::device_facts(int ordinal) const {
    DeviceFacts facts{ordinal, "", "", "", 0, 0};
    int device = 0;
    const std::string what = "looking at GPU " + std::to_string(ordinal);
    check(call.device_get(&device, ordinal), what);
    char text[256] = "";
    check(call.device_name(text, sizeof(text), device), what);
    facts.name = text;
    check(call.device_pci_id(text, sizeof(text), device), what);
    facts.pci_id = text;
    const int attribute = vendor == Vendor::kCuda ? kCudaMultiprocessors : kHipMultiprocessors;
    check(call.device_attribute(&facts.multiprocessors, attribute, device), what);
    facts.chip = chip_of(device);
    check(call.device_memory(&facts.total_bytes, device), what);
    return facts;
}

size_t Driver::free_bytes(int ordinal) const {
    make_current(ordinal);
    size_t free = 0, total = 0;
    check(call.memory_info(&free, &total), "looking at the memory of GPU " + std::to_string(ordinal));
    return free;
}

void Driver::make_current(int ordinal) const {
    const std::string what = "using GPU " + std::to_string(ordinal);
    if (vendor == Vendor::kHip) {
        check(call.set_device(ordinal), what);
        return;
    }
    int device = 0;
    check(call.device_get(&device, ordinal), what);
    // Retained once in a process, and never given back: ONNX Runtime uses the same context.
    static std::mutex mutex;
    static std::map<int, void*>& contexts = *new std::map<int, void*>;
    const std::lock_guard<std::mutex> lock(mutex);
    void*& context = contexts[device];
    if (context == nullptr) check(call.primary_retain(&context, device), what);
    check(call.context_set(context), what);
}

bool Driver::open_peer_access(int ordinal, int peer) const {
    int code = 0;
    if (vendor == Vendor::kHip) {
        make_current(ordinal);
        code = call.device_peer(peer, 0);
    } else {
        void* context = nullptr;
        int device = 0;
        check(call.device_get(&device, peer), "looking at GPU " + std::to_string(peer));
        make_current(peer);
        check(call.primary_retain(&context, device), "using GPU " + std::to_string(peer));
        make_current(ordinal);
        code = call.context_peer(context, 0);
    }
    forget_error();
    return code == 0 || code == kPeerAccessAlreadyEnabled;
}

void Driver::allow_shared_memory(Function function, unsigned bytes) const {
    if (vendor == Vendor::kHip || bytes <= kSharedMemoryWithoutAsking) return;
    check(call.function_attribute(function, kMaxDynamicSharedSize, static_cast<int>(bytes)),
          "asking for " + std::to_string(bytes) + " bytes of shared memory");
}

bool Driver::is_capturing(Stream stream) const {
    int status = 0;
    check(call.stream_capturing(stream, &status), "looking at a stream");
    return status != 0;
}

bool Driver::can_overlap() const { return vendor == Vendor::kCuda && version >= kOldestOverlap; }

}  // namespace llmpack::gpu
