#include "attention_plan.h"

#include <algorithm>

namespace tinychat {
namespace {

// Queries (rows x heads) that share the widening of the entries they see: beyond this little is gained.
constexpr int64_t kQueries = 128;
// Entries of a piece. Few key-value heads take smaller ones, or there would be fewer items than threads.
constexpr int64_t kMostEntries = 1024, kFewestEntries = 128, kManyHeads = 8;
constexpr int64_t kEntryStep = 64;

int64_t divided(int64_t n, int64_t by) { return (n + by - 1) / by; }

}  // namespace

AttentionPlan::AttentionPlan(int64_t group, int64_t n_kv_heads, const std::vector<int64_t>& windows)
    : group_(group), piece_(std::clamp(kMostEntries * n_kv_heads / kManyHeads, kFewestEntries, kMostEntries)) {
    for (const int64_t window : windows) {
        const auto same = [&](const Cut& cut) { return cut.window == window; };
        const auto cut = std::find_if(cuts_.begin(), cuts_.end(), same);
        cut_of_layer_.push_back(static_cast<size_t>(cut - cuts_.begin()));
        if (cut == cuts_.end()) cuts_.push_back({window, {}});
    }
}

void AttentionPlan::set_rows(const int32_t* slots, const int32_t* positions, int64_t rows) {
    runs_.clear();
    partials_ = 0;
    const int64_t most = std::max<int64_t>(kQueries / group_, 1);
    for (int64_t row = 0; row < rows;) {
        int64_t end = row + 1;
        while (end < rows && slots[end] == slots[row] && positions[end] == positions[end - 1] + 1) ++end;
        const int64_t n = end - row, blocks = divided(n, most);
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t first = n * block / blocks;
            runs_.push_back({row + first, n * (block + 1) / blocks - first, positions[row] + first, blocks == 1});
        }
        row = end;
    }
    slots_.assign(slots, slots + rows);
    std::sort(slots_.begin(), slots_.end());
    alone_ = std::adjacent_find(slots_.begin(), slots_.end()) == slots_.end();
    for (Cut& cut : cuts_) set_pieces(cut);
}

void AttentionPlan::set_pieces(Cut& cut) {
    const int64_t window = cut.window;
    int64_t partials = 0;
    cut.pieces.clear();
    for (int64_t r = 0; r < runs(); ++r) {
        const Run& run = runs_[static_cast<size_t>(r)];
        const int64_t begin = window ? std::max<int64_t>(run.position + 1 - window, 0) : 0;
        const int64_t end = run.position + run.rows, n = end - begin;
        // Many rows are items enough.
        const int64_t length = run.whole ? divided(divided(n, divided(n, piece_)), kEntryStep) * kEntryStep : n;
        const int64_t count = divided(n, length);
        for (int64_t i = 0; i < count; ++i) {
            const int64_t at = begin + i * length;
            cut.pieces.push_back({run.row, run.rows, at, std::min(at + length, end), i, count, r, partials});
        }
        if (count > 1) partials += count * run.rows;
    }
    partials_ = std::max(partials_, partials);
}

}  // namespace tinychat
