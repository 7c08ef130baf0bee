// Norm and activation at 16 lanes. Ends that do not fill a register are masked; nothing beyond them is touched.
#include <immintrin.h>

#include "avx/exponential_avx512.h"
#include "levels.h"

namespace tinychat {
namespace {

constexpr int64_t kLanes = 16;

__mmask16 first(int64_t n) { return static_cast<__mmask16>(n >= kLanes ? 0xffff : (1u << (n > 0 ? n : 0)) - 1); }

__m512 load(const float* from, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, from); }

void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* y) {
    __m512 squares[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t i = 0; i < n; i += kLanes) {
        const __m512 value = load(x + i, first(n - i));
        squares[i / kLanes % 4] = _mm512_fmadd_ps(value, value, squares[i / kLanes % 4]);
    }
    const float sum = _mm512_reduce_add_ps(
        _mm512_add_ps(_mm512_add_ps(squares[0], squares[1]), _mm512_add_ps(squares[2], squares[3])));
    const __m512 mean = _mm512_set1_ps(sum / static_cast<float>(n) + eps);
    const __m512 factor = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_sqrt_ps(mean));
    for (int64_t i = 0; i < n; i += kLanes) {
        const __mmask16 mask = first(n - i);
        _mm512_mask_storeu_ps(y + i, mask, _mm512_mul_ps(_mm512_mul_ps(load(x + i, mask), factor), load(weight + i, mask)));
    }
}

void silu_multiply(const float* gate, const float* up, int64_t n, float* y) {
    const __m512 one = _mm512_set1_ps(1.0f);
    for (int64_t i = 0; i < n; i += kLanes) {
        const __mmask16 mask = first(n - i);
        const __m512 g = load(gate + i, mask);
        const __m512 silu = _mm512_div_ps(g, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), g))));
        _mm512_mask_storeu_ps(y + i, mask, _mm512_mul_ps(silu, load(up + i, mask)));
    }
}

}  // namespace

const BlockKernels& block_avx512() {
    static const BlockKernels table{rms_norm, silu_multiply};
    return table;
}

}  // namespace tinychat
