// Times the CPU kernels by themselves, without ONNX Runtime, beside the limits of the machine: a loop that
// reads the same memory in two prefetched streams, and a loop of integer dot products in registers.
//
//   cmake --build .build/ops --target bench_kernels
//   .build/ops/bench_kernels [isa] [rounds] [4k] [through-caches | past-caches]
//
// The contestants of a group run in turn, round after round; the best round of each and its median are
// printed: a neighbour on the machine slows some rounds, never all. A round is a slice of a few milliseconds,
// so that most are not interrupted; successive rounds take successive slices of memory that exceeds every
// cache. Memory lies in huge pages, as a mapped file does where the system has them; `4k`: in small ones. One
// thread is timed by its own clock, which stands still while another process has the core.
#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "cpu/isa.h"

using namespace llmpack;

namespace {

constexpr int64_t kMegabyte = 1 << 20;
constexpr size_t kHugePage = 2u << 20;
int rounds = 64;
bool is_huge = true;
constexpr int64_t kSlices = 16;

template <class T>
T* pages(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + kHugePage - 1) / kHugePage * kHugePage;
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) std::abort();
    madvise(p, bytes, is_huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    uint32_t state = 1;
    uint32_t* words = static_cast<uint32_t*>(p);
    // Small numbers as float16 and as float32 alike: no subnormals, no infinities.
    for (size_t i = 0; i < bytes / 4; i++)
        words[i] = 0x2c002c00u | ((state = state * 1664525u + 1013904223u) >> 8 & 0x03ff03ffu);
    return static_cast<T*>(p);
}

using Body = std::function<void(int64_t begin, int64_t end)>;

double now(clockid_t clock) {
    timespec t;
    clock_gettime(clock, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

// Two threads wait for each other; the clock starts with the first that goes on.
double seconds(int threads, int64_t begin, int64_t end, const Body& body) {
    const clockid_t clock = threads == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC;
    const int64_t middle = threads == 1 ? end : (begin + end) / 2;
    std::atomic<int> missing{threads - 1};
    double start_of_second = 1e300;
    std::thread second;
    if (threads == 2) {
        second = std::thread([&] {
            missing--;
            start_of_second = now(clock);
            body(middle, end);
        });
    }
    while (missing > 0) {
    }
    const double start = now(clock);
    body(begin, middle);
    if (threads == 2) second.join();
    return now(clock) - std::min(start, start_of_second);
}

struct Contestant {
    std::string name;
    double amount;  // what all slices do together, in units of 1e9
    const char* unit;
    int threads;
    int64_t count;
    Body body;
    std::vector<double> times = {};
};

// Prints each contestant's best rate, its median, and the best's share of the first one's (the limit) where
// the units agree.
void race(std::vector<Contestant> all) {
    for (int r = 0; r < rounds; r++) {
        for (size_t i = 0; i < all.size(); i++) {
            Contestant& c = all[i];
            // Never the slice that the one before has just brought into the cache.
            const int64_t slice = (r + static_cast<int64_t>(i) * kSlices / 2) % kSlices;
            const int64_t begin = c.count * slice / kSlices, end = c.count * (slice + 1) / kSlices;
            const double share = static_cast<double>(end - begin) / static_cast<double>(c.count);
            c.times.push_back(seconds(c.threads, begin, end, c.body) / share);
        }
    }
    double limit = 0;
    for (Contestant& c : all) {
        std::sort(c.times.begin(), c.times.end());
        const double best = c.amount / c.times.front(), median = c.amount / c.times[c.times.size() / 2];
        if (limit == 0) limit = best;
        std::printf("%-34s %9.1f %s, median %9.1f  %9.1f us  %5.2f\n", c.name.c_str(), best, c.unit, median,
                    c.times.front() * 1e6, best / limit);
    }
    std::printf("\n");
}

typedef int32_t Vector __attribute__((vector_size(64)));
volatile int32_t sink;
void read_bytes(const void* memory, int64_t begin, int64_t end) {  // in vectors of 64 bytes
    const int64_t half = (end - begin) / 2;
    const Vector *p = static_cast<const Vector*>(memory) + begin, *q = p + half;
    Vector a{}, b{}, c{}, d{};
    for (int64_t i = 0; i + 2 <= half; i += 2) {
        for (const Vector* ahead : {p + i + 32, p + i + 33, q + i + 32, q + i + 33})
            __builtin_prefetch(ahead);
        a += p[i], b += p[i + 1], c += q[i], d += q[i + 1];
    }
    a += b + c + d;
    sink = a[0] ^ a[7];
}

// The peak of one core in multiply-adds of bytes: what the instruction set's dot product does on registers.
constexpr int64_t kPeakLoops = 8'000'000;
double peak_operations() { return 2.0 * 64 * 16 * kPeakLoops * 1e-9; }
void peak(int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
#if defined(__x86_64__)
#    define DOT(n) "vpdpbusd %%zmm31,%%zmm30,%%zmm" #n "\n"
        asm volatile(DOT(0) DOT(1) DOT(2) DOT(3) DOT(4) DOT(5) DOT(6) DOT(7) DOT(8) DOT(9) DOT(10) DOT(11)
                         DOT(12) DOT(13) DOT(14) DOT(15)::
                             : "memory");
#endif
    }
}

struct Quantized {
    int64_t M, K, N, group;
    WeightType type;
    float* x = pages<float>(M * K);
    float* y = pages<float>(M * N);
    QuantizedActivations in{
        pages<int8_t>(M * K), pages<float>(M * K / group), pages<int32_t>(M * K / group), M, K, group};
    void quantize() {
        kernels().quantize(x, in, 0,
                           (M + kernels().quantized_token_block - 1) / kernels().quantized_token_block);
    }
};

void matmul(WeightType type, int64_t K, int64_t group, const std::vector<int64_t>& tokens) {
    const int64_t width = type == WeightType::kQ4 ? 4 : type == WeightType::kQ6 ? 6 : 8;
    const double bits = width + 16.0 / group;
    const int64_t N = 320 * kMegabyte * 8 / static_cast<int64_t>(bits * K) / 32 * 32;
    const double bytes = N * K * bits / 8;
    auto* weight = pages<uint8_t>(static_cast<int64_t>(bytes) + 64);
    auto* scales = reinterpret_cast<uint16_t*>(weight + N * K * width / 8);
    const std::string name = "q" + std::to_string(width) + " group " + std::to_string(group);
    for (int64_t M : tokens) {
        const int64_t rows = M <= 8 ? N : 4096;
        auto* q = new Quantized{M, K, rows, group, type};
        q->quantize();
        std::vector<Contestant> all;
        for (int threads : {1, 2}) {
            const std::string title =
                name + ", M " + std::to_string(M) + ", threads " + std::to_string(threads);
            const int64_t vectors = static_cast<int64_t>(bytes) / 64;
            const bool bound_by_memory = M <= 4;
            if (bound_by_memory) {
                all.push_back({"read, threads " + std::to_string(threads), bytes * 1e-9, "GB/s", threads,
                               vectors, [=](int64_t b, int64_t e) { read_bytes(weight, b, e); }});
            } else {
                all.push_back({"vpdpbusd, threads " + std::to_string(threads), peak_operations(), "GOP/s",
                               threads, kPeakLoops, peak});
            }
            all.push_back(
                {title, bound_by_memory ? bytes * 1e-9 : 2.0 * M * K * rows * 1e-9,
                 bound_by_memory ? "GB/s" : "GOP/s", threads, rows / kTileRows, [=](int64_t b, int64_t e) {
                     kernels().matmul_quantized(
                         type, {&q->in, weight, scales, q->y, rows, Gating::kNone, weight_fetch(), nullptr},
                         b, e);
                 }});
            race(all);
            all.clear();
        }
    }
    munmap(weight, static_cast<size_t>(bytes) + 64);
}

void quantize(int64_t M, int64_t K) {
    auto* q = new Quantized{M, K, 16, 32, WeightType::kQ4};
    race({{"quantize " + std::to_string(M) + " x " + std::to_string(K), M * K * 1600e-9, "Gvalues/s", 1, 1600,
           [=](int64_t begin, int64_t end) {
               for (; begin < end; begin++) q->quantize();
           }}});
}

// The last `tokens` of `context` positions attend, with a float16 cache and blocks of 16 in order. `layers`
// caches in turn exceed the processor's caches.
void attention(int64_t heads, int64_t kv_heads, int64_t D, int64_t context, int64_t tokens, int64_t layers) {
    const int64_t blocks = (context + 15) / 16, width = kv_heads * D;
    auto* cache = pages<uint16_t>(2 * layers * blocks * 16 * width);
    auto* table = pages<int32_t>(blocks);
    for (int64_t i = 0; i < blocks; i++) table[i] = static_cast<int32_t>(i);
    auto* starts = new std::vector<int32_t>;
    PagedAttention args{};
    args.tile_tokens = attention_tile_tokens(D, heads / kv_heads);
    for (int64_t t = 0; t < tokens; t += args.tile_tokens) starts->push_back(static_cast<int32_t>(t));
    auto* numbers = new int32_t[3]{0, static_cast<int32_t>(tokens), static_cast<int32_t>(context)};
    args.tile_starts = starts->data();
    // Scores that differ as in life: differences of 1e-23 would have subnormal squares, at 150 cycles each.
    auto* qkv = pages<float>(tokens * (heads + 2 * kv_heads) * D);
    for (int64_t i = 0; i < tokens * (heads + 2 * kv_heads) * D; i++)
        qkv[i] = static_cast<float>((i * 7919) % 2001 - 1000) * 1e-2f;
    args.qkv = qkv;
    args.cos_sin = pages<float>(tokens * D);
    args.query_start = numbers;
    args.seq_lens = numbers + 2;
    args.block_table = table;
    args.token_sequence = pages<int32_t>(tokens + 1);
    for (int64_t t = 0; t < tokens; t++) const_cast<int32_t*>(args.token_sequence)[t] = 0;
    args.out = pages<float>(tokens * heads * D);
    args.cache_type = CacheType::kF16;
    args.num_heads = heads, args.num_kv_heads = kv_heads, args.head_dim = D;
    args.block_size = 16, args.max_blocks = blocks, args.window = context, args.scale = 0.125f;
    args.fetch = weight_fetch();

    const int64_t bytes = 2 * context * width * 2, items = static_cast<int64_t>(starts->size()) * kv_heads;
    const int64_t vectors = 2 * blocks * 16 * width * 2 / 64;
    const std::string shape = std::to_string(heads) + "/" + std::to_string(kv_heads) + " x " +
                              std::to_string(D) + ", " + std::to_string(tokens) + " at " +
                              std::to_string(context) + ", threads ";
    // Multiply-adds: a score and a weighted value for each position that a token sees.
    const double seen = static_cast<double>(tokens) * static_cast<double>(2 * context - tokens + 1) / 2;
    for (int threads : {1, 2}) {
        auto body = [=](int64_t begin, int64_t end) {
            for (int64_t i = begin / items; i * items < end; i++) {
                PagedAttention layer = args;
                layer.key_cache = cache + 2 * i * blocks * 16 * width;
                layer.value_cache = cache + (2 * i + 1) * blocks * 16 * width;
                kernels().attention_read(layer, std::max<int64_t>(0, begin - i * items),
                                         std::min(items, end - i * items));
            }
        };
        if (tokens == 1) {
            race({{"read, threads " + std::to_string(threads), layers * bytes * 1e-9, "GB/s", threads,
                   layers * vectors, [=](int64_t b, int64_t e) { read_bytes(cache, b, e); }},
                  {shape + std::to_string(threads), layers * bytes * 1e-9, "GB/s", threads, layers * items,
                   body}});
        } else {
            race({{shape + std::to_string(threads), layers * seen * heads * D * 4 * 1e-9, "GFLOP/s", threads,
                   layers * items, body}});
        }
    }
}

}  // namespace

int main(int argc, char** argv) {
    if (argc > 1 && !set_isa(argv[1]))
        return std::fprintf(stderr, "expected one of %s\n", supported_isas()), 2;
    if (argc > 2) rounds = std::atoi(argv[2]);
    for (int i = 3; i < argc; i++) {
        if (std::string(argv[i]) == "4k") {
            is_huge = false;
        } else if (!set_weight_fetch(argv[i])) {
            return std::fprintf(stderr, "%s: expected 4k, through-caches or past-caches\n", argv[i]), 2;
        }
    }
    std::printf("isa %s, best of %d rounds; last column: share of the first line's rate\n\n", kernels().name,
                rounds);
    matmul(WeightType::kQ4, 2048, 64, {1, 2, 4, 8, 16, 256, 512});
    matmul(WeightType::kQ4, 5632, 64, {1, 256});
    matmul(WeightType::kQ4, 2048, 32, {1, 256});
    matmul(WeightType::kQ6, 2048, 128, {1, 8, 256});
    matmul(WeightType::kQ8, 2048, 64, {1, 256});
    quantize(1, 2048);
    quantize(256, 2048);
    attention(32, 4, 64, 2000, 1, 64);  // TinyLlama's heads
    attention(32, 4, 64, 512, 512, 16);
    attention(32, 32, 128, 2000, 1, 16);  // Llama 2 7B's
    attention(32, 32, 128, 512, 512, 16);
}
