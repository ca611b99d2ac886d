// How a thread waits for another one: it spins, then gives up its core to whoever wants it, then sleeps on a
// word (futex), so that a slow peer costs no core.
#ifndef LLMPACK_CPU_WAITING_H_
#define LLMPACK_CPU_WAITING_H_

#include <sched.h>

#include <atomic>
#include <chrono>
#include <cstdint>

namespace llmpack {

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb" ::: "memory");  // yield is a no-op on most cores
#endif
}

// How long to wait before sleeping: spinning, and then offering the core.
struct Patience {
    std::chrono::microseconds spin, yield;
};

// Where a core is for each of those who wait for each other. Without one, whoever spins or only offers its
// core keeps it from the one that is waited for: four ranks on two cores reduced 8 KB in 29 us by sleeping at
// once, in 370 us after yielding for 100.
constexpr Patience patience(bool has_core_for_each) {
    return {std::chrono::microseconds(has_core_for_each ? 50 : 0),
            std::chrono::microseconds(has_core_for_each ? 1000 : 0)};
}

// Returns true as soon as is_over() does, false once patience has run out.
template <class IsOver>
bool wait_awake(const Patience& patience, const IsOver& is_over) {
    using Clock = std::chrono::steady_clock;
    constexpr int kSpinsPerLook = 64;  // at the clock: some microseconds
    if (is_over()) return true;
    const auto began = Clock::now();
    const auto spin_until = began + patience.spin, yield_until = spin_until + patience.yield;
    for (auto now = began; now < spin_until; now = Clock::now()) {
        for (int i = 0; i < kSpinsPerLook; i++) {
            if (is_over()) return true;
            relax();
        }
    }
    for (auto now = began; now < yield_until; now = Clock::now()) {
        sched_yield();
        if (is_over()) return true;
    }
    return false;
}

// Returns when somebody wakes the word's sleepers, or at once if it has another value, or now and then for no
// reason, or after `longest`, if that is above zero. The word may be in memory of several processes.
void sleep_while_equal(std::atomic<uint32_t>& word, uint32_t value, std::chrono::milliseconds longest);
void wake_all(std::atomic<uint32_t>& word);

}  // namespace llmpack

#endif  // LLMPACK_CPU_WAITING_H_
