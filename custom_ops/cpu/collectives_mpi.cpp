#include "cpu/collectives_mpi.h"

#include <algorithm>
#include <climits>
#include <cstring>
#include <string>

namespace llmpack {

namespace {

// Messages up to this size are gathered whole by every rank (one exchange, but size times the bytes); larger
// ones are summed in parts, each rank one (two exchanges).
constexpr size_t kWholeMessageBytes = 64 * 1024;

float* grown(std::vector<float>& buffer, size_t count) {
    if (buffer.size() < count) buffer.resize(count);
    return buffer.data();
}

}  // namespace

MpiTransport::MpiTransport(const LlmpackCommunicator& c)
    : Transport(c.rank, c.size),
      comm_(c.comm),
      byte_type_(c.byte_type),
      allgather_(reinterpret_cast<MpiExchange>(c.allgather)),
      alltoall_(reinterpret_cast<MpiExchange>(c.alltoall)),
      error_string_(reinterpret_cast<MpiErrorString>(c.error_string)),
      blocks_(static_cast<size_t>(c.size)) {}

void MpiTransport::all_reduce(const float* x, float* y, size_t n) {
    if (n == 0) return;  // on every rank, so none waits
    const bool is_whole = n * sizeof(float) <= kWholeMessageBytes;
    // Rank r sums part r of everybody's x, and then everybody gets every part; or everybody sums all.
    const size_t ranks = static_cast<size_t>(size), part = is_whole ? n : (n + ranks - 1) / ranks;
    float* received = grown(received_, ranks * part);
    for (size_t rank = 0; rank < ranks; rank++) blocks_[rank] = received + rank * part;
    if (is_whole) {
        allgather(x, received, n * sizeof(float));
        sum_in_rank_order(blocks_.data(), size, n, y);
        return;
    }
    float* sent = grown(sent_, ranks * part);
    std::memcpy(sent, x, n * sizeof(float));
    std::fill(sent + n, sent + ranks * part, 0.0f);
    exchange("MPI_Alltoall", alltoall_, sent, received, part * sizeof(float));
    sum_in_rank_order(blocks_.data(), size, part, sent);
    allgather(sent, received, part * sizeof(float));
    std::memcpy(y, received, n * sizeof(float));
}

void MpiTransport::all_gather(const float* x, float* y, const GatherShape& shape) {
    check_columns(shape, size);
    const size_t block = shape.rows * shape.columns;
    if (block == 0) return;
    float* received = grown(received_, static_cast<size_t>(size) * block);
    allgather(x, received, block * sizeof(float));
    for (int r = 0; r < size; r++) {
        place_columns(received + static_cast<size_t>(r) * block, 0, block, r, shape, y);
    }
}

void MpiTransport::exchange(const char* name, MpiExchange function, const void* send, void* receive,
                            size_t bytes) {
    if (bytes > INT_MAX) {
        throw CollectiveError(std::string(name) + " of " + std::to_string(bytes) +
                              " bytes per rank, expected at most " + std::to_string(INT_MAX));
    }
    const int count = static_cast<int>(bytes);
    const int code = function(send, count, byte_type_, receive, count, byte_type_, comm_);
    if (code == 0) return;  // MPI_SUCCESS
    char text[8192] = "";   // more than any MPI_MAX_ERROR_STRING
    int length = 0;
    error_string_(code, text, &length);
    throw CollectiveError(std::string(name) + " failed on rank " + std::to_string(rank) + " with code " +
                          std::to_string(code) + ": " + text);
}

std::unique_ptr<MpiTransport> make_mpi_transport(const LlmpackCommunicator& c) {
    if (c.struct_size != static_cast<int32_t>(sizeof(LlmpackCommunicator))) {
        throw std::invalid_argument("communicator struct has " + std::to_string(c.struct_size) +
                                    " bytes, expected " + std::to_string(sizeof(LlmpackCommunicator)));
    }
    if (c.size < 1 || c.rank < 0 || c.rank >= c.size) {
        throw std::invalid_argument("communicator has rank " + std::to_string(c.rank) + " of " +
                                    std::to_string(c.size) + ", expected 0 <= rank < size");
    }
    if (c.allgather == nullptr || c.alltoall == nullptr || c.error_string == nullptr) {
        throw std::invalid_argument(
            "communicator lacks a function, expected allgather, alltoall and error_string");
    }
    return std::make_unique<MpiTransport>(c);
}

}  // namespace llmpack
