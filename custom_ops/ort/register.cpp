// RegisterCustomOps: what SessionOptions.register_custom_ops_library looks for.
#include "llmpack_ops.h"
#include "ort/kernel.h"
#include "ort/ops.h"

namespace llmpack::ort {
namespace {

// Adds the domain to the options. The domain is made once and never released: sessions keep pointers into it.
OrtStatus* add_domain(const OrtApi& api, OrtSessionOptions* options) {
    static OrtCustomOpDomain* domain = nullptr;
    static OrtStatus* (*const make)(const OrtApi&) = [](const OrtApi& api) -> OrtStatus* {
        OrtCustomOpDomain* made = nullptr;
        if (OrtStatus* status = CreateCustomOpDomain(api, "ai.llmpack", &made)) return status;
        for (const auto& ops : {matmul_ops(), moe_ops(), elementwise_ops(), attention_ops(), collective_ops(),
                                gpu_matmul_ops(), gpu_elementwise_ops(), gpu_attention_ops(),
                                gpu_collective_ops(), gpu_top_k_ops(), gpu_moe_ops()}) {
            for (const OrtCustomOp* op : ops) {
                if (OrtStatus* status = CustomOpDomain_Add(api, made, op)) return status;
            }
        }
        domain = made;
        return nullptr;
    };
    static OrtStatus* const failure = make(api);
    if (failure != nullptr)
        return CreateStatus(api, static_cast<int>(kFail), "llmpack_ops: cannot make the operator domain.");
    return AddCustomOpDomain(api, options, domain);
}

}  // namespace
}  // namespace llmpack::ort

extern "C" LLMPACK_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
    const OrtApi* api = base->GetApi(kOrtApiVersion);
    // A status cannot be made without a table; ONNX Runtime reports the null domain as unknown operators when
    // a model loads.
    if (api == nullptr) return nullptr;
    llmpack::ort::set_release(base->GetVersionString());
    return llmpack::ort::add_domain(*api, options);
}
