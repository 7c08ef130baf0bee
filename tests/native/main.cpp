// The native tests: kernels, threads and the lowered decoder without Python, for sanitizers and cross builds.
//
//     cmake -S . -B build/native -DTINYCHAT_NATIVE_TESTS=ON [-DTINYCHAT_SANITIZE=address,undefined]
//     cmake --build build/native && build/native/native_tests
//         [arena] [attention] [block] [clip] [decoder] [draw] [linear] [macos] [packing] [team]
//
// TINYCHAT_ISA names the one level to test. For ARM, emulated: cmake/aarch64-linux-gnu.cmake.
#include <chrono>
#include <sstream>

#include "check.h"
#include "kernels.h"

namespace tinychat::test {

std::vector<std::string> isas() {
    std::istringstream names(supported_isas());
    std::vector<std::string> list;
    const char* only = std::getenv("TINYCHAT_ISA");
    for (std::string name; names >> name;) {
        if (!only || name == only) list.push_back(name);
    }
    if (list.empty()) check(false, std::string("no level ") + only + " here");
    return list;
}

}  // namespace tinychat::test

int main(int argc, char** argv) {
    using namespace tinychat::test;
    const auto run = [&](const char* name, void (*test)()) {
        bool asked = argc == 1;
        for (int i = 1; i < argc; i++) asked |= std::strcmp(argv[i], name) == 0;
        if (!asked) return;
        const auto begin = std::chrono::steady_clock::now();
        const int before = failures, done = checks;
        test();
        const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - begin;
        std::printf("%-9s %6d checks, %d failed, %.1f s\n", name, checks - done, failures - before, spent.count());
    };
    std::setvbuf(stdout, nullptr, _IOLBF, BUFSIZ);  // one that hangs is the one after the last line, in a file too
    std::printf("levels: %s\n", tinychat::supported_isas());
    run("arena", test_arena);
    run("attention", test_attention);
    run("block", test_block);
    run("clip", test_clip);
    run("decoder", test_decoder);
    run("draw", test_draw);
    run("linear", test_linear);
    run("macos", test_macos);
    run("packing", test_packing);
    run("team", test_team);
    std::printf("results: %016llx\n", static_cast<unsigned long long>(digest));
    return failures ? 1 : 0;
}
