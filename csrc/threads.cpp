#include "threads.h"

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

// A phase of a step lasts microseconds, so waiting threads spin; but a thread that waits for one the system has set
// aside only steals its core, so after some ten microseconds they sleep. (Yielding instead puts a thread behind every
// other process on the machine, over and over.)
constexpr int kSpins = 2000;

void pause_briefly() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("isb");
#endif
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
    for (int index = 1; index < size_; ++index) helpers_.emplace_back([this, index] { help(index); });
}

Team::~Team() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        closing_ = true;
    }
    wake_.notify_all();
    for (std::thread& helper : helpers_) helper.join();
}

bool Team::alive() const { return process_ == this_process(); }

void Team::run(const std::function<void(Share)>& work) {
    if (size_ > 1) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            work_ = &work;
            ++run_;
        }
        wake_.notify_all();
    }
    work({0, size_});
    barrier();
}

void Team::help(int index) {
    for (uint64_t runs = 0;;) {
        const std::function<void(Share)>* work;
        {
            std::unique_lock<std::mutex> lock(mutex_);
            wake_.wait(lock, [&] { return closing_ || run_ != runs; });
            if (closing_) return;
            runs = run_;
            work = work_;
        }
        (*work)({index, size_});
        barrier();
    }
}

void Team::barrier() {
    if (size_ == 1) return;
    const uint32_t generation = generation_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
        arrived_.store(0, std::memory_order_relaxed);
        generation_.store(generation + 1);
        // In one order for all threads: either this sees the sleeper, or the sleeper sees the new generation.
        if (sleepers_.load() > 0) {
            { std::lock_guard<std::mutex> lock(mutex_); }
            passed_.notify_all();
        }
        return;
    }
    for (int looks = 0; looks < kSpins; ++looks) {
        if (generation_.load(std::memory_order_acquire) != generation) return;
        pause_briefly();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    sleepers_.fetch_add(1);
    passed_.wait(lock, [&] { return generation_.load() != generation; });
    sleepers_.fetch_sub(1);
}

}  // namespace tinychat
