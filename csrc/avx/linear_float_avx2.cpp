// The linear of AVX2 with FMA and F16C for weights of fp32, fp16 and bf16: for every level that has no wider registers.
//
//   y[t, r] = sum over k of w x, in fp32; two registers hold the 16 rows of a tile
#include <immintrin.h>

#include "levels.h"
#include "linear_layout.h"

namespace tinychat {
namespace {

constexpr int64_t kAhead = 8192;          // bytes; without it the sums wait for memory
constexpr int64_t kPanelBytes = 1 << 18;  // of activations: half of a small level-2 cache
constexpr int64_t kHalf = 8;              // rows in a register

struct Pair {  // one value for each row of a tile
    __m256 half[2];
};

// 8 of the 16 values of column k.
template <WeightType type>
__m256 load(const char* values, int64_t k, int h) {
    const int64_t index = k * kTile + h * kHalf;
    if constexpr (type == WeightType::f32) {
        return _mm256_load_ps(reinterpret_cast<const float*>(values) + index);
    } else {
        const __m128i half = _mm_load_si128(reinterpret_cast<const __m128i*>(values + index * 2));
        if constexpr (type == WeightType::f16) return _mm256_cvtph_ps(half);
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
    }
}

// Two sums for a row, even and odd k, however many rows there are: a row's result does not depend on them.
template <WeightType type, int R>
void tile_float(int64_t steps, const char* values, const char* activation, int64_t stride, Pair* y) {
    __m256 sums[R][2][2];
    for (int t = 0; t < R; t++) {
        for (int j = 0; j < 2; j++) sums[t][j][0] = sums[t][j][1] = _mm256_setzero_ps();
    }
    for (int64_t k = 0; k < steps; k += 2) {
        const char* line = values + k * kTile * value_bytes(type);
        _mm_prefetch(line + kAhead, _MM_HINT_T1);
        if constexpr (type == WeightType::f32) _mm_prefetch(line + kAhead + 64, _MM_HINT_T1);
        for (int j = 0; j < 2; j++) {
            const __m256 w0 = load<type>(values, k + j, 0), w1 = load<type>(values, k + j, 1);
            for (int t = 0; t < R; t++) {
                const __m256 x = _mm256_broadcast_ss(reinterpret_cast<const float*>(activation + t * stride) + k + j);
                sums[t][j][0] = _mm256_fmadd_ps(w0, x, sums[t][j][0]);
                sums[t][j][1] = _mm256_fmadd_ps(w1, x, sums[t][j][1]);
            }
        }
    }
    for (int t = 0; t < R; t++) {
        for (int h = 0; h < 2; h++) y[t].half[h] = _mm256_add_ps(sums[t][0][h], sums[t][1][h]);
    }
}

// R rows of one tile, of which the first `outputs` columns exist.
template <WeightType type, int R>
void rows_of_tile(const LinearShape& shape, const char* at, const char* activation, int64_t row_bytes, int64_t outputs,
                  float* y, int64_t y_stride) {
    Pair results[R];
    tile_float<type, R>(float_steps(shape), at, activation, row_bytes, results);
    for (int t = 0; t < R; t++) std::memcpy(y + t * y_stride, &results[t], static_cast<size_t>(outputs) * 4);
}

template <WeightType type>
void run(const LinearShape& shape, const char* packed, const char* activations, int64_t rows, int64_t tile_begin,
         int64_t tile_end, float* y, int64_t y_stride) {
    const int64_t tile_bytes = round_up(float_tile_bytes(shape), 64), row_bytes = activation_bytes(shape);
    const int64_t fit = kPanelBytes / row_bytes / 2 * 2, panel = fit > 2 ? fit : 2;
    for (int64_t begin = 0; begin < rows; begin += panel) {
        const int64_t end = smaller(begin + panel, rows);
        for (int64_t tile = tile_begin; tile < tile_end; tile++) {
            const char* at = packed + tile * tile_bytes;
            const int64_t outputs = smaller(kTile, shape.n - tile * kTile);
            for (int64_t t = begin; t < end;) {
                const char* x = activations + t * row_bytes;
                float* out = y + t * y_stride + tile * kTile;
                if (end - t >= 2) {
                    rows_of_tile<type, 2>(shape, at, x, row_bytes, outputs, out, y_stride);
                    t += 2;
                } else {
                    rows_of_tile<type, 1>(shape, at, x, row_bytes, outputs, out, y_stride);
                    t += 1;
                }
            }
        }
    }
}

}  // namespace

void linear_float_avx2(const LinearShape& shape, const void* packed, const void* activations, int64_t rows,
                       int64_t tile_begin, int64_t tile_end, float* y, int64_t y_stride) {
    const char *at = static_cast<const char*>(packed), *x = static_cast<const char*>(activations);
    if (shape.type == WeightType::f32) run<WeightType::f32>(shape, at, x, rows, tile_begin, tile_end, y, y_stride);
    if (shape.type == WeightType::f16) run<WeightType::f16>(shape, at, x, rows, tile_begin, tile_end, y, y_stride);
    if (shape.type == WeightType::bf16) run<WeightType::bf16>(shape, at, x, rows, tile_begin, tile_end, y, y_stride);
}

}  // namespace tinychat
