// The quantizer's rounding, and its search of one group's limits, in the lanes of a level (lanes_*.h, included first),
// compiled anew in each level's unit. tinychat/quantize has the terms, in grid.py and clip.py, and the same in PyTorch.
//
// What a change d of a row's rounded weights adds to the loss is d (G d + pull). G is symmetric: with T its lower triangle,
// what is below the diagonal doubled, d G d = d T d in half the products. Six rows go together through all that is tried; T
// lies in blocks of columns of G as wide as a block of registers, each as far down as it goes.
//
// Weights are rounded to the numbers that Grid.nearest gives: no multiplication may fuse with the addition that follows.
#pragma once
#include <cstring>

#include "kernels.h"

namespace tinychat {
namespace {

constexpr int64_t kRows = 6;                            // at a time
constexpr int64_t kVectors = kLanes >= 8 ? 2 : 4;       // of a block: 12 or 24 sums
constexpr int64_t kBlock = kVectors * kLanes;
constexpr float kMost = 65504.0f;                       // of fp16
constexpr float kToInteger = 12582912.0f;               // 1.5 * 2^23: adding it rounds to an integer, the even one of two

inline Vector nearest_integer(Vector x) { return (x + all(kToInteger)) - all(kToInteger); }

inline int64_t padded(int64_t width) { return (width + kBlock - 1) / kBlock * kBlock; }
inline int64_t row_stride(int64_t width) { return padded(width) + kLanes; }  // rows a power of two apart would share a set
inline int64_t triangle(int64_t width) { return padded(width) * (padded(width) + kBlock) / 2; }

// T, rows of G from 0 to the last of each block's columns.
void make_triangle(const float* gram, int64_t width, float* t) {
    for (int64_t block = 0; block < width; block += kBlock) {
        for (int64_t j = 0; j < block + kBlock; ++j, t += kBlock) {
            for (int64_t i = block; i < block + kBlock; ++i) {
                const bool inside = i < width && j < width && j <= i;
                t[i - block] = inside ? gram[j * width + i] * (j < i ? 2.0f : 1.0f) : 0.0f;
            }
        }
    }
}

// Of kRows changes d, a stride apart: d (T d + pull).
__attribute__((noinline)) void losses(const float* t, const float* d, const float* pull, int64_t width, float* found) {
    const int64_t stride = row_stride(width);
    Vector totals[kRows];
    for (int64_t m = 0; m < kRows; ++m) totals[m] = all(0);
    for (int64_t block = 0; block < width; block += kBlock) {
        Vector sums[kRows][kVectors];
#pragma GCC unroll 6
        for (int64_t m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
            for (int64_t r = 0; r < kVectors; ++r) sums[m][r] = all(0);
        }
        for (int64_t j = 0; j < block + kBlock; ++j, t += kBlock) {
            Vector column[kVectors];
#pragma GCC unroll 4
            for (int64_t r = 0; r < kVectors; ++r) column[r] = load(t + r * kLanes);
#pragma GCC unroll 6
            for (int64_t m = 0; m < kRows; ++m) {
                const Vector value = all(d[m * stride + j]);
#pragma GCC unroll 4
                for (int64_t r = 0; r < kVectors; ++r) sums[m][r] = fma(value, column[r], sums[m][r]);
            }
        }
#pragma GCC unroll 6
        for (int64_t m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
            for (int64_t r = 0; r < kVectors; ++r) {
                const int64_t at = m * stride + block + r * kLanes;
                totals[m] = fma(sums[m][r] + load(pull + at), load(d + at), totals[m]);
            }
        }
    }
    for (int64_t m = 0; m < kRows; ++m) found[m] = sum_of(totals[m]);
}

struct Limits {
    float low, high;
};
struct Fit {
    float scale, zero;
};

// As Grid.parameters; a scale beyond fp16 becomes infinite.
inline Fit fitted(Limits limits, float top, bool symmetric) {
    const float low = limits.low < 0 ? limits.low : 0, high = limits.high > 0 ? limits.high : 0, middle = (top + 1) / 2;
    const float below = __builtin_fabsf(limits.low), above = __builtin_fabsf(limits.high);
    float scale = symmetric ? (below > above ? below : above) / middle : (high - low) / top;
    if (limits.low == limits.high && below <= kMost) scale = below;  // the one value, exactly
    if (scale > kMost) {
        scale = __builtin_inff();
    } else if (scale < 0x1p-14f) {
        scale = __builtin_ceilf(scale * 0x1p24f) * 0x1p-24f;
    } else {
        uint32_t bits;
        std::memcpy(&bits, &scale, 4);
        bits = (bits + 0xfff + (bits >> 13 & 1)) & ~0x1fffu;
        std::memcpy(&scale, &bits, 4);
    }
    if (scale == 0) scale = 1;
    if (symmetric) return {scale, middle};
    const float zero = __builtin_rintf(-low / scale);
    return {scale, zero < top ? zero : top};
}

// The numbers of the grid nearest to weights.
struct Rounder {
    Vector scale, low, high;

    Rounder(Fit fit, float top) : scale(all(fit.scale)), low(all(-fit.zero)), high(all(top - fit.zero)) {}
    Vector operator()(Vector weight) const {
        return smaller(larger(nearest_integer(weight / scale), low), high) * scale;
    }
};

// The range of n finite weights.
inline Limits range(const float* weights, int64_t n) {
    Vector low = all(weights[0]), high = low;
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        const Vector weight = load(weights + i);
        low = smaller(weight, low);
        high = larger(weight, high);
    }
    Limits found{-largest_of(all(0) - low), largest_of(high)};
    for (; i < n; ++i) {
        found.low = weights[i] < found.low ? weights[i] : found.low;
        found.high = weights[i] > found.high ? weights[i] : found.high;
    }
    return found;
}

bool round_rows(const Rounding& r) {
    const int64_t groups = (r.k + r.width - 1) / r.width;
    for (int64_t row = 0; row < r.rows; ++row) {
        const float* from = r.weights + row * r.k;
        float* to = r.rounded + row * r.k;
        Vector zero = all(0);  // not, after a weight that is not finite
        for (int64_t i = 0; i < r.k; i += kLanes) zero = zero + load(from + i, part(r.k - i)) * all(0);
        if (!(sum_of(zero) == 0)) return false;
        for (int64_t g = 0, at = 0; g < groups; ++g, at += r.width) {
            const int64_t n = r.k - at < r.width ? r.k - at : r.width;
            Limits limits = range(from + at, n);
            if (r.limits) std::memcpy(&limits, r.limits + (row * groups + g) * 2, sizeof limits);
            const Fit fit = fitted(limits, r.top, r.symmetric);
            if (!(fit.scale <= kMost)) return false;
            const Rounder rounded(fit, r.top);
            int64_t i = at;
            for (; i + kLanes <= at + n; i += kLanes) {
                const Vector made = rounded(load(from + i));
                save(to + i, r.divisors ? made / load(r.divisors + i) : made);
            }
            if (i < at + n) {
                const Part some = part(at + n - i);
                const Vector made = rounded(load(from + i, some));
                save(to + i, some, r.divisors ? made / load(r.divisors + i, some) : made);
            }
        }
    }
    return true;
}

int64_t clip_scratch(int64_t width) { return triangle(width) + 4 * kRows * row_stride(width); }

bool clip(const Clipping& c, float* scratch) {
    const int64_t width = c.width, stride = row_stride(width);
    float* t = scratch;
    float* weights = t + triangle(width);  // of kRows rows, padded with zeros, as what follows
    float* pull = weights + kRows * stride;
    float* rounded = pull + kRows * stride;
    float* d = rounded + kRows * stride;
    const auto bytes = static_cast<size_t>(width) * 4;
    make_triangle(c.gram, width, t);
    std::memset(weights, 0, static_cast<size_t>(4 * kRows * stride) * 4);
    const auto change = [&](int64_t m, Limits limits) {
        const Rounder round(fitted(limits, c.top, c.symmetric), c.top);
        for (int64_t i = m * stride; i < m * stride + padded(width); i += kLanes) {
            save(d + i, round(load(weights + i)) - load(rounded + i));
        }
    };
    bool changed = false;
    for (int64_t first = 0; first < c.rows; first += kRows) {
        const int64_t rows = c.rows - first < kRows ? c.rows - first : kRows;
        Limits own[kRows], limits[kRows];
        for (int64_t m = 0; m < rows; ++m) {
            std::memcpy(weights + m * stride, c.weights + (first + m) * width, bytes);
            std::memcpy(pull + m * stride, c.pull + (first + m) * width, bytes);
            std::memcpy(rounded + m * stride, c.rounded + (first + m) * width, bytes);
            std::memcpy(&own[m], c.own + (first + m) * c.stride, sizeof own[m]);
            std::memcpy(&limits[m], c.limits + (first + m) * c.stride, sizeof limits[m]);
        }
        float least[kRows] = {}, found[kRows];
        bool better[kRows] = {};
        for (int64_t move = 0; move < c.n_moves; ++move) {
            Limits best[kRows];
            std::memcpy(best, limits, sizeof best);
            for (int64_t i = 0; i < c.n_shrinks; ++i) {
                Limits tried[kRows];
                for (int64_t m = 0; m < rows; ++m) {
                    tried[m].low = c.moves[move] & 1 ? own[m].low * c.shrinks[i] : limits[m].low;
                    tried[m].high = c.moves[move] & 2 ? own[m].high * c.shrinks[i] : limits[m].high;
                    change(m, tried[m]);
                }
                losses(t, d, pull, width, found);
                for (int64_t m = 0; m < rows; ++m) {
                    if (!(found[m] < least[m])) continue;  // a NaN is never better
                    least[m] = found[m];
                    best[m] = tried[m];
                    better[m] = true;
                }
            }
            std::memcpy(limits, best, sizeof best);
        }
        for (int64_t m = 0; m < rows; ++m) {
            float* changes = c.change + (first + m) * width;
            if (!better[m]) {
                std::memset(changes, 0, bytes);
                continue;
            }
            changed = true;
            std::memcpy(c.limits + (first + m) * c.stride, &limits[m], sizeof limits[m]);
            change(m, limits[m]);
            std::memcpy(changes, d + m * stride, bytes);
        }
    }
    return changed;
}

}  // namespace
}  // namespace tinychat
