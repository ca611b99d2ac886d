// The functions of llmpack_ops.h.
#include <string>

#include "cpu/collectives.h"
#include "cpu/isa.h"
#include "guarded.h"
#include "ort/kernel.h"
#include "ort/profile.h"

namespace {

thread_local std::string last_error;

}  // namespace

namespace llmpack {

int failed(const std::string& message) {
    last_error = message;
    return -1;
}

}  // namespace llmpack

using llmpack::failed;
using llmpack::guarded;

extern "C" {

int llmpack_ops_version(void) { return LLMPACK_OPS_VERSION; }

const char* llmpack_ops_isa(void) { return llmpack::kernels().name; }

const char* llmpack_ops_isas(void) { return llmpack::supported_isas(); }

int llmpack_ops_set_isa(const char* name) {
    if (name != nullptr && llmpack::set_isa(name)) return 0;
    return failed(
        std::string("llmpack_ops_set_isa: ") + (name != nullptr ? name : "NULL") +
        " is not an instruction set of this machine, expected one of: " + llmpack::supported_isas() + ".");
}

const char* llmpack_ops_weight_fetch(void) { return llmpack::name_of(llmpack::weight_fetch()); }

int llmpack_ops_set_weight_fetch(const char* name) {
    if (name != nullptr && llmpack::set_weight_fetch(name)) return 0;
    return failed(std::string("llmpack_ops_set_weight_fetch: ") + (name != nullptr ? name : "NULL") +
                  " is no way of asking for weights, expected through-caches or past-caches.");
}

int llmpack_ops_use_threads(int number, const int32_t* cores) {
    return guarded("llmpack_ops_use_threads", [&] {
        if (number < 0)
            throw std::invalid_argument("number is " + std::to_string(number) + ", expected 0 or more");
        llmpack::ort::use_threads(number > 0 ? std::make_shared<llmpack::ThreadTeam>(number, cores)
                                             : nullptr);
    });
}

int llmpack_ops_set_communicator(const LlmpackCommunicator* communicator) {
    return guarded("llmpack_ops_set_communicator", [&] { llmpack::set_communicator(communicator); });
}

int llmpack_ops_share_memory(void) {
    std::string why_not;
    const int code = guarded("llmpack_ops_share_memory", [&] { why_not = llmpack::share_memory(); });
    if (code != 0 || why_not.empty()) return code;
    failed("llmpack_ops_share_memory: " + why_not + ".");
    return 1;
}

const char* llmpack_ops_transport(void) { return llmpack::transport_name(); }

int llmpack_ops_all_reduce(const float* x, float* y, int64_t n) {
    return guarded("llmpack_ops_all_reduce", [&] { llmpack::all_reduce(x, y, n); });
}

int llmpack_ops_all_gather(const float* x, float* y, int64_t rows, int64_t columns, int64_t out_features) {
    return guarded("llmpack_ops_all_gather", [&] { llmpack::all_gather(x, y, rows, columns, out_features); });
}

void llmpack_ops_weigh_runs(const float* logits, int64_t n, float highest, float inverse_temperature,
                            double* sums) {
    llmpack::kernels().weigh_runs(logits, n, highest, inverse_temperature, sums);
}

int64_t llmpack_ops_find_above(const float* logits, int64_t n, float threshold, int32_t* ids) {
    return llmpack::kernels().find_above(logits, n, threshold, ids);
}

void llmpack_ops_collective_state(uint64_t* begun, uint64_t* ended) {
    llmpack::collective_state(begun, ended);
}

int llmpack_ops_profile(int enable) {
    using llmpack::ort::OpTime;
    if (enable != 0) {
        for (OpTime* time = OpTime::first().load(std::memory_order_acquire); time != nullptr;
             time = time->next) {
            time->calls.store(0, std::memory_order_relaxed);
            time->nanoseconds.store(0, std::memory_order_relaxed);
        }
    }
    OpTime::enabled().store(enable != 0, std::memory_order_relaxed);
    return 0;
}

int llmpack_ops_profile_read(int index, const char** name, uint64_t* calls, uint64_t* nanoseconds) {
    using llmpack::ort::OpTime;
    OpTime* time = OpTime::first().load(std::memory_order_acquire);
    for (int i = 0; time != nullptr && i < index; i++) time = time->next;
    if (time == nullptr || index < 0) {
        return failed("llmpack_ops_profile_read: no operator has index " + std::to_string(index) + ".");
    }
    *name = time->name.c_str();
    *calls = time->calls.load(std::memory_order_relaxed);
    *nanoseconds = time->nanoseconds.load(std::memory_order_relaxed);
    return 0;
}

const char* llmpack_ops_last_error(void) { return last_error.c_str(); }

}  // extern "C"
