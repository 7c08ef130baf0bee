// One team of threads for a whole step. Each thread has a share of the work of a phase, one stretch of memory, the same at
// every step. A share is cut into parts, each half of what is left, and who has done his own claims those of others: all end
// at about the same time, and a thread that the system has set aside owes no more than the part that it has begun, so that
// on a crowded machine the others go on without it. Phases may be handed out before those ahead of them have ended: then who
// is done with one waits for nothing but the last part of the others.
#pragma once
#include <atomic>
#include <chrono>
#include <climits>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <new>
#include <thread>
#include <type_traits>
#include <vector>

namespace tinychat {

struct Range {
    int64_t begin, end;
};

// A number of this process, another one than in the process that forked it.
int64_t this_process();

// A clock that takes as little time as one can, of no unit in particular.
uint64_t ticks();

class Team {
  public:
    // The caller of run() is one of the threads: n_threads - 1 helpers are started. Throws std::system_error where the
    // system has no more of them. `granted`: so many of them may run at the same moment, whatever the cores (a control
    // group's quota).
    explicit Team(int n_threads, int granted = INT_MAX);
    ~Team();
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    // While one exists the helpers wait for the next phase awake: spinning, and soon yielding the core to whoever wants
    // it. Without one, or where threads are more than may run at the same moment, they sleep after a short while. Its end
    // waits for all that was handed out.
    class Awake {
      public:
        explicit Awake(Team& team) : team_(team) { team_.wake(); }
        ~Awake() {
            team_.wait();
            team_.awake_.store(false, std::memory_order_relaxed);
        }
        Awake(const Awake&) = delete;
        Awake& operator=(const Awake&) = delete;

      private:
        Team& team_;
    };

    // Whether it was made in this process, whose number is given: helpers do not come along to a forked one.
    bool alive(int64_t process) const { return process_ == process; }

    // Calls work(Range part, int thread) for consecutive parts that together cover [0, items), and returns when all are
    // done; what they wrote is seen by the caller and by later runs. Which thread of 0 .. n_threads - 1 does a part is
    // left to chance, and no thread does two at a time. A part has at least `least` items, but for the last of a share.
    // It begins when all that was handed out before is done. One run at a time; `work` must not throw.
    template <class Work>
    void run(int64_t items, const Work& work, int64_t least = 1) {
        run({&work, call<Work>, items, least});
    }

    // The same, but it returns before the work is done, perhaps before it is begun; the next run() or wait() returns when it is.
    // `work` is copied, and what it refers to must live until then. Of one item, or with one thread, this is run().
    template <class Work>
    void then(int64_t items, const Work& work, int64_t least = 1) {
        static_assert(std::is_trivially_copyable_v<Work> && std::is_trivially_destructible_v<Work>);
        static_assert(sizeof(Work) <= kWorkBytes && alignof(Work) <= 64);
        if (at_once(items)) return run(items, work, least);
        post({new (next_place()) Work(work), call<Work>, items, least});
    }

    // Returns when all that was handed out is done.
    void wait() {
        while (begun_ != posted_) take_next();
        await(parts_);
    }

    // Ticks that all threads together spent on parts, since it was first switched on.
    void profile(bool on) { profiling_.store(on); }
    uint64_t busy_ticks() const;

  private:
    using Clock = std::chrono::steady_clock;

    static constexpr uint64_t kPosts = 8;      // rounds that may be handed out and not done
    static constexpr size_t kWorkBytes = 128;  // of one

    struct Job {
        const void* work;
        void (*call)(const void* work, Range part, int thread);
        int64_t items, least;
        uint64_t before = 0, after = 0;  // parts of all rounds so far, without it and with it
    };

    template <class Work>
    static void call(const void* work, Range part, int thread) {
        (*static_cast<const Work*>(work))(part, thread);
    }

    // The job of a round, on one line of cache: nothing else passes from the caller to the helpers, who cut it into shares
    // and parts themselves. `version` is twice the round, and odd while the rest is written.
    struct alignas(64) Post {
        std::atomic<uint64_t> version{0};
        std::atomic<const void*> work{nullptr};
        std::atomic<decltype(Job::call)> call{nullptr};
        std::atomic<int64_t> items{0}, least{0};
        std::atomic<uint64_t> before{0}, after{0};
    };

    struct alignas(64) Place {
        unsigned char bytes[kWorkBytes];
    };

    // The next part of what thread i begins with, and its round. What is of an earlier round stands for part 0 of this one,
    // so that nothing has to be made ready.
    struct alignas(64) Next {
        std::atomic<uint64_t> part{0};
    };

    struct alignas(64) Busy {
        std::atomic<uint64_t> ticks{0};  // of thread i, written by it alone
    };

    bool at_once(int64_t items) const { return size_ == 1 || items <= 1; }
    void run(Job job);
    void* next_place();
    void post(Job job);
    void take_next();
    void await(uint64_t parts);
    void wake();
    bool read_post(uint64_t& round, Job& job) const;
    void take_parts(uint64_t round, const Job& job, int thread);
    void take_share(uint64_t round, const Job& job, int owner, int thread);
    bool done(uint64_t parts) const { return done_.load() >= parts; }
    template <class Work>
    void timed(int thread, const Work& work);
    template <class Ready>
    bool soon(const Ready& ready) const;
    void help(int thread);
    void call_helpers();
    void close();

    const int size_, granted_;
    const int64_t process_;
    std::vector<Next> next_;  // of each thread's share
    std::vector<Busy> busy_;
    std::vector<std::thread> helpers_;

    Post posts_[kPosts];    // of round r at r % kPosts
    Place places_[kPosts];  // of its work

    // Parts done of all rounds. No part of a round is begun before those of all earlier rounds are counted here, and each count
    // adds to the one before it: who sees so many sees all that was written in them.
    alignas(64) std::atomic<uint64_t> done_{0};

    alignas(64) uint64_t posted_ = 0, begun_ = 0;  // rounds; this and what follows: only for the caller
    uint64_t parts_ = 0;                           // of all rounds so far
    Clock::time_point last_call_{}, last_look_{};  // of the helpers; at the cores

    alignas(64) std::atomic<int> sleepers_{0};  // helpers
    std::atomic<bool> awake_{false};
    std::atomic<bool> crowded_{false};  // more threads than may run at the same moment
    std::atomic<bool> profiling_{false};
    std::atomic<bool> caller_sleeps_{false};
    std::mutex mutex_;
    std::condition_variable called_;  // calls_ or closing_ has changed
    std::condition_variable ended_;   // parts are done
    uint64_t calls_ = 0;
    bool closing_ = false;
};

}  // namespace tinychat
