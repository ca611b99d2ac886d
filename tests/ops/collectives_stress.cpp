// Threads as ranks of the shared-memory protocol; test_shared_collectives.py builds it with a sanitizer.
//
// Every rank draws the same calls from one seed, and delays of its own. What it must get follows from the
// seed, so each checks every element.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>

#include "cpu/collectives_shared.h"

using namespace llmpack;

namespace {

struct Threads : Processes {
    bool has_ended(int) override { return false; }
    std::string description(int rank) override { return "rank " + std::to_string(rank); }
};

// Small integers: their sums are exact.
float value(int call, int rank, size_t i) {
    return static_cast<float>((call * 7 + rank * 131 + static_cast<int>(i) * 3) % 1000);
}

void expect(bool holds, const char* what, int rank, int call) {
    if (holds) return;
    std::printf("%s is wrong on rank %d in call %d\n", what, rank, call);
    std::_Exit(1);
}

void run_rank(int rank, const SharedLayout& layout, void* memory, const Tuning& tuning, int calls) {
    const std::shared_ptr<void> kept(memory, [](void*) {});
    SharedMemoryTransport ranks(rank, layout, kept, tuning, std::make_unique<Threads>(), 0xFFFFFF00u);
    std::mt19937 common(1), own(static_cast<unsigned>(rank) + 2);
    std::vector<float> x, y;
    for (int call = 0; call < calls; call++) {
        const size_t rows = common() % 3 == 0 ? common() % 40'000 : common() % 300;
        const bool is_reduce = common() % 4 != 0;
        switch (own() % 64) {
            case 0:
                std::this_thread::sleep_for(std::chrono::microseconds(own() % 3000));
                break;
            case 1:
                std::this_thread::yield();
                break;
            default:
                break;
        }
        if (is_reduce) {
            x.resize(rows);
            for (size_t i = 0; i < rows; i++) x[i] = value(call, rank, i);
            ranks.all_reduce(x.data(), x.data(), rows);
            for (size_t i = 0; i < rows; i++) {
                float sum = 0;
                for (int r = 0; r < layout.size; r++) sum += value(call, r, i);
                expect(x[i] == sum, "AllReduce", rank, call);
            }
        } else {
            const size_t columns = 1 + rows % 17, height = rows / columns;
            const size_t out = columns * static_cast<size_t>(layout.size) - columns / 2;
            x.resize(height * columns);
            y.assign(height * out, -1);
            for (size_t i = 0; i < x.size(); i++) x[i] = value(call, rank, i);
            ranks.all_gather(x.data(), y.data(), {height, columns, out});
            for (size_t i = 0; i < y.size(); i++) {
                const size_t row = i / out, column = i % out;
                const float wanted =
                    value(call, static_cast<int>(column / columns), row * columns + column % columns);
                expect(y[i] == wanted, "AllGather", rank, call);
            }
        }
    }
}

void run(int size, size_t slot_bytes, const Tuning& tuning, int calls) {
    const SharedLayout layout{size, slot_bytes};
    void* memory = std::aligned_alloc(kMarkBytes, layout.bytes());
    std::fill_n(static_cast<char*>(memory), layout.bytes(), 0);
    std::vector<std::thread> ranks;
    for (int rank = 0; rank < size; rank++) {
        ranks.emplace_back([=] { run_rank(rank, layout, memory, tuning, calls); });
    }
    for (auto& rank : ranks) rank.join();
    std::free(memory);
}

}  // namespace

int main() {
    using std::chrono::microseconds;
    const std::chrono::milliseconds look(20), grace(1000);
    for (int size = 1; size <= 5; size++) {
        run(size, 4096, {false, microseconds(0), microseconds(0), look, grace}, 150);  // sleeps at once
        run(size, 32768, {false, microseconds(20), microseconds(200), look, grace}, 150);
        // A sanitizer does not see such stores, but the numbers must be right.
        run(size, 32768, {true, microseconds(20), microseconds(200), look, grace}, 150);
    }
    std::puts("all agree");
}
