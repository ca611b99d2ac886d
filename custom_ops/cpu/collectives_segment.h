// Obtains memory that all ranks of a communicator share, if they are on one host and may.
#ifndef LLMPACK_CPU_COLLECTIVES_SEGMENT_H_
#define LLMPACK_CPU_COLLECTIVES_SEGMENT_H_

#include <memory>
#include <string>

#include "cpu/collectives.h"
#include "cpu/collectives_mpi.h"

namespace llmpack {

// All ranks of `mpi` must call it; they agree on the outcome by `mpi`. Null: why_not says why, the same on
// every rank. Throws CollectiveError: MPI failed.
std::unique_ptr<Transport> make_shared_memory_transport(MpiTransport& mpi, std::string& why_not);

}  // namespace llmpack

#endif  // LLMPACK_CPU_COLLECTIVES_SEGMENT_H_
