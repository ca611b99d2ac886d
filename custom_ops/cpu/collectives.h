// AllReduce and AllGather between the ranks of one job, deterministic: every rank gets the same bits, the sum
// in the order of ranks, whichever way the values travel.
//
// Two ways: the MPI functions that the host program handed over (collectives_mpi.h), and memory that the
// ranks of one host share (collectives_shared.h), several times faster. Which one is agreed by all ranks.
//
// Ranks must call the same collectives with the same sizes in the same order. Through shared memory a
// difference is an error on every rank; through MPI it is not noticed. One call at a time.
#ifndef LLMPACK_CPU_COLLECTIVES_H_
#define LLMPACK_CPU_COLLECTIVES_H_

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "llmpack_ops.h"

namespace llmpack {

// The message says what failed; it names the function and gives the library's own words.
struct CollectiveError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// What AllGather is given: x [rows, columns] of each rank, y [rows, out_features].
struct GatherShape {
    size_t rows, columns, out_features;
};

// How the values travel. After an error the ranks are no longer in step, and no further call may be made.
class Transport {
  public:
    Transport(int rank, int size) : rank(rank), size(size) {}
    Transport(const Transport&) = delete;
    virtual ~Transport() = default;
    virtual const char* name() const = 0;
    // As the functions below.
    virtual void all_reduce(const float* x, float* y, size_t n) = 0;
    virtual void all_gather(const float* x, float* y, const GatherShape& shape) = 0;

    const int rank, size;
};

// Use this communicator from now on, by MPI; null: none. Throws std::invalid_argument when a member is out of
// range.
void set_communicator(const LlmpackCommunicator* communicator);

// Use memory that the ranks of the communicator share, if each of them can; all of them must call this.
// Returns "" or why they go on with MPI, the same on every rank. Throws CollectiveError: MPI failed, or no
// communicator is set.
std::string share_memory();

class MpiTransport;
// The communicator's functions, for what else the ranks must exchange; null: none is set.
MpiTransport* mpi_transport();

// "mpi", "shared-memory" or "none".
const char* transport_name();

// y [n] = sum of all ranks' x [n], added in the order of ranks; y may be x.
void all_reduce(const float* x, float* y, int64_t n);

// y [rows, out_features] = the ranks' x [rows, columns] side by side, cut to out_features columns.
// PRECOND: x and y do not overlap.
void all_gather(const float* x, float* y, int64_t rows, int64_t columns, int64_t out_features);

void collective_state(uint64_t* begun, uint64_t* ended);

// For transports.

// sum [n] = blocks[0] [n] + blocks[1] [n] + ..., in this order; sum may be one of the blocks.
void sum_in_rank_order(const float* const* blocks, int size, size_t n, float* sum);

// Throws CollectiveError if y has more columns than all ranks together.
void check_columns(const GatherShape& shape, int size);

// Puts elements [begin, begin + count) of a rank's x, row after row, where they belong in y.
void place_columns(const float* elements, size_t begin, size_t count, int rank, const GatherShape& shape,
                   float* y);

}  // namespace llmpack

#endif  // LLMPACK_CPU_COLLECTIVES_H_
