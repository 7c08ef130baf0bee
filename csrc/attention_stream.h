// Attention that waits for the cache's memory: few queries, many entries. Written in the lanes of a level (lanes_*.h,
// included first), and compiled anew in each level's unit.
//
// One pass over the keys for the scores, the softmax, one pass over the values; each reads a single stream of memory, ahead
// of itself. A block of entries stays in the first cache while the queries meet it, four at a time, so that an entry is
// widened once for four. Scores of kLanes pairs of query and entry are summed across their registers together.
#pragma once
#include "kernels.h"

namespace tinychat {
namespace {

constexpr int64_t kBlock = 64;      // entries
constexpr int64_t kAhead = 16384;   // bytes between what is read and what is asked for
constexpr float kInfinity = __builtin_inff(), kNothing = -kInfinity;  // the score of what is not seen

int64_t rounded_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

void ask_ahead(const void* entry, int64_t bytes, bool asks) {
    for (int64_t b = 0; asks && b < bytes; b += 64) __builtin_prefetch(static_cast<const char*>(entry) + kAhead + b, 0, 2);
}

// scores[h * stride + j] = q[h] . keys[j] for n entries; up to kLanes - 1 more scores are written. Entries are read one
// after the other, as they lie: only then does every core fetch ahead of itself. So that sums do not wait for each other,
// those of an entry are several.
template <int H, class Entry>
void score(const float* const* q, const Entry* keys, int64_t n, int64_t dim, bool asks, float* scores, int64_t stride) {
    constexpr int kEntries = kLanes / H, kSums = H == 1 ? 4 : 8 / H;
    const int64_t whole = dim / kLanes * kLanes, bytes = dim * static_cast<int64_t>(sizeof(Entry));
    const Part rest = part(dim - whole);
    for (int64_t j = 0; j < n; j += kEntries) {
        Vector dots[kLanes];
#pragma GCC unroll 16
        for (int e = 0; e < kEntries; ++e) {
            const Entry* key = keys + (j + e < n ? j + e : n - 1) * dim;
            ask_ahead(key, bytes, asks);
            Vector sum[H][kSums];
            for (auto& of_query : sum) {
                for (Vector& some : of_query) some = all(0);
            }
            const auto add = [&](int64_t d, int i, auto... lanes) {
                const Vector some = load(key + d, lanes...);
                for (int h = 0; h < H; ++h) sum[h][i] = fma(some, load(q[h] + d, lanes...), sum[h][i]);
            };
            int64_t d = 0;
            for (; d + kSums * kLanes <= dim; d += kSums * kLanes) {
                for (int i = 0; i < kSums; ++i) add(d + i * kLanes, i);
            }
            for (; d < whole; d += kLanes) add(d, 0);
            if (d < dim) add(d, 0, rest);
            for (int h = 0; h < H; ++h) {
                for (int i = 1; i < kSums; ++i) sum[h][0] = sum[h][0] + sum[h][i];
                dots[h * kEntries + e] = sum[h][0];
            }
        }
        alignas(64) float block[kLanes];
        save(block, sums(dots));
        for (int h = 0; h < H; ++h) {
            for (int e = 0; e < kEntries; ++e) scores[h * stride + j + e] = block[h * kEntries + e];
        }
    }
}

// The range [begin, end) of entries that query row `i` sees.
struct Seen {
    int64_t begin, end;
};
Seen seen_by(const QueryRows& rows, int64_t i, int64_t begin, int64_t end) {
    const int64_t after = rows.position + i + 1, from = rows.window ? after - rows.window : 0;
    return {from > begin ? from : begin, after < end ? after : end};
}

// Asks for a stretch of memory to the second cache, little by little.
class Ahead {
  public:
    Ahead(const void* from, int64_t bytes) : next_(static_cast<const char*>(from)), end_(next_ + bytes) {}
    void ask(int64_t lines) {
        for (; lines > 0 && next_ < end_; --lines, next_ += 64) __builtin_prefetch(next_, 0, 2);
    }

  private:
    const char *next_, *end_;
};

// Dot products of one query with the n entries from `begin` on become weights e^(score - maximum), times the values'
// scales; those not seen get 0. Weights are written to the end of the last register.
void soften(float* scores, int64_t n, const QueryGroup& group, int64_t head, const CacheView& cache, int64_t begin, Seen seen,
            int64_t position, Ahead& ahead, float* maximum, float* sum) {
    const float slope = group.slopes ? group.slopes[head] : 0;
    for (int64_t j = 0; j < n; j += kLanes) {
        Vector score = load(scores + j) * all(group.scale);
        if (cache.type == CacheType::q8) score = score * load(cache.key_scales + begin + j, part(n - j));
        if (group.cap != 0) score = capped(score, group.cap);
        if (slope != 0) score = fma(all(slope), counted() + all(static_cast<float>(begin + j - position)), score);
        save(scores + j, score);
        ahead.ask(2);
    }
    for (int64_t j = 0; j < seen.begin - begin && j < n; ++j) scores[j] = kNothing;
    for (int64_t j = seen.end > begin ? seen.end - begin : 0; j < rounded_up(n, kLanes); ++j) scores[j] = kNothing;
    Vector largest = all(kNothing);
    for (int64_t j = 0; j < n; j += kLanes) largest = larger(largest, load(scores + j));
    *maximum = largest_of(largest);
    const Vector shift = all(*maximum == kNothing ? 0 : *maximum);
    Vector total = all(0);
    for (int64_t j = 0; j < n; j += kLanes) {
        Vector weight = exponential(load(scores + j) - shift);
        total = total + weight;
        ahead.ask(6);
        if (cache.type == CacheType::q8) weight = weight * load(cache.value_scales + begin + j, part(n - j));
        save(scores + j, weight);
    }
    *sum = sum_of(total);
}

// In place of a part: all lanes.
struct Whole {};
template <class T>
Vector load(const T* from, Whole) {
    return load(from);
}
void save(float* to, Whole, Vector value) { save(to, value); }

// out[h] += sum over j of weights[h * stride + j] * values[j], in R registers of dimensions, the last of them a part or whole.
template <int H, int R, class Entry, class Last>
void mix(const float* weights, int64_t stride, const Entry* values, int64_t n, int64_t dim, bool asks, Last last,
         float* const* out) {
    Vector mixed[H][R];
    for (int h = 0; h < H; ++h) {
        for (int r = 0; r < R; ++r) {
            mixed[h][r] = r < R - 1 ? load(out[h] + r * kLanes) : load(out[h] + r * kLanes, last);
        }
    }
    for (int64_t j = 0; j < n; ++j) {
        const Entry* entry = values + j * dim;
        ask_ahead(entry, R * kLanes * static_cast<int64_t>(sizeof(Entry)), asks);
        Vector value[R];
        for (int r = 0; r < R; ++r) value[r] = r < R - 1 ? load(entry + r * kLanes) : load(entry + r * kLanes, last);
        for (int h = 0; h < H; ++h) {
            const Vector weight = all(weights[h * stride + j]);
            for (int r = 0; r < R; ++r) mixed[h][r] = fma(weight, value[r], mixed[h][r]);
        }
    }
    for (int h = 0; h < H; ++h) {
        for (int r = 0; r < R - 1; ++r) save(out[h] + r * kLanes, mixed[h][r]);
        save(out[h] + (R - 1) * kLanes, last, mixed[h][R - 1]);
    }
}

// mix() with as many registers as are left, R at most.
template <int H, int R, class Entry, class Last>
void mix_some(int64_t registers, const float* weights, int64_t stride, const Entry* values, int64_t n, int64_t dim, bool asks,
              Last last, float* const* out) {
    if constexpr (R > 1) {
        if (registers < R) return mix_some<H, R - 1>(registers, weights, stride, values, n, dim, asks, last, out);
    }
    mix<H, R>(weights, stride, values, n, dim, asks, last, out);
}

// The same sums in memory, for two entries at a time, which are read as they lie.
template <int H, class Entry>
void mix_pairs(const float* weights, int64_t stride, const Entry* values, int64_t n, int64_t dim, bool asks,
               float* const* out) {
    const int64_t whole = dim / kLanes * kLanes;
    const Part rest = part(dim - whole);
    for (int64_t j = 0; j < n; j += 2) {
        const bool both = j + 1 < n;
        const Entry *first = values + j * dim, *second = both ? first + dim : first;
        ask_ahead(first, 2 * dim * static_cast<int64_t>(sizeof(Entry)), asks);
        Vector weight[H][2];
        for (int h = 0; h < H; ++h) {
            const float* of_query = weights + h * stride + j;
            weight[h][0] = all(of_query[0]);
            weight[h][1] = all(both ? of_query[1] : 0);
        }
        const auto add = [&](int64_t d, auto lanes) {
            const Vector a = load(first + d, lanes), b = load(second + d, lanes);
            for (int h = 0; h < H; ++h) {
                save(out[h] + d, lanes, fma(weight[h][1], b, fma(weight[h][0], a, load(out[h] + d, lanes))));
            }
        };
        for (int64_t d = 0; d < whole; d += kLanes) add(d, Whole{});
        if (whole < dim) add(whole, rest);
    }
}

template <int H, class Entry>
void mix_all(const float* weights, int64_t stride, const Entry* values, int64_t n, int64_t dim, bool asks, float* const* out) {
    constexpr int kMost = (H > 1 ? kMixed : 8) / H;  // registers for the dimensions of a query
    const int64_t registers = (dim + kLanes - 1) / kLanes, passes = (registers + kMost - 1) / kMost;
    if (kMixPairs && passes > 1) return mix_pairs<H>(weights, stride, values, n, dim, asks, out);
    int64_t at = 0;
    for (int64_t pass = 0; pass < passes; ++pass) {
        const int64_t next = registers * (pass + 1) / passes, d = at * kLanes, left = dim - (next - 1) * kLanes;
        float* here[H];
        for (int h = 0; h < H; ++h) here[h] = out[h] + d;
        if (left >= kLanes) {
            mix_some<H, kMost>(next - at, weights, stride, values + d, n, dim, asks, Whole{}, here);
        } else {
            mix_some<H, kMost>(next - at, weights, stride, values + d, n, dim, asks, part(left), here);
        }
        at = next;
    }
}

template <int H>
struct Count {
    static constexpr int value = H;
};

// work(Count<H>, first query) for queries in fours, and the rest in two and one.
template <class Work>
void in_fours(int64_t queries, const Work& work) {
    int64_t m = 0;
    for (; m + 4 <= queries; m += 4) work(Count<4>{}, m);
    if (queries & 2) work(Count<2>{}, m);
    if (queries & 1) work(Count<1>{}, queries - 1);
}

int64_t stream_scratch(int64_t queries, int64_t entries) { return queries * rounded_up(entries, kBlock); }

template <class Entry>
void stream(const CacheView& cache, const QueryGroup& group, const QueryRows& rows, int64_t begin, int64_t end, float* scratch,
            const Partial& partial) {
    const int64_t dim = group.dim, n = end - begin, queries = rows.rows * group.heads, stride = rounded_up(n, kBlock);
    const Entry* keys = static_cast<const Entry*>(cache.keys) + begin * dim;
    const Entry* values = static_cast<const Entry*>(cache.values) + begin * dim;
    const bool asks = group.fetch != Fetch::none;
    // work(Count, first query, first entry, entries) for each block of entries and the queries in fours
    const auto each_block = [&](const auto& work) {
        for (int64_t j = 0; j < n; j += kBlock) {
            const int64_t here = n - j < kBlock ? n - j : kBlock;
            in_fours(queries, [&](auto count, int64_t m) { work(count, m, j, here); });
        }
    };
    each_block([&](auto count, int64_t m, int64_t j, int64_t here) {
        constexpr int H = decltype(count)::value;
        const float* q[H];
        for (int h = 0; h < H; ++h) q[h] = rows.q + (m + h) / group.heads * rows.stride + (m + h) % group.heads * dim;
        score<H>(q, keys + j * dim, here, dim, asks, scratch + m * stride + j, stride);
    });
    Ahead ahead(values, n * dim * static_cast<int64_t>(sizeof(Entry)));  // memory works on while the softmax computes
    for (int64_t m = 0; m < queries; ++m) {
        const int64_t i = m / group.heads;
        soften(scratch + m * stride, n, group, m % group.heads, cache, begin, seen_by(rows, i, begin, end), rows.position + i,
               ahead, partial.maximum + m, partial.sum + m);
        float* out = partial.out + i * partial.stride + m % group.heads * dim;
        for (int64_t d = 0; d < dim; ++d) out[d] = 0;
    }
    each_block([&](auto count, int64_t m, int64_t j, int64_t here) {
        constexpr int H = decltype(count)::value;
        float* out[H];
        for (int h = 0; h < H; ++h) {
            out[h] = partial.out + (m + h) / group.heads * partial.stride + (m + h) % group.heads * dim;
        }
        mix_all<H>(scratch + m * stride + j, stride, values + j * dim, here, dim, asks, out);
    });
}

}  // namespace
}  // namespace tinychat
