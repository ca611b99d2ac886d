// A stand-in for libcuda.so.1 or (-DSTANDIN_HIP) libamdhip64.so.7: the slice of the driver's interface that
// custom_ops/gpu/driver.h declares, on host memory. It computes nothing by itself: a launch is checked and then
// handed to a callback of the test. It is stricter than a driver where a driver would crash, wait or be wrong later.
//
// Checked: initialised first, a current context, live handles (contexts, modules, functions, streams, events), ranges
// of copies, limits of grid and block, dynamic shared memory (attribute set above 48 KB, the chip's limit), the
// number and kinds of parameters as declared, pointers that lie in live memory and are aligned as declared; that no function
// is launched before the one before it has ended unless it is declared to wait by itself, and then only where chip and driver
// know such launches; that nothing allocates, loads or waits while a stream is captured or after standin_forbid(1).
//
// Device addresses are host addresses with bit 62 set: code that follows one on the host crashes at once.
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#ifdef STANDIN_HIP
#    define NAME(cuda, hip) hip
#else
#    define NAME(cuda, hip) cuda
#endif
#define EXPORT __attribute__((visibility("default")))

typedef uint64_t Pointer;
typedef uint64_t u64;
enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, DEVICE_UNAVAILABLE = 46, INVALID_DEVICE = 101, INVALID_IMAGE = 200,
       INVALID_CONTEXT = 201, NO_BINARY = 209, INVALID_PTX = 218, INVALID_HANDLE = 400, NOT_FOUND = 500, ILLEGAL_ADDRESS = 700,
       LAUNCH_OUT_OF_RESOURCES = 701, PEER_ALREADY = 704, CAPTURE_UNSUPPORTED = 900 };
#define TAG (1ull << 62)
#define HOST(p) ((char*)((p) & ~TAG))

enum { CONTEXT = 0xC0, MODULE, FUNCTION, STREAM, EVENT, GRAPH, EXEC };
typedef struct Object {
    int kind, is_live;
    struct Object* parent;  // function: module; launch list of a stream or graph below
    char name[256];
    char parameters[128];  // declared: one character each, see standin_declare
    int parameter_count, max_dynamic_shared, device, waits;
    struct Launch* launches;  // stream that is captured; graph
    int is_capturing;
    double seconds;
} Object;
typedef struct Launch {
    Object* function;
    unsigned dims[7];
    u64 values[128];
    // kind 0: kernel; 1: copy within (to, from, bytes); 2: fill (to, byte, bytes)
    int kind, is_early;
    struct Launch* next;
} Launch;
typedef struct {
    char* begin;
    size_t bytes;
    int is_live, is_registered, device;
} Memory;

typedef void (*Callback)(const char* function, const unsigned* dims, int count, const u64* values);

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static Memory memories[65536];
static int memory_count;
static Object contexts[16];
static __thread Object* current;
static int is_initialized, is_forbidden, captures, violations;
static char report[1 << 16];
static Callback callback;
static long counts[16];  // see standin_count
enum { ALLOCATIONS, LAUNCHES, LOADS, SYNCHRONIZATIONS, COPIES, FREES, REGISTRATIONS, EARLY_LAUNCHES };
static struct { char name[256], parameters[128]; } declared[4096];
static int declared_count;
static size_t used_bytes[16];

static const char* setting(const char* name, const char* otherwise) {
    const char* value = getenv(name);
    return value != NULL && value[0] != 0 ? value : otherwise;
}
// The machine's number of a device that this program sees; -1: it sees no such device.
static int seen(int device) {
    const int all = atoi(setting("STANDIN_DEVICES", "1"));
    const char* at = getenv(NAME("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"));
    if (at == NULL) return device < all ? device : -1;
    for (int i = 0; i < device && at != NULL; i++) at = (at = strchr(at, ',')) == NULL ? NULL : at + 1;
    return at != NULL && *at != 0 && atoi(at) < all ? atoi(at) : -1;
}
static int device_count(void) {
    int count = 0;
    while (seen(count) >= 0) count++;
    return count;
}
static size_t device_bytes(void) { return strtoull(setting("STANDIN_BYTES", "8589934592"), NULL, 10); }

// As HIP 7 keeps it: until somebody asks, whatever succeeds in between.
static __thread int last_error;
static int failed(int code) {
    if (code != OK) last_error = code;
    return code;
}

static int wrong(int code, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    const size_t at = strlen(report);
    if (at < sizeof(report) - 1024) {
        vsnprintf(report + at, 1000, format, arguments);
        strcat(report, "\n");
    }
    va_end(arguments);
    violations++;
    return failed(code);
}
#define CONTEXT_NEEDED                                                                           \
    if (!is_initialized) return wrong(NOT_INITIALIZED, "%s before initialisation", __func__);    \
    if (current == NULL) return wrong(INVALID_CONTEXT, "%s without a current context", __func__)
#define QUIET_NEEDED                                                                                             \
    if (captures > 0) return wrong(CAPTURE_UNSUPPORTED, "%s while a stream is captured", __func__);              \
    if (is_forbidden) wrong(OK, "%s in a step, where nothing may allocate, load or wait", __func__)

static Object* make(int kind) {
    Object* object = calloc(1, sizeof(Object));
    object->kind = kind;
    object->is_live = 1;
    return object;
}
static int is_live(Object* object, int kind) { return object != NULL && object->kind == kind && object->is_live; }

static Memory* memory_of(Pointer address) {
    if ((address & TAG) == 0) return NULL;
    for (int i = memory_count - 1; i >= 0; i--) {
        Memory* m = &memories[i];
        if (m->is_live && HOST(address) >= m->begin && HOST(address) < m->begin + m->bytes) return m;
    }
    return NULL;
}
static int covers(Pointer address, size_t bytes) {
    const Memory* m = memory_of(address);
    return m != NULL && HOST(address) + bytes <= m->begin + m->bytes;
}

// What tests read and set.
EXPORT void standin_callback(Callback function) { callback = function; }
EXPORT int standin_violations(void) { return violations; }
EXPORT const char* standin_report(void) { return report; }
EXPORT void standin_forget(void) { violations = 0, report[0] = 0; }
EXPORT void standin_forbid(int on) { is_forbidden = on; }
EXPORT long standin_count(int what) { return counts[what]; }
EXPORT long standin_bytes_left(Pointer address) {  // from the address to the end of its memory; -1: none
    const Memory* m = memory_of(address);
    return m == NULL ? -1 : (long)(m->begin + m->bytes - HOST(address));
}
EXPORT int standin_live_memories(void) {
    int live = 0;
    for (int i = 0; i < memory_count; i++) live += memories[i].is_live;
    return live;
}
// The parameters of a function, in order: p pointer aligned to 16, q pointer, n pointer or null, i 4 bytes, l 8 bytes,
// f 4-byte float; before them w if it waits by itself for the kernels before it. An undeclared function cannot be launched.
EXPORT void standin_declare(const char* function, const char* parameters) {
    snprintf(declared[declared_count].name, 256, "%s", function);
    snprintf(declared[declared_count++].parameters, 128, "%s", parameters);
}

// Start and devices.
EXPORT int NAME(cuInit, hipInit)(unsigned flags) {
    if (flags != 0) return wrong(INVALID_VALUE, "init with flags %u", flags);
    if (device_count() == 0) return failed(100);
    is_initialized = 1;
    return OK;
}
EXPORT int NAME(cuDriverGetVersion, hipDriverGetVersion)(int* version) {
    *version = atoi(setting("STANDIN_VERSION", NAME("12090", "60443483")));
    return OK;
}
EXPORT int NAME(cuDeviceGetCount, hipGetDeviceCount)(int* count) {
    if (!is_initialized) return wrong(NOT_INITIALIZED, "count before initialisation");
    *count = device_count();
    return OK;
}
EXPORT int NAME(cuDeviceGet, hipDeviceGet)(int* device, int ordinal) {
    if (ordinal < 0 || ordinal >= device_count()) return failed(INVALID_DEVICE);
    *device = ordinal;
    return OK;
}
EXPORT int NAME(cuDeviceGetName, hipDeviceGetName)(char* name, int size, int device) {
    if (device < 0 || device >= device_count()) return failed(INVALID_DEVICE);
    snprintf(name, (size_t)size, "stand-in %d", device);
    return OK;
}
EXPORT int NAME(cuDeviceGetPCIBusId, hipDeviceGetPCIBusId)(char* id, int size, int device) {
    snprintf(id, (size_t)size, "0000:%02x:00.0", seen(device) + 1);
    return OK;
}
EXPORT int NAME(cuDeviceGetAttribute, hipDeviceGetAttribute)(int* value, int attribute, int device) {
    if (device < 0 || device >= device_count()) return failed(INVALID_DEVICE);
    const char* chip = setting("STANDIN_CHIP", "sm_89");
    const int number = atoi(chip + 3);
    switch (attribute) {
        case NAME(16, 63): *value = 4; return OK;
        case 75: *value = number / 10; return OK;
        case 76: *value = number % 10; return OK;
        default: return wrong(INVALID_VALUE, "attribute %d is not of the slice", attribute);
    }
}
EXPORT int NAME(cuDeviceCanAccessPeer, hipDeviceCanAccessPeer)(int* can, int device, int peer) {
    if (device == peer || device >= device_count() || peer >= device_count()) return failed(INVALID_DEVICE);
    *can = atoi(setting("STANDIN_PEER", "0")) != 0;
    return OK;
}
EXPORT int NAME(cuDeviceTotalMem_v2, hipDeviceTotalMem)(size_t* bytes, int device) {
    if (device < 0 || device >= device_count()) return failed(INVALID_DEVICE);
    *bytes = device_bytes();
    return OK;
}
// A device that another program has for itself.
static int is_taken(int device) { return seen(device) == atoi(setting("STANDIN_TAKEN", "-1")); }
#ifdef STANDIN_HIP
EXPORT int hipGetDevicePropertiesR0600(void* properties, int device) {
    if (device < 0 || device >= device_count()) return failed(INVALID_DEVICE);
    memset(properties, 0, 1472);
    strcpy(properties, "stand-in gfx");  // a name that must not be taken for the chip
    snprintf((char*)properties + 1160, 256, "%s:sramecc+:xnack-", setting("STANDIN_CHIP", "gfx1100"));
    return OK;
}
EXPORT int hipSetDevice(int device) {
    if (device < 0 || device >= device_count()) return failed(INVALID_DEVICE);
    if (is_taken(device)) return failed(DEVICE_UNAVAILABLE);
    contexts[device].kind = CONTEXT, contexts[device].is_live = 1, contexts[device].device = device;
    current = &contexts[device];
    return OK;
}
EXPORT int hipDeviceEnablePeerAccess(int peer, unsigned flags) {
    CONTEXT_NEEDED;
    return flags != 0 || peer == current->device || atoi(setting("STANDIN_PEER", "0")) < 2 ? failed(217) : OK;
}
EXPORT int hipGetLastError(void) {
    const int error = last_error;
    last_error = OK;
    return error;
}
EXPORT const char* hipGetErrorString(int error) {
    static char text[64];
    snprintf(text, sizeof(text), "stand-in error %d", error);
    return text;
}
#else
EXPORT int cuDevicePrimaryCtxRetain(void** context, int device) {
    if (device < 0 || device >= device_count()) return failed(INVALID_DEVICE);
    if (is_taken(device)) return failed(DEVICE_UNAVAILABLE);
    contexts[device].kind = CONTEXT, contexts[device].is_live = 1, contexts[device].device = device;
    *context = &contexts[device];
    return OK;
}
EXPORT int cuCtxSetCurrent(void* context) {
    if (context != NULL && !is_live(context, CONTEXT)) return wrong(INVALID_CONTEXT, "a context that is none");
    current = context;
    return OK;
}
EXPORT int cuCtxEnablePeerAccess(void* peer, unsigned flags) {
    CONTEXT_NEEDED;
    if (!is_live(peer, CONTEXT) || flags != 0) return wrong(INVALID_CONTEXT, "peer access to no context");
    // 0: none; 1: claimed, but refused when opened; 2: there
    return peer == (void*)current || atoi(setting("STANDIN_PEER", "0")) < 2 ? failed(217) : OK;
}
EXPORT int cuFuncSetAttribute(Object* function, int attribute, int value) {
    CONTEXT_NEEDED;
    if (!is_live(function, FUNCTION)) return wrong(INVALID_HANDLE, "attribute of no function");
    if (attribute != 8) return wrong(INVALID_VALUE, "function attribute %d is not of the slice", attribute);
    if (value > atoi(setting("STANDIN_SHARED", "101376"))) return failed(INVALID_VALUE);
    function->max_dynamic_shared = value;
    return OK;
}
EXPORT int cuGetErrorString(int error, const char** text) {
    static char buffer[64];
    snprintf(buffer, sizeof(buffer), "stand-in error %d", error);
    *text = buffer;
    return OK;
}
#endif

// Memory.
EXPORT int NAME(cuMemGetInfo_v2, hipMemGetInfo)(size_t* free_bytes, size_t* total) {
    CONTEXT_NEEDED;
    *total = device_bytes();
    *free_bytes = *total - used_bytes[current->device];
    return OK;
}
static Memory* remember(char* begin, size_t bytes, int is_registered) {
    pthread_mutex_lock(&mutex);
    Memory* m = &memories[memory_count++];
    *m = (Memory){begin, bytes, 1, is_registered, current->device};
    pthread_mutex_unlock(&mutex);
    return m;
}
EXPORT int NAME(cuMemAlloc_v2, hipMalloc)(Pointer* memory, size_t bytes) {
    CONTEXT_NEEDED;
    QUIET_NEEDED;
    if (bytes == 0) return wrong(INVALID_VALUE, "an allocation of 0 bytes");
    if (used_bytes[current->device] + bytes > device_bytes()) return failed(OUT_OF_MEMORY);
    const size_t unit = bytes < 4096 ? 256 : 4096;  // whole pages can be shared with another process
    char* begin = aligned_alloc(unit, (bytes + 2 * unit - 1) / unit * unit);
    memset(begin, 0xFF, bytes);  // NaN in every float type: reading what nobody wrote shows
    remember(begin, bytes, 0);
    used_bytes[current->device] += bytes;
    counts[ALLOCATIONS]++;
    *memory = (Pointer)begin | TAG;
    return OK;
}
#ifdef STANDIN_HIP
EXPORT int hipExtMallocWithFlags(Pointer* memory, size_t bytes, unsigned flags) {
    return flags == 3 ? hipMalloc(memory, bytes) : wrong(INVALID_VALUE, "memory with flags %u", flags);
}
#endif
typedef struct { int pid, file, device, reserved; size_t bytes; char rest[40]; } Handle;
// Moves an allocation to a file without a name, where it is for every process that opens the handle.
EXPORT int NAME(cuIpcGetMemHandle, hipIpcGetMemHandle)(Handle* handle, Pointer memory) {
    CONTEXT_NEEDED;
    QUIET_NEEDED;
    Memory* m = memory_of(memory);
    if (m == NULL || m->begin != HOST(memory) || m->bytes < 4096) return wrong(INVALID_VALUE, "a handle of no allocation");
    const size_t bytes = (m->bytes + 4095) / 4096 * 4096;
    const int file = memfd_create("stand-in", 0);
    if (file < 0 || ftruncate(file, (off_t)bytes) != 0 || pwrite(file, m->begin, m->bytes, 0) != (ssize_t)m->bytes) return failed(999);
    mmap(m->begin, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, 0);
    memset(handle, 0, sizeof(*handle));
    *handle = (Handle){getpid(), file, m->device, 0, bytes, {0}};
    return OK;
}
EXPORT int NAME(cuIpcOpenMemHandle_v2, hipIpcOpenMemHandle)(Pointer* memory, Handle handle, unsigned flags) {
    CONTEXT_NEEDED;
    QUIET_NEEDED;
    const int peer = atoi(setting("STANDIN_PEER", "0"));
    if (flags != 1) return wrong(INVALID_VALUE, "memory opened with flags %u", flags);
    if (peer < 2) return failed(217);
    char path[64];
    snprintf(path, sizeof(path), "/proc/%d/fd/%d", handle.pid, handle.file);
    const int file = open(path, O_RDWR);
    if (file < 0) return wrong(INVALID_VALUE, "a handle of nobody's");
    // 3: opened, but what the other writes is not seen
    char* begin = mmap(NULL, handle.bytes, PROT_READ | PROT_WRITE, peer == 3 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED,
                       peer == 3 ? -1 : file, 0);
    close(file);
    remember(begin, handle.bytes, 2);
    *memory = (Pointer)begin | TAG;
    return OK;
}
EXPORT int NAME(cuIpcCloseMemHandle, hipIpcCloseMemHandle)(Pointer memory) {
    CONTEXT_NEEDED;
    Memory* m = memory_of(memory);
    if (m == NULL || m->begin != HOST(memory) || m->is_registered != 2) return wrong(INVALID_VALUE, "closing what is not open");
    m->is_live = 0;
    munmap(m->begin, m->bytes);
    return OK;
}
EXPORT int NAME(cuMemFree_v2, hipFree)(Pointer memory) {
    CONTEXT_NEEDED;
    QUIET_NEEDED;
    Memory* m = memory_of(memory);
    if (m == NULL || m->begin != HOST(memory) || m->is_registered) return wrong(INVALID_VALUE, "a free of no allocation");
    m->is_live = 0;
    used_bytes[m->device] -= m->bytes;
    free(m->begin);
    counts[FREES]++;
    return OK;
}
EXPORT int NAME(cuMemHostRegister_v2, hipHostRegister)(void* memory, size_t bytes, unsigned flags) {
    CONTEXT_NEEDED;
    QUIET_NEEDED;
    if (flags != 3) return wrong(INVALID_VALUE, "host memory registered with flags %u", flags);
    if ((uintptr_t)memory % 4096 != 0 || bytes % 4096 != 0) return wrong(INVALID_VALUE, "host memory that is not whole pages");
    if (atoi(setting("STANDIN_REGISTER", "1")) == 0) return failed(801);
    remember(memory, bytes, 1);
    counts[REGISTRATIONS]++;
    return OK;
}
EXPORT int NAME(cuMemHostUnregister, hipHostUnregister)(void* memory) {
    CONTEXT_NEEDED;
    Memory* m = memory_of((Pointer)memory | TAG);
    if (m == NULL || m->begin != memory || !m->is_registered) return wrong(INVALID_VALUE, "unregistering what is not");
    m->is_live = 0;
    return OK;
}
EXPORT int NAME(cuMemHostGetDevicePointer_v2, hipHostGetDevicePointer)(Pointer* device, void* host, unsigned flags) {
    CONTEXT_NEEDED;
    Memory* m = memory_of((Pointer)host | TAG);
    if (m == NULL || !m->is_registered || flags != 0) return wrong(INVALID_VALUE, "host memory that is not registered");
    *device = (Pointer)host | TAG;
    return OK;
}

// Streams, events, graphs.
static void run(const Launch* launch) {
    if (launch->kind == 1) memmove(HOST(launch->values[0]), HOST(launch->values[1]), launch->values[2]);
    if (launch->kind == 2) memset(HOST(launch->values[0]), (int)launch->values[1], launch->values[2]);
    counts[EARLY_LAUNCHES] += launch->is_early;
    if (launch->kind == 0 && callback != NULL) {
        callback(launch->function->name, launch->dims, launch->function->parameter_count, launch->values);
    }
}
static int enqueue(Object* stream, const Launch* launch) {
    if (!stream->is_capturing) {
        run(launch);
        return OK;
    }
    Launch** end = &stream->launches;
    while (*end != NULL) end = &(*end)->next;
    *end = malloc(sizeof(Launch));
    **end = *launch;
    (*end)->next = NULL;
    return OK;
}
#define STREAM_NEEDED                                                                                       \
    CONTEXT_NEEDED;                                                                                         \
    if (!is_live(stream, STREAM)) return wrong(INVALID_HANDLE, "%s on no stream of a program", __func__)
EXPORT int NAME(cuStreamCreate, hipStreamCreateWithFlags)(Object** stream, unsigned flags) {
    CONTEXT_NEEDED;
    if (flags != 1) return wrong(INVALID_VALUE, "a stream with flags %u", flags);
    *stream = make(STREAM);
    return OK;
}
EXPORT int NAME(cuStreamDestroy_v2, hipStreamDestroy)(Object* stream) {
    STREAM_NEEDED;
    stream->is_live = 0;
    return OK;
}
EXPORT int NAME(cuStreamSynchronize, hipStreamSynchronize)(Object* stream) {
    STREAM_NEEDED;
    QUIET_NEEDED;
    counts[SYNCHRONIZATIONS]++;
    return OK;
}
EXPORT int NAME(cuStreamIsCapturing, hipStreamIsCapturing)(Object* stream, int* status) {
    STREAM_NEEDED;
    *status = stream->is_capturing;
    return OK;
}
EXPORT int NAME(cuStreamBeginCapture_v2, hipStreamBeginCapture)(Object* stream, int mode) {
    STREAM_NEEDED;
    if (stream->is_capturing || mode != 0) return wrong(INVALID_VALUE, "a capture in a capture, or not global");
    stream->is_capturing = 1;
    captures++;
    return OK;
}
EXPORT int NAME(cuStreamEndCapture, hipStreamEndCapture)(Object* stream, Object** graph) {
    STREAM_NEEDED;
    if (!stream->is_capturing) return wrong(INVALID_VALUE, "the end of no capture");
    stream->is_capturing = 0;
    captures--;
    *graph = make(GRAPH);
    (*graph)->launches = stream->launches;
    stream->launches = NULL;
    return OK;
}
EXPORT int NAME(cuGraphInstantiateWithFlags, hipGraphInstantiateWithFlags)(Object** exec, Object* graph, u64 flags) {
    CONTEXT_NEEDED;
    if (!is_live(graph, GRAPH) || flags != 0) return wrong(INVALID_HANDLE, "no graph");
    *exec = make(EXEC);
    (*exec)->launches = graph->launches;
    return OK;
}
EXPORT int NAME(cuGraphLaunch, hipGraphLaunch)(Object* exec, Object* stream) {
    STREAM_NEEDED;
    if (!is_live(exec, EXEC) || stream->is_capturing) return wrong(INVALID_HANDLE, "no graph, or in a capture");
    for (const Launch* launch = exec->launches; launch != NULL; launch = launch->next) {
        counts[LAUNCHES] += launch->kind == 0;
        run(launch);
    }
    return OK;
}
EXPORT int NAME(cuEventCreate, hipEventCreateWithFlags)(Object** event, unsigned flags) {
    CONTEXT_NEEDED;
    if (flags != 0) return wrong(INVALID_VALUE, "an event with flags %u", flags);
    *event = make(EVENT);
    return OK;
}
EXPORT int NAME(cuEventDestroy_v2, hipEventDestroy)(Object* event) {
    if (!is_live(event, EVENT)) return wrong(INVALID_HANDLE, "no event");
    event->is_live = 0;
    return OK;
}
EXPORT int NAME(cuEventRecord, hipEventRecord)(Object* event, Object* stream) {
    STREAM_NEEDED;
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    event->seconds = (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
    return is_live(event, EVENT) ? OK : wrong(INVALID_HANDLE, "no event");
}
EXPORT int NAME(cuEventSynchronize, hipEventSynchronize)(Object* event) {
    CONTEXT_NEEDED;
    QUIET_NEEDED;
    return is_live(event, EVENT) ? OK : wrong(INVALID_HANDLE, "no event");
}
EXPORT int NAME(cuEventElapsedTime, hipEventElapsedTime)(float* milliseconds, Object* start, Object* end) {
    if (!is_live(start, EVENT) || !is_live(end, EVENT)) return wrong(INVALID_HANDLE, "no event");
    *milliseconds = (float)(1e3 * (end->seconds - start->seconds));
    return OK;
}

// Copies.
EXPORT int NAME(cuMemcpyHtoDAsync_v2, hipMemcpyHtoDAsync)(Pointer to, const void* from, size_t bytes, Object* stream) {
    STREAM_NEEDED;
    if (stream->is_capturing) return wrong(CAPTURE_UNSUPPORTED, "a copy from host memory in a capture");
    if (!covers(to, bytes)) return wrong(ILLEGAL_ADDRESS, "a copy to memory that is not there");
    memcpy(HOST(to), from, bytes);
    counts[COPIES]++;
    return OK;
}
EXPORT int NAME(cuMemcpyDtoHAsync_v2, hipMemcpyDtoHAsync)(void* to, Pointer from, size_t bytes, Object* stream) {
    STREAM_NEEDED;
    if (stream->is_capturing) return wrong(CAPTURE_UNSUPPORTED, "a copy to host memory in a capture");
    if (!covers(from, bytes)) return wrong(ILLEGAL_ADDRESS, "a copy from memory that is not there");
    memcpy(to, HOST(from), bytes);
    counts[COPIES]++;
    return OK;
}
EXPORT int NAME(cuMemcpyDtoDAsync_v2, hipMemcpyDtoDAsync)(Pointer to, Pointer from, size_t bytes, Object* stream) {
    STREAM_NEEDED;
    if (!covers(to, bytes) || !covers(from, bytes)) return wrong(ILLEGAL_ADDRESS, "a copy outside of memory");
    counts[COPIES]++;
    const Launch copy = {.kind = 1, .values = {to, from, bytes}};
    return enqueue(stream, &copy);
}
EXPORT int NAME(cuMemsetD8Async, hipMemsetD8Async)(Pointer memory, unsigned char value, size_t bytes, Object* stream) {
    STREAM_NEEDED;
    if (!covers(memory, bytes)) return wrong(ILLEGAL_ADDRESS, "a fill outside of memory");
    const Launch fill = {.kind = 2, .values = {memory, value, bytes}};
    return enqueue(stream, &fill);
}

// Modules and launches.
EXPORT int NAME(cuModuleLoadData, hipModuleLoadData)(Object** module, const void* image) {
    CONTEXT_NEEDED;
    QUIET_NEEDED;
    const int is_elf = memcmp(image, "\177ELF", 4) == 0;
    const int is_ptx = NAME(strstr(image, ".version") != NULL, 0);
    if (!is_elf && !is_ptx) return failed(INVALID_IMAGE);
    if (is_elf && atoi(setting("STANDIN_REFUSES", "0"))) return failed(NO_BINARY);  // assembled for newer drivers
    *module = make(MODULE);
    counts[LOADS]++;
    return OK;
}
EXPORT int NAME(cuModuleUnload, hipModuleUnload)(Object* module) {
    CONTEXT_NEEDED;
    if (!is_live(module, MODULE)) return wrong(INVALID_HANDLE, "no module");
    module->is_live = 0;
    return OK;
}
EXPORT int NAME(cuModuleGetFunction, hipModuleGetFunction)(Object** function, Object* module, const char* name) {
    CONTEXT_NEEDED;
    if (!is_live(module, MODULE)) return wrong(INVALID_HANDLE, "a function of no module");
    for (int i = declared_count - 1; i >= 0; i--) {
        if (strcmp(declared[i].name, name) != 0) continue;
        *function = make(FUNCTION);
        (*function)->parent = module;
        snprintf((*function)->name, 256, "%s", name);
        (*function)->waits = declared[i].parameters[0] == 'w';
        strcpy((*function)->parameters, declared[i].parameters + (*function)->waits);
        (*function)->parameter_count = (int)strlen((*function)->parameters);
        (*function)->max_dynamic_shared = 48 * 1024;
        return OK;
    }
    return failed(NOT_FOUND);
}
static int launch_kernel(Object* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                         unsigned shared, Object* stream, void** parameters, void** extra, int is_early) {
    STREAM_NEEDED;
    if (!is_live(function, FUNCTION) || !is_live(function->parent, MODULE)) return wrong(INVALID_HANDLE, "no function");
    const char* name = function->name;
    if (extra != NULL || parameters == NULL) return wrong(INVALID_VALUE, "%s: parameters are not given one by one", name);
    if (gx < 1 || gx > 2147483647u || gy < 1 || gy > 65535 || gz < 1 || gz > 65535) {
        return wrong(INVALID_VALUE, "%s: grid %u %u %u", name, gx, gy, gz);
    }
    if (bx * by * bz < 1 || bx * by * bz > 1024 || bx * by * bz % 32 != 0) {
        return wrong(INVALID_VALUE, "%s: block %u %u %u", name, bx, by, bz);
    }
    const unsigned most = NAME((unsigned)function->max_dynamic_shared, 65536u);
    if (shared > most) return wrong(INVALID_VALUE, "%s: %u bytes of shared memory, allowed are %u", name, shared, most);
    if (is_early && !function->waits) return wrong(INVALID_VALUE, "%s: launched early, and does not wait", name);
    Launch launch = {.function = function, .dims = {gx, gy, gz, bx, by, bz, shared}, .is_early = is_early};
    for (int i = 0; i < function->parameter_count; i++) {
        const char kind = function->parameters[i];
        u64* value = &launch.values[i];
        if (parameters[i] == NULL) return wrong(INVALID_VALUE, "%s: parameter %d is missing", name, i);
        memcpy(value, parameters[i], kind == 'i' || kind == 'f' ? 4 : 8);
        if (kind == 'i' || kind == 'f' || kind == 'l' || (kind == 'n' && *value == 0)) continue;
        if (memory_of(*value) == NULL) return wrong(ILLEGAL_ADDRESS, "%s: parameter %d points nowhere", name, i);
        if (kind == 'p' && *value % 16 != 0) return wrong(ILLEGAL_ADDRESS, "%s: parameter %d is not aligned to 16", name, i);
    }
    if (!stream->is_capturing) counts[LAUNCHES]++;
    return enqueue(stream, &launch);
}
EXPORT int NAME(cuLaunchKernel, hipModuleLaunchKernel)(Object* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                                                       unsigned by, unsigned bz, unsigned shared, Object* stream,
                                                       void** parameters, void** extra) {
    return launch_kernel(function, gx, gy, gz, bx, by, bz, shared, stream, parameters, extra, 0);
}
#ifndef STANDIN_HIP
// CUlaunchAttribute and CUlaunchConfig.
typedef struct { unsigned id, pad; union { int number; u64 words[8]; } value; } Attribute;
typedef struct { unsigned grid[3], block[3], shared; Object* stream; const Attribute* attributes; unsigned count; } Config;
EXPORT int cuLaunchKernelEx(const Config* c, Object* function, void** parameters, void** extra) {
    if (c->count != 1 || c->attributes[0].id != 6 || c->attributes[0].value.number != 1) {
        return wrong(INVALID_VALUE, "a launch whose attribute is not to begin early");
    }
    if (atoi(setting("STANDIN_CHIP", "sm_89") + 3) < 90) return wrong(INVALID_VALUE, "an early launch on an older chip");
    if (atoi(setting("STANDIN_VERSION", "12090")) < 12040) return wrong(INVALID_VALUE, "an early launch by an older driver");
    return launch_kernel(function, c->grid[0], c->grid[1], c->grid[2], c->block[0], c->block[1], c->block[2], c->shared,
                         c->stream, parameters, extra, 1);
}
#endif
EXPORT int NAME(cuLaunchCooperativeKernel, hipModuleLaunchCooperativeKernel)(Object* function, unsigned gx, unsigned gy,
                                                                             unsigned gz, unsigned bx, unsigned by,
                                                                             unsigned bz, unsigned shared, Object* stream,
                                                                             void** parameters) {
    return NAME(cuLaunchKernel, hipModuleLaunchKernel)(function, gx, gy, gz, bx, by, bz, shared, stream, parameters, NULL);
}
