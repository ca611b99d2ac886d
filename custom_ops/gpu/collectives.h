// Collectives between GPUs. Three ways, chosen once by all ranks together:
//
//   one-shot   up to some rows, by a kernel of ours (FORMAT.md 8.5): through each other's memory where the
//              GPUs can reach it, else through host memory that all of them map; needs no other library
//   NCCL/RCCL  whatever is larger, or between hosts
//   staged     neither: copied to the host, summed by the CPU's collectives, copied back; slow, and not for
//   graphs
//
// Every rank gets the same bits. One-shot adds in rank order; NCCL's order is its own beyond two ranks.
#ifndef LLMPACK_GPU_COLLECTIVES_H_
#define LLMPACK_GPU_COLLECTIVES_H_

#include <memory>
#include <string>
#include <vector>

#include "gpu/launcher.h"
#include "gpu/nccl.h"

namespace llmpack {
class MpiTransport;
}

namespace llmpack::gpu {

// Where a one-shot kernel meets its peers (FORMAT.md 8.5); addresses as this rank's GPU sees them.
struct Meeting {
    int64_t row_bytes, max_rows;
    DevicePointer buffers, flags;  // i64 [ranks] each, in device memory
    DevicePointer epochs;          // i32 [max_rows], this rank's own
};

class Collectives {
  public:
    // All ranks must call it, in step. Throws CollectiveError: MPI failed.
    Collectives(Launcher& launcher, MpiTransport& mpi);
    ~Collectives();

    // The meeting of kernels whose rows are of this size; null: none, so not one-shot.
    const Meeting* meeting(int64_t row_bytes, int64_t max_rows) const;

    // y [n] = sum of the ranks' x [n], float16; y may be x.
    void all_reduce(const void* x, void* y, int64_t n, Stream stream);

    // One sentence without a full stop, for people: which way each size goes, and why not another.
    std::string description;
    bool can_be_captured = true;  // false: staged

    const int rank, size;

  private:
    void make_meetings(MpiTransport& mpi);
    // Where each rank's part of `bytes` is, as this GPU sees it; empty: it cannot be, on no rank.
    std::vector<DevicePointer> peer_parts(MpiTransport& mpi, size_t bytes, std::string& why_not);
    std::vector<DevicePointer> host_parts(MpiTransport& mpi, size_t bytes, std::string& why_not);
    void see_places(MpiTransport& mpi);
    void join_nccl(MpiTransport& mpi);
    void expect_no_capture(Stream stream, const char* what) const;

    Launcher& launcher_;
    std::shared_ptr<void> segment_;
    bool is_registered_ = false;
    bool is_one_host_ = false, are_gpus_own_ = false;
    std::vector<DevicePointer> opened_;  // peers' memory
    std::vector<Meeting> meetings_;
    const Nccl* nccl_ = nullptr;
    void* communicator_ = nullptr;
    std::vector<uint16_t> halves_;  // staging; they only grow
    std::vector<float> sent_;
};

}  // namespace llmpack::gpu

#endif  // LLMPACK_GPU_COLLECTIVES_H_
