// How the attention of a step is cut into items, for each key-value head: a few rows of one slot, and some of the entries
// that they see. The cut depends on the rows, never on the threads, and so do the results.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace tinychat {

// Rows [row, row + rows) of the step, at consecutive positions of one slot, and entries [begin, end).
struct Piece {
    int64_t row, rows;
    int64_t begin, end;
    int64_t index, count;  // it is one of `count` of these rows
    int64_t run;           // these rows among the step's
    int64_t partials;      // pieces before the first of these rows, weighed by rows, that are one of several
};

class AttentionPlan {
  public:
    AttentionPlan() = default;
    // Heads that share a key-value head, and how many of those there are. windows [n_layers]: what a row sees, 0: all.
    AttentionPlan(int64_t group, int64_t n_kv_heads, const std::vector<int64_t>& windows);

    // For the rows of a step, until the next.
    void set_rows(const int32_t* slots, const int32_t* positions, int64_t rows);

    struct Cut {  // of all layers with the same window (0: none)
        int64_t window;
        std::vector<Piece> pieces;
    };
    const std::vector<Cut>& cuts() const { return cuts_; }
    const std::vector<Piece>& pieces(size_t layer) const { return cuts_[cut_of_layer_[layer]].pieces; }
    int64_t runs() const { return static_cast<int64_t>(runs_.size()); }
    int64_t partials() const { return partials_; }  // rows of pieces that are one of several, the most of any layer
    // No row sees what another appends: each is the only one of its slot.
    bool rows_alone() const { return alone_; }

  private:
    struct Run {
        int64_t row, rows, position;
        bool whole;  // not a part of more rows
    };

    void set_pieces(Cut& cut);

    int64_t group_ = 1, piece_ = 1;
    std::vector<Run> runs_;
    std::vector<Cut> cuts_;
    std::vector<size_t> cut_of_layer_;
    std::vector<int32_t> slots_;  // of the step, sorted
    int64_t partials_ = 0;
    bool alone_ = false;
};

}  // namespace tinychat
