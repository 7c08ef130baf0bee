// Which instruction-set levels run here, and which one is used.
//
// On x86 a level runs where the CPU has its instructions (CPUID) and the operating system saves its registers (XGETBV): a
// hypervisor or kernel may leave AVX-512 off on a CPU that has it, and a sandbox may refuse the tiles of AMX. On ARM the
// operating system says what may be used: NEON everywhere, more by AT_HWCAP on Linux and by sysctl on macOS.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "levels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__)
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#endif

namespace tinychat {
namespace {

#if defined(__x86_64__)
struct Features {
    bool avx2 = false, avxvnni = false, avx512 = false, vnni = false, amx = false;
};

// Linux keeps no room for a thread's tiles until the process asks once for all of its threads (arch_prctl(2)).
bool may_use_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

Features features() {
    Features found;
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return found;
    const unsigned fma = 1u << 12, osxsave = 1u << 27, avx = 1u << 28, f16c = 1u << 29;
    const unsigned needed = fma | osxsave | avx | f16c;
    if ((c & needed) != needed) return found;
    unsigned saved, high;  // XCR0: which registers the operating system saves
    __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    const bool saves_ymm = (saved & 0x6) == 0x6, saves_zmm = (saved & 0xe6) == 0xe6;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
    const unsigned avx2 = 1u << 5, f = 1u << 16, dq = 1u << 17, bw = 1u << 30, vl = 1u << 31;
    found.avx2 = saves_ymm && (b & avx2);
    found.avx512 = found.avx2 && saves_zmm && (b & (f | dq | bw | vl)) == (f | dq | bw | vl);
    found.vnni = found.avx512 && (c & 1u << 11);
    const unsigned amx_tile = 1u << 24, amx_int8 = 1u << 25;
    const bool saves_tiles = (saved & 0x60000) == 0x60000;
    found.amx = found.vnni && saves_tiles && (d & (amx_tile | amx_int8)) == (amx_tile | amx_int8) && may_use_tiles();
    found.avxvnni = found.avx2 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 4);
    return found;
}
#elif defined(__aarch64__)
struct Features {
    bool dotprod = false, i8mm = false;
};

#if defined(__APPLE__)
bool has(const char* feature) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(feature, &value, &size, nullptr, 0) == 0 && value != 0;
}
#endif

Features features() {
    Features found;
#if defined(__linux__)
    constexpr unsigned long kDotProduct = 1ul << 20, kMatrixProduct = 1ul << 13;  // of AT_HWCAP, of AT_HWCAP2
    found.dotprod = (getauxval(AT_HWCAP) & kDotProduct) != 0;
    found.i8mm = found.dotprod && (getauxval(AT_HWCAP2) & kMatrixProduct) != 0;
#elif defined(__APPLE__)
    found.dotprod = has("hw.optional.arm.FEAT_DotProd");
    found.i8mm = found.dotprod && has("hw.optional.arm.FEAT_I8MM");
#endif
    return found;
}
#endif

// Best first.
std::vector<Kernels> detect() {
    std::vector<Kernels> list;
#if defined(__x86_64__)
    const Features has = features();
    if (has.amx) list.push_back({"amx", linear_amx(), block_avx512(), attention_avx512(), &clip_avx512()});
    if (has.vnni) list.push_back({"avx512vnni", linear_avx512vnni(), block_avx512(), attention_avx512(), &clip_avx512()});
    if (has.avx512) list.push_back({"avx512", linear_avx512(), block_avx512(), attention_avx512(), &clip_avx512()});
    if (has.avxvnni) list.push_back({"avxvnni", linear_avxvnni(), block_avx2(), attention_avx2(), &clip_avx2()});
    if (has.avx2) list.push_back({"avx2", linear_avx2(), block_avx2(), attention_avx2(), &clip_avx2()});
#elif defined(__aarch64__)
    const Features has = features();
    if (has.i8mm) list.push_back({"i8mm", linear_i8mm(), block_neon(), attention_neon(), &clip_neon()});
    if (has.dotprod) list.push_back({"dotprod", linear_dotprod(), block_neon(), attention_neon(), &clip_neon()});
    list.push_back({"neon", linear_neon(), block_neon(), attention_neon(), &clip_neon()});
#endif
    list.push_back({"scalar", linear_scalar(), block_scalar(), attention_scalar(), nullptr});
    return list;
}

const std::vector<Kernels>& levels() {
    static const std::vector<Kernels> found = detect();
    return found;
}

}  // namespace

const char* supported_isas() {
    static const std::string names = [] {
        std::string joined;
        for (const Kernels& level : levels()) joined += (joined.empty() ? "" : " ") + std::string(level.isa);
        return joined;
    }();
    return names.c_str();
}

const Kernels& kernels(const char* isa) {
    for (const Kernels& level : levels()) {
        if (std::strcmp(level.isa, isa) == 0) return level;
    }
    throw std::runtime_error("instruction set '" + std::string(isa) + "' does not run here; supported: " + supported_isas());
}

const Kernels& kernels() {
    const char* isa = std::getenv("TINYCHAT_ISA");
    if (!isa || !*isa) return levels().front();
    for (const Kernels& level : levels()) {
        if (std::strcmp(level.isa, isa) == 0) return level;
    }
    throw std::runtime_error("TINYCHAT_ISA=" + std::string(isa) + " does not run here; supported: " + supported_isas());
}

}  // namespace tinychat
