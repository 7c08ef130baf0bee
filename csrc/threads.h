// One team of threads for a whole step. Each thread has a share of the work of a phase, one stretch of memory, the same at
// every step. A share is cut into parts, each half of what is left, and who has done his own claims those of others: all end
// at about the same time, and a thread that the system has set aside owes no more than the part that it has begun, so that
// on a crowded machine the others go on without it.
#pragma once
#include <atomic>
#include <chrono>
#include <climits>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace tinychat {

struct Range {
    int64_t begin, end;
};

// The process's number, another one in a child that it forked.
int64_t this_process();

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
    // it. Without one, or where threads are more than may run at the same moment, they sleep after a short while.
    class Awake {
      public:
        explicit Awake(Team& team) : team_(team) { team_.wake(); }
        ~Awake() { team_.awake_.store(false, std::memory_order_relaxed); }
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
    // One run at a time; `work` must not throw.
    template <class Work>
    void run(int64_t items, const Work& work, int64_t least = 1) {
        run({&work, [](const void* what, Range part, int thread) { (*static_cast<const Work*>(what))(part, thread); },
             items, least});
    }

    // Nanoseconds that all threads together spent on parts, since it was first switched on.
    void profile(bool on) { profiling_.store(on); }
    int64_t busy_ns() const;

  private:
    using Clock = std::chrono::steady_clock;

    // What thread i begins with of job_, in parts: parts - left is the next, while any is left.
    struct alignas(64) Share {
        std::atomic<int> left{0};
        int parts = 0;                    // this and the items: read only by a thread that has claimed one of the parts
        Range items{0, 0};
        std::atomic<int64_t> busy_ns{0};  // of thread i
    };

    struct Job {
        const void* work;
        void (*call)(const void* work, Range part, int thread);
        int64_t items, least;
    };

    void run(Job job);
    void wake();
    void take_parts(int thread);
    int do_parts(int thread);
    template <class Work>
    void timed(int thread, const Work& work);
    template <class Ready>
    bool soon(const Ready& ready) const;
    void help(int thread);
    void call_helpers();
    void close();

    const int size_, granted_;
    const int64_t process_;
    std::vector<std::thread> helpers_;

    Job job_{};  // read only by a thread that has claimed one of its parts: until that is done, it stays
    std::vector<Share> shares_;   // of each thread
    alignas(64) std::atomic<uint64_t> rounds_{0};  // jobs so far
    alignas(64) std::atomic<int> unfinished_{0};   // parts of job_

    alignas(64) std::atomic<int> sleepers_{0};  // helpers
    std::atomic<bool> awake_{false};
    std::atomic<bool> crowded_{false};  // more threads than may run at the same moment
    std::atomic<bool> profiling_{false};
    std::atomic<bool> caller_sleeps_{false};
    Clock::time_point last_call_{};  // of the helpers, by the caller
    std::mutex mutex_;
    std::condition_variable called_;    // calls_ or closing_ has changed
    std::condition_variable finished_;  // unfinished_ is 0
    uint64_t calls_ = 0;
    bool closing_ = false;
};

}  // namespace tinychat
