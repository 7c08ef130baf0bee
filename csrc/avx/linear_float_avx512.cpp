// The linear of AVX-512 for weights of fp32, fp16 and bf16: for every level that has it.
//
//   y[t, r] = sum over k of w x, in fp32; a register holds the 16 rows of a tile
//
// Speed: one row runs at the speed at which a thread reads memory (benchmarks/linear.py), asking ahead or not.
#include <immintrin.h>

#include "levels.h"
#include "linear_layout.h"

namespace tinychat {
namespace {

constexpr int64_t kAhead = 8192, kNear = 2048;  // bytes from what is read to what is asked for
constexpr int64_t kPanelBytes = 1 << 19;  // of activations: half of a usual level-2 cache

template <WeightType type>
__m512 load(const char* values, int64_t k) {
    if constexpr (type == WeightType::f32) {
        return _mm512_load_ps(values + k * kTile * 4);
    } else {
        const __m256i half = _mm256_load_si256(reinterpret_cast<const __m256i*>(values + k * kTile * 2));
        if constexpr (type == WeightType::f16) return _mm512_cvtph_ps(half);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
}

// Four sums for a row, one for each k modulo 4, however many rows there are: a row's result does not depend on them.
template <WeightType type, int R, Fetch fetch>
void tile_float(int64_t steps, const char* values, const char* activation, int64_t stride, __m512* y) {
    __m512 sums[R][kFloatStep];
    for (int t = 0; t < R; t++) {
        for (int j = 0; j < kFloatStep; j++) sums[t][j] = _mm512_setzero_ps();
    }
    for (int64_t k = 0; k < steps; k += kFloatStep) {
        const char* line = values + k * kTile * value_bytes(type);
        for (int64_t i = 0; fetch != Fetch::none && i < kFloatStep * kTile * value_bytes(type); i += 64) {
            if constexpr (fetch == Fetch::far) _mm_prefetch(line + i + kAhead, _MM_HINT_T1);
            if constexpr (fetch == Fetch::near) _mm_prefetch(line + i + kNear, _MM_HINT_T0);
        }
        for (int j = 0; j < kFloatStep; j++) {
            const __m512 w = load<type>(values, k + j);
            for (int t = 0; t < R; t++) {
                const float* x = reinterpret_cast<const float*>(activation + t * stride) + k;
                sums[t][j] = _mm512_fmadd_ps(w, _mm512_set1_ps(x[j]), sums[t][j]);
            }
        }
    }
    for (int t = 0; t < R; t++) {
        y[t] = _mm512_add_ps(_mm512_add_ps(sums[t][0], sums[t][1]), _mm512_add_ps(sums[t][2], sums[t][3]));
    }
}

template <WeightType type, int R, Fetch fetch = Fetch::far>
void rows_of_tile(const LinearShape& shape, const char* at, const char* activation, int64_t row_bytes, __mmask16 outputs,
                  float* y, int64_t y_stride) {
    __m512 results[R];
    tile_float<type, R, fetch>(float_steps(shape), at, activation, row_bytes, results);
    for (int t = 0; t < R; t++) _mm512_mask_storeu_ps(y + t * y_stride, outputs, results[t]);
}

template <WeightType type>
void run(const LinearShape& shape, const char* packed, const char* activations, int64_t rows, int64_t tile_begin,
         int64_t tile_end, float* y, int64_t y_stride) {
    const int64_t tile_bytes = round_up(float_tile_bytes(shape), 64), row_bytes = activation_bytes(shape);
    const auto one_row = shape.fetch == Fetch::none   ? rows_of_tile<type, 1, Fetch::none>
                         : shape.fetch == Fetch::near ? rows_of_tile<type, 1, Fetch::near>
                                                : rows_of_tile<type, 1, Fetch::far>;
    const int64_t fit = kPanelBytes / row_bytes / 4 * 4, panel = fit > 4 ? fit : 4;
    for (int64_t begin = 0; begin < rows; begin += panel) {
        const int64_t end = smaller(begin + panel, rows);
        for (int64_t tile = tile_begin; tile < tile_end; tile++) {
            const char* at = packed + tile * tile_bytes;
            const auto mask = static_cast<__mmask16>((1u << smaller(kTile, shape.n - tile * kTile)) - 1);
            for (int64_t t = begin; t < end;) {
                const char* x = activations + t * row_bytes;
                float* out = y + t * y_stride + tile * kTile;
                if (end - t >= 4) {
                    rows_of_tile<type, 4>(shape, at, x, row_bytes, mask, out, y_stride);
                    t += 4;
                } else if (end - t >= 2) {
                    rows_of_tile<type, 2>(shape, at, x, row_bytes, mask, out, y_stride);
                    t += 2;
                } else {
                    one_row(shape, at, x, row_bytes, mask, out, y_stride);
                    t += 1;
                }
            }
        }
    }
}

}  // namespace

void linear_float_avx512(const LinearShape& shape, const void* packed, const void* activations, int64_t rows,
                         int64_t tile_begin, int64_t tile_end, float* y, int64_t y_stride) {
    const char *at = static_cast<const char*>(packed), *x = static_cast<const char*>(activations);
    if (shape.type == WeightType::f32) run<WeightType::f32>(shape, at, x, rows, tile_begin, tile_end, y, y_stride);
    if (shape.type == WeightType::f16) run<WeightType::f16>(shape, at, x, rows, tile_begin, tile_end, y, y_stride);
    if (shape.type == WeightType::bf16) run<WeightType::bf16>(shape, at, x, rows, tile_begin, tile_end, y, y_stride);
}

}  // namespace tinychat
