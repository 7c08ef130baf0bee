// Which experts of a mixture the rows of a step go to, by the router's logits.
#pragma once
#include <cstdint>
#include <vector>

#include "threads.h"

namespace tinychat {

// The numbers of an Experts (tinychat/config.py). n_experts 0: the model has none.
struct ExpertsShape {
    int64_t n_experts = 0, n_used = 0;
    int64_t intermediate_size = 0;  // of each expert
    int64_t shared_size = 0;        // of the shared expert; 0: there is none
    bool normalized = false;        // the shares of a row sum to 1

    int64_t router_size() const { return n_experts + (shared_size > 0 ? 1 : 0); }
};

// An expert and a row that goes to it are a pair. Pairs are sorted by expert, then by row, so that an expert's lie together.
class Routing {
  public:
    struct Group {
        int64_t expert, first, rows;  // the pairs first .. first + rows
    };
    struct Pair {
        int64_t row, group;
    };

    // logits [rows, router_size]: each row goes to the n_used experts of the highest.
    void route(const ExpertsShape& shape, const float* logits, int64_t rows, Team& team);

    // Of the experts that any row goes to.
    const std::vector<Group>& groups() const { return groups_; }
    const std::vector<Pair>& pairs() const { return pairs_; }
    // Of a row, [n_used]: its pairs, by expert, and what their outputs are multiplied by.
    const int64_t* pairs_of(int64_t row) const { return places_.data() + row * n_used_; }
    const float* shares_of(int64_t row) const { return shares_.data() + row * n_used_; }

  private:
    int64_t n_used_ = 0;
    std::vector<Group> groups_;
    std::vector<Pair> pairs_;      // [rows * n_used]
    std::vector<int64_t> chosen_;  // [rows, n_used], ascending
    std::vector<int64_t> places_;  // likewise: their pairs
    std::vector<float> shares_;    // likewise
    std::vector<int64_t> counts_;  // [n_experts]: rows of each, then its group
};

}  // namespace tinychat
