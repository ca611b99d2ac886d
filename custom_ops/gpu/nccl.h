// The slice of NCCL's interface that large collectives use, found at run time: libnccl.so.2 (NVIDIA) or
// librccl.so.1 (AMD, the same interface). Numbers and signatures are those of nccl.h 2.19 to 2.28.
#ifndef LLMPACK_GPU_NCCL_H_
#define LLMPACK_GPU_NCCL_H_

#include <cstddef>
#include <string>

#include "gpu/driver.h"

namespace llmpack::gpu {

struct NcclId {  // ncclUniqueId, passed by value
    char bytes[128];
};

enum class NcclType : int { kFloat16 = 6, kFloat32 = 7 };

class Nccl {
  public:
    // Opens the library. Null: it is not there, or lacks a function; `why` says which.
    static const Nccl* get(Vendor vendor, std::string& why);

    NcclId new_id() const;
    // Joins `size` ranks; collective. Returns the communicator.
    void* join(const NcclId& id, int rank, int size) const;
    // y [n] = the sum over the ranks' x [n]; y may be x.
    void all_reduce(DevicePointer x, DevicePointer y, size_t n, NcclType type, void* communicator,
                    Stream stream) const;
    void abandon(void* communicator) const;  // without waiting for the others

    std::string library;
    int version = 0;  // 22203 for 2.22.3

  private:
    void check(int code, const char* what) const;
    int (*get_version_)(int* version);
    int (*get_unique_id_)(NcclId* id);
    int (*init_rank_)(void** communicator, int size, NcclId id, int rank);
    int (*all_reduce_)(const void* x, void* y, size_t n, int type, int operation, void* communicator, Stream);
    int (*abort_)(void* communicator);
    const char* (*error_string_)(int code);
};

}  // namespace llmpack::gpu

#endif  // LLMPACK_GPU_NCCL_H_
