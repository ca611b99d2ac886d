// Drives llama.cpp through its C API, with nothing else in the process. Prints one number, or fails.
//
//   llamacpp prompt MODEL THREADS N            tokens/s of a prompt of N tokens
//   llamacpp generate MODEL THREADS N DEPTH B  tokens/s of N steps of B sequences, DEPTH tokens in the cache
//   of each llamacpp first MODEL THREADS               the likeliest token after one token: time the process
//   from outside llamacpp quantize IN OUT THREADS           GGUF F16 -> Q4_0
//
// Defaults of llama.cpp throughout: mapped weights, repacked for the CPU at load, f16 KV cache, automatic
// flash attention, batches of 2048 and 512. A repetition that is not timed comes first, as in llama-bench.
#include <llama.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static void quiet(enum ggml_log_level level, const char* text, void* data) {
    (void)data;
    if (level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
}

static void fail(const char* what) {
    fprintf(stderr, "llamacpp: %s\n", what);
    exit(1);
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static struct llama_model* load(const char* path) {
    struct llama_model* model = llama_model_load_from_file(path, llama_model_default_params());
    if (model == NULL) fail("the model cannot be loaded");
    return model;
}

static struct llama_context* context(struct llama_model* model, int threads, int positions, int sequences) {
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx = (uint32_t)(positions * sequences);
    params.n_seq_max = (uint32_t)sequences;
    params.n_threads = params.n_threads_batch = threads;
    struct llama_context* made = llama_init_from_model(model, params);
    if (made == NULL) fail("no context");
    return made;
}

static llama_token token(int i, int run) { return 3 + (7919 * i + 31 * run) % 30000; }

// Appends `count` tokens to each of `sequences`, from position `at` on; logits for the last of each.
static void decode(struct llama_context* ctx, struct llama_batch* batch, int at, int count, int sequences,
                   int run) {
    batch->n_tokens = 0;
    for (int s = 0; s < sequences; s++) {
        for (int i = 0; i < count; i++) {
            const int n = batch->n_tokens++;
            batch->token[n] = token(at + i, run + s);
            batch->pos[n] = at + i;
            batch->n_seq_id[n] = 1;
            batch->seq_id[n][0] = s;
            batch->logits[n] = i == count - 1;
        }
    }
    if (llama_decode(ctx, *batch) != 0) fail("llama_decode failed");
    llama_synchronize(ctx);
}

static void fill(struct llama_context* ctx, struct llama_batch* batch, int depth, int sequences, int run) {
    const int step = 512 / sequences;
    for (int at = 0; at < depth; at += step) {
        decode(ctx, batch, at, depth - at < step ? depth - at : step, sequences, run);
    }
}

static double prompt(struct llama_context* ctx, struct llama_batch* batch, int n, int run) {
    llama_memory_clear(llama_get_memory(ctx), true);
    const double began = now();
    fill(ctx, batch, n, 1, run);
    return n / (now() - began);
}

static double generate(struct llama_context* ctx, struct llama_batch* batch, int n, int depth, int sequences,
                       int run) {
    llama_memory_clear(llama_get_memory(ctx), true);
    fill(ctx, batch, depth, sequences, run);
    const double began = now();
    for (int i = 0; i < n; i++) decode(ctx, batch, depth + i, 1, sequences, run);
    return n * sequences / (now() - began);
}

int main(int argc, char** argv) {
    const char* mode = argc > 1 ? argv[1] : "";
    llama_log_set(quiet, NULL);
    llama_backend_init();
    if (strcmp(mode, "quantize") == 0 && argc == 5) {
        struct llama_model_quantize_params params = llama_model_quantize_default_params();
        params.ftype = LLAMA_FTYPE_MOSTLY_Q4_0;
        params.nthread = atoi(argv[4]);
        if (llama_model_quantize(argv[2], argv[3], &params) != 0) fail("cannot quantize");
        return 0;
    }
    if (argc < 4) fail("usage: see llamacpp.c");
    struct llama_model* model = load(argv[2]);
    const int threads = atoi(argv[3]);
    if (strcmp(mode, "first") == 0) {
        struct llama_context* ctx = context(model, threads, 32, 1);
        llama_token bos = 1;
        if (llama_decode(ctx, llama_batch_get_one(&bos, 1)) != 0) fail("llama_decode failed");
        const float* logits = llama_get_logits_ith(ctx, -1);
        int best = 0;
        for (int i = 1; i < llama_vocab_n_tokens(llama_model_get_vocab(model)); i++) {
            if (logits[i] > logits[best]) best = i;
        }
        printf("%d\n", best);
        fflush(stdout);
        _Exit(0);
    }
    struct llama_batch batch = llama_batch_init(512, 0, 1);
    if (strcmp(mode, "prompt") == 0 && argc == 5) {
        const int n = atoi(argv[4]);
        struct llama_context* ctx = context(model, threads, n + 8, 1);
        prompt(ctx, &batch, n, 1);
        printf("%.6g\n", prompt(ctx, &batch, n, 2));
    } else if (strcmp(mode, "generate") == 0 && argc == 7) {
        const int n = atoi(argv[4]), depth = atoi(argv[5]), sequences = atoi(argv[6]);
        struct llama_context* ctx = context(model, threads, depth + n + 8, sequences);
        generate(ctx, &batch, 4, 0, sequences, 1);
        printf("%.6g\n", generate(ctx, &batch, n, depth, sequences, 2));
    } else {
        fail("usage: see llamacpp.c");
    }
    return 0;
}
