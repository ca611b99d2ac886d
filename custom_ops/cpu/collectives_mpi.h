// Collectives by MPI functions that the host program hands over: between hosts, and where memory cannot be
// shared.
#ifndef LLMPACK_CPU_COLLECTIVES_MPI_H_
#define LLMPACK_CPU_COLLECTIVES_MPI_H_

#include <memory>
#include <vector>

#include "cpu/collectives.h"

namespace llmpack {

// The MPI functions, with every handle passed as intptr_t: llmpack_ops.h says why that is sound.
using MpiExchange = int (*)(const void* send, int send_count, intptr_t send_type, void* receive,
                            int receive_count, intptr_t receive_type, intptr_t comm);
using MpiErrorString = int (*)(int code, char* text, int* length);

class MpiTransport : public Transport {
  public:
    explicit MpiTransport(const LlmpackCommunicator& communicator);

    const char* name() const override { return "mpi"; }
    void all_reduce(const float* x, float* y, size_t n) override;
    void all_gather(const float* x, float* y, const GatherShape& shape) override;

    // send: [bytes] of this rank;  receive: [size, bytes], rank after rank. The two do not overlap.
    void allgather(const void* send, void* receive, size_t bytes) {
        exchange("MPI_Allgather", allgather_, send, receive, bytes);
    }

  private:
    void exchange(const char* name, MpiExchange function, const void* send, void* receive, size_t bytes);

    const intptr_t comm_, byte_type_;
    const MpiExchange allgather_, alltoall_;
    const MpiErrorString error_string_;
    std::vector<float> sent_, received_;  // they only grow
    std::vector<const float*> blocks_;
};

// Throws std::invalid_argument when a member is out of range.
std::unique_ptr<MpiTransport> make_mpi_transport(const LlmpackCommunicator& communicator);

}  // namespace llmpack

#endif  // LLMPACK_CPU_COLLECTIVES_MPI_H_
