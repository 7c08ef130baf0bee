// The portable half of a decoder block that is not a linear: the specification of the other levels.
#include <cmath>

#include "levels.h"

namespace tinychat {
namespace {

void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* y) {
    double squares = 0;
    for (int64_t i = 0; i < n; ++i) squares += static_cast<double>(x[i]) * x[i];
    const float factor = static_cast<float>(1 / std::sqrt(squares / static_cast<double>(n) + static_cast<double>(eps)));
    for (int64_t i = 0; i < n; ++i) y[i] = x[i] * factor * weight[i];
}

void silu_multiply(const float* gate, const float* up, int64_t n, float* y) {
    for (int64_t i = 0; i < n; ++i) y[i] = gate[i] / (1 + std::exp(-gate[i])) * up[i];
}

}  // namespace

const BlockKernels& block_scalar() {
    static const BlockKernels table{rms_norm, silu_multiply};
    return table;
}

}  // namespace tinychat
