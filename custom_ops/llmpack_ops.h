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
#define LLMPACK_OPS_VERSION 1
LLMPACK_EXPORT int llmpack_ops_version(void);

// Instruction set of the CPU kernels in use: "portable", "avx2", "avx2-vnni" (with AVX-VNNI),
// "avx512" (with VNNI) or "neon" (with dot products). The best one is chosen at load.
LLMPACK_EXPORT const char* llmpack_ops_isa(void);

// Choose the instruction set, for tests and comparisons. -1: unknown name, or this machine lacks it.
LLMPACK_EXPORT int llmpack_ops_set_isa(const char* name);

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

// Collectives begun and ended by this process. A watchdog thread may poll it: begun > ended for long means
// that this rank waits for a peer.
LLMPACK_EXPORT void llmpack_ops_collective_state(uint64_t* begun, uint64_t* ended);

// Time each operator: nonzero clears all counts and starts, zero stops. May be called while a session runs;
// an operator in flight is counted if it began while the profile was on. The time is the wall time of the
// call, worker threads included, without what ONNX Runtime does between operators.
LLMPACK_EXPORT int llmpack_ops_profile(int enable);

// Counts of the index-th operator that has run in this process, from 0, in no particular order: its name
// ("MatMulQ4"; valid for ever), calls and nanoseconds since the profile was started. -1 once index is past
// the last. So:
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
