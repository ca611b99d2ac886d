// The functions of llmpack_ops.h that concern GPUs.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "cpu/collectives_mpi.h"
#include "gpu/collectives.h"
#include "gpu/launcher.h"
#include "guarded.h"

namespace llmpack::gpu {
namespace {

Vendor vendor_of(int number) {
    if (number != 0 && number != 1) throw GpuError("vendor " + std::to_string(number) + ", expected 0 or 1");
    return static_cast<Vendor>(number);
}

std::string quoted(const std::string& text) {
    std::string out = "\"";
    for (const char c : text) {
        if (c == '"' || c == '\\') out += '\\';
        out += static_cast<unsigned char>(c) < 32 ? ' ' : c;
    }
    return out + "\"";
}

void give(const std::string& json, char* to, int64_t size) {
    if (static_cast<int64_t>(json.size()) >= size) {
        throw GpuError(std::to_string(size) + " bytes, expected " + std::to_string(json.size() + 1));
    }
    std::memcpy(to, json.c_str(), json.size() + 1);
}

// Pinned pages, device buffers, a stream and two events, given back at the end.
class Bench {
  public:
    Bench(const Driver& driver, int device, size_t bytes) : driver_(driver), bytes_(bytes) {
        const auto& call = driver.call;
        driver.make_current(device);
        undo_.steps.push_back([&driver] { driver.forget_error(); });
        host_.reset(std::aligned_alloc(4096, bytes));
        if (host_ == nullptr) throw GpuError("no memory for a measurement");
        std::memset(host_.get(), 1, bytes);
        driver.check(call.host_register(host_.get(), bytes, kHostPortableMapped), "pinning host memory");
        undo_.steps.push_back([this, &call] { call.host_unregister(host_.get()); });
        for (DevicePointer* memory : {&first, &second}) {
            driver.check(call.allocate(memory, bytes), "allocating GPU memory");
            undo_.steps.push_back([memory, &call] { call.release(*memory); });
        }
        driver.check(call.stream_create(&stream, kNonBlockingStream), "making a stream");
        undo_.steps.push_back([this, &call] { call.stream_destroy(stream); });
        for (Event* event : {&start_, &end_}) {
            driver.check(call.event_create(event, kTimingEvent), "making an event");
            undo_.steps.push_back([event, &call] { call.event_destroy(*event); });
        }
    }
    // Bytes a second: the best of several, after one that warms up.
    template <class Copy>
    double rate(const Copy& copy) {
        double best = 0;
        for (int i = 0; i < 6; i++) {
            driver_.check(driver_.call.event_record(start_, stream), "timing");
            driver_.check(copy(), "copying");
            driver_.check(driver_.call.event_record(end_, stream), "timing");
            driver_.check(driver_.call.event_synchronize(end_), "timing");
            float milliseconds = 0;
            driver_.check(driver_.call.event_elapsed(&milliseconds, start_, end_), "timing");
            const double rate = static_cast<double>(bytes_) / (1e-3 * std::max(milliseconds, 1e-6f));
            if (i > 0) best = std::max(best, rate);
        }
        return best;
    }
    char* host() { return static_cast<char*>(host_.get()); }

    DevicePointer first = 0, second = 0;
    Stream stream = nullptr;

  private:
    struct Free {
        void operator()(void* memory) const { std::free(memory); }
    };
    const Driver& driver_;
    const size_t bytes_;
    std::unique_ptr<void, Free> host_;
    Event start_ = nullptr, end_ = nullptr;
    // A member, and the last: it undoes what was made where the constructor throws, too.
    struct Undo {
        std::vector<std::function<void()>> steps;
        ~Undo() {
            for (; !steps.empty(); steps.pop_back()) steps.back()();
        }
    } undo_;
};

std::string measure(Vendor vendor, int device, int peer) {
    constexpr size_t kBytes = 64 << 20;
    const Driver& driver = Driver::get(vendor);
    char text[256];
    Bench own(driver, device, kBytes);
    const double in =
        own.rate([&] { return driver.call.copy_in(own.first, own.host(), kBytes, own.stream); });
    const double out =
        own.rate([&] { return driver.call.copy_out(own.host(), own.first, kBytes, own.stream); });
    const double copy =
        2 * own.rate([&] { return driver.call.copy_within(own.second, own.first, kBytes, own.stream); });
    std::snprintf(text, sizeof(text),
                  "{\"host_to_device_bytes_per_s\": %.6g, \"device_to_host_bytes_per_s\": %.6g, "
                  "\"copy_bytes_per_s\": %.6g",
                  in, out, copy);
    std::string json = text;
    if (peer >= 0) {
        // The driver's word is not enough: consumer cards claim access and refuse it, or lose what is
        // written.
        bool works = driver.open_peer_access(device, peer);
        double rate = 0;
        if (works) {
            Bench other(driver, peer, kBytes);
            driver.make_current(device);
            std::memset(own.host(), 0x5a, kBytes);
            driver.check(driver.call.copy_in(own.first, own.host(), kBytes, own.stream), "copying");
            rate =
                own.rate([&] { return driver.call.copy_within(other.first, own.first, kBytes, own.stream); });
            driver.make_current(peer);
            driver.check(driver.call.copy_out(other.host(), other.first, kBytes, other.stream), "copying");
            driver.check(driver.call.stream_synchronize(other.stream), "copying");
            works = std::memcmp(own.host(), other.host(), kBytes) == 0;
        }
        std::snprintf(text, sizeof(text), ", \"peer_access\": %s, \"peer_bytes_per_s\": %.6g",
                      works ? "true" : "false", works ? rate : 0.0);
        json += text;
    }
    return json + "}";
}

double time_all_reduce(int64_t rows, int64_t columns, int repeats) {
    Launcher& launcher = Launcher::current();
    if (launcher.collectives == nullptr) throw GpuError("the ranks' GPUs are not joined");
    Collectives& ranks = *launcher.collectives;
    const Driver& driver = launcher.driver;
    driver.make_current(launcher.device.ordinal);
    const int64_t n = rows * columns;
    const DevicePointer memory = launcher.allocate_zeroed(static_cast<size_t>(n) * 2);
    void* x = reinterpret_cast<void*>(memory);
    Operation one_shot;
    const Meeting* meeting = nullptr;
    for (const KernelRecord& record : launcher.file.kernels) {
        if (record.op != "all_reduce" || record.constants.at("in_features") != columns) continue;
        one_shot = launcher.operation("all_reduce", {{"in_features", columns}, {"ranks", ranks.size}},
                                      {{"x", Argument::kPointer},
                                       {"y", Argument::kPointer},
                                       {"buffers", Argument::kPointer},
                                       {"flags", Argument::kPointer},
                                       {"epochs", Argument::kPointer},
                                       {"rank", Argument::kInteger}});
        meeting = ranks.meeting(columns * 2, one_shot.most_rows());
        break;
    }
    Stream stream = nullptr;
    driver.check(driver.call.stream_create(&stream, kNonBlockingStream), "making a stream");
    const auto once = [&] {
        if (meeting != nullptr && rows <= meeting->max_rows) {
            one_shot.launch({rows}, {x, x, meeting->buffers, meeting->flags, meeting->epochs, ranks.rank},
                            stream);
        } else {
            ranks.all_reduce(x, x, n, stream);
        }
    };
    for (int i = 0; i < 10; i++) once();
    driver.check(driver.call.stream_synchronize(stream), "timing an all-reduce");
    const auto began = std::chrono::steady_clock::now();
    for (int i = 0; i < repeats; i++) once();
    driver.check(driver.call.stream_synchronize(stream), "timing an all-reduce");
    const std::chrono::duration<double, std::micro> passed = std::chrono::steady_clock::now() - began;
    driver.check(driver.call.stream_destroy(stream), "ending a stream");
    return passed.count() / repeats;
}

}  // namespace
}  // namespace llmpack::gpu

using llmpack::guarded;
using namespace llmpack::gpu;

extern "C" {

int llmpack_ops_gpu_probe(int vendor, char* json, int64_t size) {
    return guarded("llmpack_ops_gpu_probe", [&] {
        const Driver& driver = Driver::get(vendor_of(vendor));
        std::string text = "{\"library\": " + quoted(driver.library) +
                           ", \"version\": " + quoted(version_text(driver.vendor, driver.version)) +
                           ", \"devices\": [";
        const int count = driver.device_count();
        for (int i = 0; i < count; i++) {
            const DeviceFacts facts = driver.device_facts(i);
            text += std::string(i > 0 ? ", " : "") + "{\"ordinal\": " + std::to_string(i) +
                    ", \"name\": " + quoted(facts.name) + ", \"chip\": " + quoted(facts.chip) +
                    ", \"pci_id\": " + quoted(facts.pci_id) +
                    ", \"multiprocessors\": " + std::to_string(facts.multiprocessors) +
                    ", \"total_bytes\": " + std::to_string(facts.total_bytes) + "}";
        }
        give(text + "]}", json, size);
    });
}

int llmpack_ops_gpu_free_bytes(int vendor, int device, int64_t* bytes) {
    return guarded("llmpack_ops_gpu_free_bytes",
                   [&] { *bytes = static_cast<int64_t>(Driver::get(vendor_of(vendor)).free_bytes(device)); });
}

int llmpack_ops_gpu_open(const LlmpackGpu* gpu) {
    bool is_refused = false;
    const int code = guarded("llmpack_ops_gpu_open", [&] {
        if (gpu->struct_size != static_cast<int32_t>(sizeof(LlmpackGpu))) {
            throw GpuError("struct has " + std::to_string(gpu->struct_size) + " bytes, expected " +
                           std::to_string(sizeof(LlmpackGpu)));
        }
        if (gpu->max_rows < 1 || gpu->max_sequences < 1)
            throw GpuError("max_rows or max_sequences is less than 1");
        try {
            Launcher::open(
                {vendor_of(gpu->vendor), gpu->device, gpu->kernels, gpu->max_rows, gpu->max_sequences});
        } catch (const RefusedCode&) {
            is_refused = true;
            throw;
        }
    });
    return is_refused ? LLMPACK_GPU_CODE_REFUSED : code;
}

int llmpack_ops_gpu_close(void) {
    return guarded("llmpack_ops_gpu_close", [] { Launcher::close(); });
}

int llmpack_ops_gpu_allocate(int64_t bytes, void** memory) {
    return guarded("llmpack_ops_gpu_allocate", [&] {
        if (bytes < 1) throw GpuError(std::to_string(bytes) + " bytes, expected 1 or more");
        *memory = reinterpret_cast<void*>(Launcher::current().allocate_zeroed(static_cast<size_t>(bytes)));
    });
}

int llmpack_ops_gpu_free(void* memory) {
    return guarded("llmpack_ops_gpu_free",
                   [&] { Launcher::current().release(reinterpret_cast<DevicePointer>(memory)); });
}

int llmpack_ops_gpu_fill(void* memory, int byte, int64_t bytes) {
    return guarded("llmpack_ops_gpu_fill", [&] {
        Launcher::current().fill(reinterpret_cast<DevicePointer>(memory), static_cast<unsigned char>(byte),
                                 static_cast<size_t>(bytes));
    });
}

int llmpack_ops_gpu_share(void) {
    return guarded("llmpack_ops_gpu_share", [] {
        Launcher& launcher = Launcher::current();
        llmpack::MpiTransport* mpi = llmpack::mpi_transport();
        if (mpi == nullptr)
            throw GpuError("no communicator is set, expected llmpack_ops_set_communicator before");
        launcher.collectives.reset();
        launcher.collectives = std::make_unique<Collectives>(launcher, *mpi);
    });
}

const char* llmpack_ops_gpu_transport(int* can_be_captured) {
    const bool is_joined = Launcher::is_open() && Launcher::current().collectives != nullptr;
    if (can_be_captured != nullptr)
        *can_be_captured = !is_joined || Launcher::current().collectives->can_be_captured;
    return is_joined ? Launcher::current().collectives->description.c_str() : "";
}

int llmpack_ops_gpu_measure(int vendor, int device, int peer, char* json, int64_t size) {
    return guarded("llmpack_ops_gpu_measure",
                   [&] { give(measure(vendor_of(vendor), device, peer), json, size); });
}

int llmpack_ops_gpu_time_all_reduce(int64_t rows, int64_t columns, int repeats, double* microseconds) {
    return guarded("llmpack_ops_gpu_time_all_reduce",
                   [&] { *microseconds = time_all_reduce(rows, columns, repeats); });
}

}  // extern "C"
