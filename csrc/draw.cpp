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

// Logits, the largest of each block of them, and of each block of those: to find the likeliest little is looked at.
struct Blocks {
    const float* logits;
    const float* peaks;
    int64_t n;
    std::vector<float> peaks_of_peaks;

    // visit(id) for each logit of at least `least`, in their order.
    template <class Visit>
    void not_below(float least, const Visit& visit) const {
        const auto each = [&](const float* values, int64_t begin, int64_t end, const auto& work) {
            for (int64_t i = begin; i < end; ++i) {
                if (values[i] >= least) work(i);
            }
        };
        each(peaks_of_peaks.data(), 0, n_peaks(n_peaks(n)), [&](int64_t s) {
            each(peaks, s * kPeak, std::min((s + 1) * kPeak, n_peaks(n)), [&](int64_t p) {
                each(logits, p * kPeak, std::min((p + 1) * kPeak, n), visit);
            });
        });
    }
};

// The k likeliest of n >= k, from the likeliest down.
std::vector<Candidate> likeliest(const Blocks& blocks, int64_t k) {
    // So many peaks are as high as the k-th of them, and so as many logits at least.
    const float *peaks = blocks.peaks, *higher = blocks.peaks_of_peaks.data();
    const int64_t n_higher = n_peaks(n_peaks(blocks.n));
    std::vector<float> tops = n_higher >= 2 * k ? std::vector<float>(higher, higher + n_higher)
                                                : std::vector<float>(peaks, peaks + n_peaks(blocks.n));
    float least = -std::numeric_limits<float>::infinity();
    if (static_cast<int64_t>(tops.size()) >= k) {
        std::nth_element(tops.begin(), tops.begin() + (k - 1), tops.end(), std::greater<>());
        least = tops[static_cast<size_t>(k - 1)];
    }
    std::vector<Candidate> pool;
    blocks.not_below(least, [&](int64_t id) { pool.push_back({blocks.logits[id], id}); });
    std::nth_element(pool.begin(), pool.begin() + (k - 1), pool.end(), likelier);
    pool.resize(static_cast<size_t>(k));
    std::sort(pool.begin(), pool.end(), likelier);
    return pool;
}

}  // namespace

int64_t draw(const BlockKernels& kernels, const float* logits, const float* peaks, int64_t n, const DrawParams& params,
             double number) {
    Blocks blocks{logits, peaks, n, std::vector<float>(static_cast<size_t>(n_peaks(n_peaks(n))))};
    kernels.peaks(peaks, n_peaks(n), blocks.peaks_of_peaks.data());
    if (!std::isfinite(blocks.peaks_of_peaks[0])) return -1;
    if (params.top_k == 0) {  // the first of the largest
        const float most = *std::max_element(blocks.peaks_of_peaks.begin(), blocks.peaks_of_peaks.end());
        int64_t found = n;
        blocks.not_below(most, [&](int64_t id) { found = std::min(found, id); });
        return found;
    }
    const std::vector<Candidate> pool = likeliest(blocks, params.top_k);
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
