// A stand-in for libnccl.so.2: the ranks exchange files in a folder whose path is the unique id. Works on the
// addresses of standin_driver.c.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define HOST(p) ((char*)((uintptr_t)(p) & ~(1ull << 62)))

typedef struct { char bytes[128]; } Id;
typedef struct { char folder[128]; int rank, size, step; } Communicator;

static int failing(void) { return getenv("STANDIN_NCCL_FAILS") != NULL; }

EXPORT int ncclGetVersion(int* version) { return *version = 22203, 0; }
EXPORT const char* ncclGetErrorString(int code) { return code == 2 ? "unhandled system error" : "stand-in"; }
EXPORT int ncclGetUniqueId(Id* id) {
    if (failing()) return 2;
    const char* folder = getenv("TMPDIR");
    snprintf(id->bytes, sizeof(id->bytes), "%s/standin-nccl-XXXXXX", folder != NULL ? folder : "/tmp");
    return mkdtemp(id->bytes) == NULL ? 2 : 0;
}
EXPORT int ncclCommInitRank(Communicator** communicator, int size, Id id, int rank) {
    if (failing()) return 2;
    *communicator = calloc(1, sizeof(Communicator));
    memcpy((*communicator)->folder, id.bytes, sizeof(id.bytes));
    (*communicator)->rank = rank, (*communicator)->size = size;
    return access(id.bytes, W_OK) == 0 ? 0 : 2;
}
static int exchange(Communicator* c, const char* own, char* all, size_t bytes) {
    char path[256], ready[256];
    c->step++;
    snprintf(path, sizeof(path), "%s/%d-%d.new", c->folder, c->step, c->rank);
    snprintf(ready, sizeof(ready), "%s/%d-%d", c->folder, c->step, c->rank);
    FILE* file = fopen(path, "wb");
    if (file == NULL || fwrite(own, 1, bytes, file) != bytes || fclose(file) != 0 || rename(path, ready) != 0) return 2;
    for (int rank = 0; rank < c->size; rank++) {
        snprintf(ready, sizeof(ready), "%s/%d-%d", c->folder, c->step, rank);
        for (int i = 0; access(ready, R_OK) != 0; i++) {
            if (i > 30000) return 6;
            usleep(1000);
        }
        file = fopen(ready, "rb");
        const size_t got = fread(all + (size_t)rank * bytes, 1, bytes, file);
        fclose(file);
        if (got != bytes) return 5;
    }
    return 0;
}
EXPORT int ncclAllReduce(const void* x, void* y, size_t n, int type, int operation, Communicator* c, void* stream) {
    if (operation != 0 || (type != 6 && type != 7) || stream == NULL) return 4;
    const size_t bytes = n * (type == 6 ? 2 : 4);
    char* all = malloc(bytes * (size_t)c->size);
    const int code = exchange(c, HOST(x), all, bytes);
    for (size_t i = 0; code == 0 && i < n; i++) {
        float sum = 0;
        for (size_t r = 0; r < (size_t)c->size; r++) {
            sum += type == 6 ? (float)((_Float16*)all)[r * n + i] : ((float*)all)[r * n + i];
        }
        if (type == 6) {
            ((_Float16*)HOST(y))[i] = (_Float16)sum;
        } else {
            ((float*)HOST(y))[i] = sum;
        }
    }
    free(all);
    return code;
}
EXPORT int ncclCommAbort(Communicator* c) { return free(c), 0; }
EXPORT int ncclCommDestroy(Communicator* c) { return free(c), 0; }
