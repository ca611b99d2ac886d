#include "cpu/collectives.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>

#include "cpu/collectives_mpi.h"
#include "cpu/collectives_segment.h"

namespace llmpack {

namespace {

struct Transports {
    std::unique_ptr<MpiTransport> mpi;
    std::unique_ptr<Transport> shared;
};

Transports& transports() {
    // Never destroyed: at exit another thread may still be inside a collective.
    static Transports& both = *new Transports;
    return both;
}

Transport& transport() {
    if (transports().shared != nullptr) return *transports().shared;
    if (transports().mpi != nullptr) return *transports().mpi;
    throw CollectiveError(
        "no communicator is set, expected llmpack_ops_set_communicator before the first run");
}

std::atomic<uint64_t> begun_count{0}, ended_count{0};

struct CountedCollective {
    CountedCollective() { begun_count.fetch_add(1); }
    ~CountedCollective() { ended_count.fetch_add(1); }
};

typedef float Lanes __attribute__((vector_size(16)));

Lanes load(const float* from) {
    Lanes lanes;
    std::memcpy(&lanes, from, sizeof(lanes));
    return lanes;
}

void store(float* to, Lanes lanes) { std::memcpy(to, &lanes, sizeof(lanes)); }

}  // namespace

void set_communicator(const LlmpackCommunicator* communicator) {
    auto mpi = communicator != nullptr ? make_mpi_transport(*communicator) : nullptr;
    transports().shared = nullptr;
    transports().mpi = std::move(mpi);
}

std::string share_memory() {
    if (transports().mpi == nullptr) {
        throw CollectiveError("no communicator is set, expected llmpack_ops_set_communicator before");
    }
    transports().shared = nullptr;
    std::string why_not;
    transports().shared = make_shared_memory_transport(*transports().mpi, why_not);
    return why_not;
}

MpiTransport* mpi_transport() { return transports().mpi.get(); }

const char* transport_name() {
    if (transports().shared != nullptr) return transports().shared->name();
    return transports().mpi != nullptr ? transports().mpi->name() : "none";
}

void all_reduce(const float* x, float* y, int64_t n) {
    Transport& ranks = transport();
    CountedCollective counted;
    ranks.all_reduce(x, y, static_cast<size_t>(n));
}

void all_gather(const float* x, float* y, int64_t rows, int64_t columns, int64_t out_features) {
    Transport& ranks = transport();
    CountedCollective counted;
    ranks.all_gather(
        x, y, {static_cast<size_t>(rows), static_cast<size_t>(columns), static_cast<size_t>(out_features)});
}

void collective_state(uint64_t* begun, uint64_t* ended) {
    // ended first: a collective that starts in between must not look as if it had ended before it began.
    *ended = ended_count.load();
    *begun = begun_count.load();
}

void sum_in_rank_order(const float* const* blocks, int size, size_t n, float* sum) {
    // 24 cache lines: blocks may come from another core or the memory, and the processor's own prefetching
    // stops at every page.
    constexpr size_t kAhead = 24 * 16;
    const float* const first = blocks[0];
    const float* const second = blocks[size > 1 ? 1 : 0];
    size_t i = 0;
    // A cache line at a time, in registers. Written out: the compiler cannot know that sum is one of the
    // blocks or apart from all, and would go one by one.
    for (; size > 1 && i + 16 <= n; i += 16) {
        Lanes a = load(first + i) + load(second + i);
        Lanes b = load(first + i + 4) + load(second + i + 4);
        Lanes c = load(first + i + 8) + load(second + i + 8);
        Lanes d = load(first + i + 12) + load(second + i + 12);
        __builtin_prefetch(first + i + kAhead);
        __builtin_prefetch(second + i + kAhead);
        for (int rank = 2; rank < size; rank++) {
            const float* block = blocks[rank] + i;
            __builtin_prefetch(block + kAhead);
            a += load(block);
            b += load(block + 4);
            c += load(block + 8);
            d += load(block + 12);
        }
        store(sum + i, a);
        store(sum + i + 4, b);
        store(sum + i + 8, c);
        store(sum + i + 12, d);
    }
    for (; i < n; i++) {
        float total = first[i];
        for (int rank = 1; rank < size; rank++) total += blocks[rank][i];
        sum[i] = total;
    }
}

void check_columns(const GatherShape& shape, int size) {
    const size_t all = shape.columns * static_cast<size_t>(size);
    if (all >= shape.out_features) return;
    throw CollectiveError("out_features is " + std::to_string(shape.out_features) + ", expected at most " +
                          std::to_string(all) + ", the columns of all ranks together");
}

void place_columns(const float* elements, size_t begin, size_t count, int rank, const GatherShape& shape,
                   float* y) {
    const size_t end = begin + count, first_column = static_cast<size_t>(rank) * shape.columns;
    for (size_t i = begin; i < end;) {
        const size_t row = i / shape.columns, column = i % shape.columns;
        const size_t run = std::min(shape.columns - column, end - i), to = first_column + column;
        if (to < shape.out_features) {
            std::memcpy(y + row * shape.out_features + to, elements + (i - begin),
                        std::min(run, shape.out_features - to) * sizeof(float));
        }
        i += run;
    }
}

}  // namespace llmpack
