// What libllmpack_ops.so exports besides RegisterCustomOps, for a host program (llmrun calls it by ctypes).
//
// All functions may be called from any thread. Setters act on the whole process and must not run while a
// session runs. Functions that return int give 0 for success and -1 for failure; llmpack_ops_last_error says
// why.
#ifndef LLMPACK_OPS_H_
#define LLMPACK_OPS_H_

#include <stdint.h>

#if defined(__GNUC__)
#    define LLMPACK_EXPORT __attribute__((visibility("default")))
#else
#    define LLMPACK_EXPORT
#endif

#ifdef __cplusplus
extern "C" {
#endif

// Version of the operator domain ai.llmpack (FORMAT.md 2.4).
#define LLMPACK_OPS_VERSION 9
LLMPACK_EXPORT int llmpack_ops_version(void);

// Instruction set of the CPU kernels in use: "portable", "avx2", "avx2-vnni" (with AVX-VNNI), "avx512" (with
// VNNI), "avx512-vbmi" (with VNNI and VBMI) or "neon" (with dot products). The best one is chosen at load.
LLMPACK_EXPORT const char* llmpack_ops_isa(void);

// All that this machine can run, best first, separated by a comma and a space.
LLMPACK_EXPORT const char* llmpack_ops_isas(void);

// Choose the instruction set of sessions that are made from now on, and of packing. -1: unknown name, or this
// machine lacks it.
LLMPACK_EXPORT int llmpack_ops_set_isa(const char* name);

// How products of few tokens ask for weights that come from memory, and attention for keys and values:
// "through-caches", or "past-caches", which suits AMD's processors. At first what suits this one; the results
// are the same.
LLMPACK_EXPORT const char* llmpack_ops_weight_fetch(void);

// Choose it, for tests and comparisons. -1: unknown name.
LLMPACK_EXPORT int llmpack_ops_set_weight_fetch(const char* name);

// Let the sessions that this thread makes from now on run their operators on `number` threads: the one that
// calls a session, and others, started here, that end with the last such session and this thread's next call.
// ONNX Runtime's own intra-op threads are then not used: give the session one. cores: [number], one each; the
// first is the calling thread's, the others are pinned to theirs and spin between two loops, for a
// millisecond at most. NULL: not one each, nobody is pinned or spins. With one thread, work is not cut into
// ranges for others to take: each costs streams from memory a new start. number 0, as in the beginning: ONNX
// Runtime's threads. -1: number is below 0, or the system refuses a thread.
LLMPACK_EXPORT int llmpack_ops_use_threads(int number, const int32_t* cores);

// A communicator handed over by the host program, with the MPI functions that act on it. The library links no
// MPI, so one build serves MPICH, Open MPI and the MPI 5 ABI.
//
// An MPI handle is an int in MPICH and a pointer in Open MPI. Both travel here as intptr_t, and the functions
// are called as if they took intptr_t. On the two ABIs supported this is sound: an integer or pointer
// argument fills one 64-bit register or one 8-byte stack slot (x86-64 System V: six registers, and the
// seventh argument, the communicator of MPI_Allgather, on the stack; AAPCS64: eight registers), and a callee
// that takes an int reads the low 32 bits and ignores the rest. Both are little-endian, so the low half of a
// slot comes first.
typedef struct {
    int32_t struct_size;  // sizeof(LlmpackCommunicator), so that a stale caller is refused
    int32_t rank;         // in [0, size)
    int32_t size;         // ranks in comm
    int32_t reserved;     // 0
    intptr_t comm;        // MPI_Comm, private to this library, with the error handler MPI_ERRORS_RETURN
    intptr_t byte_type;   // MPI_BYTE
    void* allgather;      // MPI_Allgather
    void* alltoall;       // MPI_Alltoall
    void* error_string;   // MPI_Error_string
} LlmpackCommunicator;

// Use this communicator in AllReduce and AllGather from now on, by MPI; NULL: none. The struct is copied.
LLMPACK_EXPORT int llmpack_ops_set_communicator(const LlmpackCommunicator* communicator);

// Move the values through memory that the ranks share, if each rank of the communicator can: they must be on
// one host and may look at each other in /proc. Every rank must call this, in step: the ranks agree by
// MPI_Allgather. 0: memory is shared. 1: it is not, the ranks go on with MPI, and llmpack_ops_last_error says
// why, on every rank the same. -1: MPI failed. Without this call, and after every
// llmpack_ops_set_communicator, the values travel by MPI.
LLMPACK_EXPORT int llmpack_ops_share_memory(void);

// How the values travel: "shared-memory", "mpi" or "none" (no communicator is set).
LLMPACK_EXPORT const char* llmpack_ops_transport(void);

// What the operators AllReduce and AllGather do (FORMAT.md 5.6, 5.7): y [n] = the sum of all ranks' x [n], y
// may be x;  y [rows, out_features] = the ranks' x [rows, columns] side by side. Every rank must call the
// same, in step, one at a time. After a failure the ranks are no longer in step: set the communicator again.
LLMPACK_EXPORT int llmpack_ops_all_reduce(const float* x, float* y, int64_t n);
LLMPACK_EXPORT int llmpack_ops_all_gather(const float* x, float* y, int64_t rows, int64_t columns,
                                          int64_t out_features);

// What sampling asks of a row of logits [n], of which none is NaN or infinity and `highest` is the largest
// (minus infinity may be among them). sums [n / 256, rounded up] = e^((logit - highest) *
// inverse_temperature), added up in each run of 256.
LLMPACK_EXPORT void llmpack_ops_weigh_runs(const float* logits, int64_t n, float highest,
                                           float inverse_temperature, double* sums);

// ids [n] = where a logit is above the threshold, ascending. Returns how many there are.
LLMPACK_EXPORT int64_t llmpack_ops_find_above(const float* logits, int64_t n, float threshold, int32_t* ids);

// Collectives begun and ended by this process. A watchdog thread may poll it: begun > ended for long means
// that this rank waits for a peer.
LLMPACK_EXPORT void llmpack_ops_collective_state(uint64_t* begun, uint64_t* ended);

// GPUs. Nothing of the following is needed, and no driver is opened, on a box that computes on its CPU.
// Vendors: 0 NVIDIA (CUDA's driver), 1 AMD (HIP).

// What the driver says, as JSON: {"library", "version", "devices": [{"ordinal", "name", "chip", "pci_id",
// "multiprocessors", "total_bytes"}]}. -1: there is no driver or no GPU, or `size` bytes are too few. Nothing
// is used of any GPU.
LLMPACK_EXPORT int llmpack_ops_gpu_probe(int vendor, char* json, int64_t size);

// What is free of a GPU's memory once this process uses it: makes its context.
LLMPACK_EXPORT int llmpack_ops_gpu_free_bytes(int vendor, int device, int64_t* bytes);

typedef struct {
    int32_t struct_size;  // sizeof(LlmpackGpu)
    int32_t vendor;
    int32_t device;         // as the driver counts, after CUDA_VISIBLE_DEVICES and the like
    int32_t max_sequences;  // in a step, at most
    int32_t max_rows;       // tokens, and rows of logits, in a step at most
    int32_t reserved;       // 0
    const char* kernels;    // path of the kernel file (FORMAT.md 8.1) for this chip
} LlmpackGpu;

// The driver takes no such code, and may take another file's.
#define LLMPACK_GPU_CODE_REFUSED 1

// Use this GPU and this code in the sessions made from now on; one in a process. The struct is copied.
// LLMPACK_NO_PDL=1 in the environment: no kernel begins before the one before it has ended (FORMAT.md 8.6).
LLMPACK_EXPORT int llmpack_ops_gpu_open(const LlmpackGpu* gpu);
LLMPACK_EXPORT int llmpack_ops_gpu_close(void);

// Memory of that GPU, all zero, until it is closed: as many bytes as are asked for, where ONNX Runtime's own
// allocator of values takes up to twice as many from the driver.
LLMPACK_EXPORT int llmpack_ops_gpu_allocate(int64_t bytes, void** memory);

// Give such memory back before; no step may use it any more. -1: it is not of this GPU's, or was given back.
LLMPACK_EXPORT int llmpack_ops_gpu_free(void* memory);

// Set each of the bytes at `memory`; waits until it is done.
LLMPACK_EXPORT int llmpack_ops_gpu_fill(void* memory, int byte, int64_t bytes);

// Join the GPUs of the communicator's ranks, before a session is made. Every rank must call this, in step.
LLMPACK_EXPORT int llmpack_ops_gpu_share(void);

// How values travel between the GPUs, in one sentence; "" before llmpack_ops_gpu_share. *can_be_captured: 0
// if a step must not be captured into a graph.
LLMPACK_EXPORT const char* llmpack_ops_gpu_transport(int* can_be_captured);

// Measure, as JSON: {"host_to_device_bytes_per_s", "device_to_host_bytes_per_s", "copy_bytes_per_s"} of
// pinned memory and within the device (bytes read and written); of a second device, if peer >= 0,
// {"peer_access", "peer_bytes_per_s"}: access is opened and bytes are copied and compared. No session may
// run.
LLMPACK_EXPORT int llmpack_ops_gpu_measure(int vendor, int device, int peer, char* json, int64_t size);

// Time `repeats` all-reduces of `rows` float16 rows of `columns`, as a step would do them. Every rank must
// call this, in step, after llmpack_ops_gpu_share. *microseconds: the mean of one.
LLMPACK_EXPORT int llmpack_ops_gpu_time_all_reduce(int64_t rows, int64_t columns, int repeats,
                                                   double* microseconds);

// Time each operator: nonzero clears all counts and starts, zero stops. May be called while a session runs;
// an operator in flight is counted if it began while the profile was on. The time is the wall time of the
// call, worker threads included, without what ONNX Runtime does between operators.
LLMPACK_EXPORT int llmpack_ops_profile(int enable);

// Counts of the index-th operator that a session of this process has or had, from 0, in no particular order:
// its name, calls and nanoseconds since the profile was started. The name (valid for ever) is the operator's
// and its node's, the same for every layer: "MatMulQ4 /model/layers.*/mlp/down_proj"; "MatMulQ4" for a node
// without a name. -1 once index is past the last. So:
//   for (int i = 0; llmpack_ops_profile_read(i, &name, &calls, &nanoseconds) == 0; i++) ...
LLMPACK_EXPORT int llmpack_ops_profile_read(int index, const char** name, uint64_t* calls,
                                            uint64_t* nanoseconds);

// Why the last failing call of this thread failed (or why llmpack_ops_share_memory gave 1); "" if none did.
// Valid until the thread's next failing call.
LLMPACK_EXPORT const char* llmpack_ops_last_error(void);

#ifdef __cplusplus
}
#endif

#endif  // LLMPACK_OPS_H_
