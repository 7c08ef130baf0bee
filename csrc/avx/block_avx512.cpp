// Norm and activation at 16 lanes. Ends that do not fill a register are masked; nothing beyond them is touched.
#include <immintrin.h>

#include "avx/exponential_avx512.h"
#include "levels.h"

namespace tinychat {
namespace {

constexpr int64_t kLanes = 16;

__mmask16 first(int64_t n) { return static_cast<__mmask16>(n >= kLanes ? 0xffff : (1u << (n > 0 ? n : 0)) - 1); }

__m512 load(const float* from, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, from); }

void add(float* x, const float* y, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes) {
        const __mmask16 mask = first(n - i);
        _mm512_mask_storeu_ps(x + i, mask, _mm512_add_ps(load(x + i, mask), load(y + i, mask)));
    }
}

// The sum of f(x[i]) over n values, where f may make of a masked-out 0 what it likes.
template <class F>
float sum_over(const float* x, int64_t n, const F& f) {
    __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    int64_t i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
        for (int r = 0; r < 4; ++r) sums[r] = _mm512_add_ps(sums[r], f(_mm512_loadu_ps(x + i + r * kLanes)));
    }
    for (; i < n; i += kLanes) {
        const __mmask16 mask = first(n - i);
        sums[0] = _mm512_mask_add_ps(sums[0], mask, sums[0], f(load(x + i, mask)));
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
}

Moments moments(NormType type, const float* x, int64_t n) {
    const float count = static_cast<float>(n);
    const float mean = type == NormType::layer ? sum_over(x, n, [](__m512 value) { return value; }) / count : 0;
    const auto square = [&](__m512 value) {
        const __m512 away = _mm512_sub_ps(value, _mm512_set1_ps(mean));
        return _mm512_mul_ps(away, away);
    };
    return {mean, sum_over(x, n, square) / count};
}

void normalize(const float* x, float mean, float factor, const float* weight, const float* bias, int64_t n, float* y) {
    const __m512 center = _mm512_set1_ps(mean), scale = _mm512_set1_ps(factor);
    for (int64_t i = 0; i < n; i += kLanes) {
        const __mmask16 mask = first(n - i);
        const __m512 even = _mm512_mul_ps(_mm512_sub_ps(load(x + i, mask), center), scale);
        const __m512 shift = bias ? load(bias + i, mask) : _mm512_setzero_ps();
        _mm512_mask_storeu_ps(y + i, mask, _mm512_fmadd_ps(even, load(weight + i, mask), shift));
    }
}

void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* y) {
    const __m128 mean = _mm_set_ss(moments(NormType::rms, x, n).variance + eps);
    normalize(x, 0, 1 / _mm_cvtss_f32(_mm_sqrt_ss(mean)), weight, nullptr, n, y);
}

__m512 silu(__m512 x) {
    return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

// x (1 + erf(z)) / 2 with z = x / sqrt 2; for z >= 0 1 - erf(z) = e^(-z^2) p(1 / (1 + 0.3275911 z)), p of degree 5, within
// 1.5e-7 (Abramowitz and Stegun, 7.1.26).
__m512 gelu(__m512 x) {
    const __m512 z = _mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(0.70710678f));
    const __m512 t = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_fmadd_ps(z, _mm512_set1_ps(0.3275911f), _mm512_set1_ps(1.0f)));
    __m512 p = _mm512_set1_ps(1.061405429f);
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-1.453152027f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(1.421413741f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-0.284496736f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.254829592f));
    const __m512 rest = _mm512_mul_ps(_mm512_mul_ps(p, t), exponential(_mm512_fnmadd_ps(z, z, _mm512_setzero_ps())));
    const __m512 half = _mm512_mul_ps(_mm512_mul_ps(x, _mm512_set1_ps(0.5f)), rest);
    return _mm512_mask_sub_ps(half, _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GE_OQ), x, half);
}

template <class Act>
void activate_by(const Act& act, const float* gate, const float* up, int64_t n, float* y) {
    for (int64_t i = 0; i < n; i += kLanes) {
        const __mmask16 mask = first(n - i);
        const __m512 value = act(load(gate + i, mask));
        _mm512_mask_storeu_ps(y + i, mask, up ? _mm512_mul_ps(value, load(up + i, mask)) : value);
    }
}

void activate(Activation activation, const float* gate, const float* up, int64_t n, float* y) {
    if (activation == Activation::silu) {
        activate_by([](__m512 x) { return silu(x); }, gate, up, n, y);
    } else {
        activate_by([](__m512 x) { return gelu(x); }, gate, up, n, y);
    }
}

}  // namespace

const BlockKernels& block_avx512() {
    static const BlockKernels table{add, moments, normalize, activate, rms_norm};
    return table;
}

}  // namespace tinychat
