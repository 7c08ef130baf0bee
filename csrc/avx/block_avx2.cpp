// Norm and activation at 8 lanes. Ends that do not fill a register go through one of their own; nothing beyond
// them is touched.
#include <immintrin.h>

#include "avx/exponential_avx2.h"
#include "levels.h"

namespace tinychat {
namespace {

constexpr int64_t kLanes = 8;

// The first n of 8 lanes; n may be anything.
__m256i first(int64_t n) {
    const int lanes = static_cast<int>(n > kLanes ? kLanes : n);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(lanes), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// n values, or 8 where there are as many; the lanes beyond are 0.
__m256 load(const float* from, int64_t n) {
    return n >= kLanes ? _mm256_loadu_ps(from) : _mm256_maskload_ps(from, first(n));
}
void save(float* to, int64_t n, __m256 value) {
    if (n >= kLanes) {
        _mm256_storeu_ps(to, value);
    } else {
        _mm256_maskstore_ps(to, first(n), value);
    }
}

float sum_of(__m256 x) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

void add(float* x, const float* y, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes) save(x + i, n - i, _mm256_add_ps(load(x + i, n - i), load(y + i, n - i)));
}

// The sum of f(x[i]) over n values.
template <class F>
float sum_over(const float* x, int64_t n, const F& f) {
    __m256 sums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    int64_t i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
        for (int r = 0; r < 4; ++r) sums[r] = _mm256_add_ps(sums[r], f(_mm256_loadu_ps(x + i + r * kLanes)));
    }
    for (; i < n; i += kLanes) {
        const __m256 values = f(load(x + i, n - i));
        sums[0] = _mm256_add_ps(sums[0], _mm256_and_ps(values, _mm256_castsi256_ps(first(n - i))));
    }
    return sum_of(_mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3])));
}

Moments moments(NormType type, const float* x, int64_t n) {
    const float count = static_cast<float>(n);
    const float mean = type == NormType::layer ? sum_over(x, n, [](__m256 value) { return value; }) / count : 0;
    const auto square = [&](__m256 value) {
        const __m256 away = _mm256_sub_ps(value, _mm256_set1_ps(mean));
        return _mm256_mul_ps(away, away);
    };
    return {mean, sum_over(x, n, square) / count};
}

void normalize(const float* x, float mean, float factor, const float* weight, const float* bias, int64_t n, float* y) {
    const __m256 center = _mm256_set1_ps(mean), scale = _mm256_set1_ps(factor);
    for (int64_t i = 0; i < n; i += kLanes) {
        const __m256 even = _mm256_mul_ps(_mm256_sub_ps(load(x + i, n - i), center), scale);
        const __m256 shift = bias ? load(bias + i, n - i) : _mm256_setzero_ps();
        save(y + i, n - i, _mm256_fmadd_ps(even, load(weight + i, n - i), shift));
    }
}

void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* y) {
    const __m128 mean = _mm_set_ss(moments(NormType::rms, x, n).variance + eps);
    normalize(x, 0, 1 / _mm_cvtss_f32(_mm_sqrt_ss(mean)), weight, nullptr, n, y);
}

__m256 silu(__m256 x) {
    return _mm256_div_ps(x, _mm256_add_ps(_mm256_set1_ps(1.0f), exponential(_mm256_sub_ps(_mm256_setzero_ps(), x))));
}

// x (1 + erf(z)) / 2 with z = x / sqrt 2; for z >= 0 1 - erf(z) = e^(-z^2) p(1 / (1 + 0.3275911 z)), p of degree 5, within
// 1.5e-7 (Abramowitz and Stegun, 7.1.26).
__m256 gelu(__m256 x) {
    const __m256 positive = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
    const __m256 z = _mm256_mul_ps(positive, _mm256_set1_ps(0.70710678f));
    const __m256 t = _mm256_div_ps(_mm256_set1_ps(1.0f), _mm256_fmadd_ps(z, _mm256_set1_ps(0.3275911f), _mm256_set1_ps(1.0f)));
    __m256 p = _mm256_set1_ps(1.061405429f);
    p = _mm256_fmadd_ps(p, t, _mm256_set1_ps(-1.453152027f));
    p = _mm256_fmadd_ps(p, t, _mm256_set1_ps(1.421413741f));
    p = _mm256_fmadd_ps(p, t, _mm256_set1_ps(-0.284496736f));
    p = _mm256_fmadd_ps(p, t, _mm256_set1_ps(0.254829592f));
    const __m256 rest = _mm256_mul_ps(_mm256_mul_ps(p, t), exponential(_mm256_fnmadd_ps(z, z, _mm256_setzero_ps())));
    const __m256 half = _mm256_mul_ps(_mm256_mul_ps(x, _mm256_set1_ps(0.5f)), rest);
    return _mm256_blendv_ps(_mm256_sub_ps(x, half), half, x);
}

template <class Act>
void activate_by(const Act& act, const float* gate, const float* up, int64_t n, float* y) {
    for (int64_t i = 0; i < n; i += kLanes) {
        const __m256 value = act(load(gate + i, n - i));
        save(y + i, n - i, up ? _mm256_mul_ps(value, load(up + i, n - i)) : value);
    }
}

void activate(Activation activation, const float* gate, const float* up, int64_t n, float* y) {
    if (activation == Activation::silu) {
        activate_by([](__m256 x) { return silu(x); }, gate, up, n, y);
    } else {
        activate_by([](__m256 x) { return gelu(x); }, gate, up, n, y);
    }
}

}  // namespace

const BlockKernels& block_avx2() {
    static const BlockKernels table{add, moments, normalize, activate, rms_norm};
    return table;
}

}  // namespace tinychat
