#include "cpu/collectives_shared.h"

#if defined(__x86_64__)
#    include <xmmintrin.h>
#endif

#include <algorithm>
#include <cstring>

namespace llmpack {

namespace {

using Clock = std::chrono::steady_clock;

// With more than two ranks, larger messages are summed in parts, each rank one: a second step, but then each
// rank reads 2 (size - 1) / size times the message and not size - 1 times.
constexpr size_t kWholeMessageBytes = 32 * 1024;
constexpr size_t kLineFloats = 16;       // parts begin at cache lines
constexpr size_t kStreamedBytes = 4096;  // below, plain stores are as fast or faster

std::string words(const Call& call) {
    switch (call.kind) {
        case Call::kAllReduce:
            return "AllReduce of " + std::to_string(call.rows) + " elements";
        case Call::kAllGather:
            return "AllGather of " + std::to_string(call.rows) + " x " + std::to_string(call.columns) +
                   " elements to " + std::to_string(call.out_features) + " columns";
        default:
            return "no collective";
    }
}

}  // namespace

SharedMemoryTransport::SharedMemoryTransport(int rank, const SharedLayout& layout,
                                             std::shared_ptr<void> memory, const Tuning& tuning,
                                             std::unique_ptr<Processes> processes, uint32_t first_step)
    : Transport(rank, layout.size),
      layout_(layout),
      memory_(std::move(memory)),
      tuning_(tuning),
      processes_(std::move(processes)),
      slot_floats_(layout.slot_bytes / sizeof(float)),
      step_(first_step - 1),
      ended_since_(static_cast<size_t>(layout.size)),
      blocks_(static_cast<size_t>(layout.size)) {}

SharedMemoryTransport::~SharedMemoryTransport() {
    has_left(rank).store(1, std::memory_order_seq_cst);
    // Whoever goes to sleep just now may miss it, and looks again after tuning_.look.
    for (Mark& own : layout_.of(memory_.get(), rank).marks) {
        if (own.sleepers.load(std::memory_order_seq_cst) != 0) wake_all(own.step);
    }
}

void SharedMemoryTransport::all_reduce(const float* x, float* y, size_t n) {
    in_step([&] {
        const Call call{Call::kAllReduce, n, 0, 0};
        const bool is_whole = size <= 2 || n * sizeof(float) <= kWholeMessageBytes;
        size_t done = 0;
        do {  // also for no element: the ranks must agree about that too
            const size_t count = std::min(n - done, slot_floats_);
            write(x + done, count, slot(rank));
            meet(call);
            if (is_whole) {
                sum(x + done, 0, count, y + done);
            } else {
                // Rank r sums part r, and puts it where its own part r was, which no other rank reads before.
                const size_t ranks = static_cast<size_t>(size);
                const size_t lines = (count + kLineFloats - 1) / kLineFloats;
                const auto begin = [&](int r) {
                    return std::min(count, lines * static_cast<size_t>(r) / ranks * kLineFloats);
                };
                float* const piece = y + done;
                sum(x + done, begin(rank), begin(rank + 1), piece + begin(rank));
                write(piece + begin(rank), begin(rank + 1) - begin(rank), slot(rank) + begin(rank));
                meet(call);
                for (int r = 0; r < size; r++) {
                    if (r == rank) continue;
                    std::memcpy(piece + begin(r), slot(r) + begin(r),
                                (begin(r + 1) - begin(r)) * sizeof(float));
                }
            }
            piece_++;
            done += count;
        } while (done < n);
    });
}

// to [count] = from; `to` is the beginning of a cache line of the own slot. Stored past the caches, a vector
// of 16 KB took 2.6 to 3.1 us to reduce wherever the two cores were; by plain stores 2.4 us between cores
// that share an L3 cache, but 8 to 10 us between others, which fetch each written line out of the writer's
// cache.
void SharedMemoryTransport::write(const float* from, size_t count, float* to) const {
    size_t done = 0;
#if defined(__x86_64__)
    if (tuning_.streams && count * sizeof(float) >= kStreamedBytes) {
        for (; done + 4 <= count; done += 4) _mm_stream_ps(to + done, _mm_loadu_ps(from + done));
        _mm_sfence();
    }
#endif
    if (done < count) std::memcpy(to + done, from + done, (count - done) * sizeof(float));
}

// to = the sum of elements [begin, end) of all ranks' pieces. The own one is read where it came from: the
// lines of the slot are on their way to the others (24 us in place of 36 for 256 KB).
void SharedMemoryTransport::sum(const float* own, size_t begin, size_t end, float* to) {
    for (int r = 0; r < size; r++) {
        blocks_[static_cast<size_t>(r)] = (r == rank ? own : slot(r)) + begin;
    }
    sum_in_rank_order(blocks_.data(), size, end - begin, to);
}

void SharedMemoryTransport::all_gather(const float* x, float* y, const GatherShape& shape) {
    in_step([&] {
        const Call call{Call::kAllGather, shape.rows, shape.columns, shape.out_features};
        const size_t n = shape.rows * shape.columns;
        size_t done = 0;
        do {
            const size_t count = std::min(n - done, slot_floats_);
            write(x + done, count, slot(rank));
            meet(call);
            check_columns(shape, size);  // here, where all ranks have the same shape and none waits
            for (int r = 0; r < size; r++) place_columns(slot(r), done, count, r, shape, y);
            piece_++;
            done += count;
        } while (done < n);
    });
}

// Runs a collective's steps; after an error every later call is refused, as the ranks are no longer in step.
template <class Body>
void SharedMemoryTransport::in_step(Body body) {
    if (!failure_.empty()) throw CollectiveError("an earlier collective failed: " + failure_);
    try {
        body();
    } catch (const CollectiveError& error) {
        failure_ = error.what();
        throw;
    }
}

// Publishes this rank's mark of the next step and waits until all have. Throws CollectiveError on every rank
// if their calls differ.
void SharedMemoryTransport::meet(const Call& call) {
    publish(call);
    for (int peer = 0; peer < size; peer++) {
        if (peer != rank) await(peer, call);
    }
}

void SharedMemoryTransport::publish(const Call& call) {
    step_++;
    Mark& own = mark(rank);
    own.call = call;
    // Sequentially consistent, as sleep_until_published: either this rank sees the sleeper, or the sleeper
    // the mark.
    own.step.store(step_, std::memory_order_seq_cst);
    if (own.sleepers.load(std::memory_order_seq_cst) != 0) wake_all(own.step);
}

void SharedMemoryTransport::await(int peer, const Call& call) {
    Mark& its = mark(peer);
    if (!wait_awake(tuning_.patience, [&] { return is_published(its); }) &&
        !sleep_until_published(peer, call)) {
        throw CollectiveError(processes_->description(peer) + " has left the communicator, and rank " +
                              std::to_string(rank) + " waits for it in " + words(call));
    }
    if (its.call == call) return;
    throw CollectiveError("the ranks disagree: rank " + std::to_string(rank) + " is in " + words(call) +
                          ", rank " + std::to_string(peer) + " in " + words(its.call));
}

// False: the peer has left without a mark of this step.
bool SharedMemoryTransport::sleep_until_published(int peer, const Call& call) {
    struct Sleeper {
        explicit Sleeper(Mark& mark) : mark(mark) { mark.sleepers.fetch_add(1, std::memory_order_seq_cst); }
        ~Sleeper() { mark.sleepers.fetch_sub(1, std::memory_order_relaxed); }
        Mark& mark;
    } sleeper(mark(peer));
    std::atomic<uint32_t>& step = mark(peer).step;
    for (;;) {
        const uint32_t seen = step.load(std::memory_order_seq_cst);
        if (seen == step_) return true;
        // Then the mark again: the peer may have published it meanwhile, and left.
        if (has_left(peer).load(std::memory_order_seq_cst) != 0) return is_published(mark(peer));
        sleep_while_equal(step, seen, tuning_.look);
        if (is_published(mark(peer))) return true;
        expect_running_peers(call);
    }
}

// Throws CollectiveError if a rank that has not reached this step has ended, some time ago: whoever started
// the ranks usually ends them all at once, and says it better.
void SharedMemoryTransport::expect_running_peers(const Call& call) {
    const auto now = Clock::now();
    for (int peer = 0; peer < size; peer++) {
        if (peer == rank || !processes_->has_ended(peer)) continue;
        auto& since = ended_since_[static_cast<size_t>(peer)];
        if (since == Clock::time_point()) since = now;
        // Looked at last: a rank may have ended after its last step, or after it has left, which await says.
        if (now - since < tuning_.grace || is_published(mark(peer)) || has_left(peer).load() != 0) continue;
        throw CollectiveError(processes_->description(peer) + " has ended, and rank " + std::to_string(rank) +
                              " waits for it in " + words(call));
    }
}

}  // namespace llmpack
