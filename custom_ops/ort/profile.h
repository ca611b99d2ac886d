// Where the time goes: calls and nanoseconds of each operator at each place in the layers, counted while
// llmpack_ops_profile is on. Off, it costs one relaxed load in each call of an operator.
#ifndef LLMPACK_ORT_PROFILE_H_
#define LLMPACK_ORT_PROFILE_H_

#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <string>
#include <utility>

namespace llmpack::ort {

// In a list that is only ever read and appended to, so that readers need no lock.
class OpTime {
  public:
    // The one of this name. It lives as long as the process: sessions come and go, and share it.
    static OpTime& named(std::string name) {
        static std::mutex adding;
        const std::lock_guard<std::mutex> lock(adding);
        OpTime* const head = first().load(std::memory_order_acquire);
        for (OpTime* time = head; time != nullptr; time = time->next) {
            if (time->name == name) return *time;
        }
        OpTime* const added = new OpTime(std::move(name), head);
        first().store(added, std::memory_order_release);
        return *added;
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

    const std::string name;
    std::atomic<uint64_t> calls{0}, nanoseconds{0};
    OpTime* const next;

  private:
    OpTime(std::string name, OpTime* next) : name(std::move(name)), next(next) {}
};

// "MatMulQ4 /model/layers.*/mlp/down_proj": the operator, and its node's name with any layer's number.
std::string profile_name(const char* op, const std::string& node);

// Adds the time until its end, if the profile was on at its beginning.
class ProfileScope {
  public:
    explicit ProfileScope(OpTime& time)
        : time_(OpTime::enabled().load(std::memory_order_relaxed) ? &time : nullptr) {
        if (time_ != nullptr) start_ = std::chrono::steady_clock::now();
    }
    ~ProfileScope() { stop(); }
    ProfileScope(const ProfileScope&) = delete;
    ProfileScope& operator=(const ProfileScope&) = delete;

    // What follows is another operator's: two that are joined are two rows of a profile.
    void go_on_as(OpTime& time) {
        if (time_ == nullptr) return;
        start_ = stop();
        time_ = &time;
    }

  private:
    using Moment = std::chrono::steady_clock::time_point;

    // Returns when.
    Moment stop() const {
        if (time_ == nullptr) return {};
        const Moment stopped = std::chrono::steady_clock::now();
        const auto passed = std::chrono::duration_cast<std::chrono::nanoseconds>(stopped - start_);
        time_->calls.fetch_add(1, std::memory_order_relaxed);
        time_->nanoseconds.fetch_add(static_cast<uint64_t>(passed.count()), std::memory_order_relaxed);
        return stopped;
    }

    OpTime* time_;
    Moment start_;
};

}  // namespace llmpack::ort

#endif  // LLMPACK_ORT_PROFILE_H_
