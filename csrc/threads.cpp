#include "threads.h"

#include <algorithm>

#if defined(__linux__)
#include <sched.h>
#endif
#if !defined(_WIN32)
#include <pthread.h>
#include <unistd.h>
#endif
#if defined(_M_X64)
#include <intrin.h>
#elif defined(__x86_64__)
#include <x86intrin.h>
#endif

namespace tinychat {
namespace {

using std::chrono::microseconds;

// A phase of a step lasts microseconds, and to wake a sleeper takes tens of them: so within a step a thread that waits
// stays awake, at first spinning, then yielding at each turn, and sleeps only where the step seems to be stuck. After a step
// it waits for the next one a little. Where threads are more than may run at once, one that spins takes the core from one
// that works, so it soon sleeps, and a sleeper is not called at every phase.
constexpr microseconds kSpinCrowded{20}, kSpin{100}, kBetweenSteps{100}, kStuck{5000}, kBetweenCalls{100};
constexpr microseconds kBetweenLooks{10000};  // at the cores that there are

// A share is cut in half, and what is left of it again, into so many parts: all threads end with small ones, and so at
// about the same time, for few claims.
constexpr uint64_t kParts = 8;

// How often a thread that has done its own share asks whether the round is over, before it looks for parts of the others'
// shares to do: to look there takes a line of cache from its owner, who most often is about to end.
constexpr int kPatience = 24;

// A round and the next part of a share in it, as one number that grows with both.
constexpr uint64_t kPartBits = 4;
static_assert(kParts < 1 << kPartBits);
uint64_t next_part(uint64_t round, uint64_t part) { return round << kPartBits | part; }

// What one thread of `size` begins with of `items`, cut in parts of `least` items and more.
class Share {
  public:
    Share(int64_t items, int64_t least, int thread, int size)
        : begin_(items * thread / size), end_(items * (thread + 1) / size), least_(least),
          pieces_((end_ - begin_ + least - 1) / least) {
        while (parts_ < kParts && pieces_ >> parts_) ++parts_;
    }

    uint64_t parts() const { return parts_; }
    Range part(uint64_t i) const { return {cut(i), std::min(cut(i + 1), end_)}; }

  private:
    // Where part i begins.
    int64_t cut(uint64_t i) const { return begin_ + (i < kParts ? pieces_ - (pieces_ >> i) : pieces_) * least_; }

    int64_t begin_, end_, least_, pieces_;
    uint64_t parts_ = 0;
};

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

#if defined(_WIN32)
int64_t this_process() { return 1; }  // nothing forks
#else
int64_t this_process() {
    static std::atomic<int64_t> generation{1};  // to ask the system would take a thousandth of a small model's step
    static const int registered = pthread_atfork(nullptr, nullptr, [] { ++generation; });
    return registered == 0 ? generation.load(std::memory_order_relaxed) : getpid();
}
#endif

uint64_t ticks() {
#if defined(__x86_64__) || defined(_M_X64)
    return __rdtsc();
#elif defined(__aarch64__)
    uint64_t count;
    asm volatile("mrs %0, cntvct_el0" : "=r"(count));
    return count;
#else
    return static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count());
#endif
}

Team::Team(int n_threads, int granted)
    : size_(n_threads), granted_(granted), process_(this_process()), next_(static_cast<size_t>(n_threads)),
      busy_(static_cast<size_t>(n_threads)) {
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
    const auto now = Clock::now();
    if (now - last_look_ > kBetweenLooks) {
        last_look_ = now;
        crowded_.store(size_ > std::min(usable_cpus(), granted_), std::memory_order_relaxed);
    }
    awake_.store(true, std::memory_order_relaxed);
    if (sleepers_.load() > 0) call_helpers();
}

// Whether `ready` came true before it was time to sleep.
template <class Ready>
bool Team::soon(const Ready& ready) const {
    const auto spun = [&] {
        for (int i = 0; i < 8; ++i) {
            if (ready()) return true;
            pause_briefly();
        }
        return false;
    };
    if (spun()) return true;  // most often, before there is need of a clock
    const auto begin = Clock::now();
    while (!spun()) {
        const auto waited = Clock::now() - begin;
        const bool crowded = crowded_.load(std::memory_order_relaxed), awake = awake_.load(std::memory_order_relaxed);
        if (waited > (crowded ? kSpinCrowded : awake ? kStuck : kBetweenSteps)) return ready();
        if (waited > kSpin) std::this_thread::yield();
    }
    return true;
}

template <class Work>
void Team::timed(int thread, const Work& work) {
    if (!profiling_.load(std::memory_order_relaxed)) return work();
    const uint64_t begin = ticks();
    work();
    std::atomic<uint64_t>& busy = busy_[static_cast<size_t>(thread)].ticks;
    busy.store(busy.load(std::memory_order_relaxed) + ticks() - begin, std::memory_order_relaxed);
}

void Team::run(Job job) {
    if (!at_once(job.items)) {
        post(job);
        return wait();
    }
    wait();
    timed(0, [&] {
        if (job.items > 0) job.call(job.work, {0, job.items}, 0);
    });
}

// Where the next round's work lies. The round that had the place is done: the one after it has begun.
void* Team::next_place() {
    while (posted_ - begun_ == kPosts - 1) take_next();
    return places_[(posted_ + 1) % kPosts].bytes;
}

void Team::post(Job job) {
    while (posted_ - begun_ == kPosts - 1) take_next();
    const uint64_t round = ++posted_;
    job.before = parts_;
    for (int thread = 0; thread < size_; ++thread) parts_ += Share(job.items, job.least, thread, size_).parts();
    job.after = parts_;
    Post& post = posts_[round % kPosts];
    // Each store is seen after those before it: who reads the same even version before and after the job has it whole.
    post.version.store(2 * round - 1, std::memory_order_relaxed);
    post.work.store(job.work, std::memory_order_release);
    post.call.store(job.call, std::memory_order_release);
    post.items.store(job.items, std::memory_order_release);
    post.least.store(job.least, std::memory_order_release);
    post.before.store(job.before, std::memory_order_release);
    post.after.store(job.after, std::memory_order_release);
    post.version.store(2 * round, std::memory_order_release);  // who falls asleep now may miss it: the next claim looks again
}

// The caller's parts of the first round that he has not begun.
void Team::take_next() {
    uint64_t round = begun_ + 1;
    Job job{};
    read_post(round, job);
    await(job.before);
    begun_ = round;
    take_parts(round, job, 0);
}

// The caller waits until so many parts are done.
void Team::await(uint64_t parts) {
    const auto ended = [&] { return done(parts); };
    if (ended() || soon(ended)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    // This exchange and the next load of done_, and in take_share() the addition to done_ and the next load of caller_sleeps_,
    // have one order for all threads: either the last part's thread sees the sleeper, or the sleeper sees that it is done.
    // Both read and write at once: QEMU's ARM, on x86, lets a plain store pass behind the next load, whatever is asked for.
    caller_sleeps_.exchange(true);
    ended_.wait(lock, ended);
    caller_sleeps_.store(false);
}

// Whether the job of `round` was read whole; where that is long over, of the first that may not be.
bool Team::read_post(uint64_t& round, Job& job) const {
    uint64_t version;
    while ((version = posts_[round % kPosts].version.load(std::memory_order_acquire)) > 2 * round) {
        round = (version + 1) / 2 - kPosts + 1;
    }
    if (version != 2 * round) return false;
    const Post& post = posts_[round % kPosts];
    job.work = post.work.load(std::memory_order_acquire);
    job.call = post.call.load(std::memory_order_acquire);
    job.items = post.items.load(std::memory_order_acquire);
    job.least = post.least.load(std::memory_order_acquire);
    job.before = post.before.load(std::memory_order_acquire);
    job.after = post.after.load(std::memory_order_acquire);
    return post.version.load(std::memory_order_relaxed) == version;
}

// Parts of the thread's own share until none is left, then, where the round is not over soon, of the others'.
void Team::take_parts(uint64_t round, const Job& job, int thread) {
    take_share(round, job, thread, thread);
    const int patience = crowded_.load(std::memory_order_relaxed) ? 0 : kPatience;  // there, owners are set aside
    for (int i = 0; i < patience; ++i) {
        if (done(job.after)) return;
        pause_briefly();
    }
    for (int i = 1; i < size_; ++i) take_share(round, job, (thread + i) % size_, thread);
}

// Claims and does what is left of the share that thread `owner` began with. Of a round that is over nothing is left: its
// last claims still stand, or later ones.
void Team::take_share(uint64_t round, const Job& job, int owner, int thread) {
    const Share share(job.items, job.least, owner, size_);
    std::atomic<uint64_t>& next = next_[static_cast<size_t>(owner)].part;
    uint64_t count = 0;
    timed(thread, [&] {
        for (uint64_t seen = next.load();;) {
            const uint64_t claimed = std::max(seen, next_part(round, 0));
            const uint64_t part = claimed - next_part(round, 0);
            if (part >= share.parts()) break;
            if (thread == 0 && sleepers_.load() > 0) call_helpers();
            if (!next.compare_exchange_weak(seen, claimed + 1)) continue;
            job.call(job.work, share.part(part), thread);
            ++count;
            seen = claimed + 1;
        }
    });
    if (!count) return;
    done_.fetch_add(count);
    if (thread != 0 && caller_sleeps_.load()) {
        { std::lock_guard<std::mutex> lock(mutex_); }
        ended_.notify_one();
    }
}

uint64_t Team::busy_ticks() const {
    uint64_t sum = 0;
    for (const Busy& busy : busy_) sum += busy.ticks.load(std::memory_order_relaxed);
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
    uint64_t calls = 0, round = 1;
    Job job{};
    const auto ready = [&] { return read_post(round, job) && done(job.before); };
    for (;;) {
        for (; soon(ready); ++round) take_parts(round, job, thread);
        std::unique_lock<std::mutex> lock(mutex_);
        sleepers_.fetch_add(1);
        called_.wait(lock, [&] { return closing_ || calls_ != calls || ready(); });
        sleepers_.fetch_sub(1);
        if (closing_) return;
        calls = calls_;
    }
}

}  // namespace tinychat
