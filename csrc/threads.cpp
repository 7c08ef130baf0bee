#include "threads.h"

#include <algorithm>

#if defined(__linux__)
#include <sched.h>
#endif
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

// A phase of a step lasts microseconds, and to wake a sleeper takes tens of them: so within a step a thread that waits
// stays awake, at first spinning, then yielding at each turn, and sleeps only where the step seems to be stuck. After a step
// it waits for the next one a little. Where threads are more than may run at once, one that spins takes the core from one
// that works, so it soon sleeps, and a sleeper is not called at every phase.
constexpr microseconds kSpinCrowded{20}, kSpin{100}, kBetweenSteps{100}, kStuck{5000}, kBetweenCalls{100};

// A share is cut in half, and what is left of it again, into so many parts: all threads end with small ones, and so at
// about the same time, for few claims.
constexpr int kParts = 8;

// Parts of n items, or of n pieces of several.
int parts_of(int64_t n) {
    int parts = 0;
    while (parts < kParts && n >> parts) ++parts;
    return parts;
}

// Where part i of n begins.
int64_t cut(int64_t n, int i) { return i < kParts ? n - (n >> i) : n; }

int64_t pieces(Range items, int64_t least) { return (items.end - items.begin + least - 1) / least; }

void pause_briefly() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("isb");
#endif
}

// On how many cores threads may run.
int usable_cpus() {
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
    return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
}

}  // namespace

int64_t this_process() {
#if defined(_WIN32)
    return _getpid();
#else
    return getpid();
#endif
}

Team::Team(int n_threads, int granted)
    : size_(n_threads), granted_(granted), process_(this_process()), shares_(static_cast<size_t>(n_threads)) {
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

void Team::wake() {
    crowded_.store(size_ > std::min(usable_cpus(), granted_), std::memory_order_relaxed);
    awake_.store(true, std::memory_order_relaxed);
    if (sleepers_.load() > 0) call_helpers();
}

// Whether `ready` came true before it was time to sleep.
template <class Ready>
bool Team::soon(const Ready& ready) const {
    const auto begin = Clock::now();
    for (;;) {
        for (int i = 0; i < 8; ++i) {
            if (ready()) return true;
            pause_briefly();
        }
        const auto waited = Clock::now() - begin;
        const bool crowded = crowded_.load(std::memory_order_relaxed), awake = awake_.load(std::memory_order_relaxed);
        if (waited > (crowded ? kSpinCrowded : awake ? kStuck : kBetweenSteps)) return ready();
        if (waited > kSpin) std::this_thread::yield();
    }
}

template <class Work>
void Team::timed(int thread, const Work& work) {
    if (!profiling_.load(std::memory_order_relaxed)) return work();
    const auto begin = Clock::now();
    work();
    const auto spent = std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - begin).count();
    shares_[static_cast<size_t>(thread)].busy_ns.fetch_add(spent, std::memory_order_relaxed);
}

void Team::run(Job job) {
    if (size_ == 1 || job.items <= 1) {
        timed(0, [&] {
            if (job.items > 0) job.call(job.work, {0, job.items}, 0);
        });
        return;
    }
    job_ = job;
    int parts = 0;
    for (int thread = 0; thread < size_; ++thread) {
        Share& share = shares_[static_cast<size_t>(thread)];
        share.items = {job.items * thread / size_, job.items * (thread + 1) / size_};
        share.parts = parts_of(pieces(share.items, job.least));
        parts += share.parts;
    }
    unfinished_.store(parts, std::memory_order_relaxed);
    for (Share& share : shares_) share.left.store(share.parts);
    rounds_.fetch_add(1);
    take_parts(0);
    const auto finished = [&] { return unfinished_.load() == 0; };
    if (finished() || soon(finished)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    // Of this store and the load in finished(), and of those in take_parts(), one order for all threads: either the last
    // part's thread sees the sleeper, or the sleeper sees that it is done.
    caller_sleeps_.store(true);
    finished_.wait(lock, finished);
    caller_sleeps_.store(false);
}

void Team::take_parts(int thread) {
    int done = 0;
    timed(thread, [&] { done = do_parts(thread); });
    if (done && unfinished_.fetch_sub(done) == done && caller_sleeps_.load()) {
        { std::lock_guard<std::mutex> lock(mutex_); }
        finished_.notify_one();
    }
}

// Claims parts and does them, the thread's own first, until none is left; how many. All are of one job: the next begins
// when take_parts() has told of them.
int Team::do_parts(int thread) {
    int done = 0;
    for (int i = 0; i < size_; ++i) {
        Share& share = shares_[static_cast<size_t>((thread + i) % size_)];
        for (int left = share.left.load(); left > 0;) {
            if (thread == 0 && sleepers_.load() > 0) call_helpers();
            if (!share.left.compare_exchange_weak(left, left - 1)) continue;
            const int part = share.parts - left;
            const int64_t n = pieces(share.items, job_.least);
            const int64_t begin = share.items.begin + cut(n, part) * job_.least;
            const int64_t end = share.items.begin + cut(n, part + 1) * job_.least;
            job_.call(job_.work, {begin, std::min(end, share.items.end)}, thread);
            ++done;
            left = share.left.load();
        }
    }
    return done;
}

int64_t Team::busy_ns() const {
    int64_t sum = 0;
    for (const Share& share : shares_) sum += share.busy_ns.load(std::memory_order_relaxed);
    return sum;
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
    uint64_t calls = 0, rounds = 0;
    const auto next_round = [&] { return rounds_.load() != rounds; };
    for (;;) {
        while (soon(next_round)) {
            rounds = rounds_.load();
            take_parts(thread);
        }
        std::unique_lock<std::mutex> lock(mutex_);
        sleepers_.fetch_add(1);
        called_.wait(lock, [&] { return closing_ || calls_ != calls || next_round(); });
        sleepers_.fetch_sub(1);
        if (closing_) return;
        calls = calls_;
    }
}

}  // namespace tinychat
