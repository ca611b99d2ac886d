// AllReduce, AllReduceAddRMSNorm and AllReduceRMSNormAddRMSNorm of a GPU's graph.
#include "gpu/collectives.h"

#include "ort/gpu_add_rms_norm.h"
#include "ort/gpu_operator.h"
#include "ort/ops.h"

namespace llmpack::ort {
namespace {

gpu::Collectives& collectives() {
    auto& made = Launcher::current().collectives;
    if (made == nullptr) {
        throw OpError(
            "the ranks' GPUs are not joined, expected llmpack_ops_gpu_share before a session is made", kFail);
    }
    return *made;
}

// A one-shot kernel and where it meets its peers; absent where the ranks have no mapped memory.
struct OneShot {
    Operation operation;
    const gpu::Meeting* meeting = nullptr;

    void find(const char* op, const gpu::Constants& constants, std::initializer_list<Argument> arguments,
              int64_t row_bytes) {
        gpu::Collectives& ranks = collectives();
        const gpu::KernelFile& file = Launcher::current().file;
        for (const gpu::KernelRecord& record : file.kernels) {
            if (record.op != op) continue;
            operation = Launcher::current().operation(op, constants, arguments);
            meeting = ranks.meeting(row_bytes, operation.most_rows());
            return;
        }
    }
    bool takes(int64_t rows) const { return meeting != nullptr && rows <= meeting->max_rows; }
};

struct GpuAllReduce {
    static constexpr const char* kName = "AllReduce";
    static constexpr Port kInputs[] = {{"x", kFloat16}};
    static constexpr Port kOutputs[] = {{"y", kFloat16}};
    static constexpr InPlace kInPlace[] = {{0, 0}};

    explicit GpuAllReduce(const NodeInfo& node) : width(node.size_attribute("in_features")) {
        one_shot.find("all_reduce", {{"in_features", width}, {"ranks", collectives().size}},
                      {{"x", kPointer},
                       {"y", kPointer},
                       {"buffers", kPointer},
                       {"flags", kPointer},
                       {"epochs", kPointer},
                       {"rank", kInteger}},
                      width * 2);
    }

    void compute(Context& context) const {
        const Tensor x = context.input(0);
        x.expect_shape({kAnySize, width}, "[tokens, hidden_size]");
        const int64_t T = x.shape[0];
        void* y = context.output_memory(0, {T, width});
        gpu::Collectives& ranks = collectives();
        if (!one_shot.takes(T)) return ranks.all_reduce(x.data, y, T * width, context.gpu_stream());
        const gpu::Meeting& m = *one_shot.meeting;
        one_shot.operation.launch({T}, {x.data, y, m.buffers, m.flags, m.epochs, narrow(ranks.rank)},
                                  context.gpu_stream());
    }

    int64_t width;
    OneShot one_shot;
};

template <class Form>
struct GpuAllReduceAddRMSNorm : GpuAddRMSNorm<Form> {
    static constexpr const char* kName = Form::kReducedName;
    using GpuAddRMSNorm<Form>::epsilon;
    using GpuAddRMSNorm<Form>::width;

    explicit GpuAllReduceAddRMSNorm(const NodeInfo& node) : GpuAddRMSNorm<Form>(node) {
        one_shot.find(Form::kReducedKernel, {{"in_features", width}, {"ranks", collectives().size}},
                      {{"x", kPointer},
                       {"x_weight", kPointer},
                       {"residual", kPointer},
                       {"weight", kPointer},
                       {"y", kPointer},
                       {"buffers", kPointer},
                       {"flags", kPointer},
                       {"epochs", kPointer},
                       {"rank", kInteger},
                       {"epsilon", kNumber}},
                      width * 2);
        Launcher& launcher = Launcher::current();
        launcher.reserve(static_cast<size_t>(launcher.settings.max_rows * width) * 2);
    }

    void compute(Context& context) const {
        const auto on = this->operands(context);
        gpu::Collectives& ranks = collectives();
        if (one_shot.takes(on.T)) {
            const gpu::Meeting& m = *one_shot.meeting;
            one_shot.operation.launch({on.T},
                                      {on.x, on.x_weight, on.sum, on.weight, on.y, m.buffers, m.flags,
                                       m.epochs, narrow(ranks.rank), epsilon},
                                      on.stream);
            return;
        }
        const Launcher& launcher = Launcher::current();
        if (on.T > launcher.settings.max_rows) {
            throw OpError("a step of " + std::to_string(on.T) + " tokens, expected at most " +
                          std::to_string(launcher.settings.max_rows));
        }
        void* reduced = reinterpret_cast<void*>(launcher.workspace());
        ranks.all_reduce(on.x, reduced, on.T * width, on.stream);
        this->launch(on, reduced);
    }

    OneShot one_shot;
};

}  // namespace

std::vector<const OrtCustomOp*> gpu_collective_ops() {
    return gpu_ops_of<GpuAllReduce, GpuAllReduceAddRMSNorm<Added>, GpuAllReduceAddRMSNorm<NormedAndAdded>>();
}

}  // namespace llmpack::ort
