// Ranks that leave, or end, while others are behind them or wait for them; test_shared_collectives.py builds
// it with a sanitizer. Threads are ranks, held where a process might lose its core.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <future>
#include <string>
#include <thread>

#include "cpu/collectives_shared.h"

using namespace llmpack;
using std::chrono::milliseconds;

namespace {

void expect(const std::string& found, const std::string& expected) {
    if (found == expected) return;
    std::printf("found \"%s\", expected \"%s\"\n", found.c_str(), expected.c_str());
    std::_Exit(1);
}

// A rank looks at processes after it has slept and before it looks at the mark again: there it is held.
struct Held : Processes {
    Held(std::shared_future<void> until, int ended) : until(std::move(until)), ended(ended) {}
    bool has_ended(int rank) override {
        until.wait();
        return rank == ended;
    }
    std::string description(int rank) override { return "rank " + std::to_string(rank); }
    std::shared_future<void> until;
    const int ended;  // -1: none
};

std::shared_future<void> at_once() {
    std::promise<void> now;
    now.set_value();
    return now.get_future().share();
}

struct Memory {
    Memory() : whole(std::aligned_alloc(kMarkBytes, layout.bytes()), std::free) {
        std::fill_n(static_cast<char*>(whole.get()), layout.bytes(), 0);
    }
    // look: the longest sleep. A rank that sleeps at once, and is held as soon as it has slept.
    SharedMemoryTransport rank(int rank, milliseconds look, std::shared_future<void> until,
                               int ended = -1) const {
        const Tuning tuning{false, {std::chrono::microseconds(0), std::chrono::microseconds(0)}, look, look};
        return {rank, layout, whole, tuning, std::make_unique<Held>(std::move(until), ended)};
    }
    const SharedLayout layout{3, 4096};
    const std::shared_ptr<void> whole;
};

// "", or what the rank says.
std::string all_reduce(SharedMemoryTransport& rank, size_t n) {
    float x[64] = {};
    try {
        rank.all_reduce(x, x, n);
        return "";
    } catch (const CollectiveError& error) {
        return error.what();
    }
}

std::string disagreement(int rank, int own, int other, int others) {
    const auto call = [](int n) { return "AllReduce of " + std::to_string(n) + " elements"; };
    return "the ranks disagree: rank " + std::to_string(rank) + " is in " + call(own) + ", rank " +
           std::to_string(other) + " in " + call(others);
}

// Rank 2 waits in a step that the others have done. They go on, disagree in the next one, and leave.
void leave_while_one_is_a_step_behind() {
    const Memory memory;
    std::promise<void> have_left;
    const std::shared_future<void> until = have_left.get_future().share();
    std::thread behind([&] {
        auto rank = memory.rank(2, milliseconds(1), until);
        expect(all_reduce(rank, 8), "");
        expect(all_reduce(rank, 8), disagreement(2, 8, 0, 4));
    });
    // Until rank 2 is in the kernel, or held behind that.
    while (memory.layout.of(memory.whole.get(), 0).marks[1].sleepers.load() == 0) std::this_thread::yield();
    std::this_thread::sleep_for(milliseconds(50));
    const auto be = [&](int number, size_t n, const std::string& expected) {
        auto rank = memory.rank(number, milliseconds(1), at_once());
        expect(all_reduce(rank, 8), "");
        expect(all_reduce(rank, n), expected);
    };
    std::thread first([&] { be(0, 4, disagreement(0, 4, 1, 8)); });
    std::thread second([&] { be(1, 8, disagreement(1, 8, 0, 4)); });
    first.join();
    second.join();
    have_left.set_value();
    behind.join();
}

// A rank that leaves wakes who sleeps on a mark of it, of whichever step.
void leave_while_another_sleeps(int steps) {
    constexpr milliseconds kLook(20'000);
    const Memory memory;
    std::promise<void> leave;
    const auto be = [&](int number) {
        auto rank = memory.rank(number, kLook, at_once());
        for (int step = 0; step < steps; step++) expect(all_reduce(rank, 8), "");
        if (number == 0) return leave.get_future().wait();
        expect(all_reduce(rank, 8), "rank 0 has left the communicator, and rank " + std::to_string(number) +
                                        " waits for it in AllReduce of 8 elements");
    };
    std::thread ranks[3];
    for (int number = 0; number < 3; number++) ranks[number] = std::thread(be, number);
    const auto& next = memory.layout.of(memory.whole.get(), 0).marks[(steps + 1) % 2];
    while (next.sleepers.load() < 2) std::this_thread::yield();
    std::this_thread::sleep_for(milliseconds(50));
    const auto left = std::chrono::steady_clock::now();
    leave.set_value();
    for (auto& rank : ranks) rank.join();
    const bool woke = std::chrono::steady_clock::now() - left < kLook / 2;
    expect(woke ? "woke the others" : "let them sleep", "woke the others");
}

// One that comes when another has left already.
void leave_before_another_comes() {
    const Memory memory;
    {
        const auto gone = memory.rank(0, milliseconds(1), at_once());
    }
    auto rank = memory.rank(1, milliseconds(1), at_once());
    expect(all_reduce(rank, 8),
           "rank 0 has left the communicator, and rank 1 waits for it in AllReduce of 8 elements");
}

// Who ended after it had done its part of a step is missed in the next one only, and not by one that still
// waits for a third rank in this one.
void end_after_a_step() {
    const Memory memory;
    std::promise<void> be_told;
    std::thread first([&] {
        auto rank = memory.rank(0, milliseconds(1), at_once());
        expect(all_reduce(rank, 8), "");
        be_told.get_future().wait();  // as if it were gone: it neither goes on nor leaves
    });
    std::thread second([&] {
        auto rank = memory.rank(1, milliseconds(1), at_once(), 0);
        expect(all_reduce(rank, 8), "");
        expect(all_reduce(rank, 8), "rank 0 has ended, and rank 1 waits for it in AllReduce of 8 elements");
        be_told.set_value();
    });
    std::this_thread::sleep_for(milliseconds(100));
    auto rank = memory.rank(2, milliseconds(1), at_once());
    expect(all_reduce(rank, 8), "");
    first.join();
    second.join();
}

}  // namespace

int main() {
    leave_while_one_is_a_step_behind();
    for (int steps : {0, 1, 2}) leave_while_another_sleeps(steps);
    leave_before_another_comes();
    end_after_a_step();
    std::puts("all were told");
}
