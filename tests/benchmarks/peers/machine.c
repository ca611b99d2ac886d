// What this machine can do: read bandwidth from memory, and the peak of 8-bit dot products.
//
// Of nine repetitions the median for reading, as a program's tokens/s are a mean over steps too and not its best moment; the
// best for dot products, which is the processor's limit.
//
//   machine THREADS -> {"read_bytes_per_s": .., "int8_ops_per_s": .. or null, "int8_instruction": ".."}
//   machine THREADS on-demand FILE...    for each line that comes, bytes/s of one repetition of reading, of the files' own pages:
//                                        one file, which the threads share, or one for each. A line is a number of pieces (1 if
//                                        empty): after each the threads wait for each other, as ranks do in an all-reduce;
//                                        nothing else is done, so no program that meets as often is faster. Or "loads": a loop
//                                        of loads without prefetches, as programs that measure bandwidth commonly read
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>

enum { kRepeats = 9, kMostThreads = 256 };
static const size_t kBytes = (size_t)1 << 30;  // of all threads together: far beyond any cache
static const long kRounds = 20000000;

// Eight independent sums hide the latency of the instruction; each instruction makes `kOps` multiplications
// and additions.
#if defined(__AVX512VNNI__)
#    define NAME "vpdpbusd zmm"
#    define CHAIN(n) "vpdpbusd %%zmm30, %%zmm31, %%zmm" #n "\n"
#    define DOT                                                                                \
        asm volatile(CHAIN(0) CHAIN(1) CHAIN(2) CHAIN(3) CHAIN(4) CHAIN(5) CHAIN(6) CHAIN(7):: \
                         : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7")
static const double kOps = 8 * 128;
#elif defined(__AVX2__)
#    define NAME "vpmaddubsw + vpmaddwd + vpaddd ymm"
#    define CHAIN(n)                                                                                     \
        "vpmaddubsw %%ymm15, %%ymm14, %%ymm8\nvpmaddwd %%ymm13, %%ymm8, %%ymm8\nvpaddd %%ymm8, %%ymm" #n \
        ", %%ymm" #n "\n"
#    define DOT                                                                                \
        asm volatile(CHAIN(0) CHAIN(1) CHAIN(2) CHAIN(3) CHAIN(4) CHAIN(5) CHAIN(6) CHAIN(7):: \
                         : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8")
static const double kOps = 8 * 64;
#elif defined(__ARM_FEATURE_DOTPROD)
#    define NAME "sdot"
#    define CHAIN(n) "sdot v" #n ".4s, v30.16b, v31.16b\n"
#    define DOT                                                                                \
        asm volatile(CHAIN(0) CHAIN(1) CHAIN(2) CHAIN(3) CHAIN(4) CHAIN(5) CHAIN(6) CHAIN(7):: \
                         : "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7")
static const double kOps = 8 * 32;
#endif

typedef uint64_t Vector __attribute__((vector_size(64)));

typedef struct {
    pthread_barrier_t* barrier;
    int core;
    const Vector* data;
    size_t count;
    double read_s[kRepeats], dot_s[kRepeats];
    uint64_t sum;
} Thread;

static bool is_on_demand, loads_alone;
static int threads, pieces = 1;
static atomic_int arrivals;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void read_by_loads(Thread* t) {
    Vector a = {0}, b = a, c = a, d = a;
    for (size_t i = 0; i + 4 <= t->count; i += 4) {
        a += t->data[i];
        b += t->data[i + 1];
        c += t->data[i + 2];
        d += t->data[i + 3];
    }
    a += b + c + d;
    t->sum += a[0] + a[1] + a[2] + a[3] + a[4] + a[5] + a[6] + a[7];
}

static void read_piece(Thread* t, const Vector* data, size_t count) {
    // Two streams: one does not keep the prefetchers of a core busy.
    Vector a = {0}, b = a, c = a, d = a;
    const size_t half = count / 2;
    for (size_t i = 0; i + 2 <= half; i += 2) {
        __builtin_prefetch((const char*)(data + i) + 2048);
        __builtin_prefetch((const char*)(data + i + 1) + 2048);
        __builtin_prefetch((const char*)(data + half + i) + 2048);
        __builtin_prefetch((const char*)(data + half + i + 1) + 2048);
        a += data[i];
        b += data[i + 1];
        c += data[half + i];
        d += data[half + i + 1];
    }
    a += b + c + d;
    t->sum += a[0] + a[1] + a[2] + a[3] + a[4] + a[5] + a[6] + a[7];
}

// Reads all of a thread's memory; returns the seconds.
static double read_all(Thread* t) {
    const double began = now();
    if (loads_alone) {
        read_by_loads(t);
        return now() - began;
    }
    for (int piece = 0; piece < pieces; piece++) {
        const size_t begin = t->count * (size_t)piece / (size_t)pieces;
        const size_t end = t->count * ((size_t)piece + 1) / (size_t)pieces;
        read_piece(t, t->data + begin, end - begin);
        if (pieces == 1) break;
        atomic_fetch_add(&arrivals, 1);
        while (atomic_load(&arrivals) < threads * (piece + 1)) {
        }
    }
    return now() - began;
}

static void* run(void* argument) {
    Thread* t = argument;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(t->core, &set);
    sched_setaffinity(0, sizeof set, &set);
    while (is_on_demand) {  // the main thread waits with them, and ends the process
        pthread_barrier_wait(t->barrier);
        t->read_s[0] = read_all(t);
        pthread_barrier_wait(t->barrier);
    }
    for (int r = 0; r < kRepeats; r++) {
        pthread_barrier_wait(t->barrier);
        t->read_s[r] = read_all(t);
        pthread_barrier_wait(t->barrier);
        const double began = now();
#ifdef NAME
        for (long i = 0; i < kRounds; i++) DOT;
#endif
        t->dot_s[r] = now() - began;
    }
    return NULL;
}

static void serve(Thread* all, pthread_barrier_t* barrier) {
    for (char line[64]; fgets(line, sizeof line, stdin) != NULL;) {
        loads_alone = strcmp(line, "loads\n") == 0;
        pieces = atoi(line) > 1 ? atoi(line) : 1;
        arrivals = 0;
        pthread_barrier_wait(barrier);
        pthread_barrier_wait(barrier);
        double slowest = 0;
        size_t count = 0;
        for (int i = 0; i < threads; i++) {
            count += all[i].count;
            if (all[i].read_s[0] > slowest) slowest = all[i].read_s[0];
        }
        printf("%.6g\n", (double)count * 64 / slowest);
        fflush(stdout);
    }
    exit(0);
}

// The part of a thread in its file, mapped on huge pages where the system has them; false if it cannot be.
static bool map_part(Thread* t, const char* path, size_t part, size_t parts) {
    const int descriptor = open(path, O_RDONLY);
    struct stat file;
    if (descriptor < 0 || fstat(descriptor, &file) != 0) return false;
    const size_t size = (size_t)file.st_size;
    const char* whole = mmap(NULL, size, PROT_READ, MAP_SHARED, descriptor, 0);
    if (whole == MAP_FAILED) return false;
    madvise((void*)whole, size, MADV_HUGEPAGE);
    t->count = size / parts / 64 / 4 * 4;
    t->data = (const Vector*)whole + part * t->count;
    return t->count > 0;
}

static int compare(const void* a, const void* b) {
    const double x = *(const double*)a, y = *(const double*)b;
    return (x > y) - (x < y);
}

int main(int argc, char** argv) {
    threads = argc > 1 ? atoi(argv[1]) : 2;
    cpu_set_t allowed;
    if (threads < 1 || threads > kMostThreads || sched_getaffinity(0, sizeof allowed, &allowed) != 0)
        return 1;
    static Thread all[kMostThreads];
    pthread_t ids[kMostThreads];
    pthread_barrier_t barrier;
    is_on_demand = argc > 3;
    if (is_on_demand && argc != 4 && argc != 3 + threads) return 1;
    pthread_barrier_init(&barrier, NULL, (unsigned)threads + (is_on_demand ? 1 : 0));
    const size_t bytes = kBytes / (size_t)threads / 128 * 128;
    int core = -1;
    for (int i = 0; i < threads; i++) {
        do core = (core + 1) % CPU_SETSIZE;
        while (!CPU_ISSET(core, &allowed));
        all[i] = (Thread){.barrier = &barrier, .core = core, .count = bytes / 64};
        if (is_on_demand) {
            const bool is_shared = argc == 4;
            if (!map_part(&all[i], argv[is_shared ? 3 : 3 + i], is_shared ? (size_t)i : 0,
                          is_shared ? (size_t)threads : 1))
                return 1;
        } else {
            uint64_t* data = aligned_alloc(64, bytes);
            if (data == NULL) return 1;
            for (size_t j = 0; j < bytes / 8; j++) data[j] = j;
            all[i].data = (const Vector*)data;
        }
        pthread_create(&ids[i], NULL, run, &all[i]);
    }
    if (is_on_demand) serve(all, &barrier);
    uint64_t sum = 0;
    for (int i = 0; i < threads; i++) {
        pthread_join(ids[i], NULL);
        sum += all[i].sum;
    }
    double read_s[kRepeats] = {0}, dot_s = 1e9;  // a repetition takes as long as its slowest thread
    for (int r = 0; r < kRepeats; r++) {
        double dot = 0;
        for (int i = 0; i < threads; i++) {
            if (all[i].read_s[r] > read_s[r]) read_s[r] = all[i].read_s[r];
            if (all[i].dot_s[r] > dot) dot = all[i].dot_s[r];
        }
        if (dot < dot_s) dot_s = dot;
    }
    qsort(read_s, kRepeats, sizeof *read_s, compare);
    printf("{\"read_bytes_per_s\": %.6g, ", (double)bytes * threads / read_s[kRepeats / 2]);
#ifdef NAME
    printf("\"int8_ops_per_s\": %.6g, \"int8_instruction\": \"%s\"", (double)kRounds * kOps * threads / dot_s,
           NAME);
#else
    printf(
        "\"int8_ops_per_s\": null, \"int8_instruction\": \"no 8-bit dot product that this program knows\"");
#endif
    printf(", \"checksum\": %llu}\n", (unsigned long long)sum);
    return 0;
}
