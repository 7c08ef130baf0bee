// Which levels a Mac is given: csrc/isa.cpp compiled as for macOS on ARM, with a sysctlbyname that answers as machines do.
//
// Names and answers: xnu's tests/arm_cpu_capabilities.c, and what `sysctl hw.optional` prints on an M1 and an M2.
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"

#undef __x86_64__
#undef __linux__
#undef __aarch64__
#undef __APPLE__
#define __aarch64__ 1
#define __APPLE__ 1
#define tinychat tinychat_of_macos  // beside the levels of this machine
#include "../../csrc/isa.cpp"

namespace {

using Answers = std::map<std::string, int>;
Answers machine;

}  // namespace

int pretended_sysctlbyname(const char* name, void* value, size_t* size, void* new_value, size_t new_size) {
    const auto found = machine.find(name);
    if (new_value || new_size || found == machine.end()) {
        errno = new_value || new_size ? EPERM : ENOENT;
        return -1;
    }
    if (*size < sizeof found->second) {
        errno = ENOMEM;
        return -1;
    }
    std::memcpy(value, &found->second, *size = sizeof found->second);
    return 0;
}

namespace tinychat {

// Nothing is computed here: tables of no kernels.
const LinearKernels& linear_scalar() { static const LinearKernels none{}; return none; }
const LinearKernels& linear_neon() { return linear_scalar(); }
const LinearKernels& linear_dotprod() { return linear_scalar(); }
const LinearKernels& linear_i8mm() { return linear_scalar(); }
const BlockKernels& block_scalar() { static const BlockKernels none{}; return none; }
const BlockKernels& block_neon() { return block_scalar(); }
const AttentionKernels& attention_scalar() { static const AttentionKernels none{}; return none; }
const AttentionKernels& attention_neon() { return attention_scalar(); }
const ClipKernels& clip_neon() { static const ClipKernels none{}; return none; }

}  // namespace tinychat

namespace {

std::string levels_of(const Answers& answers) {
    machine = answers;
    std::string names;
    for (const tinychat::Kernels& level : tinychat::detect()) names += (names.empty() ? "" : " ") + std::string(level.isa);
    return names;
}

}  // namespace

#undef tinychat

void tinychat::test::test_macos() {
    const char *dot = "hw.optional.arm.FEAT_DotProd", *matrix = "hw.optional.arm.FEAT_I8MM";
    const auto expect = [](const char* what, const Answers& answers, const char* expected) {
        const std::string found = levels_of(answers);
        check(found == expected, std::string(what) + " has the levels " + found + ", not " + expected);
    };
    expect("an M1", {{dot, 1}, {matrix, 0}}, "dotprod neon scalar");
    expect("an M2", {{dot, 1}, {matrix, 1}}, "i8mm dotprod neon scalar");
    expect("a CPU without either, as a Cortex-A72", {{dot, 0}, {matrix, 0}}, "neon scalar");
    expect("a system that knows dot products only", {{dot, 1}}, "dotprod neon scalar");
    expect("macOS 11, which knows neither name", {{"hw.optional.neon", 1}, {"hw.optional.armv8_2_fhm", 1}}, "neon scalar");
    expect("products of matrices without dot products", {{dot, 0}, {matrix, 1}}, "neon scalar");
}
