#include "cpu/threads.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <system_error>

namespace llmpack {

namespace {

// Signals are for the host program's own threads, except those that say what a thread itself did: where they
// are blocked, a fault ends the process without the host program's handler.
class NoSignals {
  public:
    NoSignals() {
        sigset_t blocked;
        sigfillset(&blocked);
        for (int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGSYS}) sigdelset(&blocked, fault);
        pthread_sigmask(SIG_SETMASK, &blocked, &before_);
    }
    ~NoSignals() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

  private:
    sigset_t before_;
};

// A refusal costs speed only.
void pin(std::thread& thread, int core) {
    if (core < 0 || core >= CPU_SETSIZE) return;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(core, &set);
    pthread_setaffinity_np(thread.native_handle(), sizeof(set), &set);
}

}  // namespace

ThreadTeam::ThreadTeam(int number, const int32_t* cores)
    : number_(number),
      patience_(patience(cores != nullptr)),
      process_(getpid()),
      members_(new Member[static_cast<size_t>(number)]) {
    const NoSignals inherited;
    for (int i = 1; i < number; i++) {
        Member& member = members_[static_cast<size_t>(i)];
        try {
            member.thread = std::thread([this, i] { follow(static_cast<size_t>(i)); });
        } catch (const std::system_error& error) {
            stop();
            throw std::runtime_error("thread " + std::to_string(i + 1) + " of " + std::to_string(number) +
                                     " cannot be started (" + error.code().message() +
                                     "), expected the system to allow as many");
        }
        pthread_setname_np(member.thread.native_handle(), ("llmpack-" + std::to_string(i)).c_str());
        if (cores != nullptr) pin(member.thread, cores[i]);
    }
}

ThreadTeam::~ThreadTeam() {
    if (getpid() == process_) {
        stop();
    } else {
        (void)members_.release();  // threads of another process are not to be waited for
    }
}

void ThreadTeam::stop() {
    for (int i = 1; i < number_; i++) {
        Member& member = members_[static_cast<size_t>(i)];
        if (!member.thread.joinable()) continue;
        set(member, kStop);
        member.thread.join();
    }
}

void ThreadTeam::run(Function function, void* data, int64_t count, int64_t grain) {
    const int64_t grains = (count + grain - 1) / grain;
    if (grains <= 1 || number_ == 1 || is_busy_.test_and_set(std::memory_order_acquire)) {
        if (count > 0) function(data, 0, 0, count);
        return;
    }
    function_ = function;
    data_ = data;
    count_ = count;
    grain_ = grain;
    const int64_t working = std::min<int64_t>(number_, grains);
    working_ = static_cast<size_t>(working);
    for (int64_t i = 0; i < working; i++) {
        Member& member = members_[static_cast<size_t>(i)];
        member.next.store(grains * i / working, std::memory_order_relaxed);
        member.end = grains * (i + 1) / working;
    }
    loop_ += kNextLoop;
    for (size_t i = 1; i < working_; i++) set(members_[i], loop_ + kOffered);
    work(0);
    for (size_t i = 1; i < working_; i++) {
        uint32_t offered = loop_ + kOffered;
        if (members_[i].ticket.compare_exchange_strong(offered, loop_ + kDone)) continue;  // never begun
        wait_while(members_[i], loop_ + kTaken);
    }
    is_busy_.clear(std::memory_order_release);
}

// The part of members[self], then what is left of the others'.
void ThreadTeam::work(size_t self) {
    for (size_t k = 0; k < working_; k++) {
        Member& member = members_[(self + k) % working_];
        int64_t begin = member.next.load(std::memory_order_relaxed);
        while (begin < member.end) {
            const int64_t end = begin + (member.end - begin + 1) / 2;
            if (!member.next.compare_exchange_weak(begin, end, std::memory_order_relaxed)) continue;
            function_(data_, static_cast<int>(self), begin * grain_, std::min(count_, end * grain_));
            begin = member.next.load(std::memory_order_relaxed);
        }
    }
}

// What a thread does in its life.
void ThreadTeam::follow(size_t self) {
    Member& own = members_[self];
    for (;;) {
        uint32_t ticket = own.ticket.load(std::memory_order_acquire);
        if (ticket == kStop) return;
        if (ticket % kNextLoop != kOffered) {
            wait_while(own, ticket);
        } else if (own.ticket.compare_exchange_strong(ticket, ticket + kTaken)) {
            work(self);
            set(own, ticket + kDone);
        }
    }
}

void ThreadTeam::wait_while(Member& member, uint32_t ticket) const {
    if (wait_awake(patience_, [&] { return member.ticket.load(std::memory_order_acquire) != ticket; })) {
        return;
    }
    // Sequentially consistent, as set: either this thread sees the new ticket, or the other one the sleeper.
    member.sleepers.fetch_add(1, std::memory_order_seq_cst);
    while (member.ticket.load(std::memory_order_seq_cst) == ticket) {
        sleep_while_equal(member.ticket, ticket, std::chrono::milliseconds(0));
    }
    member.sleepers.fetch_sub(1, std::memory_order_relaxed);
}

void ThreadTeam::set(Member& member, uint32_t ticket) {
    member.ticket.store(ticket, std::memory_order_seq_cst);
    if (member.sleepers.load(std::memory_order_seq_cst) != 0) wake_all(member.ticket);
}

}  // namespace llmpack
