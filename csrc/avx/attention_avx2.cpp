// Attention at 8 lanes. Ends that do not fill a register go through one of their own; nothing beyond them is touched.
//
// It takes four heads of a group at a time, so that a cache entry is loaded and widened once for all of them: one pass over
// the keys for the scores, the softmax, one pass over the values. It waits for the cache's memory.
#include <immintrin.h>

#include "avx/exponential_avx2.h"
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

const AttentionKernels& attention_avx2() {
    static const AttentionKernels table{store, attend};
    return table;
}

}  // namespace tinychat
