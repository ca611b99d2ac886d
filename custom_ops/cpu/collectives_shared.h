// Collectives through memory that the ranks of one host share. The protocol only: collectives_segment.h
// obtains the memory and knows the processes.
//
// The ranks take steps together. In a step each rank writes into its own slot, publishes a mark with the
// number of the step and the call that it is in, waits for the marks of all others, and then reads their
// slots.
//
//       rank 0   write slot, mark ---.   .--- wait --- read all slots --- (next step, other buffer)
//       rank 1   write slot, mark ---'---'--- wait --- read all slots --- ...
//
// Marks and slots are double: a rank that writes for step k + 2 has seen everybody's mark of step k + 1,
// which each publishes after it has read step k. So one wait a step is enough, and a mark holds either this
// step's number or that of two steps ago.
//
// A rank that leaves says so in a word of its own and lets its marks be: after an error it has not seen
// everybody's mark of its last step k, and some may still need the one of step k - 1. Whoever waits for a
// mark looks at that word only where the mark is not there.
//
// A rank waits as waiting.h says. While it sleeps it looks whether the ranks that it waits for still run.
#ifndef LLMPACK_CPU_COLLECTIVES_SHARED_H_
#define LLMPACK_CPU_COLLECTIVES_SHARED_H_

#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "cpu/collectives.h"
#include "cpu/waiting.h"

namespace llmpack {

// The processes of the ranks, as far as a wait must know them.
class Processes {
  public:
    virtual ~Processes() = default;
    virtual bool has_ended(int rank) = 0;
    virtual std::string description(int rank) = 0;  // for messages: "rank 1 (pid 4711)"
};

// What a rank does in a step; equal on all ranks, or they disagree.
struct Call {
    enum Kind : uint64_t { kNone, kAllReduce, kAllGather };
    uint64_t kind, rows, columns, out_features;  // AllReduce: rows elements

    bool operator==(const Call& other) const {
        return kind == other.kind && rows == other.rows && columns == other.columns &&
               out_features == other.out_features;
    }
};

constexpr size_t kMarkBytes = 128;  // two cache lines: processors fetch them in pairs

struct alignas(kMarkBytes) Mark {
    std::atomic<uint32_t> step;      // 32 bits, because the kernel waits on it; wraps
    std::atomic<uint32_t> sleepers;  // ranks that wait for this mark in the kernel
    uint64_t token;                  // of the segment and the rank: collectives_segment.cpp
    Call call;
};
static_assert(sizeof(Mark) == kMarkBytes);

struct alignas(kMarkBytes) Farewell {
    std::atomic<uint32_t> has_left;  // 1: the rank publishes no more marks
};

struct RankMarks {
    Mark marks[2];
    Farewell farewell;
};

// The memory of `size` ranks, all zero at first: [size] of their marks, [size] of two slots.
struct SharedLayout {
    int size;
    size_t slot_bytes;

    size_t bytes() const { return static_cast<size_t>(size) * (sizeof(RankMarks) + 2 * slot_bytes); }
    RankMarks& of(void* memory, int rank) const { return static_cast<RankMarks*>(memory)[rank]; }
    char* slots(void* memory, int rank) const {
        return static_cast<char*>(memory) + static_cast<size_t>(size) * sizeof(RankMarks) +
               static_cast<size_t>(rank) * 2 * slot_bytes;
    }
};

struct Tuning {
    bool streams;  // write slots past the caches
    Patience patience;
    std::chrono::milliseconds look;   // the longest sleep, after which the peers are looked at
    std::chrono::milliseconds grace;  // from seeing that a rank has ended to saying so
};

class SharedMemoryTransport : public Transport {
  public:
    // memory: [layout.bytes()], aligned to kMarkBytes.
    // first_step: the same on all ranks; that of 2^32 steps is as good as any.
    SharedMemoryTransport(int rank, const SharedLayout& layout, std::shared_ptr<void> memory,
                          const Tuning& tuning, std::unique_ptr<Processes> processes,
                          uint32_t first_step = 1);
    // Tells the others, should they wait for this rank.
    ~SharedMemoryTransport() override;

    const char* name() const override { return "shared-memory"; }
    void all_reduce(const float* x, float* y, size_t n) override;
    void all_gather(const float* x, float* y, const GatherShape& shape) override;

  private:
    void write(const float* from, size_t count, float* to) const;
    void sum(const float* own, size_t begin, size_t end, float* to);
    void meet(const Call& call);
    void publish(const Call& call);
    void await(int peer, const Call& call);
    bool sleep_until_published(int peer, const Call& call);
    void expect_running_peers(const Call& call);
    template <class Body>
    void in_step(Body body);

    bool is_published(const Mark& mark) const { return mark.step.load(std::memory_order_acquire) == step_; }
    Mark& mark(int peer) const { return layout_.of(memory_.get(), peer).marks[step_ % 2]; }
    std::atomic<uint32_t>& has_left(int peer) const {
        return layout_.of(memory_.get(), peer).farewell.has_left;
    }
    float* slot(int peer) const {
        return reinterpret_cast<float*>(layout_.slots(memory_.get(), peer) +
                                        (piece_ % 2) * layout_.slot_bytes);
    }

    const SharedLayout layout_;
    const std::shared_ptr<void> memory_;
    const Tuning tuning_;
    const std::unique_ptr<Processes> processes_;
    const size_t slot_floats_;
    uint32_t step_;        // the latest that this rank has published
    uint32_t piece_ = 0;   // alternates the slots; a piece takes one step or two
    std::string failure_;  // of an earlier call: the ranks are no longer in step
    std::vector<std::chrono::steady_clock::time_point>
        ended_since_;  // when a rank was first seen to have ended
    std::vector<const float*> blocks_;
};

}  // namespace llmpack

#endif  // LLMPACK_CPU_COLLECTIVES_SHARED_H_
