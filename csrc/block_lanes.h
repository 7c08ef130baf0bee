// The block kernels of a level with lanes (lanes_*.h, included first), compiled anew in each level's unit. Ends that do
// not fill a register are parts of one; nothing beyond them is touched.
#pragma once
#include "kernels.h"

namespace tinychat {
namespace {

// y[i] = f(vectors of the inputs at i), n values; f takes a vector of each input.
template <class F, class... Inputs>
void each_value(float* y, int64_t n, const F& f, const Inputs*... inputs) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) save(y + i, f(load(inputs + i)...));
    if (i < n) {
        const Part rest = part(n - i);
        save(y + i, rest, f(load(inputs + i, rest)...));
    }
}

void add(float* x, const float* y, float factor, int64_t n) {
    const Vector by = all(factor);
    each_value(x, n, [&](Vector a, Vector b) { return fma(by, b, a); }, x, y);
}

// The sum of f(x[i]) over n values.
template <class F>
float sum_over(const float* x, int64_t n, const F& f) {
    Vector sums[4] = {all(0), all(0), all(0), all(0)};
    int64_t i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
        for (int r = 0; r < 4; ++r) sums[r] = sums[r] + f(load(x + i + r * kLanes));
    }
    for (; i + kLanes <= n; i += kLanes) sums[0] = sums[0] + f(load(x + i));
    if (i < n) sums[1] = sums[1] + within(f(load(x + i, part(n - i))), 0, n - i, 0);
    return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

Moments moments(NormType type, const float* x, int64_t n) {
    const float count = static_cast<float>(n);
    const float mean = type == NormType::layer ? sum_over(x, n, [](Vector value) { return value; }) / count : 0;
    const auto square = [&](Vector value) {
        const Vector away = value - all(mean);
        return away * away;
    };
    return {mean, sum_over(x, n, square) / count};
}

void normalize(const float* x, float mean, float factor, const float* weight, const float* bias, int64_t n, float* y) {
    const Vector center = all(mean), scale = all(factor);
    if (bias) {
        each_value(y, n, [&](Vector a, Vector w, Vector b) { return fma((a - center) * scale, w, b); }, x, weight, bias);
    } else {
        each_value(y, n, [&](Vector a, Vector w) { return (a - center) * scale * w; }, x, weight);
    }
}

void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* y) {
    normalize(x, 0, 1 / __builtin_sqrtf(moments(NormType::rms, x, n).variance + eps), weight, nullptr, n, y);
}

Vector negative(Vector x) { return all(0) - x; }

Vector silu(Vector x) { return x / (all(1) + exponential(negative(x))); }

// x (1 + erf(z)) / 2 with z = x / sqrt 2; for z >= 0 1 - erf(z) = e^(-z^2) p(1 / (1 + 0.3275911 z)), p of degree 5, within
// 1.5e-7 (Abramowitz and Stegun, 7.1.26). So it is the larger of x and 0 less |x| (1 - erf(|z|)) / 2.
Vector gelu(Vector x) {
    const Vector size = magnitude(x), z = size * all(0.70710678f), t = all(1) / fma(z, all(0.3275911f), all(1));
    Vector p = all(1.061405429f);
    p = fma(p, t, all(-1.453152027f));
    p = fma(p, t, all(1.421413741f));
    p = fma(p, t, all(-0.284496736f));
    p = fma(p, t, all(0.254829592f));
    const Vector rest = p * t * exponential(negative(z * z));
    return larger(all(0), x) - size * all(0.5f) * rest;
}

// x (1 + tanh(u)) / 2 = x / (1 + e^(-2 u)) with u = sqrt(2 / pi) (x + 0.044715 x^3)
Vector gelu_tanh(Vector x) {
    const Vector u = x * fma(x * x, all(0.044715f), all(1));
    return x / (all(1) + exponential(u * all(-1.59576912f)));
}

Vector relu(Vector x) { return larger(all(0), x); }

template <class Act>
void activate_by(const Act& act, const float* gate, const float* up, int64_t n, float* y) {
    if (up) {
        each_value(y, n, [&](Vector g, Vector u) { return act(g) * u; }, gate, up);
    } else {
        each_value(y, n, act, gate);
    }
}

void activate(Activation activation, const float* gate, const float* up, int64_t n, float* y) {
    switch (activation) {
        case Activation::silu: return activate_by([](Vector x) { return silu(x); }, gate, up, n, y);
        case Activation::gelu: return activate_by([](Vector x) { return gelu(x); }, gate, up, n, y);
        case Activation::gelu_tanh: return activate_by([](Vector x) { return gelu_tanh(x); }, gate, up, n, y);
        case Activation::relu: return activate_by([](Vector x) { return relu(x); }, gate, up, n, y);
    }
}

void soft_cap(float* x, float cap, int64_t n) {
    each_value(x, n, [&](Vector value) { return capped(value, cap); }, x);
}

void peaks(const float* x, int64_t n, float* y) {
    static_assert(kPeak % kLanes == 0);
    const Vector none = all(-__builtin_inff());
    Vector spoilt = all(0);  // NaN where a value is, or is infinite
    int64_t i = 0;
    for (; i + kPeak <= n; i += kPeak) {
        Vector most = none;
        for (int64_t v = 0; v < kPeak; v += kLanes) {
            const Vector value = load(x + i + v);
            most = larger(most, value);
            spoilt = fma(value, all(0), spoilt);
        }
        y[i / kPeak] = largest_of(most);
    }
    if (i < n) {
        Vector most = none;
        for (int64_t v = i; v < n; v += kLanes) {
            const Vector value = load(x + v, part(n - v));
            most = larger(most, within(value, 0, n - v, -__builtin_inff()));
            spoilt = fma(value, all(0), spoilt);
        }
        y[i / kPeak] = largest_of(most);
    }
    y[0] += sum_of(spoilt);
}

}  // namespace
}  // namespace tinychat
