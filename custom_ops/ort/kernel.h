// What a kernel's glue needs from ONNX Runtime: attributes, checked tensors, parallel loops; and the template
// that turns a description of an operator into an OrtCustomOp.
//
// A description is a class:
//
//   struct RMSNorm {
//       static constexpr const char* kName = "RMSNorm";
//       static constexpr Port kInputs[] = {{"x", kFloat}, {"weight", kFloat}};
//       static constexpr Port kOutputs[] = {{"y", kFloat}};
//       // Optional: an input and the output that may share its memory.
//       static constexpr InPlace kInPlace[] = {{0, 0}};
//       explicit RMSNorm(const NodeInfo& node);  // reads attributes, throws OpError
//       void compute(Context& context) const;    // checks shapes, runs the kernel, throws OpError
//   };
#ifndef LLMPACK_ORT_KERNEL_H_
#define LLMPACK_ORT_KERNEL_H_

#include <algorithm>
#include <initializer_list>
#include <iterator>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "cpu/isa.h"
#include "cpu/threads.h"
#include "ort/abi.h"
#include "ort/profile.h"

namespace llmpack::ort {

struct Port {
    const char* name;
    ElementType type;
    bool is_on_host =
        false;  // an input of a GPU's operator that the host reads: small, and no copy is captured
    bool is_optional = false;  // an input that a node may lack
};

struct InPlace {
    int input, output;
};

// An error of the caller, the graph or a peer; becomes an OrtStatus. The message is one sentence without the
// operator's name.
class OpError : public std::runtime_error {
  public:
    explicit OpError(const std::string& message, ErrorCode code = kInvalidArgument)
        : std::runtime_error(message), code(code) {}
    const ErrorCode code;
};

// Sizes of a tensor's axes, outermost first. On the stack: a kernel reads several at each call.
class Shape {
  public:
    static constexpr size_t kMaxRank = 8;  // no operator takes more than four axes
    size_t rank = 0;
    int64_t sizes[kMaxRank] = {};
    int64_t operator[](size_t axis) const { return sizes[axis]; }
};

// An axis of any size. Nothing computed of sizes equals it: they are not negative, and those that attributes
// give are at most kMaxSize, so that no product of them wraps around.
constexpr int64_t kAnySize = std::numeric_limits<int64_t>::min();
constexpr int64_t kMaxSize = std::numeric_limits<int32_t>::max();

// "[2, 64]"
std::string shape_string(const int64_t* sizes, size_t rank);

struct Tensor {
    const char* name;  // of the operator's input
    ElementType type;
    Shape shape;
    void* data;

    template <class T>
    T* as() const {
        return static_cast<T*>(data);
    }
    // Throws "input weight has shape [..], expected [..]". kAnySize accepts any size.
    void expect_shape(std::initializer_list<int64_t> expected, const char* meaning) const {
        expect_shape(expected, {meaning});
    }
    // The same with a meaning in parts.
    void expect_shape(std::initializer_list<int64_t> expected,
                      std::initializer_list<const char*> meaning) const;
};

class NodeInfo {
  public:
    NodeInfo(const OrtApi& api, const OrtKernelInfo* info, const Port* inputs)
        : api_(api), info_(info), inputs_(inputs) {}
    // Attributes are required: the packager writes every one.
    int64_t int_attribute(const char* name) const;
    // The same, or `otherwise` where there is no such integer: what graphs of older versions lack.
    int64_t int_attribute(const char* name, int64_t otherwise) const;
    float float_attribute(const char* name) const;
    // Null where there is no such float.
    std::optional<float> optional_float_attribute(const char* name) const;
    // Throws OpError unless it is from 1 to kMaxSize.
    int64_t size_attribute(const char* name) const;
    // The same, or `otherwise`, as above.
    int64_t size_attribute(const char* name, int64_t otherwise) const;
    // Throws OpError if input `index`, into which the operator writes, is an initializer: that is read-only,
    // or other nodes and later runs take it for a constant. Of an initializer that is an input of the graph
    // as well, or lies behind an Unsqueeze, ONNX Runtime says nothing: llmrun's graph_check.py refuses those.
    void expect_no_constant(size_t index) const;
    // Whether the node has input `index`, which is optional: of one that is missing before another the name
    // is empty.
    bool has_input(size_t index) const;
    // Input `index` if it is an initializer: the memory that each call will get.
    std::optional<Tensor> constant_input(size_t index) const;
    std::string name() const;

  private:
    const OrtApi& api_;
    const OrtKernelInfo* info_;
    const Port* inputs_;
};

class Context {
  public:
    // kernels: of the instruction set that was chosen when the node was made. threads: null for those of ONNX
    // Runtime.
    Context(const OrtApi& api, OrtKernelContext* context, const Port* inputs, const Kernels& kernels,
            ThreadTeam* threads, ProfileScope& profile)
        : kernels(kernels),
          profile(profile),
          api_(api),
          context_(context),
          inputs_(inputs),
          threads_(threads) {}

    const Kernels& kernels;
    ProfileScope& profile;

    // Input `index` as it lies in memory: for an initializer, the mapped file.
    Tensor input(size_t index) const;
    float* output(size_t index, std::initializer_list<int64_t> shape) {
        return static_cast<float*>(output_memory(index, shape));
    }
    void* output_memory(size_t index, std::initializer_list<int64_t> shape);
    // The stream that a GPU's provider computes on (cudaStream_t or hipStream_t).
    void* gpu_stream() const;

    // Calls body(begin, end) on disjoint ranges that cover [0, count), on the session's threads, and waits.
    // `grain` items are worth one call. If body throws, the process ends at once: what may fail comes before
    // the loop, memory too.
    template <class Body>
    void parallel_for(int64_t count, int64_t grain, const Body& body) const {
        static_assert(std::is_invocable_v<const Body&, int64_t, int64_t>, "body(begin, end)");
        parallel_for_in_places(count, grain, [&](int64_t, int64_t begin, int64_t end) { body(begin, end); });
    }

    // The same with body(place, begin, end): two calls at the same time have different places, below
    // places(count, grain).
    template <class Body>
    void parallel_for_in_places(int64_t count, int64_t grain, const Body& body) const {
        static_assert(std::is_invocable_v<const Body&, int64_t, int64_t, int64_t>, "body(place, begin, end)");
        if (count <= 0) return;
        Loop<Body> loop{body, count, 1};
        if (threads_ != nullptr) {
            threads_->run(&Loop<Body>::range, &loop, count, std::max<int64_t>(grain, 1));
            return;
        }
        loop.ranges = ranges(count, grain);
        parallel_for_each(&Loop<Body>::one_of_ranges, static_cast<size_t>(loop.ranges), &loop);
    }

    int64_t places(int64_t count, int64_t grain) const {
        return threads_ != nullptr ? threads_->number() : ranges(count, grain);
    }

  private:
    template <class Body>
    struct Loop {
        const Body& body;
        int64_t count, ranges;
        static void range(void* self, int place, int64_t begin, int64_t end) noexcept {
            static_cast<const Loop*>(self)->body(place, begin, end);
        }
        static void one_of_ranges(void* self, size_t index) noexcept {
            const Loop& loop = *static_cast<const Loop*>(self);
            const int64_t i = static_cast<int64_t>(index);
            loop.body(i, loop.count * i / loop.ranges, loop.count * (i + 1) / loop.ranges);
        }
    };
    // For ONNX Runtime's threads: more ranges than there are threads, so that one that starts late takes
    // fewer of them.
    static int64_t ranges(int64_t count, int64_t grain) {
        constexpr int64_t kMostRanges = 64;
        return std::clamp<int64_t>(grain > 1 ? count / grain : count, 1, kMostRanges);
    }
    void parallel_for_each(void (*function)(void*, size_t) noexcept, size_t total, void* user_data) const;

    const OrtApi& api_;
    OrtKernelContext* context_;
    const Port* inputs_;
    ThreadTeam* threads_;
};

// An input that usually is an initializer, and is then read once, when the kernel is made: asking ONNX
// Runtime for an input takes 0.5 us while weights pass through the caches, and a step asks hundreds of times.
class StoredInput {
  public:
    StoredInput(const NodeInfo& node, size_t index) : index_(index), tensor_(node.constant_input(index)) {}
    Tensor of(const Context& context) const { return tensor_ ? *tensor_ : context.input(index_); }

  private:
    size_t index_;
    std::optional<Tensor> tensor_;
};

// The same of an optional input.
class OptionalInput {
  public:
    OptionalInput(const NodeInfo& node, size_t index) {
        if (node.has_input(index)) stored_.emplace(node, index);
    }
    bool is_there() const { return stored_.has_value(); }
    // Null: the node has none.
    std::optional<Tensor> of(const Context& context) const {
        return stored_ ? std::optional(stored_->of(context)) : std::nullopt;
    }

  private:
    std::optional<StoredInput> stored_;
};

// Rows that are worth a call of their own in parallel_for: about 16K numbers.
inline int64_t row_grain(int64_t columns) {
    return columns >= 16384 ? 1 : 16384 / (columns < 1 ? 1 : columns);
}

// llmpack_ops_use_threads; null: those of ONNX Runtime.
void use_threads(std::shared_ptr<ThreadTeam> threads);
std::shared_ptr<ThreadTeam> threads_in_use();

// Which release of ONNX Runtime runs the operators, "1.32.0"; until told, the oldest.
void set_release(const char* version);

// Memory that a thread keeps between calls and that only grows. `Tag` tells the buffers of a thread apart.
// Throws OpError if there is none: not for bodies of loops.
template <class T, class Tag>
T* workspace(size_t count) {
    thread_local std::unique_ptr<T[]> buffer;
    thread_local size_t capacity = 0;
    if (capacity < count) {
        buffer.reset();
        capacity = 0;
        buffer.reset(new (std::nothrow) T[count]);
        if (buffer == nullptr) {
            throw OpError(std::to_string(count * sizeof(T)) +
                              " bytes to work in cannot be had, expected memory for them",
                          kFail);
        }
        capacity = count;
    }
    return buffer.get();
}

OrtStatus* to_status(const OrtApi& api, const char* op, const std::string& node, const std::exception& error);

template <class Op, class = void>
struct InPlaceOf {
    static constexpr const InPlace* pairs = nullptr;
    static constexpr size_t count = 0;
};
template <class Op>
struct InPlaceOf<Op, std::void_t<decltype(Op::kInPlace)>> {
    static constexpr const InPlace* pairs = Op::kInPlace;
    static constexpr size_t count = std::size(Op::kInPlace);
};

// Under which name an operator's time begins; its own, unless it goes on as another's.
template <class Op, class = void>
struct ProfileNameOf {
    static constexpr const char* value = Op::kName;
};
template <class Op>
struct ProfileNameOf<Op, std::void_t<decltype(Op::kProfileName)>> {
    static constexpr const char* value = Op::kProfileName;
};

constexpr const char* kCpuProvider = "CPUExecutionProvider";
constexpr const char* kCudaProvider = "CUDAExecutionProvider";
constexpr const char* kRocmProvider = "ROCMExecutionProvider";

// The OrtCustomOp of a description, for one execution provider: ONNX Runtime takes the one of the provider
// that a node is placed on. One static object each; ONNX Runtime keeps a pointer to it.
template <class Op>
struct CustomOp : OrtCustomOp {
    const char* const provider;

    struct Kernel {
        const OrtApi& api;
        std::string node;
        OpTime& time;
        const Kernels& kernels;
        const std::shared_ptr<ThreadTeam> threads;
        Op op;
    };

    explicit CustomOp(const char* provider) : OrtCustomOp{}, provider(provider) {
        version = kOrtApiVersion;
        GetName = [](const OrtCustomOp*) { return Op::kName; };
        GetExecutionProviderType = [](const OrtCustomOp* op) {
            return static_cast<const CustomOp*>(op)->provider;
        };
        GetInputType = [](const OrtCustomOp*, size_t i) -> int { return Op::kInputs[i].type; };
        GetInputTypeCount = [](const OrtCustomOp*) { return std::size(Op::kInputs); };
        GetOutputType = [](const OrtCustomOp*, size_t i) -> int { return Op::kOutputs[i].type; };
        GetOutputTypeCount = [](const OrtCustomOp*) { return std::size(Op::kOutputs); };
        // INPUT_OUTPUT_OPTIONAL or INPUT_OUTPUT_REQUIRED
        GetInputCharacteristic = [](const OrtCustomOp*, size_t i) -> int {
            return Op::kInputs[i].is_optional;
        };
        GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return 0; };
        // OrtMemTypeCPUInput, or OrtMemTypeDefault: the provider's own memory.
        GetInputMemoryType = [](const OrtCustomOp*, size_t i) { return Op::kInputs[i].is_on_host ? -2 : 0; };
        GetVariadicInputMinArity = GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 0; };
        GetVariadicInputHomogeneity = GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
        GetStartVersion = GetEndVersion = [](const OrtCustomOp*) { return 1; };
        CreateKernelV2 = create;
        KernelComputeV2 = compute;
        KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
        if constexpr (InPlaceOf<Op>::count > 0) {
            GetMayInplace = may_in_place;
            ReleaseMayInplace = [](int* inputs, int* outputs) {
                delete[] inputs;
                delete[] outputs;
            };
        }
    }

    static OrtStatus* create(const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info,
                             void** kernel) {
        NodeInfo node(*api, info, std::data(Op::kInputs));
        std::string name;
        try {
            name = node.name();
            *kernel = new Kernel{*api,
                                 name,
                                 OpTime::named(profile_name(ProfileNameOf<Op>::value, name)),
                                 kernels(),
                                 threads_in_use(),
                                 Op(node)};
            return nullptr;
        } catch (const std::exception& error) {
            return to_status(*api, Op::kName, name, error);
        }
    }

    static OrtStatus* compute(void* kernel, OrtKernelContext* ort_context) {
        const Kernel& k = *static_cast<const Kernel*>(kernel);
        ProfileScope scope(k.time);
        try {
            Context context(k.api, ort_context, std::data(Op::kInputs), k.kernels, k.threads.get(), scope);
            k.op.compute(context);
            return nullptr;
        } catch (const std::exception& error) {
            return to_status(k.api, Op::kName, k.node, error);
        }
    }

    static size_t may_in_place(int** inputs, int** outputs) {
        constexpr size_t count = InPlaceOf<Op>::count;
        *inputs = new int[count];
        *outputs = new int[count];
        for (size_t i = 0; i < count; i++) {
            (*inputs)[i] = InPlaceOf<Op>::pairs[i].input;
            (*outputs)[i] = InPlaceOf<Op>::pairs[i].output;
        }
        return count;
    }
};

template <class Op>
const OrtCustomOp* custom_op() {
    static const CustomOp<Op> op(kCpuProvider);
    return &op;
}

// The same description twice: the two GPU providers differ in the driver that the launcher calls.
template <class Op>
std::vector<const OrtCustomOp*> gpu_custom_ops() {
    static const CustomOp<Op> cuda(kCudaProvider), rocm(kRocmProvider);
    return {&cuda, &rocm};
}

}  // namespace llmpack::ort

#endif  // LLMPACK_ORT_KERNEL_H_
