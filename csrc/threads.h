// One team of threads for a whole step: they enter together, meet at barriers between phases, and sleep between steps.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace tinychat {

struct Range {
    int64_t begin, end;
};

// One thread's share of the work: thread `index` of `count`.
struct Share {
    int index, count;

    // Its part of `total` items: consecutive, all parts together cover them, sizes differ by one at most.
    Range of(int64_t total) const { return {total * index / count, total * (index + 1) / count}; }
};

class Team {
  public:
    explicit Team(int n_threads);  // the caller is one of them: n_threads - 1 helpers are started
    ~Team();
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    int size() const { return size_; }
    // False in a process forked after the team was made: the helpers did not come along.
    bool alive() const;
    // Runs `work` once on every thread of the team and returns when all are done. `work` must not throw.
    void run(const std::function<void(Share)>& work);
    // Called by every thread of the team, inside run(): nobody leaves before all have come, and what was written
    // before is seen by all after.
    void barrier();

  private:
    void help(int index);

    const int size_;
    const int64_t process_;
    std::vector<std::thread> helpers_;

    std::mutex mutex_;
    std::condition_variable wake_;    // a run has started, or the team closes
    std::condition_variable passed_;  // a barrier
    const std::function<void(Share)>* work_ = nullptr;
    uint64_t run_ = 0;  // runs started
    bool closing_ = false;

    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> generation_{0};  // barriers passed
    std::atomic<int> sleepers_{0};                     // of those who wait at a barrier
};

}  // namespace tinychat
