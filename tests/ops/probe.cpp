// A second operator library, for tests only: where a value lies in memory. Built on the same glue as the
// operators.
#include "ort/kernel.h"

namespace llmpack::ort {
namespace {

// address [4] = the address of x in pieces of 16 bits, lowest first: float32 holds each exactly.
struct AddressOf {
    static constexpr const char* kName = "AddressOf";
    static constexpr Port kInputs[] = {{"x", kAny}};
    static constexpr Port kOutputs[] = {{"address", kFloat}};

    explicit AddressOf(const NodeInfo&) {}

    void compute(Context& context) const {
        const auto address = reinterpret_cast<uintptr_t>(context.input(0).data);
        float* out = context.output(0, {4});
        for (int i = 0; i < 4; i++) out[i] = static_cast<float>((address >> (16 * i)) & 0xffff);
    }
};

}  // namespace
}  // namespace llmpack::ort

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base) {
    using namespace llmpack::ort;
    const OrtApi& api = *base->GetApi(kOrtApiVersion);
    OrtCustomOpDomain* domain = nullptr;
    if (OrtStatus* status = CreateCustomOpDomain(api, "test.probe", &domain)) return status;
    if (OrtStatus* status = CustomOpDomain_Add(api, domain, custom_op<AddressOf>())) return status;
    return AddCustomOpDomain(api, options, domain);
}
