#include "gpu/collectives.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <set>

#include "cpu/collectives_segment.h"
#include "gpu/half.h"

namespace llmpack::gpu {

namespace {

constexpr int64_t kFlagBytes = 128;  // one flag of a row; FORMAT.md 8.5
constexpr size_t kPage = 4096;

// Which GPU of which host a rank has.
struct Place {
    char host[256], pci_id[32];
};

struct Need {
    int64_t row_bytes, max_rows;
    bool operator<(const Need& other) const {
        return row_bytes != other.row_bytes ? row_bytes < other.row_bytes : max_rows < other.max_rows;
    }
    int64_t region_bytes() const { return 2 * max_rows * row_bytes + max_rows * kFlagBytes; }
};

// The shapes of the one-shot kernels that the file has for this number of ranks.
std::set<Need> needs(const KernelFile& file, int ranks) {
    std::set<Need> found;
    for (const KernelRecord& record : file.kernels) {
        const auto constant = [&](const char* name) {
            const auto it = record.constants.find(name);
            return it == record.constants.end() ? int64_t{0} : it->second;
        };
        if (record.op != "all_reduce" && record.op != "all_reduce_add_rms_norm") continue;
        if (constant("ranks") != ranks) continue;
        found.insert({constant("in_features") * 2, constant("max_rows")});
    }
    return found;
}

// Containers of one host have names of their own, and several hosts may be called localhost: a kernel's boot
// has one id, which all its containers see. The name where there is none.
void name_host(char* host, size_t size) {
    host[0] = 0;
    const std::unique_ptr<FILE, int (*)(FILE*)> id(std::fopen("/proc/sys/kernel/random/boot_id", "r"),
                                                   std::fclose);
    if (id != nullptr && std::fgets(host, static_cast<int>(size), id.get()) != nullptr) return;
    if (gethostname(host, size - 1) != 0) host[0] = 0;
}

size_t whole_pages(int64_t bytes) { return (static_cast<size_t>(bytes) + kPage - 1) / kPage * kPage; }

}  // namespace

Collectives::Collectives(Launcher& launcher, MpiTransport& mpi)
    : rank(mpi.rank), size(mpi.size), launcher_(launcher) {
    see_places(mpi);
    // Kernels that wait could fill a GPU on which another rank has yet to write what this one waits for.
    if (!are_gpus_own_) launcher.may_overlap = false;
    make_meetings(mpi);
    join_nccl(mpi);
}

Collectives::~Collectives() {
    if (communicator_ != nullptr) nccl_->abandon(communicator_);
    for (const DevicePointer memory : opened_) launcher_.driver.call.ipc_close(memory);
    if (is_registered_) launcher_.driver.call.host_unregister(segment_.get());
    launcher_.driver.forget_error();
}

void Collectives::see_places(MpiTransport& mpi) {
    Place own{};
    name_host(own.host, sizeof(own.host));
    std::snprintf(own.pci_id, sizeof(own.pci_id), "%s", launcher_.device.pci_id.c_str());
    std::vector<Place> places(static_cast<size_t>(size));
    mpi.allgather(&own, places.data(), sizeof(Place));
    std::set<std::string> hosts, gpus;
    for (const Place& place : places) {
        hosts.insert(place.host);
        gpus.insert(std::string(place.host) + " " + place.pci_id);
    }
    is_one_host_ = hosts.size() == 1;
    are_gpus_own_ = gpus.size() == places.size();
}

std::vector<DevicePointer> Collectives::peer_parts(MpiTransport& mpi, size_t bytes, std::string& why_not) {
    if (!is_one_host_ || !are_gpus_own_) {
        why_not = is_one_host_ ? "ranks share a GPU" : "ranks are on several hosts";
        return {};
    }
    const Driver& driver = launcher_.driver;
    std::string trouble;
    // A pattern of the rank's own, which its peers must find there: some machines grant access and lose data.
    std::vector<uint32_t> pattern(kPage / sizeof(uint32_t)), seen(pattern.size());
    const auto fill = [&](int r) {
        for (size_t i = 0; i < pattern.size(); i++) {
            pattern[i] = static_cast<uint32_t>(r + 1) * 2654435761u + static_cast<uint32_t>(i);
        }
    };
    DevicePointer own = 0, scratch = 0;
    IpcHandle handle{};
    try {
        own = launcher_.allocate_zeroed(bytes, true);
        scratch = launcher_.allocate_zeroed(kPage);
        fill(rank);
        launcher_.upload(own, pattern.data(), kPage);
        driver.check(driver.call.ipc_handle(&handle, own), "sharing GPU memory");
    } catch (const GpuError& error) {
        trouble = error.what();
    }
    std::vector<IpcHandle> handles(static_cast<size_t>(size));
    mpi.allgather(&handle, handles.data(), sizeof(IpcHandle));
    trouble = agree_on(mpi, trouble);
    std::vector<DevicePointer> parts(static_cast<size_t>(size), own);
    if (trouble.empty()) {
        try {
            for (int r = 0; r < size; r++) {
                if (r == rank) continue;
                DevicePointer& part = parts[static_cast<size_t>(r)];
                driver.check(driver.call.ipc_open(&part, handles[static_cast<size_t>(r)], kOpenPeerAccess),
                             "reaching the memory of rank " + std::to_string(r) + "'s GPU");
                opened_.push_back(part);
                launcher_.copy(scratch, part, seen.data(), kPage);
                fill(r);
                if (seen != pattern) {
                    throw GpuError("the memory of rank " + std::to_string(r) +
                                   "'s GPU is open and does not hold what was written there");
                }
            }
        } catch (const GpuError& error) {
            trouble = error.what();
        }
        trouble = agree_on(mpi, trouble);
    }
    if (!trouble.empty()) {
        why_not = trouble;
        return {};
    }
    launcher_.fill(own, 0, kPage);
    mpi.allgather(&handle, handles.data(), sizeof(IpcHandle));  // nobody begins before all are clear
    return parts;
}

std::vector<DevicePointer> Collectives::host_parts(MpiTransport& mpi, size_t bytes, std::string& why_not) {
    const size_t all = bytes * static_cast<size_t>(size);
    segment_ = make_shared_segment(mpi, all, why_not);
    if (segment_ == nullptr) return {};
    const Driver& driver = launcher_.driver;
    DevicePointer base = 0;
    try {
        driver.make_current(launcher_.device.ordinal);
        driver.check(driver.call.host_register(segment_.get(), all, kHostPortableMapped),
                     "mapping host memory into the GPU");
        is_registered_ = true;
        driver.check(driver.call.host_pointer(&base, segment_.get(), 0), "mapping host memory into the GPU");
    } catch (const GpuError& error) {
        why_not = error.what();
    }
    why_not = agree_on(mpi, why_not);
    if (!why_not.empty()) return {};
    std::vector<DevicePointer> parts;
    for (int r = 0; r < size; r++) parts.push_back(base + static_cast<size_t>(r) * bytes);
    return parts;
}

void Collectives::make_meetings(MpiTransport& mpi) {
    const std::set<Need> wanted = needs(launcher_.file, size);
    if (wanted.empty()) {
        description = "no one-shot kernel for " + std::to_string(size) + " ranks in " + launcher_.file.path;
        return;
    }
    // A rank's part: for each need a buffer and its flags. Parts begin at pages.
    size_t bytes = 0;
    for (const Need& need : wanted) bytes += whole_pages(need.region_bytes());
    std::string not_peer, not_host;
    std::vector<DevicePointer> parts = peer_parts(mpi, bytes, not_peer);
    const bool is_peer = !parts.empty();
    if (!is_peer) parts = host_parts(mpi, bytes, not_host);
    std::string trouble = parts.empty() ? not_host : "";
    if (trouble.empty()) {
        try {
            size_t at = 0;
            for (const Need& need : wanted) {
                std::vector<uint64_t> buffers, flags;
                for (const DevicePointer part : parts) {
                    buffers.push_back(part + at);
                    flags.push_back(buffers.back() +
                                    static_cast<uint64_t>(2 * need.max_rows * need.row_bytes));
                }
                const size_t table = buffers.size() * sizeof(uint64_t);
                Meeting meeting{
                    need.row_bytes, need.max_rows, launcher_.allocate_zeroed(table),
                    launcher_.allocate_zeroed(table),
                    launcher_.allocate_zeroed(static_cast<size_t>(need.max_rows) * sizeof(int32_t))};
                launcher_.upload(meeting.buffers, buffers.data(), table);
                launcher_.upload(meeting.flags, flags.data(), table);
                meetings_.push_back(meeting);
                at += whole_pages(need.region_bytes());
            }
        } catch (const GpuError& error) {
            trouble = error.what();
        }
        trouble = agree_on(mpi, trouble);
    }
    if (!trouble.empty()) {
        meetings_.clear();
        description = "not one-shot: " + trouble;
        return;
    }
    int64_t most = 0;
    for (const Meeting& meeting : meetings_) most = std::max(most, meeting.max_rows);
    description = "up to " + std::to_string(most) + " rows one-shot through " +
                  (is_peer ? "the GPUs' own memory" : "mapped host memory (" + not_peer + ")");
}

void Collectives::join_nccl(MpiTransport& mpi) {
    std::string why_not;
    const Nccl* found = Nccl::get(launcher_.settings.vendor, why_not);
    if (!are_gpus_own_) why_not = "ranks share a GPU, which NCCL does not allow";
    NcclId id{};
    std::vector<NcclId> ids(static_cast<size_t>(size));
    if (why_not.empty() && rank == 0) {
        try {
            id = found->new_id();
        } catch (const GpuError& error) {
            why_not = error.what();
        }
    }
    why_not = agree_on(mpi, why_not);
    if (why_not.empty()) {
        mpi.allgather(&id, ids.data(), sizeof(NcclId));
        std::string trouble;
        try {
            launcher_.driver.make_current(launcher_.device.ordinal);
            communicator_ = found->join(ids[0], rank, size);
            nccl_ = found;
            // What NCCL allocates and starts at its first call must be there before a graph is captured.
            Stream stream = nullptr;
            const Driver& driver = launcher_.driver;
            driver.check(driver.call.stream_create(&stream, kNonBlockingStream), "making a stream");
            const DevicePointer one = launcher_.allocate_zeroed(256);
            nccl_->all_reduce(one, one, 1, NcclType::kFloat32, communicator_, stream);
            driver.check(driver.call.stream_synchronize(stream), "the first all-reduce");
            driver.check(driver.call.stream_destroy(stream), "ending a stream");
        } catch (const GpuError& error) {
            trouble = error.what();
        }
        why_not = agree_on(mpi, trouble);
    }
    launcher_.driver.forget_error();  // that of a library that could not join
    const char* others = meetings_.empty() ? "; all" : "; more";
    if (why_not.empty()) {
        description += others + std::string(" through ") + nccl_->library + " " +
                       std::to_string(nccl_->version / 10000) + "." +
                       std::to_string(nccl_->version / 100 % 100) + "." +
                       std::to_string(nccl_->version % 100);
        return;
    }
    if (communicator_ != nullptr) nccl_->abandon(communicator_);
    communicator_ = nullptr;
    nccl_ = nullptr;
    can_be_captured = !meetings_.empty();
    description += others + std::string(" by way of the CPU, which is slow (") + why_not + ")";
}

const Meeting* Collectives::meeting(int64_t row_bytes, int64_t max_rows) const {
    for (const Meeting& meeting : meetings_) {
        if (meeting.row_bytes == row_bytes && meeting.max_rows == max_rows) return &meeting;
    }
    return nullptr;
}

void Collectives::expect_no_capture(Stream stream, const char* what) const {
    if (launcher_.driver.is_capturing(stream)) {
        throw GpuError(std::string(what) +
                       " by way of the CPU cannot be part of a graph, expected a step of its own");
    }
}

void Collectives::all_reduce(const void* x, void* y, int64_t n, Stream stream) {
    const auto from = reinterpret_cast<DevicePointer>(x), to = reinterpret_cast<DevicePointer>(y);
    const size_t count = static_cast<size_t>(n), bytes = count * sizeof(uint16_t);
    if (nccl_ != nullptr) {
        nccl_->all_reduce(from, to, count, NcclType::kFloat16, communicator_, stream);
        return;
    }
    expect_no_capture(stream, "AllReduce");
    const Driver& driver = launcher_.driver;
    if (halves_.size() < count) halves_.resize(count), sent_.resize(count);
    driver.check(driver.call.copy_out(halves_.data(), from, bytes, stream), "AllReduce");
    driver.check(driver.call.stream_synchronize(stream), "AllReduce");
    for (size_t i = 0; i < count; i++) sent_[i] = half_to_float(halves_[i]);
    llmpack::all_reduce(sent_.data(), sent_.data(), n);
    for (size_t i = 0; i < count; i++) halves_[i] = float_to_half(sent_[i]);
    driver.check(driver.call.copy_in(to, halves_.data(), bytes, stream), "AllReduce");
    driver.check(driver.call.stream_synchronize(stream),
                 "AllReduce");  // the buffer is used again by the next
}

}  // namespace llmpack::gpu
