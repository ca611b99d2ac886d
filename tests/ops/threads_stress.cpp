// Loops on a ThreadTeam, with delays; test_threads.py builds it with a sanitizer.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "cpu/threads.h"

using namespace llmpack;

namespace {

void expect(bool holds, const char* what, int loop) {
    if (holds) return;
    std::printf("%s in loop %d\n", what, loop);
    std::_Exit(1);
}

struct Loop {
    int number;
    int64_t grain;
    unsigned slow, sleepy;   // one item in so many takes long, or sleeps
    std::vector<int> times;  // that each item ran; no atomics: an item is one thread's
    std::vector<double> result;
    std::vector<int> visits;  // of each place; no atomics either: a place is one thread's at a time

    static void run(void* self, int place, int64_t begin, int64_t end) noexcept {
        Loop& loop = *static_cast<Loop*>(self);
        loop.visits.at(static_cast<size_t>(place))++;
        const int64_t count = static_cast<int64_t>(loop.times.size());
        expect(begin % loop.grain == 0 && (end % loop.grain == 0 || end == count), "a grain was cut",
               loop.number);
        for (int64_t i = begin; i < end; i++) {
            const size_t item = static_cast<size_t>(i);
            loop.times[item]++;
            double x = loop.number;
            if (loop.slow != 0 && item % loop.slow == 0) {
                for (int k = 0; k < 3000; k++) x = x * 0.5 + 1;
            }
            if (loop.sleepy != 0 && item % loop.sleepy == 0)
                std::this_thread::sleep_for(std::chrono::microseconds(50));
            loop.result[item] = x + static_cast<double>(i);
        }
    }
};

void loops(ThreadTeam& team, int number, unsigned seed) {
    std::mt19937 random(seed);
    for (int k = 0; k < number; k++) {
        const size_t count = random() % 3 == 0 ? random() % 4 : random() % 65;
        Loop loop{k,
                  1 + static_cast<int64_t>(random() % 5),
                  random() % 4 == 0 ? 3u : 0u,
                  random() % 32 == 0 ? 5u : 0u,
                  std::vector<int>(count),
                  std::vector<double>(count),
                  std::vector<int>(static_cast<size_t>(team.number()))};
        team.run(&Loop::run, &loop, static_cast<int64_t>(count), loop.grain);
        for (size_t i = 0; i < count; i++) {
            expect(loop.times[i] == 1, "an item did not run once", k);
            expect(loop.result[i] >= static_cast<double>(i), "a result is not there", k);
        }
        // Long enough for the others to fall asleep, now and then.
        if (random() % 64 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 3000));
    }
}

}  // namespace

int main() {
    // All on one: the system takes it away in the middle of everything.
    const std::vector<int32_t> cores(8, 0);
    for (const int32_t* given : {static_cast<const int32_t*>(nullptr), cores.data()}) {
        for (int number : {1, 2, 3, 5, 8}) {
            for (int life = 0; life < 3; life++) {
                ThreadTeam team(number, given);
                loops(team, 4000, static_cast<unsigned>(number * 10 + life));
                if (life == 1) {  // two callers: one of them is on its own
                    std::thread other([&] { loops(team, 2000, 77); });
                    loops(team, 2000, 78);
                    other.join();
                }
                if (life == 2) continue;  // ends while the others still spin
                std::this_thread::sleep_for(std::chrono::milliseconds(3));
            }
        }
    }
    std::puts("all ran once");
}
