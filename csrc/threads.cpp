#include "threads.h"

#include <algorithm>

#if defined(_WIN32)
#include <process.h>
#else
#include <unistd.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace tinychat {
namespace {

using std::chrono::microseconds;

// A phase of a step lasts microseconds, so a thread that waits spins; but where threads are more than cores it only takes
// the core from one that works, so it soon sleeps, and a sleeper is not called at every phase.
constexpr microseconds kSpin{20}, kBetweenCalls{100};
constexpr int kPartsPerThread = 4;  // more even shares, for more claims

void pause_briefly() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("isb");
#endif
}

// Whether `ready` came true within a short while.
template <class Ready>
bool soon(const Ready& ready) {
    const auto end = std::chrono::steady_clock::now() + kSpin;
    do {
        if (ready()) return true;
        pause_briefly();
    } while (std::chrono::steady_clock::now() < end);
    return false;
}

int64_t this_process() {
#if defined(_WIN32)
    return _getpid();
#else
    return getpid();
#endif
}

}  // namespace

Team::Team(int n_threads) : size_(n_threads), process_(this_process()) {
    try {
        for (int thread = 1; thread < size_; ++thread) helpers_.emplace_back([this, thread] { help(thread); });
    } catch (...) {
        close();  // or the threads that did start would end the process
        throw;
    }
}

Team::~Team() { close(); }

void Team::close() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        closing_ = true;
    }
    called_.notify_all();
    for (std::thread& helper : helpers_) helper.join();
}

bool Team::alive() const { return process_ == this_process(); }

void Team::run(Job job) {
    job.parts = static_cast<int>(std::min<int64_t>(job.items, int64_t{kPartsPerThread} * size_));
    if (size_ == 1 || job.parts <= 1) {
        if (job.items > 0) job.call(job.work, {0, job.items}, 0);
        return;
    }
    job_ = job;
    unfinished_.store(job.parts, std::memory_order_relaxed);
    unclaimed_.store(job.parts);
    take_parts(0);
    const auto finished = [&] { return unfinished_.load() == 0; };
    if (soon(finished)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    // Of this store and the load in finished(), and of those in take_parts(), one order for all threads: either the last
    // part's thread sees the sleeper, or the sleeper sees that it is done.
    caller_sleeps_.store(true);
    finished_.wait(lock, finished);
    caller_sleeps_.store(false);
}

void Team::take_parts(int thread) {
    for (int left = unclaimed_.load(); left > 0;) {
        if (thread == 0 && sleepers_.load() > 0) call_helpers();
        if (!unclaimed_.compare_exchange_weak(left, left - 1)) continue;
        const int64_t part = left - 1;
        job_.call(job_.work, {job_.items * part / job_.parts, job_.items * (part + 1) / job_.parts}, thread);
        if (unfinished_.fetch_sub(1) == 1 && caller_sleeps_.load()) {
            { std::lock_guard<std::mutex> lock(mutex_); }
            finished_.notify_one();
        }
        left = unclaimed_.load();
    }
}

void Team::call_helpers() {
    const auto now = Clock::now();
    if (now - last_call_ < kBetweenCalls) return;
    last_call_ = now;
    {
        std::lock_guard<std::mutex> lock(mutex_);
        ++calls_;
    }
    called_.notify_all();
}

void Team::help(int thread) {
    for (uint64_t calls = 0;;) {
        while (soon([&] { return unclaimed_.load() > 0; })) take_parts(thread);
        std::unique_lock<std::mutex> lock(mutex_);
        sleepers_.fetch_add(1);
        called_.wait(lock, [&] { return closing_ || calls_ != calls || unclaimed_.load() > 0; });
        sleepers_.fetch_sub(1);
        if (closing_) return;
        calls = calls_;
    }
}

}  // namespace tinychat
