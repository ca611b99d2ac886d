#include "gpu/nccl.h"

#include <dlfcn.h>

#include <cstring>
#include <mutex>

namespace llmpack::gpu {

namespace {

constexpr int kSum = 0;  // ncclSum

template <class Function>
bool find(void* handle, const char* symbol, Function& function) {
    void* address = dlsym(handle, symbol);
    std::memcpy(&function, &address, sizeof(function));
    return address != nullptr;
}

}  // namespace

const Nccl* Nccl::get(Vendor vendor, std::string& why) {
    static std::mutex mutex;
    static const Nccl* loaded[2] = {};
    const std::lock_guard<std::mutex> lock(mutex);
    const Nccl*& known = loaded[static_cast<int>(vendor)];
    if (known != nullptr) return known;
    Nccl nccl;
    void* handle = vendor == Vendor::kCuda ? open_library({"libnccl.so.2"}, nccl.library, why)
                                           : open_library({"librccl.so.1"}, nccl.library, why);
    if (handle == nullptr) return nullptr;
    if (!find(handle, "ncclGetVersion", nccl.get_version_) ||
        !find(handle, "ncclGetUniqueId", nccl.get_unique_id_) ||
        !find(handle, "ncclCommInitRank", nccl.init_rank_) ||
        !find(handle, "ncclAllReduce", nccl.all_reduce_) || !find(handle, "ncclCommAbort", nccl.abort_) ||
        !find(handle, "ncclGetErrorString", nccl.error_string_)) {
        why = nccl.library + " lacks a function of NCCL's";
        return nullptr;
    }
    if (nccl.get_version_(&nccl.version) != 0) nccl.version = 0;
    return known = new Nccl(nccl);
}

void Nccl::check(int code, const char* what) const {
    if (code == 0) return;
    const char* text = error_string_(code);
    throw GpuError(std::string(what) + ": " + library + " says '" +
                   (text != nullptr ? text : "nothing more") + "' (error " + std::to_string(code) +
                   "); NCCL_DEBUG=WARN shows more");
}

NcclId Nccl::new_id() const {
    NcclId id{};
    check(get_unique_id_(&id), "ncclGetUniqueId");
    return id;
}

void* Nccl::join(const NcclId& id, int rank, int size) const {
    void* communicator = nullptr;
    check(init_rank_(&communicator, size, id, rank), "ncclCommInitRank");
    return communicator;
}

void Nccl::all_reduce(DevicePointer x, DevicePointer y, size_t n, NcclType type, void* communicator,
                      Stream stream) const {
    check(all_reduce_(reinterpret_cast<const void*>(x), reinterpret_cast<void*>(y), n, static_cast<int>(type),
                      kSum, communicator, stream),
          "ncclAllReduce");
}

void Nccl::abandon(void* communicator) const { abort_(communicator); }

}  // namespace llmpack::gpu
