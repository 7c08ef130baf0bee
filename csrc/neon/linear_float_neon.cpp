// The linear of ARMv8.0 for weights of fp32, fp16 (fcvtl) and bf16 (a shift): for every level of ARM.
//
//   y[t, r] = sum over k of w x, in fp32; four registers hold the 16 rows of a tile
#include <arm_neon.h>

#include "levels.h"
#include "linear_layout.h"

namespace tinychat {
namespace {

constexpr int64_t kAhead = 1024;          // bytes
constexpr int64_t kPanelBytes = 1 << 17;  // of activations: a share of the level-2 cache that four cores of a board have
constexpr int kMost = 4;                  // rows at a time

// R registers of the 16 values of column k, the first of them register `first`.
template <WeightType type, int H>
__attribute__((always_inline)) inline void load(const char* values, int64_t k, int first, float32x4_t (&w)[H]) {
    const int64_t index = k * kTile + first * 4;
    for (int j = 0; j < H; j += 2) {
        if constexpr (type == WeightType::f32) {
            w[j] = vld1q_f32(reinterpret_cast<const float*>(values) + index + j * 4);
            w[j + 1] = vld1q_f32(reinterpret_cast<const float*>(values) + index + j * 4 + 4);
        } else {
            const uint16x8_t bits = vld1q_u16(reinterpret_cast<const uint16_t*>(values) + index + j * 4);
            if constexpr (type == WeightType::f16) {
                w[j] = vcvt_f32_f16(vget_low_f16(vreinterpretq_f16_u16(bits)));
                w[j + 1] = vcvt_high_f32_f16(vreinterpretq_f16_u16(bits));
            } else {
                w[j] = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(bits), 16));
                w[j + 1] = vreinterpretq_f32_u32(vshll_high_n_u16(bits, 16));
            }
        }
    }
}

// R rows by H registers of a tile. Two sums for each, even and odd k, however many rows there are: a row's result does not
// depend on them.
template <WeightType type, int R, int H>
__attribute__((always_inline)) inline void tile_float(int64_t steps, const char* values, int first, const char* activation,
                                                      int64_t stride, float* y) {
    float32x4_t sums[R][2][H];
    for (int t = 0; t < R; t++) {
        for (int j = 0; j < H; j++) sums[t][0][j] = sums[t][1][j] = vdupq_n_f32(0);
    }
    for (int64_t k = 0; k < steps; k += kFloatStep) {
        const char* line = values + k * kTile * value_bytes(type);
        for (int64_t b = 0; first == 0 && b < kFloatStep * kTile * value_bytes(type); b += 64) __builtin_prefetch(line + kAhead + b);
        float32x4_t x[R];
        for (int t = 0; t < R; t++) x[t] = vld1q_f32(reinterpret_cast<const float*>(activation + t * stride) + k);
        const auto column = [&](auto lane) __attribute__((always_inline)) {
            constexpr int i = decltype(lane)::value;
            float32x4_t w[H];
            load<type, H>(values, k + i, first, w);
            for (int t = 0; t < R; t++) {
                for (int j = 0; j < H; j++) sums[t][i % 2][j] = vfmaq_laneq_f32(sums[t][i % 2][j], w[j], x[t], i);
            }
        };
        column(Number<0>{});
        column(Number<1>{});
        column(Number<2>{});
        column(Number<3>{});
    }
    for (int t = 0; t < R; t++) {
        for (int j = 0; j < H; j++) vst1q_f32(y + t * kTile + (first + j) * 4, vaddq_f32(sums[t][0][j], sums[t][1][j]));
    }
}

// R rows of one tile, of which the first `outputs` columns exist.
template <WeightType type, int R>
void rows_of_tile(const LinearShape& shape, const char* at, const char* activation, int64_t row_bytes, int64_t outputs,
                  float* y, int64_t y_stride) {
    constexpr int H = R > 2 ? 2 : 4;  // as many as the registers hold sums of
    float results[R * kTile];
    for (int first = 0; first < 4; first += H) tile_float<type, R, H>(float_steps(shape), at, first, activation, row_bytes, results);
    for (int t = 0; t < R; t++) std::memcpy(y + t * y_stride, results + t * kTile, static_cast<size_t>(outputs) * 4);
}

template <WeightType type>
void run(const LinearShape& shape, const char* packed, const char* activations, int64_t rows, int64_t tile_begin,
         int64_t tile_end, float* y, int64_t y_stride) {
    const int64_t tile_bytes = round_up(float_tile_bytes(shape), 64), row_bytes = activation_bytes(shape);
    const int64_t fit = kPanelBytes / row_bytes / kMost * kMost, panel = fit > kMost ? fit : kMost;
    for (int64_t begin = 0; begin < rows; begin += panel) {
        const int64_t end = smaller(begin + panel, rows);
        for (int64_t tile = tile_begin; tile < tile_end; tile++) {
            const char* at = packed + tile * tile_bytes;
            const int64_t outputs = smaller(kTile, shape.n - tile * kTile);
            for (int64_t t = begin; t < end;) {
                const char* x = activations + t * row_bytes;
                float* out = y + t * y_stride + tile * kTile;
                const auto take = [&](auto some) {
                    rows_of_tile<type, decltype(some)::value>(shape, at, x, row_bytes, outputs, out, y_stride);
                    t += decltype(some)::value;
                };
                if (end - t >= kMost) {
                    take(Number<kMost>{});
                } else if (end - t >= 2) {
                    take(Number<2>{});
                } else {
                    take(Number<1>{});
                }
            }
        }
    }
}

}  // namespace

void linear_float_neon(const LinearShape& shape, const void* packed, const void* activations, int64_t rows,
                       int64_t tile_begin, int64_t tile_end, float* y, int64_t y_stride) {
    const char *at = static_cast<const char*>(packed), *x = static_cast<const char*>(activations);
    if (shape.type == WeightType::f32) run<WeightType::f32>(shape, at, x, rows, tile_begin, tile_end, y, y_stride);
    if (shape.type == WeightType::f16) run<WeightType::f16>(shape, at, x, rows, tile_begin, tile_end, y, y_stride);
    if (shape.type == WeightType::bf16) run<WeightType::bf16>(shape, at, x, rows, tile_begin, tile_end, y, y_stride);
}

}  // namespace tinychat
