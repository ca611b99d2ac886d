// Runs the operator library's functions for another process: the part of ONNX Runtime that the operators use,
// and calls of the exported functions, over standard input and output. emulator.py starts it under qemu-user,
// with the library for the emulated machine, and so the tests of the operators run there unchanged.
//
//   host LIBRARY
//
// A request is a word (what to do) and its arguments, an answer a string (the error, or "") and its results;
// integers are little-endian, strings and arrays have their length in bytes before them (8 bytes).
//
// Tensors end where their page ends, and the next page is closed: a kernel that reads or writes beyond one
// dies.
#include <dlfcn.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "llmpack_ops.h"
#include "ort/abi.h"
#include "pack/pack.h"

namespace {

[[noreturn]] void fail(const char* what) {
    std::fprintf(stderr, "emulated host: %s\n", what);
    std::_Exit(70);
}

template <class T>
T read() {
    T value;
    if (std::fread(&value, sizeof(value), 1, stdin) != 1) std::_Exit(0);  // the tests are over
    return value;
}
void read_bytes(void* to, size_t count) {
    if (count > 0 && std::fread(to, 1, count, stdin) != count) fail("a request ends early");
}
std::string read_string() {
    std::string text(read<uint64_t>(), '\0');
    read_bytes(text.data(), text.size());
    return text;
}
void write_bytes(const void* from, size_t count) {
    const uint64_t length = count;
    std::fwrite(&length, sizeof(length), 1, stdout);
    std::fwrite(from, 1, count, stdout);
}
void write_string(const std::string& text) { write_bytes(text.data(), text.size()); }

// `bytes` of memory that end at a closed page.
class Guarded {
  public:
    explicit Guarded(size_t bytes) : bytes_(bytes) {
        const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
        open_ = (bytes + page - 1) / page * page;
        all_ = open_ + page;
        base_ = static_cast<char*>(
            mmap(nullptr, all_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        if (base_ == MAP_FAILED || mprotect(base_ + open_, page, PROT_NONE) != 0) fail("no memory");
    }
    Guarded(const Guarded&) = delete;
    ~Guarded() { munmap(base_, all_); }
    char* data() const { return base_ + open_ - bytes_; }
    size_t size() const { return bytes_; }

  private:
    size_t bytes_, open_, all_;
    char* base_;
};

std::unique_ptr<Guarded> read_guarded() {
    auto memory = std::make_unique<Guarded>(read<uint64_t>());
    read_bytes(memory->data(), memory->size());
    return memory;
}

}  // namespace

// What ONNX Runtime hides behind these names.
struct OrtStatus {
    std::string message;
};
struct OrtTensorTypeAndShapeInfo {
    int type;
    std::vector<int64_t> shape;
};
struct OrtValue {
    OrtTensorTypeAndShapeInfo info;
    std::unique_ptr<Guarded> data;
};
struct OrtKernelInfo {
    std::string name;
    std::map<std::string, int64_t> ints;
    std::map<std::string, float> floats;
    std::vector<bool> inputs;  // false: missing
};
struct OrtKernelContext {
    std::vector<OrtValue> inputs, outputs;
    size_t threads;
};
struct OrtCustomOpDomain {
    std::map<std::string, const OrtCustomOp*> ops;
};

namespace {

OrtStatus* error(const std::string& message) { return new OrtStatus{message}; }

// The slots of OrtApi, from onnxruntime_c_api.h; abi.h has the signatures.
OrtStatus* create_status(int, const char* message) { return error(message); }
OrtStatus* create_domain(const char*, OrtCustomOpDomain** out) {
    *out = new OrtCustomOpDomain;
    return nullptr;
}
OrtStatus* add_op(OrtCustomOpDomain* domain, const OrtCustomOp* op) {
    if (std::strcmp(op->GetExecutionProviderType(op), "CPUExecutionProvider") == 0)
        domain->ops[op->GetName(op)] = op;
    return nullptr;
}
OrtCustomOpDomain* registered = nullptr;
OrtStatus* add_domain(OrtSessionOptions*, OrtCustomOpDomain* domain) {
    registered = domain;
    return nullptr;
}
OrtStatus* mutable_data(OrtValue* value, void** out) {
    *out = value->data->data();
    return nullptr;
}
OrtStatus* element_type(const OrtTensorTypeAndShapeInfo* info, int* out) {
    *out = info->type;
    return nullptr;
}
OrtStatus* dimensions_count(const OrtTensorTypeAndShapeInfo* info, size_t* out) {
    *out = info->shape.size();
    return nullptr;
}
OrtStatus* dimensions(const OrtTensorTypeAndShapeInfo* info, int64_t* sizes, size_t count) {
    std::copy_n(info->shape.begin(), count, sizes);
    return nullptr;
}
OrtStatus* type_and_shape(const OrtValue* value, OrtTensorTypeAndShapeInfo** out) {
    *out = new OrtTensorTypeAndShapeInfo(value->info);
    return nullptr;
}
template <class T>
OrtStatus* attribute(const std::map<std::string, T>& all, const char* name, T* out) {
    const auto found = all.find(name);
    if (found == all.end()) return error("no such attribute");
    *out = found->second;
    return nullptr;
}
OrtStatus* float_attribute(const OrtKernelInfo* info, const char* name, float* out) {
    return attribute(info->floats, name, out);
}
OrtStatus* int_attribute(const OrtKernelInfo* info, const char* name, int64_t* out) {
    return attribute(info->ints, name, out);
}
OrtStatus* input(const OrtKernelContext* context, size_t index, const OrtValue** out) {
    const OrtValue& value = context->inputs[index];
    *out = value.data ? &value : nullptr;
    return nullptr;
}
OrtStatus* output(OrtKernelContext* context, size_t index, const int64_t* sizes, size_t rank,
                  OrtValue** out) {
    OrtValue& value = context->outputs[index];
    value.info = {llmpack::ort::kFloat, {sizes, sizes + rank}};
    size_t count = 1;
    for (size_t i = 0; i < rank; i++) count *= static_cast<size_t>(sizes[i]);
    value.data = std::make_unique<Guarded>(count * sizeof(float));
    std::memset(value.data->data(), 0xff, value.data->size());  // NaN: what is not written shows
    *out = &value;
    return nullptr;
}
void release_status(OrtStatus* status) { delete status; }
void release_info(OrtTensorTypeAndShapeInfo* info) { delete info; }
OrtStatus* input_count(const OrtKernelInfo* info, size_t* out) {
    *out = info->inputs.size();
    return nullptr;
}
OrtStatus* input_name(const OrtKernelInfo* info, size_t index, char* out, size_t* size) {
    const std::string name = info->inputs[index] ? "x" : "";
    if (out != nullptr) std::memcpy(out, name.c_str(), name.size() + 1);
    *size = name.size() + 1;
    return nullptr;
}
OrtStatus* node_name(const OrtKernelInfo* info, char* out, size_t* size) {
    if (out != nullptr) std::memcpy(out, info->name.c_str(), info->name.size() + 1);
    *size = info->name.size() + 1;
    return nullptr;
}
OrtStatus* parallel_for(const OrtKernelContext* context, void (*function)(void*, size_t), size_t total,
                        size_t, void* user_data) {
    std::atomic<size_t> next{0};
    auto work = [&] {
        for (size_t i = next++; i < total; i = next++) function(user_data, i);
    };
    std::vector<std::thread> others;
    for (size_t i = 1; i < context->threads; i++) others.emplace_back(work);
    work();
    for (auto& other : others) other.join();
    return nullptr;
}
OrtStatus* constant_input(const OrtKernelInfo*, size_t, int* is_constant, const OrtValue**) {
    *is_constant = 0;
    return nullptr;
}
void unknown_slot() { fail("the library calls a function of OrtApi that is not here"); }

const OrtApi* api(uint32_t) {
    static const OrtApi table = [] {
        OrtApi made;
        for (auto& slot : made.slots) slot = unknown_slot;
        auto set = [&](int slot, auto* function) {
            made.slots[slot] = reinterpret_cast<OrtAnyFunction>(function);
        };
        set(0, create_status);
        set(26, create_domain);
        set(27, add_op);
        set(28, add_domain);
        set(51, mutable_data);
        set(60, element_type);
        set(61, dimensions_count);
        set(62, dimensions);
        set(65, type_and_shape);
        set(85, float_attribute);
        set(86, int_attribute);
        set(90, input);
        set(91, output);
        set(93, release_status);
        set(99, release_info);
        set(230, input_count);
        set(232, input_name);
        set(244, node_name);
        set(249, constant_input);
        set(274, parallel_for);
        return made;
    }();
    return &table;
}

void* library = nullptr;
template <class Function>
Function* symbol(const char* name) {
    void* address = dlsym(library, name);
    if (address == nullptr) fail(dlerror());
    return reinterpret_cast<Function*>(address);
}
const char* last_error() { return symbol<decltype(llmpack_ops_last_error)>("llmpack_ops_last_error")(); }

std::string taken(OrtStatus* status) {
    if (status == nullptr) return {};
    std::string message = status->message;
    delete status;
    return message;
}

// run: operator, node, integer and float attributes, inputs (one that is missing: the type 0 alone), number
// of outputs, threads -> outputs, and all inputs that are there as they are afterwards.
void run() {
    const std::string name = read_string();
    OrtKernelInfo info;
    info.name = read_string();
    for (auto n = read<uint64_t>(); n > 0; n--) {
        const std::string key = read_string();
        info.ints[key] = read<int64_t>();
    }
    for (auto n = read<uint64_t>(); n > 0; n--) {
        const std::string key = read_string();
        info.floats[key] = static_cast<float>(read<double>());
    }
    OrtKernelContext context;
    context.inputs.resize(read<uint64_t>());
    for (OrtValue& value : context.inputs) {
        value.info.type = static_cast<int>(read<uint64_t>());
        info.inputs.push_back(value.info.type != 0);
        if (value.info.type == 0) continue;
        value.info.shape.resize(read<uint64_t>());
        for (int64_t& size : value.info.shape) size = read<int64_t>();
        value.data = read_guarded();
    }
    context.outputs.resize(read<uint64_t>());
    context.threads = read<uint64_t>();

    const OrtCustomOp* op = registered->ops[name];
    if (op == nullptr) fail("no such operator");
    void* kernel = nullptr;
    std::string message = taken(op->CreateKernelV2(op, api(0), &info, &kernel));
    if (message.empty()) {
        message = taken(op->KernelComputeV2(kernel, &context));
        op->KernelDestroy(kernel);
    }
    write_string(message);
    if (!message.empty()) return;
    for (const OrtValue& value : context.outputs) {
        write_bytes(value.info.shape.data(), value.info.shape.size() * sizeof(int64_t));
        write_bytes(value.data->data(), value.data->size());
    }
    for (const OrtValue& value : context.inputs) {
        if (value.data) write_bytes(value.data->data(), value.data->size());
    }
}

// pack: the members of LlmpackRows in order, its arrays as bytes -> code, weight, scales.
void pack() {
    LlmpackRows rows{};
    rows.struct_size = sizeof(rows);
    for (int32_t* member : {&rows.source_type, &rows.storage, &rows.group_size})
        *member = static_cast<int32_t>(read<int64_t>());
    for (int64_t* member : {&rows.num_rows, &rows.num_columns, &rows.row_stride, &rows.num_tiles})
        *member = read<int64_t>();
    const auto source = read_guarded(), candidates = read_guarded(), weight = read_guarded(),
               scales = read_guarded();
    rows.rows = source->data();
    rows.candidates = reinterpret_cast<const float*>(candidates->data());
    rows.num_candidates = static_cast<int64_t>(candidates->size() / sizeof(float));
    rows.weight = weight->data();
    rows.scales = scales->size() > 0 ? reinterpret_cast<uint16_t*>(scales->data()) : nullptr;
    const int code = symbol<decltype(llmpack_ops_pack_rows)>("llmpack_ops_pack_rows")(&rows);
    write_string("");
    write_string(std::to_string(code));
    write_bytes(weight->data(), weight->size());
    write_bytes(scales->data(), scales->size());
}

// product: storage, group_size, num_tiles, num_columns, weight, scales, x -> code, y.
void product() {
    LlmpackProduct args{};
    args.struct_size = sizeof(args);
    args.storage = static_cast<int32_t>(read<int64_t>());
    args.group_size = static_cast<int32_t>(read<int64_t>());
    args.num_tiles = read<int64_t>();
    args.num_columns = read<int64_t>();
    const auto weight = read_guarded(), scales = read_guarded(), x = read_guarded();
    Guarded y(static_cast<size_t>(args.num_tiles) * 16 * 8 * sizeof(double));
    args.weight = weight->data();
    args.scales = scales->size() > 0 ? reinterpret_cast<const uint16_t*>(scales->data()) : nullptr;
    args.x = reinterpret_cast<const double*>(x->data());
    args.y = reinterpret_cast<double*>(y.data());
    const int code = symbol<decltype(llmpack_ops_packed_product)>("llmpack_ops_packed_product")(&args);
    write_string("");
    write_string(std::to_string(code));
    write_bytes(y.data(), y.size());
}

// MPI between the processes of `ranks`: each writes what it sends into memory that all see, waits for the
// others, and reads what is meant for it.
struct Exchange {
    static constexpr size_t kMost = 1 << 16;  // bytes that a rank sends
    std::atomic<uint32_t> arrived;
    struct {
        char bytes[kMost];
    } sent[8];
};
Exchange* exchange = nullptr;
int this_rank = 0, all_ranks = 0;

void wait_for_all() {
    static uint32_t target = 0;
    target += static_cast<uint32_t>(all_ranks);
    exchange->arrived++;
    while (exchange->arrived.load() < target) usleep(200);
}
int all_gather(const void* send, int count, intptr_t, void* receive, int, intptr_t, intptr_t) {
    const size_t bytes = static_cast<size_t>(count);
    if (bytes > Exchange::kMost) return 1;
    std::memcpy(exchange->sent[this_rank].bytes, send, bytes);
    wait_for_all();
    for (int rank = 0; rank < all_ranks; rank++) {
        std::memcpy(static_cast<char*>(receive) + static_cast<size_t>(rank) * bytes,
                    exchange->sent[rank].bytes, bytes);
    }
    wait_for_all();
    return 0;
}
int all_to_all(const void* send, int count, intptr_t, void* receive, int, intptr_t, intptr_t) {
    const size_t bytes = static_cast<size_t>(count), all = bytes * static_cast<size_t>(all_ranks);
    if (all > Exchange::kMost) return 1;
    std::memcpy(exchange->sent[this_rank].bytes, send, all);
    wait_for_all();
    for (int rank = 0; rank < all_ranks; rank++) {
        std::memcpy(static_cast<char*>(receive) + static_cast<size_t>(rank) * bytes,
                    exchange->sent[rank].bytes + static_cast<size_t>(this_rank) * bytes, bytes);
    }
    wait_for_all();
    return 0;
}
int error_string(int, char* text, int* length) {
    std::strcpy(text, "exchange failed");
    *length = static_cast<int>(std::strlen(text));
    return 0;
}

// One rank; its results go to memory that the parent sees. Returns an exit status.
int be_rank(bool shares_memory, const float* x, size_t n, float* y, float* gathered) {
    LlmpackCommunicator comm{};
    comm.struct_size = sizeof(comm);
    comm.rank = this_rank;
    comm.size = all_ranks;
    comm.allgather = reinterpret_cast<void*>(all_gather);
    comm.alltoall = reinterpret_cast<void*>(all_to_all);
    comm.error_string = reinterpret_cast<void*>(error_string);
    auto check = [](int code) {
        if (code == 0) return;
        std::fprintf(stderr, "rank %d: %s\n", this_rank, last_error());
        std::_Exit(1);
    };
    check(symbol<decltype(llmpack_ops_set_communicator)>("llmpack_ops_set_communicator")(&comm));
    if (shares_memory) check(symbol<decltype(llmpack_ops_share_memory)>("llmpack_ops_share_memory")());
    const char* transport = symbol<decltype(llmpack_ops_transport)>("llmpack_ops_transport")();
    if (std::strcmp(transport, shares_memory ? "shared-memory" : "mpi") != 0) return 2;
    const auto length = static_cast<int64_t>(n);
    // Several times: buffers and marks alternate.
    for (int i = 0; i < 5; i++)
        check(symbol<decltype(llmpack_ops_all_reduce)>("llmpack_ops_all_reduce")(x, y, length));
    check(symbol<decltype(llmpack_ops_all_gather)>("llmpack_ops_all_gather")(x, gathered, 1, length,
                                                                             length * all_ranks));
    return 0;
}

// ranks: number, whether they share memory, x [number, n] -> y [number, n], gathered [number, number * n].
void ranks() {
    all_ranks = static_cast<int>(read<uint64_t>());
    const bool shares_memory = read<uint64_t>() != 0;
    const auto x = read_guarded();
    const size_t size = static_cast<size_t>(all_ranks), n = x->size() / sizeof(float) / size;
    const size_t y_bytes = x->size(), gathered_bytes = size * x->size();
    const size_t bytes = sizeof(Exchange) + y_bytes + gathered_bytes;
    char* memory =
        static_cast<char*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    if (memory == MAP_FAILED) fail("no memory");
    exchange = reinterpret_cast<Exchange*>(memory);
    float* y = reinterpret_cast<float*>(memory + sizeof(Exchange));
    float* gathered = y + size * n;
    std::vector<pid_t> processes;
    std::fflush(stdout);
    for (this_rank = 0; this_rank < all_ranks; this_rank++) {
        const pid_t process = fork();
        if (process == 0) {
            const size_t rank = static_cast<size_t>(this_rank);
            const float* own = reinterpret_cast<const float*>(x->data()) + rank * n;
            std::_Exit(be_rank(shares_memory, own, n, y + rank * n, gathered + rank * size * n));
        }
        processes.push_back(process);
    }
    std::string trouble;
    for (const pid_t process : processes) {
        int status = 0;
        waitpid(process, &status, 0);
        if (status != 0) trouble = "a rank ended with status " + std::to_string(status);
    }
    write_string(trouble);
    write_bytes(y, y_bytes);
    write_bytes(gathered, gathered_bytes);
    munmap(memory, bytes);
}

}  // namespace

int main(int argc, char** argv) {
    library = argc == 2 ? dlopen(argv[1], RTLD_NOW | RTLD_LOCAL) : nullptr;
    if (library == nullptr) fail(argc == 2 ? dlerror() : "expected the path of libllmpack_ops.so");
    static const OrtApiBase base = {api, [] { return "emulated"; }};
    auto* add = symbol<OrtStatus*(OrtSessionOptions*, const OrtApiBase*)>("RegisterCustomOps");
    if (add(nullptr, &base) != nullptr || registered == nullptr) fail("RegisterCustomOps failed");
    for (;;) {
        const std::string what = read_string();
        if (what == "run") {
            run();
        } else if (what == "pack") {
            pack();
        } else if (what == "product") {
            product();
        } else if (what == "ranks") {
            ranks();
        } else if (what == "isa") {
            write_string("");
            write_string(symbol<decltype(llmpack_ops_isa)>("llmpack_ops_isa")());
        } else if (what == "set_isa") {
            const std::string name = read_string();
            const int code = symbol<decltype(llmpack_ops_set_isa)>("llmpack_ops_set_isa")(name.c_str());
            write_string(code == 0 ? "" : last_error());
        } else {
            fail("no such request");
        }
        std::fflush(stdout);
    }
}
