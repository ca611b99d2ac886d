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

// Likewise: plain memory of at least `bytes`, zero at first and aligned to a page, mapped until the last copy
// of the pointer is gone. The mapping goes on for one page behind the last whole page.
std::shared_ptr<void> make_shared_segment(MpiTransport& mpi, size_t bytes, std::string& why_not);

// Tells all ranks each one's trouble ("" if none); returns that of the first rank that has some, or "".
std::string agree_on(MpiTransport& mpi, const std::string& trouble);

}  // namespace llmpack

#endif  // LLMPACK_CPU_COLLECTIVES_SEGMENT_H_
