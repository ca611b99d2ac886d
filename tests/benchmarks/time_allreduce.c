// For bench_allreduce.py: times calls of an all-reduce one by one, without Python in between.
#include <stdint.h>
#include <time.h>

typedef int (*Ours)(const float* x, float* y, int64_t n);
// Handles as intptr_t: custom_ops/llmpack_ops.h says why that is sound.
typedef int (*Theirs)(const void* x, void* y, int n, intptr_t type, intptr_t operation, intptr_t comm);

static double now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec * 1e-3;
}

// x is written before each call, as a matrix product would; that is not timed.
static void fill(float* x, int64_t n, int call) {
    for (int64_t i = 0; i < n; i++) x[i] = (float)(call + 1);
}

int time_ours(void* function, float* x, float* y, int64_t n, int calls, double* us) {
    for (int i = 0; i < calls; i++) {
        fill(x, n, i);
        const double began = now_us();
        if (((Ours)function)(x, y, n) != 0) return -1;
        us[i] = now_us() - began;
    }
    return 0;
}

int time_theirs(void* function, float* x, float* y, int64_t n, intptr_t type, intptr_t operation,
                intptr_t comm, int calls, double* us) {
    for (int i = 0; i < calls; i++) {
        fill(x, n, i);
        const double began = now_us();
        if (((Theirs)function)(x, y, (int)n, type, operation, comm) != 0) return -1;
        us[i] = now_us() - began;
    }
    return 0;
}
