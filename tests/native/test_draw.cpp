// The draw of the next token: the one at a number along the weights of the likeliest, whatever their places.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "check.h"
#include "draw.h"

namespace tinychat::test {
namespace {

// By sorting all of them.
int64_t drawn_plainly(const std::vector<float>& logits, const DrawParams& params, double number) {
    std::vector<size_t> order(logits.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return logits[a] > logits[b]; });
    order.resize(static_cast<size_t>(std::max<int64_t>(params.top_k, 1)));
    std::vector<double> weights;
    for (const size_t id : order) weights.push_back(std::exp((logits[id] - logits[order[0]]) / params.temperature));
    const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
    double kept = 0;
    size_t count = 0;
    for (const double weight : weights) {
        if (count && ((params.top_p < 1 && kept >= params.top_p * total) || weight < params.min_p)) break;
        kept += weight;
        ++count;
    }
    double sum = 0;
    for (size_t i = 0; i < count; ++i) {
        sum += weights[i];
        if (sum > number * kept) return static_cast<int64_t>(order[i]);
    }
    return static_cast<int64_t>(order[count - 1]);
}

int64_t drawn(const std::string& isa, const float* logits, int64_t n, const DrawParams& params, double number) {
    const BlockKernels& block = kernels(isa.c_str()).block;
    const Memory peaks((n + kPeak - 1) / kPeak * 4);
    float* found = reinterpret_cast<float*>(peaks.data());
    const int64_t first = n / (2 * kPeak) * kPeak;  // by two who computed logits
    if (first) block.peaks(logits, first, found);
    block.peaks(logits + first, n - first, found + first / kPeak);
    return draw(block, logits, found, n, params, number);
}

void draws(const std::string& isa) {
    Random random(5);
    for (const int64_t n : {2, 3, 16, 63, 64, 65, 129, 1000, 4097}) {
        Memory memory(n * 4);
        float* logits = reinterpret_cast<float*>(memory.data());
        for (int turn = 0; turn < 60; ++turn) {
            std::vector<float> values = random.normals(n);
            if (turn % 3 == 0) {
                for (float& value : values) value = std::round(value);  // equals
            }
            std::copy(values.begin(), values.end(), logits);
            const int64_t top_k = turn % 4 ? random.below(std::min<int64_t>(n, 300)) : 0;
            const DrawParams params{top_k, turn % 2 ? 0.7f : 2.0f, turn % 5 ? 0.9 : 1.0, turn % 7 ? 0.05f : 0.0f};
            const double number = turn ? random.uniform() : 0.0;
            check(drawn(isa, logits, n, params, number) == drawn_plainly(values, params, number),
                  "draw " + std::to_string(turn) + " of " + std::to_string(n) + ", top_k " + std::to_string(top_k));
        }
        logits[n - 1] = std::numeric_limits<float>::quiet_NaN();
        check(drawn(isa, logits, n, {0, 1, 1, 0}, 0) == -1, "NaN is drawn");
    }
}

}  // namespace

void test_draw() {
    for (const std::string& isa : isas()) draws(isa);
}

}  // namespace tinychat::test
