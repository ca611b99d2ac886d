#include "cpu/isa.h"

#include <atomic>
#include <cstring>
#include <string>

#if defined(__x86_64__)
#    include <cpuid.h>
#elif defined(__aarch64__)
#    include <sys/auxv.h>
#endif

namespace llmpack {

namespace portable {
const Kernels& table();
}
#if defined(__x86_64__)
namespace avx2 {
const Kernels& table();
}
#    if defined(LLMPACK_HAS_AVX2_VNNI)
namespace avx2_vnni {
const Kernels& table();
}
#    endif
namespace avx512 {
const Kernels& table();
}
namespace avx512_vbmi {
const Kernels& table();
}
#elif defined(__aarch64__)
namespace neon {
const Kernels& table();
}
#endif

namespace {

bool always() { return true; }

#if defined(__x86_64__)
// __builtin_cpu_supports also asks whether the operating system saves the wide registers. It has no name for
// F16C in older compilers, so that bit is read directly.
bool has_avx2() {
    unsigned eax, ebx, ecx = 0, edx;
    bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
    return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
}
bool has_avx512_vbmi() { return has_avx512() && __builtin_cpu_supports("avx512vbmi"); }

#    if defined(LLMPACK_HAS_AVX2_VNNI)
// AVX-VNNI has no name for __builtin_cpu_supports in older compilers either.
bool has_avx2_vnni() {
    constexpr unsigned kAvxVnni = 1u << 4;
    unsigned eax, ebx, ecx, edx;
    return has_avx2() && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && eax >= 1 &&
           __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & kAvxVnni);
}
#    endif
#elif defined(__aarch64__)
// The kernels are compiled for Armv8.2, to which the dot products were added: a machine that has these has
// all of it.
bool has_neon_dot_products() {
    constexpr unsigned long kAsimdDotProduct = 1ul << 20;  // HWCAP_ASIMDDP
    return (getauxval(AT_HWCAP) & kAsimdDotProduct) != 0;
}
#endif

// Whether products read faster past the caches: on AMD's processors since Zen, and on Hygon's, which descend
// from them. Measured on Zen 5: 6 to 14 % of a decode step. On an Intel Xeon with AVX-512 a step took 1.65
// times as long (tests/benchmarks/LOG.md, 2026-11-26).
bool reads_faster_past_caches() {
#if defined(__x86_64__)
    constexpr unsigned kZen = 0x17;
    unsigned eax, vendor[3];
    if (!__get_cpuid(0, &eax, &vendor[0], &vendor[2], &vendor[1])) return false;
    if (std::memcmp(vendor, "AuthenticAMD", 12) != 0 && std::memcmp(vendor, "HygonGenuine", 12) != 0)
        return false;
    unsigned ebx, ecx, edx;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return false;
    return (eax >> 8 & 15) + (eax >> 20 & 255) >= kZen;
#else
    return false;
#endif
}

struct Level {
    const Kernels& (*table)();
    bool (*supported)();
};

// Best first.
constexpr Level kLevels[] = {
#if defined(__x86_64__)
    {avx512_vbmi::table, has_avx512_vbmi},
    {avx512::table, has_avx512},
#    if defined(LLMPACK_HAS_AVX2_VNNI)
    {avx2_vnni::table, has_avx2_vnni},
#    endif
    {avx2::table, has_avx2},
#elif defined(__aarch64__)
    {neon::table, has_neon_dot_products},
#endif
    {portable::table, always},
};

const Kernels* best() {
    for (const Level& level : kLevels) {
        if (level.supported()) return &level.table();
    }
    return nullptr;
}

std::atomic<const Kernels*>& current() {
    static std::atomic<const Kernels*> kernels{best()};
    return kernels;
}

std::atomic<WeightFetch>& current_fetch() {
    static std::atomic<WeightFetch> fetch{reads_faster_past_caches() ? WeightFetch::kPastCaches
                                                                     : WeightFetch::kThroughCaches};
    return fetch;
}

}  // namespace

WeightFetch weight_fetch() { return current_fetch().load(std::memory_order_relaxed); }

const char* name_of(WeightFetch fetch) {
    return fetch == WeightFetch::kPastCaches ? "past-caches" : "through-caches";
}

bool set_weight_fetch(const char* name) {
    for (WeightFetch fetch : {WeightFetch::kThroughCaches, WeightFetch::kPastCaches}) {
        if (std::strcmp(name, name_of(fetch)) != 0) continue;
        current_fetch().store(fetch, std::memory_order_relaxed);
        return true;
    }
    return false;
}

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

bool set_isa(const char* name) {
    for (const Level& level : kLevels) {
        if (std::strcmp(level.table().name, name) == 0 && level.supported()) {
            current().store(&level.table(), std::memory_order_relaxed);
            return true;
        }
    }
    return false;
}

const char* supported_isas() {
    static const std::string names = [] {
        std::string joined;
        for (const Level& level : kLevels) {
            if (!level.supported()) continue;
            if (!joined.empty()) joined += ", ";
            joined += level.table().name;
        }
        return joined;
    }();
    return names.c_str();
}

}  // namespace llmpack
