// A second operator library, for tests only: where a value lies in memory, and loops that break their
// contract. Built on the same glue as the operators.
#include <stdexcept>
#include <thread>

#include "ort/kernel.h"

namespace llmpack {

// The probe's operators have no kernels.
const Kernels& kernels() {
    static const Kernels none{};
    return none;
}

}  // namespace llmpack

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

// A loop whose body throws on the calling thread, where somebody could catch it, while others are in the
// loop.
struct Throws {
    static constexpr const char* kName = "Throws";
    static constexpr Port kInputs[] = {{"x", kFloat}};
    static constexpr Port kOutputs[] = {{"y", kFloat}};

    explicit Throws(const NodeInfo&) {}

    void compute(Context& context) const {
        const auto caller = std::this_thread::get_id();
        context.parallel_for(64, 1, [&](int64_t, int64_t) {
            if (std::this_thread::get_id() == caller) throw std::runtime_error("thrown in a loop");
            std::this_thread::sleep_for(std::chrono::milliseconds(20));
        });
    }
};

}  // namespace
}  // namespace llmpack::ort

// llmpack_ops_use_threads of this library's operators, which spin nowhere.
extern "C" __attribute__((visibility("default"))) void probe_use_threads(int number) {
    llmpack::ort::use_threads(number > 0 ? std::make_shared<llmpack::ThreadTeam>(number, nullptr) : nullptr);
}

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base) {
    using namespace llmpack::ort;
    const OrtApi& api = *base->GetApi(kOrtApiVersion);
    OrtCustomOpDomain* domain = nullptr;
    if (OrtStatus* status = CreateCustomOpDomain(api, "test.probe", &domain)) return status;
    if (OrtStatus* status = CustomOpDomain_Add(api, domain, custom_op<AddressOf>())) return status;
    if (OrtStatus* status = CustomOpDomain_Add(api, domain, custom_op<Throws>())) return status;
    return AddCustomOpDomain(api, options, domain);
}
