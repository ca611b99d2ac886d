// Rank 0 makes anonymous memory (memfd) and the others open it through /proc/PID/fd. It has no name, so
// nothing is left behind whenever a rank is killed, and it does not count against the size of /dev/shm.
//
// Whether the ranks are on one host is not guessed from names: every rank writes a token into the memory, and
// looks for those of all others. Each of the three stages ends with an exchange by MPI, so that all ranks go
// on together or none does.
#include "cpu/collectives_segment.h"

#include <fcntl.h>
#include <linux/memfd.h>
#include <poll.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <vector>

#include "cpu/collectives_shared.h"

#ifndef SYS_pidfd_open
#    define SYS_pidfd_open 434  // the same on every architecture
#endif
#ifndef MFD_NOEXEC_SEAL
#    define MFD_NOEXEC_SEAL 0x0008U
#endif
#ifndef F_ADD_SEALS
#    define F_ADD_SEALS 1033
#    define F_SEAL_SEAL 0x0001
#    define F_SEAL_SHRINK 0x0002
#    define F_SEAL_GROW 0x0004
#endif

namespace llmpack {

namespace {

// Per rank and buffer. Larger: fewer steps for messages of megabytes; smaller: more of it stays in the L2
// cache.
constexpr size_t kSlotBytes = 128 * 1024;
constexpr size_t kPageBytes = 4096;  // of the mapping that a GPU's driver pins

// tests/benchmarks/LOG.md has the measurements.
Tuning tuning(bool has_core_for_each) {
    Tuning chosen{};
#if defined(__x86_64__)
    chosen.streams = __builtin_cpu_is("amd");  // measured there only
#endif
    chosen.patience = patience(has_core_for_each);
    chosen.look = std::chrono::milliseconds(100);
    // Longer than the two seconds after which failstop.py ends the ranks that the launcher does not.
    chosen.grace = std::chrono::milliseconds(3000);
    return chosen;
}

// What a rank cannot do; the message ends up in every rank's `why_not`.
struct Trouble {
    std::string message;
};

Trouble system_trouble(const std::string& what) { return {what + ": " + std::strerror(errno)}; }

class Descriptor {
  public:
    explicit Descriptor(int number = -1) : number_(number) {}
    Descriptor(Descriptor&& other) noexcept : number_(other.release()) {}
    Descriptor& operator=(Descriptor&& other) noexcept {
        std::swap(number_, other.number_);
        return *this;
    }
    ~Descriptor() {
        if (number_ >= 0) close(number_);
    }
    int get() const { return number_; }
    int release() {
        const int number = number_;
        number_ = -1;
        return number;
    }

  private:
    int number_;
};

std::shared_ptr<void> map(const Descriptor& file, size_t bytes) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file.get(), 0);
    if (memory == MAP_FAILED) throw system_trouble("mmap of " + std::to_string(bytes) + " bytes");
    return {memory, [bytes](void* mapped) { munmap(mapped, bytes); }};
}

// Rank 0's side of the file, and what tells whether the ranks can see each other at all.
struct Offer {
    uint64_t bytes;          // of the segment; differs between versions of the layout
    uint64_t token;          // rank 0's, random
    uint64_t pid_namespace;  // 0: unknown
    int32_t pid, file;
    cpu_set_t cores;
};

struct Report {
    char trouble[256];  // "" if none
};

// Exchanges `own` and returns the values of all ranks.
template <class T>
std::vector<T> exchange(MpiTransport& mpi, const T& own) {
    std::vector<T> all(static_cast<size_t>(mpi.size));
    mpi.allgather(&own, all.data(), sizeof(T));
    return all;
}

// Does `work` on every rank; returns the trouble of the first rank that has some, or "".
template <class Work>
std::string agree(MpiTransport& mpi, Work work) {
    Report own{};
    try {
        work();
    } catch (const Trouble& trouble) {
        std::snprintf(own.trouble, sizeof(own.trouble), "%s", trouble.message.c_str());
    }
    const auto reports = exchange(mpi, own);
    for (size_t rank = 0; rank < reports.size(); rank++) {
        if (reports[rank].trouble[0] != 0)
            return "rank " + std::to_string(rank) + ": " + reports[rank].trouble;
    }
    return "";
}

class HostProcesses : public Processes {
  public:
    explicit HostProcesses(const std::vector<Offer>& offers) {
        for (const Offer& offer : offers) {
            // A descriptor means this process for ever, whoever gets its number later.
            Descriptor process(static_cast<int>(syscall(SYS_pidfd_open, offer.pid, 0)));
            if (process.get() < 0) throw system_trouble("pidfd_open of " + std::to_string(offer.pid));
            pids_.push_back(offer.pid);
            processes_.push_back(std::move(process));
        }
    }
    bool has_ended(int rank) override {
        pollfd process{processes_[static_cast<size_t>(rank)].get(), POLLIN, 0};
        return poll(&process, 1, 0) > 0;
    }
    std::string description(int rank) override {
        return "rank " + std::to_string(rank) + " (pid " + std::to_string(pids_[static_cast<size_t>(rank)]) +
               ")";
    }

  private:
    std::vector<int> pids_;
    std::vector<Descriptor> processes_;
};

Descriptor make_file(size_t bytes) {
    const unsigned flags = MFD_CLOEXEC | MFD_ALLOW_SEALING;
    // Kernels before 6.3 do not know MFD_NOEXEC_SEAL; some later ones insist on it.
    long number = syscall(SYS_memfd_create, "llmpack", flags | MFD_NOEXEC_SEAL);
    if (number < 0 && errno == EINVAL) number = syscall(SYS_memfd_create, "llmpack", flags);
    if (number < 0) throw system_trouble("memfd_create");
    Descriptor file(static_cast<int>(number));
    if (ftruncate(file.get(), static_cast<off_t>(bytes)) != 0) throw system_trouble("ftruncate");
    // Nobody can make an access to the mapping fail.
    if (fcntl(file.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
        throw system_trouble("sealing a memfd");
    }
    return file;
}

Descriptor open_file(const Offer& offer) {
    const std::string path = "/proc/" + std::to_string(offer.pid) + "/fd/" + std::to_string(offer.file);
    struct stat status{};
    if (stat(path.c_str(), &status) != 0) throw system_trouble(path);
    if (!S_ISREG(status.st_mode) || static_cast<uint64_t>(status.st_size) != offer.bytes) {
        throw Trouble{path + " is not the memory of rank 0"};
    }
    Descriptor file(open(path.c_str(), O_RDWR | O_CLOEXEC));
    if (file.get() < 0) throw system_trouble(path);
    return file;
}

uint64_t pid_namespace() {
    struct stat status{};
    return stat("/proc/self/ns/pid", &status) == 0 ? static_cast<uint64_t>(status.st_ino) : 0;
}

uint64_t random_token() {
    uint64_t token = 0;
    if (getrandom(&token, sizeof(token), 0) != sizeof(token)) throw system_trouble("getrandom");
    return token | 1;  // not what the memory holds at first
}

void expect_one_host(const std::vector<Offer>& offers, uint64_t bytes) {
    for (size_t rank = 0; rank < offers.size(); rank++) {
        if (offers[rank].bytes != bytes) throw Trouble{"another version of the operator library"};
        if (offers[rank].pid_namespace == 0 || offers[rank].pid_namespace != offers[0].pid_namespace) {
            throw Trouble{"rank " + std::to_string(rank) + " does not see the processes of rank 0"};
        }
    }
}

bool has_core_for_each(const std::vector<Offer>& offers) {
    cpu_set_t cores;
    CPU_ZERO(&cores);
    for (const Offer& offer : offers) CPU_OR(&cores, &cores, &offer.cores);
    return static_cast<size_t>(CPU_COUNT(&cores)) >= offers.size();
}

// Memory of `bytes` that all ranks map. token_of(memory, rank): where a rank's token lies, apart from the
// others'; touch(memory): what each rank does with its own part first, so that the pages are close to its
// core. Fills `offers`.
template <class TokenOf, class Touch>
std::shared_ptr<void> obtain(MpiTransport& mpi, size_t bytes, const TokenOf& token_of, const Touch& touch,
                             std::vector<Offer>& offers, std::string& why_not) {
    std::shared_ptr<void> memory;
    Descriptor file;
    Offer own{};
    why_not = agree(mpi, [&] {
        own.bytes = bytes;
        own.pid_namespace = pid_namespace();
        own.pid = static_cast<int32_t>(getpid());
        if (sched_getaffinity(0, sizeof(own.cores), &own.cores) != 0) CPU_ZERO(&own.cores);
        if (mpi.rank != 0) return;
        file = make_file(bytes);
        memory = map(file, bytes);
        own.file = file.get();
        own.token = *token_of(memory.get(), 0) = random_token();
    });
    if (!why_not.empty()) return nullptr;

    offers = exchange(mpi, own);
    why_not = agree(mpi, [&] {
        expect_one_host(offers, bytes);
        if (mpi.rank != 0) {
            file = open_file(offers[0]);
            memory = map(file, bytes);
            if (*token_of(memory.get(), 0) != offers[0].token) {
                throw Trouble{"rank 0 (pid " + std::to_string(offers[0].pid) + ") is another process here"};
            }
        }
        touch(memory.get());
        *token_of(memory.get(), mpi.rank) = offers[0].token + static_cast<uint64_t>(mpi.rank);
    });
    if (!why_not.empty()) return nullptr;

    why_not = agree(mpi, [&] {
        for (int rank = 0; rank < mpi.size; rank++) {
            if (*token_of(memory.get(), rank) != offers[0].token + static_cast<uint64_t>(rank)) {
                throw Trouble{"rank " + std::to_string(rank) + " has other memory"};
            }
        }
    });
    return why_not.empty() ? memory : nullptr;
}

}  // namespace

std::unique_ptr<Transport> make_shared_memory_transport(MpiTransport& mpi, std::string& why_not) {
    const SharedLayout layout{mpi.size, kSlotBytes};
    std::vector<Offer> offers;
    std::unique_ptr<Processes> processes;
    auto memory = obtain(
        mpi, layout.bytes(), [&](void* at, int rank) { return &layout.of(at, rank).marks[0].token; },
        [&](void* at) {
            processes = std::make_unique<HostProcesses>(offers);
            std::memset(layout.slots(at, mpi.rank), 0, 2 * layout.slot_bytes);
        },
        offers, why_not);
    if (memory == nullptr) return nullptr;
    return std::make_unique<SharedMemoryTransport>(mpi.rank, layout, std::move(memory),
                                                   tuning(has_core_for_each(offers)), std::move(processes));
}

std::shared_ptr<void> make_shared_segment(MpiTransport& mpi, size_t bytes, std::string& why_not) {
    // The tokens lie behind what was asked for, so that it begins at a page and is all zero.
    const size_t tokens = (bytes + kPageBytes - 1) / kPageBytes * kPageBytes;
    std::vector<Offer> offers;
    return obtain(
        mpi, tokens + kPageBytes,
        [&](void* at, int rank) {
            return reinterpret_cast<uint64_t*>(static_cast<char*>(at) + tokens) + rank;
        },
        [](void*) {}, offers, why_not);
}

std::string agree_on(MpiTransport& mpi, const std::string& trouble) {
    return agree(mpi, [&] {
        if (!trouble.empty()) throw Trouble{trouble};
    });
}

}  // namespace llmpack
