#include "draw.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

namespace tinychat {
namespace {

struct Candidate {
    float logit;
    int64_t id;
};

bool likelier(const Candidate& a, const Candidate& b) {
    return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

int64_t n_peaks(int64_t n) { return (n + kPeak - 1) / kPeak; }

// Logits, their peaks, and the peaks of those: to find the likeliest little of them is looked at.
struct Heights {
    const float* logits;
    const float* peaks;
    int64_t n;
    std::vector<float> summits;  // of the peaks

    // visit(id) for each logit of at least `least`, in their order.
    template <class Visit>
    void above(float least, const Visit& visit) const {
        const auto each = [&](const float* values, int64_t begin, int64_t end, const auto& work) {
            for (int64_t i = begin; i < end; ++i) {
                if (values[i] >= least) work(i);
            }
        };
        each(summits.data(), 0, n_peaks(n_peaks(n)), [&](int64_t s) {
            each(peaks, s * kPeak, std::min((s + 1) * kPeak, n_peaks(n)), [&](int64_t p) {
                each(logits, p * kPeak, std::min((p + 1) * kPeak, n), visit);
            });
        });
    }
};

// The k likeliest of n >= k, from the likeliest down.
std::vector<Candidate> likeliest(const Heights& heights, int64_t k) {
    // So many peaks are as high as the k-th of them, and so as many logits at least.
    const float *peaks = heights.peaks, *summits = heights.summits.data();
    const int64_t n_summits = n_peaks(n_peaks(heights.n));
    std::vector<float> heads = n_summits >= 2 * k ? std::vector<float>(summits, summits + n_summits)
                                                  : std::vector<float>(peaks, peaks + n_peaks(heights.n));
    float least = -std::numeric_limits<float>::infinity();
    if (static_cast<int64_t>(heads.size()) >= k) {
        std::nth_element(heads.begin(), heads.begin() + (k - 1), heads.end(), std::greater<>());
        least = heads[static_cast<size_t>(k - 1)];
    }
    std::vector<Candidate> pool;
    heights.above(least, [&](int64_t id) { pool.push_back({heights.logits[id], id}); });
    std::nth_element(pool.begin(), pool.begin() + (k - 1), pool.end(), likelier);
    pool.resize(static_cast<size_t>(k));
    std::sort(pool.begin(), pool.end(), likelier);
    return pool;
}

}  // namespace

int64_t draw(const BlockKernels& kernels, const float* logits, const float* peaks, int64_t n, const DrawParams& params,
             double number) {
    Heights heights{logits, peaks, n, std::vector<float>(static_cast<size_t>(n_peaks(n_peaks(n))))};
    kernels.peaks(peaks, n_peaks(n), heights.summits.data());
    if (!std::isfinite(heights.summits[0])) return -1;
    if (params.top_k == 0) {  // the first of the largest
        const float most = *std::max_element(heights.summits.begin(), heights.summits.end());
        int64_t found = n;
        heights.above(most, [&](int64_t id) { found = std::min(found, id); });
        return found;
    }
    const std::vector<Candidate> pool = likeliest(heights, params.top_k);
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
