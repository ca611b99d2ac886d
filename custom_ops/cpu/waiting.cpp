#include "cpu/waiting.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>

namespace llmpack {

// Without FUTEX_PRIVATE_FLAG, as the word may be in memory of several processes.
void sleep_while_equal(std::atomic<uint32_t>& word, uint32_t value, std::chrono::milliseconds longest) {
    timespec timeout{};
    timeout.tv_sec = static_cast<time_t>(longest.count() / 1000);
    timeout.tv_nsec = static_cast<long>(longest.count() % 1000 * 1'000'000);
    syscall(SYS_futex, &word, FUTEX_WAIT, value, longest.count() > 0 ? &timeout : nullptr, nullptr, 0);
}

void wake_all(std::atomic<uint32_t>& word) {
    syscall(SYS_futex, &word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace llmpack
