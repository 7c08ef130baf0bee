// Norm, activation and attention at 8 lanes. Ends that do not fill a register go through one of their own; nothing beyond
// them is touched.
//
// Attention takes four heads of a group at a time, so that a cache entry is loaded and widened once for all of them: one
// pass over the keys for the scores, the softmax, one pass over the values. It waits for the cache's memory.
#include <immintrin.h>

#include "levels.h"

namespace tinychat {
namespace {

constexpr int64_t kLanes = 8;
constexpr int64_t kValueRegisters = 2;  // of each head while values are summed: heads * this accumulators
constexpr int kHeads = 4;               // taken together

// The first n of 8 lanes; n may be anything.
__m256i first(int64_t n) {
    const int lanes = static_cast<int>(n > kLanes ? kLanes : n);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(lanes), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// n values, or 8 where there are as many; the lanes beyond are 0.
__m256 load(const float* from, int64_t n) {
    return n >= kLanes ? _mm256_loadu_ps(from) : _mm256_maskload_ps(from, first(n));
}
__m256 load(const uint16_t* from, int64_t n) {
    if (n >= kLanes) return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    alignas(16) uint16_t some[kLanes] = {};
    for (int64_t i = 0; i < n; ++i) some[i] = from[i];
    return _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(some)));
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

// e^x: x = n ln 2 + r with |r| <= ln 2 / 2, and e^r by its Taylor polynomial, within 2^-24 of it. Overflows to infinity and
// underflows to 0 as it should.
__m256 exponential(__m256 x) {
    // Beyond these bounds the result is the same, and n stays small. max and min return the second of two if one is NaN.
    x = _mm256_min_ps(_mm256_set1_ps(90.0f), _mm256_max_ps(_mm256_set1_ps(-105.0f), x));
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0x1.62e4p-1f), x);  // ln 2 in two parts, the first short
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0x1.7f7d1cp-20f), r);
    __m256 p = _mm256_set1_ps(1.0f / 5040);
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 720));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 120));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 24));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 6));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.5f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
    // 2^n in two factors: n may be beyond the exponents of a float.
    const __m256i all = _mm256_cvtps_epi32(n), part = _mm256_srai_epi32(all, 1), bias = _mm256_set1_epi32(127);
    const __m256i low = _mm256_slli_epi32(_mm256_add_epi32(part, bias), 23);
    const __m256i high = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(all, part), bias), 23);
    return _mm256_mul_ps(_mm256_mul_ps(p, _mm256_castsi256_ps(low)), _mm256_castsi256_ps(high));
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

void store(CacheType type, const float* x, int64_t n, void* entry) {
    for (int64_t i = 0; i < n; i += kLanes) {
        const __m256 value = load(x + i, n - i);
        if (type == CacheType::f32) {
            save(static_cast<float*>(entry) + i, n - i, value);
            continue;
        }
        alignas(16) uint16_t halves[kLanes];
        _mm_store_si128(reinterpret_cast<__m128i*>(halves), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
        const int64_t here = n - i < kLanes ? n - i : kLanes;
        for (int64_t j = 0; j < here; ++j) static_cast<uint16_t*>(entry)[i + j] = halves[j];
    }
}

// scores[h * n + j] = scale * q[h] . keys[j] for n entries.
template <int H, class Entry>
void score(const float* q, int64_t q_stride, const Entry* keys, int64_t n, int64_t dim, float scale, float* scores) {
    for (int64_t j = 0; j < n; ++j) {
        __m256 dots[H];
        for (int h = 0; h < H; ++h) dots[h] = _mm256_setzero_ps();
        for (int64_t d = 0; d < dim; d += kLanes) {
            const __m256 key = load(keys + j * dim + d, dim - d);
            for (int h = 0; h < H; ++h) dots[h] = _mm256_fmadd_ps(load(q + h * q_stride + d, dim - d), key, dots[h]);
        }
        for (int h = 0; h < H; ++h) scores[h * n + j] = scale * sum_of(dots[h]);
    }
}

// Scores to weights e^(score - largest); returns their sum.
float soften(float* scores, int64_t n) {
    float largest = scores[0];
    for (int64_t j = 1; j < n; ++j) largest = scores[j] > largest ? scores[j] : largest;
    const __m256 shift = _mm256_set1_ps(largest);
    __m256 sum = _mm256_setzero_ps();
    for (int64_t j = 0; j < n; j += kLanes) {
        save(scores + j, n - j, exponential(_mm256_sub_ps(load(scores + j, n - j), shift)));
        sum = _mm256_add_ps(sum, load(scores + j, n - j));
    }
    return sum_of(sum);
}

// out[h] = sum over j of weights[h * n + j] * values[j], times factors[h].
template <int H, class Entry>
void mix(const float* weights, const float* factors, const Entry* values, int64_t n, int64_t dim, float* out,
         int64_t out_stride) {
    constexpr int64_t R = kValueRegisters;
    for (int64_t d = 0; d < dim; d += R * kLanes) {
        __m256 sums[H][R];
        for (int h = 0; h < H; ++h) {
            for (int64_t r = 0; r < R; ++r) sums[h][r] = _mm256_setzero_ps();
        }
        for (int64_t j = 0; j < n; ++j) {
            __m256 value[R];
            for (int64_t r = 0; r < R; ++r) value[r] = load(values + j * dim + d + r * kLanes, dim - d - r * kLanes);
            for (int h = 0; h < H; ++h) {
                const __m256 weight = _mm256_set1_ps(weights[h * n + j]);
                for (int64_t r = 0; r < R; ++r) sums[h][r] = _mm256_fmadd_ps(weight, value[r], sums[h][r]);
            }
        }
        for (int h = 0; h < H; ++h) {
            const __m256 factor = _mm256_set1_ps(factors[h]);
            for (int64_t r = 0; r < R; ++r) {
                save(out + h * out_stride + d + r * kLanes, dim - d - r * kLanes, _mm256_mul_ps(sums[h][r], factor));
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

const BlockKernels& block_avx2() {
    static const BlockKernels table{add, moments, normalize, activate, rms_norm, store, attend};
    return table;
}

}  // namespace tinychat
