// The threads that the loops of a session run on: the one that calls, and others that wait for it.
//
// Each thread has its own part of a loop, one run of items and the same in every step. It takes half of what
// is left of it, then half of the rest, down to a grain: streams from memory are long, and yet all are done
// within a grain's time of each other, as whoever is done takes of what is left to the others, in halves too.
// One that has not begun by then (its core was taken away, or it slept) is told not to.
//
//       caller    offer ---- own part, then others' ---- take back what was not begun, wait ---- (next loop)
//       thread 1        '--- own part, then others' ---- done ---'
//
// Offer, answer and end of a loop are one word a thread (a ticket), in a pair of cache lines of its own.
#ifndef LLMPACK_CPU_THREADS_H_
#define LLMPACK_CPU_THREADS_H_

#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <thread>

#include "cpu/waiting.h"

namespace llmpack {

class ThreadTeam {
  public:
    // place: which of the threads calls, below number(). noexcept, as nobody could catch what another thread
    // throws, and the others would go on with memory of a caller that has left: the process ends at once.
    using Function = void (*)(void* data, int place, int64_t begin, int64_t end) noexcept;

    // number: with the calling thread, at least 1. cores: [number], one each, the first being the caller's,
    // who is not pinned here; null: no thread has a core of its own, so none spins.
    // Throws std::runtime_error if the system refuses a thread.
    ThreadTeam(int number, const int32_t* cores);
    ~ThreadTeam();
    ThreadTeam(const ThreadTeam&) = delete;
    ThreadTeam& operator=(const ThreadTeam&) = delete;

    int number() const { return number_; }

    // Calls function(data, place, begin, end) on disjoint ranges that cover [0, count), and waits for all.
    // Each begins at a multiple of `grain` and, but for the last, ends at one. While another thread is in
    // here, the calling one does it all by itself.
    void run(Function function, void* data, int64_t count, int64_t grain);

  private:
    // A loop's number is a multiple of 4; with these it is a ticket.
    enum State : uint32_t { kOffered = 0, kTaken = 1, kDone = 2, kStop = 3 };
    static constexpr uint32_t kNextLoop = 4;

    struct alignas(128) Member {  // two cache lines: processors fetch them in pairs
        std::atomic<uint32_t> ticket{kDone};
        // Who wait for the ticket in the kernel: its thread or the caller, or, for a moment, both.
        std::atomic<uint32_t> sleepers{0};
        std::atomic<int64_t> next{0};  // grain of its part that nobody has taken
        int64_t end = 0;
        std::thread thread;
    };

    void follow(size_t self);
    void work(size_t self);
    void stop();
    void wait_while(Member& member, uint32_t ticket) const;
    static void set(Member& member, uint32_t ticket);

    const int number_;
    const Patience patience_;
    const pid_t process_;  // a child that was forked from it has no other thread
    std::unique_ptr<Member[]> members_;
    std::atomic_flag is_busy_ = ATOMIC_FLAG_INIT;
    uint32_t loop_ = 0;

    // Written while no other thread has taken a ticket.
    Function function_ = nullptr;
    void* data_ = nullptr;
    int64_t count_ = 0, grain_ = 1;
    size_t working_ = 0;
};

}  // namespace llmpack

#endif  // LLMPACK_CPU_THREADS_H_
