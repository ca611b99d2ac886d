// The slice of the two GPU drivers' C interfaces that the launcher uses, found at run time: libcuda.so.1
// (NVIDIA) or libamdhip64.so (AMD). No header of either is needed to build, and neither library is opened
// before a program asks for a GPU.
//
// The two interfaces are alike but for names: a device pointer is a 64-bit number in one and a pointer in the
// other, every handle is a pointer, every result an int with 0 for success. So one table of signatures serves
// both. Names, numbers and signatures are those of cuda.h 13.0 and hip_runtime_api.h 6.0 to 7.0.
#ifndef LLMPACK_GPU_DRIVER_H_
#define LLMPACK_GPU_DRIVER_H_

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace llmpack::gpu {

// One sentence without a full stop: what was found, what was expected, what to do.
struct GpuError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// The driver takes no such code, and may take other: it is older than what assembled it.
struct RefusedCode : GpuError {
    using GpuError::GpuError;
};

enum class Vendor : int { kCuda = 0, kHip = 1 };

using DevicePointer = uint64_t;
using Stream = void*;
using Module = void*;
using Function = void*;
using Event = void*;

constexpr unsigned kHostPortableMapped =
    3;                                   // CU_MEMHOSTREGISTER_PORTABLE | DEVICEMAP, and HIP's of these names
constexpr unsigned kOpenPeerAccess = 1;  // CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS, hipIpcMemLazyEnablePeerAccess
constexpr unsigned kUncached = 3;        // hipDeviceMallocUncached: other GPUs see what is written at once
constexpr unsigned kNonBlockingStream = 1;  // CU_STREAM_NON_BLOCKING, hipStreamNonBlocking
constexpr unsigned kTimingEvent = 0;        // CU_EVENT_DEFAULT, hipEventDefault

// CUlaunchAttribute and CUlaunchConfig, whose layouts are the same since CUDA 11.8.
struct LaunchAttribute {
    unsigned id;
    char unused[4];
    union {
        int number;
        char bytes[64];
    } value;
};
struct LaunchConfig {
    unsigned grid[3], block[3], shared_bytes;
    Stream stream;
    LaunchAttribute* attributes;
    unsigned num_attributes;
};
static_assert(sizeof(LaunchAttribute) == 72 && sizeof(LaunchConfig) == 56, "as in cuda.h");
constexpr unsigned kProgrammaticSerialization = 6;  // CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION

struct IpcHandle {  // CUipcMemHandle and hipIpcMemHandle_t, passed by value
    char bytes[64];
};

// X(member, CUDA's symbol, HIP's symbol, parameters); every function returns int, 0 for success.
#define LLMPACK_GPU_BOTH(X)                                                                                 \
    X(init, "cuInit", "hipInit", (unsigned flags))                                                          \
    X(driver_version, "cuDriverGetVersion", "hipDriverGetVersion", (int* version))                          \
    X(device_count, "cuDeviceGetCount", "hipGetDeviceCount", (int* count))                                  \
    X(device_get, "cuDeviceGet", "hipDeviceGet", (int* device, int ordinal))                                \
    X(device_name, "cuDeviceGetName", "hipDeviceGetName", (char* name, int size, int device))               \
    X(device_attribute, "cuDeviceGetAttribute", "hipDeviceGetAttribute",                                    \
      (int* value, int attribute, int device))                                                              \
    X(device_pci_id, "cuDeviceGetPCIBusId", "hipDeviceGetPCIBusId", (char* id, int size, int device))       \
    X(can_access_peer, "cuDeviceCanAccessPeer", "hipDeviceCanAccessPeer", (int* can, int device, int peer)) \
    X(device_memory, "cuDeviceTotalMem_v2", "hipDeviceTotalMem", (size_t* bytes, int device))               \
    X(memory_info, "cuMemGetInfo_v2", "hipMemGetInfo", (size_t* free, size_t* total))                       \
    X(allocate, "cuMemAlloc_v2", "hipMalloc", (DevicePointer * memory, size_t bytes))                       \
    X(release, "cuMemFree_v2", "hipFree", (DevicePointer memory))                                           \
    X(host_register, "cuMemHostRegister_v2", "hipHostRegister",                                             \
      (void* memory, size_t bytes, unsigned flags))                                                         \
    X(host_unregister, "cuMemHostUnregister", "hipHostUnregister", (void* memory))                          \
    X(host_pointer, "cuMemHostGetDevicePointer_v2", "hipHostGetDevicePointer",                              \
      (DevicePointer * device, void* host, unsigned flags))                                                 \
    X(ipc_handle, "cuIpcGetMemHandle", "hipIpcGetMemHandle", (IpcHandle * handle, DevicePointer memory))    \
    X(ipc_open, "cuIpcOpenMemHandle_v2", "hipIpcOpenMemHandle",                                             \
      (DevicePointer * memory, IpcHandle handle, unsigned flags))                                           \
    X(ipc_close, "cuIpcCloseMemHandle", "hipIpcCloseMemHandle", (DevicePointer memory))                     \
    X(copy_in, "cuMemcpyHtoDAsync_v2", "hipMemcpyHtoDAsync",                                                \
      (DevicePointer to, const void* from, size_t bytes, Stream stream))                                    \
    X(copy_out, "cuMemcpyDtoHAsync_v2", "hipMemcpyDtoHAsync",                                               \
      (void* to, DevicePointer from, size_t bytes, Stream stream))                                          \
    X(copy_within, "cuMemcpyDtoDAsync_v2", "hipMemcpyDtoDAsync",                                            \
      (DevicePointer to, DevicePointer from, size_t bytes, Stream stream))                                  \
    X(fill, "cuMemsetD8Async", "hipMemsetD8Async",                                                          \
      (DevicePointer memory, unsigned char value, size_t bytes, Stream stream))                             \
    X(module_load, "cuModuleLoadData", "hipModuleLoadData", (Module * module, const void* image))           \
    X(module_unload, "cuModuleUnload", "hipModuleUnload", (Module module))                                  \
    X(module_function, "cuModuleGetFunction", "hipModuleGetFunction",                                       \
      (Function * function, Module module, const char* name))                                               \
    X(launch, "cuLaunchKernel", "hipModuleLaunchKernel",                                                    \
      (Function function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,              \
       unsigned block_y, unsigned block_z, unsigned shared_bytes, Stream stream, void** parameters,         \
       void** extra))                                                                                       \
    X(launch_cooperative, "cuLaunchCooperativeKernel", "hipModuleLaunchCooperativeKernel",                  \
      (Function function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,              \
       unsigned block_y, unsigned block_z, unsigned shared_bytes, Stream stream, void** parameters))        \
    X(stream_create, "cuStreamCreate", "hipStreamCreateWithFlags", (Stream * stream, unsigned flags))       \
    X(stream_destroy, "cuStreamDestroy_v2", "hipStreamDestroy", (Stream stream))                            \
    X(stream_synchronize, "cuStreamSynchronize", "hipStreamSynchronize", (Stream stream))                   \
    X(stream_capturing, "cuStreamIsCapturing", "hipStreamIsCapturing", (Stream stream, int* status))        \
    X(event_create, "cuEventCreate", "hipEventCreateWithFlags", (Event * event, unsigned flags))            \
    X(event_destroy, "cuEventDestroy_v2", "hipEventDestroy", (Event event))                                 \
    X(event_record, "cuEventRecord", "hipEventRecord", (Event event, Stream stream))                        \
    X(event_synchronize, "cuEventSynchronize", "hipEventSynchronize", (Event event))                        \
    X(event_elapsed, "cuEventElapsedTime", "hipEventElapsedTime",                                           \
      (float* milliseconds, Event start, Event end))

#define LLMPACK_GPU_CUDA(X)                                                                    \
    X(primary_retain, "cuDevicePrimaryCtxRetain", (void** context, int device))                \
    X(context_set, "cuCtxSetCurrent", (void* context))                                         \
    X(context_peer, "cuCtxEnablePeerAccess", (void* peer, unsigned flags))                     \
    X(function_attribute, "cuFuncSetAttribute", (Function function, int attribute, int value)) \
    X(launch_with, "cuLaunchKernelEx",                                                         \
      (const LaunchConfig* config, Function function, void** parameters, void** extra))        \
    X(cuda_error_text, "cuGetErrorString", (int error, const char** text))

// hipGetErrorString gives the text; the others are as above.
#define LLMPACK_GPU_HIP(X)                                                                          \
    X(set_device, "hipSetDevice", (int device))                                                     \
    X(allocate_as, "hipExtMallocWithFlags", (DevicePointer * memory, size_t bytes, unsigned flags)) \
    X(device_peer, "hipDeviceEnablePeerAccess", (int peer, unsigned flags))                         \
    X(properties, "hipGetDevicePropertiesR0600", (void* properties, int device))                    \
    X(take_last_error, "hipGetLastError", (void))

struct Functions {
#define LLMPACK_GPU_MEMBER(name, cuda, hip, parameters) int(*name) parameters = nullptr;
    LLMPACK_GPU_BOTH(LLMPACK_GPU_MEMBER)
#undef LLMPACK_GPU_MEMBER
#define LLMPACK_GPU_MEMBER(name, symbol, parameters) int(*name) parameters = nullptr;
    LLMPACK_GPU_CUDA(LLMPACK_GPU_MEMBER)
    LLMPACK_GPU_HIP(LLMPACK_GPU_MEMBER)
#undef LLMPACK_GPU_MEMBER
    const char* (*hip_error_text)(int error) = nullptr;
};

// What the driver says of one device.
struct DeviceFacts {
    int ordinal;
    std::string name;    // "NVIDIA GeForce RTX 4090"
    std::string chip;    // "sm_89", "gfx1100"
    std::string pci_id;  // "0000:01:00.0"
    int multiprocessors;
    size_t total_bytes;
};

// One vendor's driver. Every call throws GpuError when the driver reports an error.
class Driver {
  public:
    // Opens the library, finds every function and initialises it; once in a process. Throws GpuError: there
    // is no driver, it lacks a function, or it is older than what compiled code needs.
    static const Driver& get(Vendor vendor);

    int device_count() const;
    // Makes no context: that takes hundreds of megabytes of the device, and another program may have it for
    // itself.
    DeviceFacts device_facts(int ordinal) const;
    size_t free_bytes(int ordinal) const;  // makes the device current for this thread
    // Makes the device's primary context, the one that ONNX Runtime uses, current for this thread.
    void make_current(int ordinal) const;
    // Lets kernels on `ordinal` reach the memory of `peer`. False: the driver refuses.
    bool open_peer_access(int ordinal, int peer) const;
    // Dynamic shared memory beyond 48 KB must be asked for on NVIDIA, function by function.
    void allow_shared_memory(Function function, unsigned bytes) const;
    bool is_capturing(Stream stream) const;
    // Whether kernels may begin before the one before them has ended, in a captured stream too.
    bool can_overlap() const;

    // Throws "`what`: the driver says `text` (error `code`)"; nobody else finds the error then.
    void check(int code, const std::string& what) const;
    // HIP keeps a thread's last error for whoever asks next, from HIP 7 on whatever succeeds in between, and
    // ONNX Runtime asks after every node: call it wherever a code is not checked.
    void forget_error() const;

    const Vendor vendor;
    std::string library;  // the name under which it was found
    int version = 0;      // 12080 for CUDA 12.8; 60443483 for HIP 6.4
    Functions call;

    Driver(const Driver&) = delete;

  private:
    explicit Driver(Vendor vendor);
    std::string chip_of(int device) const;
};

// "CUDA 12.8", "HIP 6.4"
std::string version_text(Vendor vendor, int version);
const char* vendor_name(Vendor vendor);  // "CUDA", "ROCm"

// Opens the first of several libraries; null: none, and `tried` lists the loader's own words for the last
// one.
void* open_library(const std::vector<const char*>& names, std::string& found, std::string& why);

}  // namespace llmpack::gpu

#endif  // LLMPACK_GPU_DRIVER_H_
