// The portable half of a decoder block that is not a linear: the specification of the other levels.
#include <cmath>

#include "levels.h"

namespace tinychat {
namespace {

void add(float* x, const float* y, float factor, int64_t n) {
    for (int64_t i = 0; i < n; ++i) x[i] += factor * y[i];
}

Moments moments(NormType type, const float* x, int64_t n) {
    double mean = 0, squares = 0;
    if (type == NormType::layer) {
        for (int64_t i = 0; i < n; ++i) mean += static_cast<double>(x[i]);
        mean /= static_cast<double>(n);
    }
    for (int64_t i = 0; i < n; ++i) squares += (x[i] - mean) * (x[i] - mean);
    return {static_cast<float>(mean), static_cast<float>(squares / static_cast<double>(n))};
}

void normalize(const float* x, float mean, float factor, const float* weight, const float* bias, int64_t n, float* y) {
    for (int64_t i = 0; i < n; ++i) y[i] = (x[i] - mean) * factor * weight[i] + (bias ? bias[i] : 0);
}

void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* y) {
    normalize(x, 0, 1 / std::sqrt(moments(NormType::rms, x, n).variance + eps), weight, nullptr, n, y);
}

float activated(Activation activation, float x) {
    switch (activation) {
        case Activation::silu: return x / (1 + std::exp(-x));
        case Activation::gelu: return x * 0.5f * std::erfc(-x * 0.70710678f);
        case Activation::gelu_tanh: return x / (1 + std::exp(-1.59576912f * x * (1 + 0.044715f * x * x)));
        case Activation::relu: return x < 0 ? 0 : x;
    }
    return x;
}

void activate(Activation activation, const float* gate, const float* up, int64_t n, float* y) {
    for (int64_t i = 0; i < n; ++i) {
        const float act = activated(activation, gate[i]);
        y[i] = up ? act * up[i] : act;
    }
}

void soft_cap(float* x, float cap, int64_t n) {
    for (int64_t i = 0; i < n; ++i) x[i] = cap * std::tanh(x[i] / cap);
}

void peaks(const float* x, int64_t n, float* y) {
    float spoilt = 0;  // NaN where a value is, or is infinite
    for (int64_t i = 0; i < n; ++i) {
        float& peak = y[i / kPeak];
        if (i % kPeak == 0 || x[i] > peak) peak = x[i];
        spoilt += x[i] * 0;
    }
    y[0] += spoilt;
}

}  // namespace

const BlockKernels& block_scalar() {
    static const BlockKernels table{add, moments, normalize, activate, rms_norm, soft_cap, peaks};
    return table;
}

}  // namespace tinychat
