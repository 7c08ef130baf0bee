// Norm, activation and attention at 16 lanes. Ends that do not fill a register are masked; nothing beyond them is touched.
//
// Attention takes four heads of a group at a time, so that a cache entry is loaded and widened once for all of them: one
// pass over the keys for the scores, the softmax, one pass over the values. It waits for the cache's memory.
#include <immintrin.h>

#include "levels.h"

namespace tinychat {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kValueRegisters = 4;  // of each head while values are summed: heads * this accumulators
constexpr int kHeads = 4;               // taken together

__mmask16 first(int64_t n) { return static_cast<__mmask16>(n >= kLanes ? 0xffff : (1u << (n > 0 ? n : 0)) - 1); }

__m512 load(const float* from, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, from); }
__m512 load(const uint16_t* from, __mmask16 mask) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, from)); }

// e^x: x = n ln 2 + r with |r| <= ln 2 / 2, and e^r by its Taylor polynomial, within 2^-24 of it. Overflows to infinity and
// underflows to 0 as it should.
__m512 exponential(__m512 x) {
    // Beyond these bounds the result is the same, and n stays small. max and min return the second of two if one is NaN.
    x = _mm512_min_ps(_mm512_set1_ps(90.0f), _mm512_max_ps(_mm512_set1_ps(-105.0f), x));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0x1.62e4p-1f), x);  // ln 2 in two parts, the first short
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0x1.7f7d1cp-20f), r);
    __m512 p = _mm512_set1_ps(1.0f / 5040);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 720));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

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

void store(CacheType type, const float* x, int64_t n, void* entry) {
    for (int64_t i = 0; i < n; i += kLanes) {
        const __mmask16 mask = first(n - i);
        const __m512 value = load(x + i, mask);
        if (type == CacheType::f32) {
            _mm512_mask_storeu_ps(static_cast<float*>(entry) + i, mask, value);
        } else {
            _mm256_mask_storeu_epi16(static_cast<uint16_t*>(entry) + i, mask, _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
        }
    }
}

// scores[h * n + j] = scale * q[h] . keys[j] for n entries.
template <int H, class Entry>
void score(const float* q, int64_t q_stride, const Entry* keys, int64_t n, int64_t dim, float scale, float* scores) {
    for (int64_t j = 0; j < n; ++j) {
        __m512 dots[H];
        for (int h = 0; h < H; ++h) dots[h] = _mm512_setzero_ps();
        for (int64_t d = 0; d < dim; d += kLanes) {
            const __mmask16 mask = first(dim - d);
            const __m512 key = load(keys + j * dim + d, mask);
            for (int h = 0; h < H; ++h) dots[h] = _mm512_fmadd_ps(load(q + h * q_stride + d, mask), key, dots[h]);
        }
        for (int h = 0; h < H; ++h) scores[h * n + j] = scale * _mm512_reduce_add_ps(dots[h]);
    }
}

// Scores to weights e^(score - largest); returns their sum.
float soften(float* scores, int64_t n) {
    __m512 largest = _mm512_set1_ps(scores[0]);
    for (int64_t j = 0; j < n; j += kLanes) {
        largest = _mm512_mask_max_ps(largest, first(n - j), largest, load(scores + j, first(n - j)));
    }
    const __m512 shift = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
    __m512 sum = _mm512_setzero_ps();
    for (int64_t j = 0; j < n; j += kLanes) {
        const __mmask16 mask = first(n - j);
        const __m512 weight = exponential(_mm512_sub_ps(load(scores + j, mask), shift));
        _mm512_mask_storeu_ps(scores + j, mask, weight);
        sum = _mm512_mask_add_ps(sum, mask, sum, weight);
    }
    return _mm512_reduce_add_ps(sum);
}

// out[h] = sum over j of weights[h * n + j] * values[j], times factors[h].
template <int H, class Entry>
void mix(const float* weights, const float* factors, const Entry* values, int64_t n, int64_t dim, float* out,
         int64_t out_stride) {
    constexpr int64_t R = kValueRegisters;
    for (int64_t d = 0; d < dim; d += R * kLanes) {
        __mmask16 masks[R];
        for (int64_t r = 0; r < R; ++r) masks[r] = first(dim - d - r * kLanes);
        __m512 sums[H][R];
        for (int h = 0; h < H; ++h) {
            for (int64_t r = 0; r < R; ++r) sums[h][r] = _mm512_setzero_ps();
        }
        for (int64_t j = 0; j < n; ++j) {
            __m512 value[R];
            for (int64_t r = 0; r < R; ++r) value[r] = load(values + j * dim + d + r * kLanes, masks[r]);
            for (int h = 0; h < H; ++h) {
                const __m512 weight = _mm512_set1_ps(weights[h * n + j]);
                for (int64_t r = 0; r < R; ++r) sums[h][r] = _mm512_fmadd_ps(weight, value[r], sums[h][r]);
            }
        }
        for (int h = 0; h < H; ++h) {
            const __m512 factor = _mm512_set1_ps(factors[h]);
            for (int64_t r = 0; r < R; ++r) {
                _mm512_mask_storeu_ps(out + h * out_stride + d + r * kLanes, masks[r], _mm512_mul_ps(sums[h][r], factor));
            }
        }
    }
}

template <int H, class Entry>
void attend_heads(const float* q, int64_t q_stride, const Entry* keys, const Entry* values, int64_t n, int64_t dim,
                  float scale, float* scores, float* out, int64_t out_stride) {
    float factors[H];
    score<H>(q, q_stride, keys, n, dim, scale, scores);
    for (int h = 0; h < H; ++h) factors[h] = 1.0f / soften(scores + h * n, n);
    mix<H>(scores, factors, values, n, dim, out, out_stride);
}

template <class Entry>
void attend_group(const float* q, int64_t q_stride, const Entry* keys, const Entry* values, int64_t n, int64_t heads,
                  int64_t dim, float scale, float* scores, float* out, int64_t out_stride) {
    int64_t h = 0;
    for (; h + kHeads <= heads; h += kHeads) {
        attend_heads<kHeads>(q + h * q_stride, q_stride, keys, values, n, dim, scale, scores, out + h * out_stride,
                             out_stride);
    }
    const auto rest = [&](auto attend) {
        attend(q + h * q_stride, q_stride, keys, values, n, dim, scale, scores, out + h * out_stride, out_stride);
    };
    if (heads - h == 3) rest(attend_heads<3, Entry>);
    if (heads - h == 2) rest(attend_heads<2, Entry>);
    if (heads - h == 1) rest(attend_heads<1, Entry>);
}

void attend(CacheType type, const float* q, int64_t q_stride, const void* keys, const void* values, int64_t begin,
            int64_t end, int64_t heads, int64_t dim, float scale, float* scores, float* out, int64_t out_stride) {
    if (type == CacheType::f16) {
        attend_group(q, q_stride, static_cast<const uint16_t*>(keys) + begin * dim,
                     static_cast<const uint16_t*>(values) + begin * dim, end - begin, heads, dim, scale, scores, out,
                     out_stride);
    } else {
        attend_group(q, q_stride, static_cast<const float*>(keys) + begin * dim,
                     static_cast<const float*>(values) + begin * dim, end - begin, heads, dim, scale, scores, out,
                     out_stride);
    }
}

}  // namespace

const BlockKernels& block_avx512() {
    static const BlockKernels table{add, moments, normalize, activate, rms_norm, store, attend};
    return table;
}

}  // namespace tinychat
