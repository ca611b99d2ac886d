#include "gpu/collectives.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <set>

#include "cpu/collectives_segment.h"
#include "gpu/half.h"

namespace llmpack::gpu {

namespace {

constexpr int64_t kFlagBytes = 128;  // one flag of a row; FORMAT.md 8.5
constexpr size_t kPage = 4096;

// Which GPU of which host a rank has.
struct Place {
    char host[64], pci_id[32];
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

size_t whole_pages(int64_t bytes) { return (static_cast<size_t>(bytes) + kPage - 1) / kPage * kPage; }

}  // namespace

Collectives::Collectives(Launcher& launcher, MpiTransport& mpi)
    : rank(mpi.rank), size(mpi.size), launcher_(launcher) {
    make_meetings(mpi);
    join_nccl(mpi);
}

Collectives::~Collectives() {
    if (communicator_ != nullptr) nccl_->abandon(communicator_);
    if (is_registered_) launcher_.driver.call.host_unregister(segment_.get());
}

void Collectives::make_meetings(MpiTransport& mpi) {
    const std::set<Need> wanted = needs(launcher_.file, size);
    if (wanted.empty()) {
        description = "no one-shot kernel for " + std::to_string(size) + " ranks in " + launcher_.file.path;
        return;
    }
    // A rank's part: for each need a buffer and its flags. Parts begin at pages.
    size_t part = 0;
    for (const Need& need : wanted) part += whole_pages(need.region_bytes());
    std::string why_not;
    segment_ = make_shared_segment(mpi, part * static_cast<size_t>(size), why_not);
    if (segment_ == nullptr) {
        description = "not one-shot: " + why_not;
        return;
    }
    const Driver& driver = launcher_.driver;
    DevicePointer base = 0;
    std::string trouble;
    try {
        driver.make_current(launcher_.device.ordinal);
        driver.check(
            driver.call.host_register(segment_.get(), part * static_cast<size_t>(size), kHostPortableMapped),
            "mapping host memory into the GPU");
        is_registered_ = true;
        driver.check(driver.call.host_pointer(&base, segment_.get(), 0), "mapping host memory into the GPU");
        size_t at = 0;
        for (const Need& need : wanted) {
            std::vector<uint64_t> buffers, flags;
            for (int r = 0; r < size; r++) {
                buffers.push_back(base + static_cast<size_t>(r) * part + at);
                flags.push_back(buffers.back() + static_cast<uint64_t>(2 * need.max_rows * need.row_bytes));
            }
            const size_t bytes = buffers.size() * sizeof(uint64_t);
            Meeting meeting{need.row_bytes, need.max_rows, launcher_.allocate_zeroed(bytes),
                            launcher_.allocate_zeroed(bytes),
                            launcher_.allocate_zeroed(static_cast<size_t>(need.max_rows) * sizeof(int32_t))};
            launcher_.upload(meeting.buffers, buffers.data(), bytes);
            launcher_.upload(meeting.flags, flags.data(), bytes);
            meetings_.push_back(meeting);
            at += whole_pages(need.region_bytes());
        }
    } catch (const GpuError& error) {
        trouble = error.what();
    }
    trouble = agree_on(mpi, trouble);
    if (!trouble.empty()) {
        meetings_.clear();
        description = "not one-shot: " + trouble;
        return;
    }
    int64_t most = 0;
    for (const Meeting& meeting : meetings_) most = std::max(most, meeting.max_rows);
    description = "up to " + std::to_string(most) + " rows one-shot through mapped host memory";
}

void Collectives::join_nccl(MpiTransport& mpi) {
    std::string why_not;
    const Nccl* found = Nccl::get(launcher_.settings.vendor, why_not);
    Place own{};
    if (gethostname(own.host, sizeof(own.host) - 1) != 0) own.host[0] = 0;
    std::snprintf(own.pci_id, sizeof(own.pci_id), "%s", launcher_.device.pci_id.c_str());
    std::vector<Place> places(static_cast<size_t>(size));
    mpi.allgather(&own, places.data(), sizeof(Place));
    std::set<std::string> different;
    for (const Place& place : places) different.insert(std::string(place.host) + " " + place.pci_id);
    if (different.size() < places.size()) why_not = "ranks share a GPU, which NCCL does not allow";
    NcclId id{};
    std::vector<NcclId> ids(static_cast<size_t>(size));
    if (why_not.empty() && rank == 0) {
        try {
            id = found->new_id();
        } catch (const GpuError& error) {
            why_not = error.what();
        }
    }
    why_not = agree_on(mpi, found == nullptr ? why_not : why_not.empty() ? "" : why_not);
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
