// Attention at 16 lanes. Ends that do not fill a register are masked; nothing beyond them is touched.
//
// It takes four heads of a group at a time, so that a cache entry is loaded and widened once for all of them: one pass over
// the keys for the scores, the softmax, one pass over the values. It waits for the cache's memory.
#include <immintrin.h>

#include "avx/exponential_avx512.h"
#include "levels.h"

namespace tinychat {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kValueRegisters = 4;  // of each head while values are summed: heads * this accumulators
constexpr int kHeads = 4;               // taken together

__mmask16 first(int64_t n) { return static_cast<__mmask16>(n >= kLanes ? 0xffff : (1u << (n > 0 ? n : 0)) - 1); }

__m512 load(const float* from, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, from); }
__m512 load(const uint16_t* from, __mmask16 mask) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, from)); }

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

const AttentionKernels& attention_avx512() {
    static const AttentionKernels table{store, attend};
    return table;
}

}  // namespace tinychat
