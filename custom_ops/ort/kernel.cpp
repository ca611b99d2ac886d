#include "ort/kernel.h"

#include <algorithm>
#include <atomic>
#include <cstdio>

namespace llmpack::ort {

namespace {

const char* type_name(int type) {
    switch (type) {
        case kFloat:
            return "float32";
        case kUInt8:
            return "uint8";
        case kInt32:
            return "int32";
        case kFloat16:
            return "float16";
        default:
            return "another type";
    }
}

// Throws what() if the status is a failure; the sentence is made only then.
template <class What>
void require(const OrtApi& api, OrtStatus* status, const What& what) {
    if (status == nullptr) return;
    ReleaseStatus(api, status);
    throw OpError(what());
}

// Throws if an optional attribute is there after all, as a number of another type: none is passed over.
void refuse(const OrtApi& api, OrtStatus* status, const char* name, const char* found, const char* expected) {
    if (status == nullptr)
        throw OpError(std::string("attribute ") + name + " is " + found + ", expected " + expected);
    ReleaseStatus(api, status);
}

int64_t checked_size(const char* name, int64_t value) {
    if (value >= 1 && value <= kMaxSize) return value;
    throw OpError(std::string("attribute ") + name + " is " + std::to_string(value) + ", expected " +
                  (value < 1 ? "a positive number" : "at most " + std::to_string(kMaxSize)));
}

std::atomic<bool> has_shape_references{false};

// rank is above Shape::kMaxRank if the tensor has more axes than a Shape holds; then sizes are not read.
OrtStatus* read_type_and_shape(const OrtApi& api, const OrtValue* value, int& type, Shape& shape) {
    if (has_shape_references.load(std::memory_order_relaxed)) {
        const int64_t* sizes = nullptr;
        OrtStatus* status = GetTensorElementTypeAndShapeDataReference(api, value, &type, &sizes, &shape.rank);
        if (status == nullptr && shape.rank <= Shape::kMaxRank) std::copy_n(sizes, shape.rank, shape.sizes);
        return status;
    }
    OrtTensorTypeAndShapeInfo* info = nullptr;
    if (OrtStatus* status = GetTensorTypeAndShape(api, value, &info)) return status;
    OrtStatus* status = GetTensorElementType(api, info, &type);
    if (status == nullptr) status = GetDimensionsCount(api, info, &shape.rank);
    if (status == nullptr && shape.rank <= Shape::kMaxRank)
        status = GetDimensions(api, info, shape.sizes, shape.rank);
    ReleaseTensorTypeAndShapeInfo(api, info);
    return status;
}

// The tensor that an input is. Throws if it is none, or not what the port takes.
Tensor tensor_of(const OrtApi& api, const OrtValue* value, const Port& port) {
    Tensor tensor{port.name, kAny, {}, nullptr};
    const auto unreadable = [&] {
        return std::string("input ") + port.name + " is missing or no tensor, expected a tensor";
    };
    if (value == nullptr) throw OpError(unreadable());
    int type = 0;
    require(api, read_type_and_shape(api, value, type, tensor.shape), unreadable);
    if (tensor.shape.rank > Shape::kMaxRank) {
        throw OpError(std::string("input ") + port.name + " has " + std::to_string(tensor.shape.rank) +
                      " axes, expected at most " + std::to_string(Shape::kMaxRank));
    }
    if (port.type != kAny && type != port.type) {
        throw OpError(std::string("input ") + port.name + " is of " + type_name(type) + ", expected " +
                      type_name(port.type));
    }
    tensor.type = static_cast<ElementType>(type);
    // The C ABI has one accessor, for mutable data. Only PagedAttention writes through it, to its caches.
    require(api, GetTensorMutableData(api, const_cast<OrtValue*>(value), &tensor.data), unreadable);
    return tensor;
}

}  // namespace

void set_release(const char* version) {
    int release = 0;
    has_shape_references = version != nullptr && std::sscanf(version, "1.%d.", &release) == 1 &&
                           release >= kTypeAndShapeReferenceRelease;
}

std::string shape_string(const int64_t* sizes, size_t rank) {
    std::string text = "[";
    for (size_t i = 0; i < rank; i++) {
        if (i > 0) text += ", ";
        text += sizes[i] == kAnySize ? "any" : std::to_string(sizes[i]);
    }
    return text + "]";
}

int64_t NodeInfo::int_attribute(const char* name) const {
    int64_t value = 0;
    require(api_, KernelInfoGetAttribute_int64(api_, info_, name, &value), [&] {
        return std::string("attribute ") + name + " is missing or no integer, expected an integer";
    });
    return value;
}

int64_t NodeInfo::int_attribute(const char* name, int64_t otherwise) const {
    int64_t value = 0;
    OrtStatus* missing = KernelInfoGetAttribute_int64(api_, info_, name, &value);
    if (missing == nullptr) return value;
    ReleaseStatus(api_, missing);
    float wrong = 0;
    refuse(api_, KernelInfoGetAttribute_float(api_, info_, name, &wrong), name, "a float", "an integer");
    return otherwise;
}

float NodeInfo::float_attribute(const char* name) const {
    float value = 0;
    require(api_, KernelInfoGetAttribute_float(api_, info_, name, &value),
            [&] { return std::string("attribute ") + name + " is missing or no float, expected a float"; });
    return value;
}

std::optional<float> NodeInfo::optional_float_attribute(const char* name) const {
    float value = 0;
    OrtStatus* missing = KernelInfoGetAttribute_float(api_, info_, name, &value);
    if (missing == nullptr) return value;
    ReleaseStatus(api_, missing);
    int64_t wrong = 0;
    refuse(api_, KernelInfoGetAttribute_int64(api_, info_, name, &wrong), name, "an integer", "a float");
    return std::nullopt;
}

int64_t NodeInfo::size_attribute(const char* name) const { return checked_size(name, int_attribute(name)); }

int64_t NodeInfo::size_attribute(const char* name, int64_t otherwise) const {
    return checked_size(name, int_attribute(name, otherwise));
}

void NodeInfo::expect_no_constant(size_t index) const {
    if (!constant_input(index)) return;
    throw OpError(std::string("input ") + inputs_[index].name +
                  " is an initializer, expected an input of the graph: the operator writes into it");
}

bool NodeInfo::has_input(size_t index) const {
    size_t count = 0;
    require(api_, KernelInfo_GetInputCount(api_, info_, &count),
            [] { return "ONNX Runtime does not say how many inputs the node has, expected their number"; });
    if (index >= count) return false;
    size_t size = 0;  // with the zero at the end
    require(api_, KernelInfo_GetInputName(api_, info_, index, static_cast<char*>(nullptr), &size), [&] {
        return std::string("ONNX Runtime does not say what the node's input ") + inputs_[index].name +
               " is, expected its name";
    });
    return size > 1;
}

std::optional<Tensor> NodeInfo::constant_input(size_t index) const {
    int is_constant = 0;
    const OrtValue* value = nullptr;
    if (OrtStatus* status = KernelInfoGetConstantInput_tensor(api_, info_, index, &is_constant, &value)) {
        ReleaseStatus(api_, status);
        return std::nullopt;
    }
    if (is_constant == 0) return std::nullopt;
    return tensor_of(api_, value, inputs_[index]);
}

std::string NodeInfo::name() const {
    size_t size = 0;  // with the zero at the end
    if (OrtStatus* status = KernelInfo_GetNodeName(api_, info_, static_cast<char*>(nullptr), &size)) {
        ReleaseStatus(api_, status);
        return {};
    }
    std::string name(size, '\0');
    if (OrtStatus* status = KernelInfo_GetNodeName(api_, info_, name.data(), &size)) {
        ReleaseStatus(api_, status);
        return {};
    }
    name.resize(size > 0 ? size - 1 : 0);
    return name;
}

void Tensor::expect_shape(std::initializer_list<int64_t> expected,
                          std::initializer_list<const char*> meaning) const {
    bool equal = expected.size() == shape.rank;
    size_t i = 0;
    for (int64_t size : expected) {
        equal = equal && (size == kAnySize || size == shape[i]);
        i++;
    }
    if (equal) return;
    std::string message = std::string("input ") + name + " has shape " +
                          shape_string(shape.sizes, shape.rank) + ", expected " +
                          shape_string(expected.begin(), expected.size()) + " = ";
    for (const char* part : meaning) message += part;
    throw OpError(message);
}

Tensor Context::input(size_t index) const {
    const OrtValue* value = nullptr;
    require(api_, KernelContext_GetInput(api_, context_, index, &value), [&] {
        return std::string("input ") + inputs_[index].name + " is missing or no tensor, expected a tensor";
    });
    return tensor_of(api_, value, inputs_[index]);
}

void* Context::output_memory(size_t index, std::initializer_list<int64_t> shape) {
    OrtValue* value = nullptr;
    void* data = nullptr;
    auto what = [&] {
        return "output " + std::to_string(index) + " of shape " + shape_string(shape.begin(), shape.size()) +
               " cannot be made, expected memory for it";
    };
    require(api_, KernelContext_GetOutput(api_, context_, index, shape.begin(), shape.size(), &value), what);
    require(api_, GetTensorMutableData(api_, value, &data), what);
    return data;
}

void* Context::gpu_stream() const {
    void* stream = nullptr;
    require(api_, KernelContext_GetGPUComputeStream(api_, context_, &stream),
            [] { return "ONNX Runtime gives no compute stream, expected that of a GPU's provider"; });
    return stream;
}

std::string profile_name(const char* op, const std::string& node) {
    std::string name = op;
    if (node.empty()) return name;
    name += " " + node;
    const std::string layer = "/layers.";
    const size_t at = name.find(layer);
    if (at == std::string::npos) return name;
    const size_t number = at + layer.size();
    const size_t end = std::min(name.find('/', number), name.size());
    return name.replace(number, end - number, "*");
}

namespace {

thread_local std::shared_ptr<ThreadTeam> used_threads;

}  // namespace

void use_threads(std::shared_ptr<ThreadTeam> threads) { used_threads = std::move(threads); }

std::shared_ptr<ThreadTeam> threads_in_use() { return used_threads; }

void Context::parallel_for_each(void (*function)(void*, size_t) noexcept, size_t total,
                                void* user_data) const {
    require(api_, KernelContext_ParallelFor(api_, context_, function, total, size_t{0}, user_data),
            [] { return "the thread pool refused a parallel loop, expected it to run"; });
}

OrtStatus* to_status(const OrtApi& api, const char* op, const std::string& node,
                     const std::exception& error) {
    const OpError* op_error = dynamic_cast<const OpError*>(&error);
    std::string message = op;
    if (!node.empty()) message += " '" + node + "'";
    message += std::string(": ") + error.what() + ".";
    return CreateStatus(api, static_cast<int>(op_error != nullptr ? op_error->code : kFail), message.c_str());
}

}  // namespace llmpack::ort
