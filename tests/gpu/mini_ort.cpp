// The part of ONNX Runtime that a GPU's operators call, so that they run without a GPU build of it: tensors that say
// where they lie, nodes with attributes, a stream. `Plan` is a list of calls that is run again and again; a graph of
// the driver may capture it. Slots as in custom_ops/ort/abi.h.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "ort/abi.h"

struct OrtStatus {
    std::string message;
};
struct OrtCustomOpDomain {
    std::vector<const OrtCustomOp*> ops;
};
struct OrtSessionOptions {
    std::vector<OrtCustomOpDomain*> domains;
};
struct OrtKernelInfo {
    std::string name;
    std::map<std::string, int64_t> integers;
    std::map<std::string, float> floats;
    size_t num_inputs = 0;
    uint64_t missing = 0;  // a bit for each
};
struct OrtValue {
    int type = 0;
    std::vector<int64_t> shape;
    void* data = nullptr;
};
struct OrtTensorTypeAndShapeInfo {
    OrtValue value;
};
struct OrtKernelContext {
    std::vector<OrtValue*> inputs, outputs;
    void* stream = nullptr;
    std::string trouble;
};

namespace {

std::string error;

OrtStatus* status(const std::string& message) { return new OrtStatus{message}; }

OrtApi make_api() {
    OrtApi api{};
    auto set = [&](int slot, auto function) { api.slots[slot] = reinterpret_cast<OrtAnyFunction>(function); };
    set(0, +[](int, const char* message) -> OrtStatus* { return status(message); });
    set(26, +[](const char*, OrtCustomOpDomain** out) -> OrtStatus* { return *out = new OrtCustomOpDomain, nullptr; });
    set(27, +[](OrtCustomOpDomain* domain, const OrtCustomOp* op) -> OrtStatus* {
        domain->ops.push_back(op);
        return nullptr;
    });
    set(28, +[](OrtSessionOptions* options, OrtCustomOpDomain* domain) -> OrtStatus* {
        options->domains.push_back(domain);
        return nullptr;
    });
    set(51, +[](OrtValue* value, void** out) -> OrtStatus* { return *out = value->data, nullptr; });
    set(60, +[](const OrtTensorTypeAndShapeInfo* info, int* out) -> OrtStatus* { return *out = info->value.type, nullptr; });
    set(61, +[](const OrtTensorTypeAndShapeInfo* info, size_t* out) -> OrtStatus* {
        return *out = info->value.shape.size(), nullptr;
    });
    set(62, +[](const OrtTensorTypeAndShapeInfo* info, int64_t* dims, size_t count) -> OrtStatus* {
        std::memcpy(dims, info->value.shape.data(), count * sizeof(int64_t));
        return nullptr;
    });
    set(65, +[](const OrtValue* value, OrtTensorTypeAndShapeInfo** out) -> OrtStatus* {
        return *out = new OrtTensorTypeAndShapeInfo{*value}, nullptr;
    });
    set(85, +[](const OrtKernelInfo* info, const char* name, float* out) -> OrtStatus* {
        const auto found = info->floats.find(name);
        if (found == info->floats.end()) return status("no float attribute");
        return *out = found->second, nullptr;
    });
    set(86, +[](const OrtKernelInfo* info, const char* name, int64_t* out) -> OrtStatus* {
        const auto found = info->integers.find(name);
        if (found == info->integers.end()) return status("no integer attribute");
        return *out = found->second, nullptr;
    });
    set(90, +[](const OrtKernelContext* context, size_t index, const OrtValue** out) -> OrtStatus* {
        *out = index < context->inputs.size() ? context->inputs[index] : nullptr;
        return nullptr;
    });
    set(91, +[](OrtKernelContext* context, size_t index, const int64_t* dims, size_t count, OrtValue** out) -> OrtStatus* {
        if (index >= context->outputs.size()) return status("no such output");
        OrtValue* value = context->outputs[index];
        if (std::vector<int64_t>(dims, dims + count) != value->shape) {
            context->trouble = "output " + std::to_string(index) + " has another shape than the graph's";
            return status(context->trouble);
        }
        return *out = value, nullptr;
    });
    set(93, +[](OrtStatus* done) { delete done; });
    set(99, +[](OrtTensorTypeAndShapeInfo* info) { delete info; });
    set(193, +[](const OrtKernelContext* context, void** out) -> OrtStatus* { return *out = context->stream, nullptr; });
    set(230, +[](const OrtKernelInfo* info, size_t* out) -> OrtStatus* { return *out = info->num_inputs, nullptr; });
    set(232, +[](const OrtKernelInfo* info, size_t index, char* out, size_t* size) -> OrtStatus* {
        const char* name = (info->missing >> index & 1) != 0 ? "" : "input";
        if (out != nullptr) std::strcpy(out, name);
        return *size = std::strlen(name) + 1, nullptr;
    });
    set(244, +[](const OrtKernelInfo* info, char* out, size_t* size) -> OrtStatus* {
        if (out != nullptr) std::memcpy(out, info->name.c_str(), info->name.size() + 1);
        return *size = info->name.size() + 1, nullptr;
    });
    // What a test gives as integer attribute constant_input is the index of the one input that is an initializer.
    set(249, +[](const OrtKernelInfo* info, size_t index, int* is_constant, const OrtValue** out) -> OrtStatus* {
        static const OrtValue empty{10, {0}, nullptr};  // float16
        const auto found = info->integers.find("constant_input");
        *is_constant = found != info->integers.end() && found->second == static_cast<int64_t>(index);
        return *out = *is_constant != 0 ? &empty : nullptr, nullptr;
    });
    return api;
}

const OrtApi& api() {
    static const OrtApi table = make_api();
    return table;
}

OrtSessionOptions& session() {
    static OrtSessionOptions options;
    return options;
}

struct Node {
    const OrtCustomOp* op;
    OrtKernelInfo info;
    void* kernel = nullptr;
    ~Node() {
        if (kernel != nullptr) op->KernelDestroy(kernel);
    }
};
struct Plan {
    struct Call {
        Node* node;
        OrtKernelContext context;
    };
    std::vector<std::unique_ptr<OrtValue>> values;
    std::vector<Call> calls;
};

// The thread's last error of HIP: the provider for ROCm asks after every node, and takes any for the node's.
int hip_error() {
    using Ask = int (*)();
    static const Ask ask = [] {
        void* library = dlopen("libamdhip64.so.7", RTLD_NOW | RTLD_NOLOAD);
        if (library == nullptr) library = dlopen("libamdhip64.so.6", RTLD_NOW | RTLD_NOLOAD);
        return library == nullptr ? nullptr : reinterpret_cast<Ask>(dlsym(library, "hipGetLastError"));
    }();
    return ask == nullptr ? 0 : ask();
}

int failed(OrtStatus* status) {
    if (status == nullptr) return 0;
    error = status->message;
    delete status;
    return -1;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT const char* mini_error() { return error.c_str(); }

EXPORT int mini_load(const char* path) {
    void* library = dlopen(path, RTLD_NOW);
    if (library == nullptr) return error = dlerror(), -1;
    using Register = OrtStatus* (*)(OrtSessionOptions*, const OrtApiBase*);
    const auto register_ops = reinterpret_cast<Register>(dlsym(library, "RegisterCustomOps"));
    static const OrtApiBase base{+[](uint32_t version) { return version <= 22 ? &api() : nullptr; },
                                 +[] { return "1.22.0"; }};
    return failed(register_ops(&session(), &base));
}

// Names of attributes, with integer values where `is_integer`, else floats. num_inputs: 0 for those that every node has;
// missing: a bit for each of them whose name is empty.
EXPORT Node* mini_node(const char* op, const char* provider, const char* name, int num_inputs, uint64_t missing,
                       int count, const char** names, const int* is_integer, const double* values) {
    for (const OrtCustomOpDomain* domain : session().domains) {
        for (const OrtCustomOp* candidate : domain->ops) {
            if (std::strcmp(candidate->GetName(candidate), op) != 0 ||
                std::strcmp(candidate->GetExecutionProviderType(candidate), provider) != 0) {
                continue;
            }
            auto node = std::make_unique<Node>();
            node->op = candidate;
            node->info.name = name;
            node->info.num_inputs = static_cast<size_t>(num_inputs);
            node->info.missing = missing;
            for (size_t i = 0; num_inputs == 0 && i < candidate->GetInputTypeCount(candidate); i++) {
                node->info.num_inputs += candidate->GetInputCharacteristic(candidate, i) == 0;
            }
            for (int i = 0; i < count; i++) {
                if (is_integer[i] != 0) {
                    node->info.integers[names[i]] = static_cast<int64_t>(values[i]);
                } else {
                    node->info.floats[names[i]] = static_cast<float>(values[i]);
                }
            }
            if (failed(candidate->CreateKernelV2(candidate, &api(), &node->info, &node->kernel)) != 0) return nullptr;
            return node.release();
        }
    }
    error = std::string(op) + " is not registered for " + provider;
    return nullptr;
}
EXPORT void mini_node_free(Node* node) { delete node; }
EXPORT int mini_counts(const Node* node, int what) {  // 0: inputs, 1: outputs; types of an input 100 + i, an output 200 + i
    const OrtCustomOp* op = node->op;
    if (what == 0) return static_cast<int>(node->info.num_inputs);
    if (what == 1) return static_cast<int>(op->GetOutputTypeCount(op));
    return what >= 200 ? op->GetOutputType(op, static_cast<size_t>(what - 200))
                       : op->GetInputType(op, static_cast<size_t>(what - 100));
}

EXPORT Plan* mini_plan() { return new Plan; }
EXPORT void mini_plan_free(Plan* plan) { delete plan; }
EXPORT int mini_plan_value(Plan* plan, int type, int rank, const int64_t* dims, void* data) {
    plan->values.push_back(std::make_unique<OrtValue>(OrtValue{type, {dims, dims + rank}, data}));
    return static_cast<int>(plan->values.size()) - 1;
}
// The number of an input that is missing is negative.
EXPORT void mini_plan_call(Plan* plan, Node* node, int num_inputs, const int* inputs, int num_outputs,
                           const int* outputs) {
    Plan::Call call{node, {}};
    for (int i = 0; i < num_inputs; i++) {
        call.context.inputs.push_back(inputs[i] < 0 ? nullptr : plan->values[static_cast<size_t>(inputs[i])].get());
    }
    for (int i = 0; i < num_outputs; i++) {
        call.context.outputs.push_back(plan->values[static_cast<size_t>(outputs[i])].get());
    }
    plan->calls.push_back(std::move(call));
}
// Runs calls [first, last).
EXPORT int mini_plan_run(Plan* plan, int first, int last, void* stream) {
    for (int i = first; i < last; i++) {
        Plan::Call& call = plan->calls[static_cast<size_t>(i)];
        call.context.stream = stream;
        if (failed(call.node->op->KernelComputeV2(call.node->kernel, &call.context)) != 0) return -1;
        if (const int code = hip_error()) {
            error = call.node->info.name + ": HIP error " + std::to_string(code);
            return -1;
        }
    }
    return 0;
}
