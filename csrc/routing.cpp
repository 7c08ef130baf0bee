#include "routing.h"

#include <algorithm>
#include <cmath>

namespace tinychat {
namespace {

// The experts of the n_used highest logits, ascending, and the softmax of their logits over all experts, or over these.
void choose(const ExpertsShape& shape, const float* logits, int64_t* chosen, float* shares) {
    int64_t held = 0;  // so many, the highest first; a NaN is higher than none and lower than none
    for (int64_t expert = 0; expert < shape.n_experts; ++expert) {
        int64_t place = held;
        while (place > 0 && logits[expert] > logits[chosen[place - 1]]) --place;
        if (place == shape.n_used) continue;
        held = std::min(held + 1, shape.n_used);
        for (int64_t i = held - 1; i > place; --i) chosen[i] = chosen[i - 1];
        chosen[place] = expert;
    }
    const float highest = logits[chosen[0]];
    std::sort(chosen, chosen + shape.n_used);
    float sum = 0;
    for (int64_t i = 0; i < shape.n_used; ++i) sum += shares[i] = std::exp(logits[chosen[i]] - highest);
    if (!shape.normalized) {
        sum = 0;
        for (int64_t expert = 0; expert < shape.n_experts; ++expert) sum += std::exp(logits[expert] - highest);
    }
    for (int64_t i = 0; i < shape.n_used; ++i) shares[i] /= sum;
}

}  // namespace

void Routing::route(const ExpertsShape& shape, const float* logits, int64_t rows, Team& team) {
    n_used_ = shape.n_used;
    const auto n = static_cast<size_t>(rows * n_used_);
    pairs_.resize(n);
    chosen_.resize(n);
    places_.resize(n);
    shares_.resize(n);
    team.run(rows, [&](Range part, int) {
        for (int64_t t = part.begin; t < part.end; ++t) {
            choose(shape, logits + t * shape.router_size(), chosen_.data() + t * n_used_, shares_.data() + t * n_used_);
        }
    });
    counts_.assign(static_cast<size_t>(shape.n_experts), 0);
    for (int64_t expert : chosen_) ++counts_[static_cast<size_t>(expert)];
    groups_.clear();
    int64_t first = 0;
    for (int64_t expert = 0; expert < shape.n_experts; ++expert) {
        const int64_t count = counts_[static_cast<size_t>(expert)];
        counts_[static_cast<size_t>(expert)] = static_cast<int64_t>(groups_.size());  // from here on: its group
        if (count) groups_.push_back({expert, first, 0});
        first += count;
    }
    for (size_t i = 0; i < n; ++i) {
        const int64_t index = counts_[static_cast<size_t>(chosen_[i])];
        Group& group = groups_[static_cast<size_t>(index)];
        places_[i] = group.first + group.rows++;
        pairs_[static_cast<size_t>(places_[i])] = {static_cast<int64_t>(i) / n_used_, index};
    }
}

}  // namespace tinychat
