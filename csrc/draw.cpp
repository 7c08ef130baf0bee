#include "draw.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

namespace tinychat {
namespace {

constexpr int64_t kBlock = 64;  // values whose largest is looked at before any of them

struct Candidate {
    float logit;
    int64_t id;
};

bool likelier(const Candidate& a, const Candidate& b) {
    return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

bool finite(const float* values, int64_t n) {
    int found = 0;
    for (int64_t i = 0; i < n; ++i) {
        uint32_t bits;
        std::memcpy(&bits, values + i, sizeof bits);
        found |= (bits & 0x7f800000u) == 0x7f800000u;
    }
    return !found;
}

// Of finite values, n > 0. In lanes, as a compiler may not reorder the maximum of floats in a row.
float largest_of(const float* values, int64_t n) {
    typedef float Lanes __attribute__((vector_size(16)));
    constexpr int64_t kLanes = 16;
    const auto larger = [](Lanes a, Lanes b) { return a > b ? a : b; };
    if (n < kLanes) return *std::max_element(values, values + n);
    Lanes most[4], next[4];
    std::memcpy(most, values, sizeof most);
    int64_t i = kLanes;
    for (; i + kLanes <= n; i += kLanes) {
        std::memcpy(next, values + i, sizeof next);
        for (int j = 0; j < 4; ++j) most[j] = larger(most[j], next[j]);
    }
    const Lanes last = larger(larger(most[0], most[1]), larger(most[2], most[3]));
    return std::max({last[0], last[1], last[2], last[3], *std::max_element(values + i - 1, values + n)});
}

// The k likeliest of n > k, from the likeliest down.
std::vector<Candidate> likeliest(const float* logits, int64_t n, int64_t k) {
    const auto last = [&](std::vector<Candidate>& pool) { return pool.begin() + (k - 1); };
    std::vector<Candidate> pool;
    pool.reserve(static_cast<size_t>(2 * k + kBlock));
    float least = -std::numeric_limits<float>::infinity();  // above which a value, of a higher id than all so far, comes in
    for (int64_t begin = 0; begin < n; begin += kBlock) {
        const int64_t end = std::min(begin + kBlock, n);
        if (largest_of(logits + begin, end - begin) <= least) continue;
        for (int64_t id = begin; id < end; ++id) {
            if (logits[id] > least) pool.push_back({logits[id], id});
        }
        if (static_cast<int64_t>(pool.size()) < 2 * k) continue;
        std::nth_element(pool.begin(), last(pool), pool.end(), likelier);
        pool.resize(static_cast<size_t>(k));
        least = pool.back().logit;
    }
    std::nth_element(pool.begin(), last(pool), pool.end(), likelier);
    pool.resize(static_cast<size_t>(k));
    std::sort(pool.begin(), pool.end(), likelier);
    return pool;
}

// The first of the largest.
int64_t likeliest(const float* logits, int64_t n) {
    int64_t best = 0;
    float largest = -std::numeric_limits<float>::infinity();
    for (int64_t begin = 0; begin < n; begin += kBlock) {
        const float value = largest_of(logits + begin, std::min(kBlock, n - begin));
        if (value <= largest) continue;
        largest = value;
        best = begin;
    }
    return std::find(logits + best, logits + n, largest) - logits;
}

}  // namespace

int64_t draw(const float* logits, int64_t n, const DrawParams& params, double number) {
    if (!finite(logits, n)) return -1;
    if (params.top_k == 0) return likeliest(logits, n);
    const std::vector<Candidate> pool = likeliest(logits, n, params.top_k);
    std::vector<float> weights;  // falling, from 1
    double total = 0;
    for (const Candidate& candidate : pool) {
        weights.push_back(std::exp((candidate.logit - pool[0].logit) / params.temperature));
        total += static_cast<double>(weights.back());
    }
    std::vector<double> sums;  // of the weights so far
    double sum = 0;
    for (const float weight : weights) {
        const bool reached = params.top_p < 1 && sum >= params.top_p * total;
        if (!sums.empty() && (reached || weight < params.min_p)) break;
        sums.push_back(sum += static_cast<double>(weight));
    }
    // Where rounding leaves no sum above the goal: the first that is the largest, so that no weight of 0 is drawn.
    const auto above = std::upper_bound(sums.begin(), sums.end(), number * sums.back());
    const auto end = std::lower_bound(sums.begin(), sums.end(), sums.back());
    return pool[static_cast<size_t>(std::min(above, end) - sums.begin())].id;
}

}  // namespace tinychat
