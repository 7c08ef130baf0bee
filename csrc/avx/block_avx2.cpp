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

void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* y) {
    __m256 squares[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    for (int64_t i = 0; i < n; i += kLanes) {
        const __m256 value = load(x + i, n - i);
        squares[i / kLanes % 4] = _mm256_fmadd_ps(value, value, squares[i / kLanes % 4]);
    }
    const float sum = sum_of(_mm256_add_ps(_mm256_add_ps(squares[0], squares[1]), _mm256_add_ps(squares[2], squares[3])));
    const __m256 mean = _mm256_set1_ps(sum / static_cast<float>(n) + eps);
    const __m256 factor = _mm256_div_ps(_mm256_set1_ps(1.0f), _mm256_sqrt_ps(mean));
    for (int64_t i = 0; i < n; i += kLanes) {
        save(y + i, n - i, _mm256_mul_ps(_mm256_mul_ps(load(x + i, n - i), factor), load(weight + i, n - i)));
    }
}

void silu_multiply(const float* gate, const float* up, int64_t n, float* y) {
    const __m256 one = _mm256_set1_ps(1.0f);
    for (int64_t i = 0; i < n; i += kLanes) {
        const __m256 g = load(gate + i, n - i);
        const __m256 silu = _mm256_div_ps(g, _mm256_add_ps(one, exponential(_mm256_sub_ps(_mm256_setzero_ps(), g))));
        save(y + i, n - i, _mm256_mul_ps(silu, load(up + i, n - i)));
    }
}

}  // namespace

const BlockKernels& block_avx2() {
    static const BlockKernels table{rms_norm, silu_multiply};
    return table;
}

}  // namespace tinychat
