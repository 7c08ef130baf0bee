// Attention that waits for arithmetic: many queries. Written in the lanes of a level (lanes_*.h, included first), and
// compiled anew in each level's unit.
//
// The queries of a block of rows, all heads of the group, meet a tile of 64 entries at a time. The tile's keys are widened
// and transposed, its values widened, once for all queries; then S = Q K^T and O = O * factor + P V run over blocks of
// registers, kQueries by kWide vectors. Between them the softmax goes on from tile to tile: when a query's maximum grows,
// what it has summed so far is scaled down by factor = e^(old - new) (arXiv 2205.14135, algorithm 1). Queries are in the
// order of their rows, so that the blocks that see nothing of a tile are passed over.
#pragma once
#include "attention_stream.h"

namespace tinychat {
namespace {

constexpr int64_t kTileEntries = 64;
constexpr float kLeast = -3.4028235e38f;

// s[m][j] = q[m] . k[.][j] for M queries and R vectors of entries.
template <int M, int R>
void multiply_keys(const float* q, int64_t q_stride, const float* k, int64_t dim, float* s) {
    Vector dots[M][R];
    for (int m = 0; m < M; ++m) {
        for (int r = 0; r < R; ++r) dots[m][r] = all(0);
    }
    for (int64_t d = 0; d < dim; ++d) {
        Vector key[R];
        for (int r = 0; r < R; ++r) key[r] = load(k + d * kTileEntries + r * kLanes);
        for (int m = 0; m < M; ++m) {
            const Vector value = all(q[m * q_stride + d]);
            for (int r = 0; r < R; ++r) dots[m][r] = fma(value, key[r], dots[m][r]);
        }
    }
    for (int m = 0; m < M; ++m) {
        for (int r = 0; r < R; ++r) save(s + m * kTileEntries + r * kLanes, dots[m][r]);
    }
}

// o[m] = o[m] * factors[m] + sum over j of p[m][j] * v[j], for M queries and R vectors of dimensions.
template <int M, int R>
void multiply_values(const float* p, const float* factors, const float* v, int64_t stride, int64_t n, float* o) {
    Vector mixed[M][R];
    for (int m = 0; m < M; ++m) {
        for (int r = 0; r < R; ++r) mixed[m][r] = load(o + m * stride + r * kLanes) * all(factors[m]);
    }
    for (int64_t j = 0; j < n; ++j) {
        Vector value[R];
        for (int r = 0; r < R; ++r) value[r] = load(v + j * stride + r * kLanes);
        for (int m = 0; m < M; ++m) {
            const Vector weight = all(p[m * kTileEntries + j]);
            for (int r = 0; r < R; ++r) mixed[m][r] = fma(weight, value[r], mixed[m][r]);
        }
    }
    for (int m = 0; m < M; ++m) {
        for (int r = 0; r < R; ++r) save(o + m * stride + r * kLanes, mixed[m][r]);
    }
}

// work(Count<n>) where n is at most Most.
template <int Most, class Work>
void counted_out(int64_t n, const Work& work) {
    if constexpr (Most > 1) {
        if (n < Most) return counted_out<Most - 1>(n, work);
    }
    work(Count<Most>{});
}

// work(begin, vectors) for `registers` vectors in even pieces of at most kWide.
template <class Work>
void in_pieces(int64_t registers, const Work& work) {
    const int64_t pieces = (registers + kWide - 1) / kWide;
    for (int64_t piece = 0, at = 0; piece < pieces; ++piece) {
        const int64_t next = registers * (piece + 1) / pieces;
        work(at, next - at);
        at = next;
    }
}

// n entries [.., dim], times their scales where there are any: transposed to k[dim][kTileEntries], entries beyond n 0.
template <class Entry>
void widen_keys(const Entry* keys, const float* scales, int64_t n, int64_t dim, float* k) {
    for (int64_t j = 0; j < rounded_up(n, kLanes); j += kLanes) {
        for (int64_t e = j; e < j + kLanes && e < n; ++e) {
            ask_ahead(keys + e * dim, dim * static_cast<int64_t>(sizeof(Entry)), true);
        }
        for (int64_t d = 0; d < dim; d += kLanes) {
            const Part some = part(dim - d);
            Vector square[kLanes];
            for (int e = 0; e < kLanes; ++e) {
                square[e] = all(0);
                if (j + e < n) square[e] = load(keys + (j + e) * dim + d, some);
                if (j + e < n && scales) square[e] = square[e] * all(scales[j + e]);
            }
            transpose(square);
            const int64_t here = dim - d < kLanes ? dim - d : kLanes;
            for (int64_t i = 0; i < here; ++i) save(k + (d + i) * kTileEntries + j, square[i]);
        }
    }
}

// n entries [.., dim], times their scales where there are any, to rows of `stride`, dimensions beyond dim 0.
template <class Entry>
void widen_values(const Entry* values, const float* scales, int64_t n, int64_t dim, float* v, int64_t stride) {
    for (int64_t j = 0; j < n; ++j) {
        const Vector scale = all(scales ? scales[j] : 1);
        ask_ahead(values + j * dim, dim * static_cast<int64_t>(sizeof(Entry)), true);
        for (int64_t d = 0; d < dim; d += kLanes) save(v + j * stride + d, load(values + j * dim + d, part(dim - d)) * scale);
    }
}

// Scores of a query with a tile's entries, of which it sees some, become weights e^(score - maximum); those it does not see
// get 0, to the end of the last register. The maximum before is left in *factor: see rescale().
void soften_tile(float* s, int64_t n, Seen seen, float cap, float slope, int64_t distance, float* maximum, float* sum,
                 float* factor) {
    constexpr int64_t kRegisters = kTileEntries / kLanes;
    const int64_t registers = (n + kLanes - 1) / kLanes;
    const bool all_seen = seen.begin <= 0 && seen.end >= registers * kLanes;
    Vector largest = all(*maximum), scores[kRegisters];
    for (int64_t r = 0; r < registers; ++r) {
        scores[r] = load(s + r * kLanes);
        if (cap != 0) scores[r] = capped(scores[r], cap);
        if (slope != 0) scores[r] = fma(all(slope), counted() + all(static_cast<float>(distance + r * kLanes)), scores[r]);
        if (!all_seen) scores[r] = within(scores[r], seen.begin - r * kLanes, seen.end - r * kLanes, kNothing);
        largest = larger(largest, scores[r]);
    }
    *factor = *maximum;
    *maximum = largest_of(largest);
    const Vector shift = all(*maximum == kNothing ? 0 : *maximum);
    Vector total = all(0);
    for (int64_t r = 0; r < registers; ++r) {
        const Vector weight = exponential(scores[r] - shift);
        total = total + weight;
        save(s + r * kLanes, weight);
    }
    *sum = sum_of(total);
}

// Maxima before a tile become factors for what was summed before; sums of the tile are added to it. All of n queries, rounded
// up to whole registers.
void rescale(int64_t n, const float* maxima, const float* tile_sums, float* factors, float* sums) {
    for (int64_t m = 0; m < n; m += kLanes) {
        const Part some = part(n - m);
        const Vector now = load(maxima + m, some), shift = larger(all(kLeast), now);  // of nothing: factor 0, not NaN
        const Vector factor = exponential(load(factors + m, some) - shift);
        save(factors + m, some, factor);
        save(sums + m, some, fma(load(sums + m, some), factor, load(tile_sums + m, some)));
    }
}

// k, v, and for each query q, out, scores, a factor and a sum.
int64_t tiles_scratch(int64_t queries, int64_t dim) {
    const int64_t stride = rounded_up(dim, kLanes);
    return 2 * stride * kTileEntries + queries * (2 * stride + kTileEntries) + 2 * rounded_up(queries, 16);
}

template <class Entry>
void tiles(const CacheView& cache, const QueryGroup& group, const QueryRows& rows, int64_t begin, int64_t end, float* scratch,
           const Partial& partial) {
    const int64_t dim = group.dim, heads = group.heads, queries = rows.rows * heads, stride = rounded_up(dim, kLanes);
    float* k = scratch;                       // [dim, kTileEntries]
    float* v = k + stride * kTileEntries;     // [kTileEntries, stride]
    float* q = v + stride * kTileEntries;     // [queries, stride], scaled
    float* o = q + queries * stride;          // [queries, stride]
    float* s = o + queries * stride;          // [queries, kTileEntries]
    float* factors = s + queries * kTileEntries;
    float* tile_sums = factors + rounded_up(queries, 16);
    for (int64_t m = 0; m < queries; ++m) {
        const float* from = rows.q + m / heads * rows.stride + m % heads * dim;
        for (int64_t d = 0; d < stride; ++d) q[m * stride + d] = d < dim ? from[d] * group.scale : 0, o[m * stride + d] = 0;
        partial.maximum[m] = kNothing;
        partial.sum[m] = 0;
    }
    const bool scaled = cache.type == CacheType::q8;
    begin = seen_by(rows, 0, begin, end).begin;
    end = seen_by(rows, rows.rows - 1, begin, end).end;
    for (int64_t tile = begin; tile < end; tile += kTileEntries) {
        const int64_t n = end - tile < kTileEntries ? end - tile : kTileEntries;
        widen_keys(static_cast<const Entry*>(cache.keys) + tile * dim, scaled ? cache.key_scales + tile : nullptr, n, dim, k);
        widen_values(static_cast<const Entry*>(cache.values) + tile * dim, scaled ? cache.value_scales + tile : nullptr, n,
                     dim, v, stride);
        // Queries [from, to) see some of the tile, the first `after(m)` entries at most: those before `from` end before it,
        // and those from `to` on begin after it.
        const auto after = [&](int64_t m) { return seen_by(rows, m / heads, tile, tile + n).end - tile; };
        int64_t from = 0, to = queries;
        while (from < to && after(from) <= 0) from += heads;
        while (from < to && seen_by(rows, (to - 1) / heads, tile, tile + n).begin - tile >= n) to -= heads;
        const auto in_blocks = [&](const auto& work) {
            const int64_t blocks = (to - from + kQueries - 1) / kQueries;
            for (int64_t block = 0; block < blocks; ++block) {
                const int64_t m = from + (to - from) * block / blocks;
                const int64_t some = from + (to - from) * (block + 1) / blocks - m;
                counted_out<kQueries>(some, [&](auto M) { work(M, m, after(m + some - 1)); });
            }
        };
        in_blocks([&](auto M, int64_t m, int64_t seen) {
            in_pieces((seen + kLanes - 1) / kLanes, [&](int64_t at, int64_t vectors) {
                counted_out<kWide>(vectors, [&](auto R) {
                    multiply_keys<decltype(M)::value, decltype(R)::value>(q + m * stride, stride, k + at * kLanes, dim,
                                                                          s + m * kTileEntries + at * kLanes);
                });
            });
        });
        in_blocks([&](auto M, int64_t m, int64_t seen) {
            for (int64_t i = m; i < m + decltype(M)::value; ++i) {
                const Seen own = seen_by(rows, i / heads, tile, tile + seen);
                soften_tile(s + i * kTileEntries, seen, {own.begin - tile, own.end - tile}, group.cap,
                            group.slopes ? group.slopes[i % heads] : 0, tile - rows.position - i / heads,
                            partial.maximum + i, tile_sums + i, factors + i);
            }
        });
        rescale(to - from, partial.maximum + from, tile_sums + from, factors + from, partial.sum + from);
        in_blocks([&](auto M, int64_t m, int64_t seen) {
            in_pieces(stride / kLanes, [&](int64_t at, int64_t vectors) {
                counted_out<kWide>(vectors, [&](auto R) {
                    multiply_values<decltype(M)::value, decltype(R)::value>(s + m * kTileEntries, factors + m,
                                                                            v + at * kLanes, stride, seen,
                                                                            o + m * stride + at * kLanes);
                });
            });
        });
    }
    for (int64_t m = 0; m < queries; ++m) {
        float* out = partial.out + m / heads * partial.stride + m % heads * dim;
        for (int64_t d = 0; d < dim; ++d) out[d] = o[m * stride + d];
    }
}

}  // namespace
}  // namespace tinychat
