// The team of threads: every item once, results seen by the caller and by later runs, teams that come and go.
#include <atomic>
#include <climits>
#include <ctime>
#include <numeric>
#include <thread>

#include "check.h"
#include "threads.h"

namespace tinychat::test {
namespace {

void covers(int threads) {
    Team team(threads);
    Random random(static_cast<uint64_t>(threads));
    bool once = true;
    std::atomic<bool> in_range{true};
    for (int run = 0; run < 2000; run++) {
        const int64_t items = random.below(run % 10 ? 40 : 3000);
        const int64_t least = 1 + random.below(9);
        std::vector<int> counts(static_cast<size_t>(items));  // plain: a race on them is for the sanitizer to see
        const auto work = [&](Range part, int thread) {
            const int64_t of_share = items * (thread + 1) / threads - items * thread / threads;
            if (thread < 0 || thread >= threads || part.begin >= part.end || part.end > items) in_range = false;
            bool last = false;  // of a share: only there a part may be short
            for (int t = 0; t < threads; t++) last |= part.end == items * (t + 1) / threads;
            if (part.end - part.begin < least && !last) in_range = false;
            if (part.end - part.begin > (of_share + least) / 2 + least && threads > 1) in_range = false;
            for (int64_t i = part.begin; i < part.end; i++) counts[static_cast<size_t>(i)]++;
        };
        team.run(items, work, least);
        for (int count : counts) once &= count == 1;
    }
    check(once && in_range, "each item once with " + std::to_string(threads) + " threads");
}

// Each phase reads what the one before wrote, whoever wrote it.
void phases(int threads) {
    Team team(threads);
    std::vector<int64_t> values(100, 0);
    for (int phase = 0; phase < 2000; phase++) {
        std::vector<int64_t> next(values.size());
        team.run(100, [&](Range part, int) {
            for (int64_t i = part.begin; i < part.end; i++) {
                next[static_cast<size_t>(i)] = values[static_cast<size_t>((i + 37) % 100)] + 1;
            }
        });
        values = next;
    }
    check(std::accumulate(values.begin(), values.end(), int64_t{0}) == 2000 * 100, "phases follow one another");
}

// Phases handed out before those ahead of them are done: each reads what all of the one before wrote, whoever is late.
void phases_ahead(int threads, int granted = INT_MAX) {
    Team team(threads, granted);
    Random random(static_cast<uint64_t>(threads));
    std::vector<int64_t> some(120), others(some.size());
    int64_t *from = some.data(), *to = others.data(), expected = 0;
    for (int step = 0; step < 60; step++) {
        const Team::Awake awake(team);
        for (int phase = 0; phase < 50; phase++) {
            const int64_t items = random.below(10) ? 120 : random.below(2);  // of one or none too
            const bool slow = random.below(100) == 0;
            team.then(items, [=](Range part, int thread) {
                if (slow && thread) std::this_thread::sleep_for(std::chrono::microseconds(200));
                for (int64_t i = part.begin; i < part.end; i++) to[i] = from[(i + 37) % items] + 1;
            }, 1 + random.below(4));
            if (items == 120) {
                std::swap(from, to);
                expected++;
            }
            if (random.below(50) == 0) team.run(3, [](Range, int) {});
        }
        team.wait();
        bool all = true;
        for (int i = 0; i < 120; i++) all &= from[i] == expected;
        if (!all) return check(false, "phases ahead, " + std::to_string(threads) + " threads");
    }
    check(true, "phases ahead, " + std::to_string(threads) + " threads");
}

// Steps in which the helpers stay awake, the profile on and off, with serial stretches between phases.
void steps(int threads) {
    Team team(threads);
    int64_t total = 0;
    for (int step = 0; step < 50; step++) {
        const Team::Awake awake(team);
        team.profile(step % 2 == 0);
        for (int phase = 0; phase < 20; phase++) {
            std::vector<int64_t> sums(30);
            team.run(30, [&](Range part, int) {
                for (int64_t i = part.begin; i < part.end; i++) sums[static_cast<size_t>(i)] = i;
            });
            total += std::accumulate(sums.begin(), sums.end(), int64_t{0});
            if (phase % 7 == 0) std::this_thread::sleep_for(std::chrono::microseconds(150));
        }
    }
    check(total == 50 * 20 * 435, "steps of phases, " + std::to_string(threads) + " threads");
    check(team.busy_ticks() > 0, "a profile counts");
}

// Whether a helper does a part of some run within five seconds: the caller is slow to claim the next.
bool helped(Team& team) {
    std::atomic<bool> found{false};
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(5);
    while (!found && std::chrono::steady_clock::now() < end) {
        team.run(64, [&](Range, int thread) {
            if (thread) found = true;
            else std::this_thread::sleep_for(std::chrono::microseconds(50));
        });
    }
    return found;
}

void pauses() {
    Team team(3);
    int64_t total = 0;
    for (int run = 0; run < 20; run++) {
        std::this_thread::sleep_for(std::chrono::milliseconds(2));  // the helpers fall asleep
        std::vector<int64_t> sums(64);
        team.run(64, [&](Range part, int) {
            for (int64_t i = part.begin; i < part.end; i++) sums[static_cast<size_t>(i)] = i;
        });
        total += std::accumulate(sums.begin(), sums.end(), int64_t{0});
    }
    check(total == 20 * 63 * 32, "runs after pauses");
    check(helped(team), "helpers that slept come back");
}

// A caller who falls asleep about when the last part is done is woken: with a helper beyond the quota he sleeps after 20 us.
void last_moments() {
    Team team(2, 1);
    Random random(5);
    const Team::Awake awake(team);
    for (int run = 0; run < 20000; run++) {
        const std::chrono::microseconds work(15 + random.below(25));
        team.run(2, [&](Range, int thread) {
            const auto begin = std::chrono::steady_clock::now();
            while (thread && std::chrono::steady_clock::now() - begin < work) {
            }
        });
    }
    check(true, "who falls asleep at the last moment is woken");
}

// Helpers who slept while more phases were handed out than are kept come in where the others are.
void left_behind(int threads) {
    Team team(threads);
    int64_t sum = 0;
    for (int turn = 0; turn < 20; turn++) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
        std::atomic<int64_t> count{0};
        for (int phase = 0; phase < 40; phase++) {
            team.then(50, [&count](Range part, int) { count += part.end - part.begin; });
        }
        team.wait();
        sum += count;
    }
    check(sum == 20 * 40 * 50, "helpers that were left behind, " + std::to_string(threads) + " threads");
    check(helped(team), "helpers that were left behind come in again, " + std::to_string(threads) + " threads");
}

// The processor's time that a step takes of which the caller sleeps 4 ms.
double awake_seconds(int granted) {
    Team team(2, granted);
    const Team::Awake awake(team);
    team.run(2, [](Range, int) {});
    const std::clock_t begin = std::clock();
    std::this_thread::sleep_for(std::chrono::milliseconds(4));
    return static_cast<double>(std::clock() - begin) / CLOCKS_PER_SEC;
}

}  // namespace

void test_team() {
    for (int threads : {1, 2, 3, 8}) {
        covers(threads);
        phases(threads);
    }
    for (int threads : {1, 2, 5}) steps(threads);
    for (int threads : {1, 2, 3, 8}) phases_ahead(threads);
    phases_ahead(2, 1);
    for (int threads : {2, 5}) left_behind(threads);
    pauses();
    last_moments();
    for (int i = 0; i < 50; i++) Team team(4);
    check(true, "teams come and go");
    check(awake_seconds(1) < 1.5e-3, "a helper beyond the quota does not wait awake");  // of two cores 4 ms without one
}

}  // namespace tinychat::test
