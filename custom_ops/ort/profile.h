// Where the time goes: calls and nanoseconds of each operator of the domain, counted while
// llmpack_ops_profile is on. Off, it costs one relaxed load in each call of an operator.
#ifndef LLMPACK_ORT_PROFILE_H_
#define LLMPACK_ORT_PROFILE_H_

#include <atomic>
#include <chrono>
#include <cstdint>

namespace llmpack::ort {

// One for each operator, as a static object: it enters a list that is only ever read and appended to.
class OpTime {
  public:
    explicit OpTime(const char* name) : name(name) {
        next = first().load(std::memory_order_relaxed);
        while (!first().compare_exchange_weak(next, this, std::memory_order_release)) {
        }
    }
    OpTime(const OpTime&) = delete;
    OpTime& operator=(const OpTime&) = delete;

    static std::atomic<OpTime*>& first() {
        static std::atomic<OpTime*> head{nullptr};
        return head;
    }
    static std::atomic<bool>& enabled() {
        static std::atomic<bool> on{false};
        return on;
    }

    const char* const name;
    std::atomic<uint64_t> calls{0}, nanoseconds{0};
    OpTime* next;
};

// Adds the time until its end, if the profile was on at its beginning.
class ProfileScope {
  public:
    explicit ProfileScope(OpTime& time)
        : time_(OpTime::enabled().load(std::memory_order_relaxed) ? &time : nullptr) {
        if (time_ != nullptr) start_ = std::chrono::steady_clock::now();
    }
    ~ProfileScope() {
        if (time_ == nullptr) return;
        const auto passed = std::chrono::steady_clock::now() - start_;
        time_->calls.fetch_add(1, std::memory_order_relaxed);
        time_->nanoseconds.fetch_add(
            static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(passed).count()),
            std::memory_order_relaxed);
    }
    ProfileScope(const ProfileScope&) = delete;
    ProfileScope& operator=(const ProfileScope&) = delete;

  private:
    OpTime* const time_;
    std::chrono::steady_clock::time_point start_;
};

}  // namespace llmpack::ort

#endif  // LLMPACK_ORT_PROFILE_H_
