// The portable half of a decoder block that is not a linear: the specification of the other levels.
#include <cmath>

#include "levels.h"

namespace tinychat {
namespace {

void add(float* x, const float* y, int64_t n) {
    for (int64_t i = 0; i < n; ++i) x[i] += y[i];
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

void activate(Activation activation, const float* gate, const float* up, int64_t n, float* y) {
    for (int64_t i = 0; i < n; ++i) {
        const float x = gate[i];
        const float act = activation == Activation::silu ? x / (1 + std::exp(-x)) : x * 0.5f * std::erfc(-x * 0.70710678f);
        y[i] = up ? act * up[i] : act;
    }
}

}  // namespace

const BlockKernels& block_scalar() {
    static const BlockKernels table{add, moments, normalize, activate, rms_norm};
    return table;
}

}  // namespace tinychat
