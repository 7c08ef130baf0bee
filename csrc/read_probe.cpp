#include "read_probe.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>
#include <vector>

#include "levels.h"

namespace tinychat {
namespace {

using Read = uint64_t (*)(const void*, int64_t);
using Clock = std::chrono::steady_clock;

#if defined(__x86_64__)
constexpr int64_t kSlices = 12, kSlice = 4 << 20;

// Whichever is faster here: each reads every second slice of the data, and its best counts.
Read faster(Read a, Read b, const void* data) {
    Clock::duration best[2] = {Clock::duration::max(), Clock::duration::max()};
    std::atomic<uint64_t> seen{0};  // a result that nobody uses would not be read
    for (int64_t i = 0; i < kSlices; i++) {
        const Clock::time_point begin = Clock::now();
        seen += (i % 2 ? b : a)(static_cast<const char*>(data) + i * kSlice, kSlice);
        best[i % 2] = std::min(best[i % 2], Clock::now() - begin);
    }
    return best[1] < best[0] ? b : a;
}
#endif

Read widest([[maybe_unused]] const void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__x86_64__)
    // Little data does not tell which is faster, and is read as more was before it, if any was.
    static std::atomic<Read> chosen{nullptr};
    const auto choose = [&](Read plain, Read ahead) {
        if (!chosen && bytes >= kSlices * kSlice) chosen = faster(plain, ahead, data);
        const Read known = chosen;
        return known ? known : plain;
    };
    if (std::strstr(supported_isas(), "avx512")) return choose(read_avx512, read_ahead_avx512);
    if (std::strstr(supported_isas(), "avx2")) return choose(read_avx2, read_ahead_avx2);
#elif defined(__aarch64__)
    if (std::strcmp(supported_isas(), "scalar") != 0) return read_neon;
#endif
    return read_scalar;
}

}  // namespace

double read_probe(const void* data, int64_t bytes, int threads) {
    const Read read = widest(data, bytes);
    const int64_t part = bytes / threads / 64 * 64;
    std::atomic<int> ready{0};
    std::atomic<bool> begun{false};
    std::atomic<uint64_t> seen{0};  // a result that nobody uses would not be read
    const auto take = [&](int thread) { seen += read(static_cast<const char*>(data) + thread * part, part); };
    std::vector<std::thread> helpers;
    const auto join = [&] {
        begun = true;
        for (std::thread& helper : helpers) helper.join();
    };
    try {
        for (int thread = 1; thread < threads; thread++) {
            helpers.emplace_back([&, thread] {
                ready++;
                while (!begun) std::this_thread::yield();
                take(thread);
            });
        }
    } catch (...) {
        join();
        throw;
    }
    while (ready < threads - 1) std::this_thread::yield();
    const Clock::time_point start = Clock::now();
    begun = true;
    take(0);
    join();
    return std::chrono::duration<double>(Clock::now() - start).count();
}

}  // namespace tinychat
