// The linear of AVX2 with FMA and F16C for weights of fp32, fp16 and bf16: for every level that has no wider registers.
//
//   y[t, r] = sum over blocks of (sum over even k of w x + sum over odd k of w x), in fp32
//
// two registers hold the 16 rows of a tile. The order of the sums is the same however many rows there are: a row's result
// does not depend on the others.
// Few rows wait for memory, and meet the weights as they lie. For many, a block of a tile is widened once, and the first
// cache holds it while a panel of rows, which the second holds, passes. Six rows by two registers are 12 sums, of which two
// multiplications a cycle, of four cycles each, need 8; with the weights and a factor they are 15 registers.
// Speed: many rows reach 0.83 of what the instructions allow on Zen 3 (benchmarks/results/speed.md).
#include <immintrin.h>

#include "levels.h"
#include "linear_layout.h"

namespace tinychat {
namespace {

constexpr int64_t kAhead = 8192, kNear = 2048;  // bytes from what is read to what is asked for
constexpr int64_t kHalf = 8;              // rows in a register
constexpr int64_t kLength = 256;          // k of a block
constexpr int kMany = 6;                  // of many rows, those that meet a weight at a time
constexpr int64_t kPanelRows = 96;        // of many
constexpr int64_t kStride = kLength + 16;  // floats from row to row of a panel: a power of two apart they would share sets

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

template <WeightType type, int R, Fetch fetch>
__attribute__((always_inline)) inline void block_float(int64_t begin, int64_t end, const char* values,
                                                       const char* activation, int64_t stride, Pair* y) {
    __m256 sums[R][2][2];
    for (int t = 0; t < R; t++) {
        for (int j = 0; j < 2; j++) sums[t][j][0] = sums[t][j][1] = _mm256_setzero_ps();
    }
    for (int64_t k = begin; k < end; k += 2) {
        const char* line = values + k * kTile * value_bytes(type);
        for (int64_t i = 0; fetch != Fetch::none && i < 2 * kTile * value_bytes(type); i += 64) {
            if constexpr (fetch == Fetch::far) _mm_prefetch(line + i + kAhead, _MM_HINT_T1);
            if constexpr (fetch == Fetch::near) _mm_prefetch(line + i + kNear, _MM_HINT_T0);
        }
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
        for (int h = 0; h < 2; h++) {
            y[t].half[h] = _mm256_add_ps(y[t].half[h], _mm256_add_ps(sums[t][0][h], sums[t][1][h]));
        }
    }
}

// R rows of one tile, of which the first `outputs` columns exist.
template <WeightType type, int R, Fetch fetch = Fetch::far>
void rows_of_tile(const LinearShape& shape, const char* at, const char* activation, int64_t row_bytes, int64_t outputs,
                  float* y, int64_t y_stride) {
    Pair results[R] = {};
    const int64_t steps = float_steps(shape);
    for (int64_t k = 0; k < steps; k += kLength) {
        block_float<type, R, fetch>(k, smaller(k + kLength, steps), at, activation, row_bytes, results);
    }
    for (int t = 0; t < R; t++) std::memcpy(y + t * y_stride, &results[t], static_cast<size_t>(outputs) * 4);
}

template <WeightType type>
void run_few(const LinearShape& shape, const char* packed, const char* activations, int64_t rows, int64_t tile_begin,
             int64_t tile_end, float* y, int64_t y_stride) {
    const int64_t tile_bytes = round_up(float_tile_bytes(shape), 64), row_bytes = activation_bytes(shape);
    const auto one_row = shape.fetch == Fetch::none   ? rows_of_tile<type, 1, Fetch::none>
                         : shape.fetch == Fetch::near ? rows_of_tile<type, 1, Fetch::near>
                                                : rows_of_tile<type, 1, Fetch::far>;
    for (int64_t tile = tile_begin; tile < tile_end; tile++) {
        const char* at = packed + tile * tile_bytes;
        const int64_t outputs = smaller(kTile, shape.n - tile * kTile);
        for (int64_t t = 0; t < rows; t += 2) {
            const char* x = activations + t * row_bytes;
            float* out = y + t * y_stride + tile * kTile;
            if (rows - t >= 2) {
                rows_of_tile<type, 2>(shape, at, x, row_bytes, outputs, out, y_stride);
            } else {
                one_row(shape, at, x, row_bytes, outputs, out, y_stride);
            }
        }
    }
}

// ---- many rows -------------------------------------------------------------------------------------------------------

// A block of a tile, for all rows of a panel.
struct BlockOfTile {
    int64_t length;        // k
    const float* weights;  // [length][16]
    bool first;            // of k
    int64_t stride;        // bytes of the next tile that each step asks for
};

// made[t] = the sum of w x for every second of `length` k, of R rows kStride apart. Written out for GCC, which would load
// the factors of all rows first and then have no registers for the sums. Each step asks for `stride` more bytes at `ahead`.
template <int R>
__attribute__((noinline)) void multiply(int64_t length, const float* weights, const float* x, Pair* made,
                                        const char* ahead, int64_t stride) {
    __m256 sums[R][2];
#pragma GCC unroll 6
    for (int t = 0; t < R; t++) sums[t][0] = sums[t][1] = _mm256_setzero_ps();
    for (int64_t k = 0; k < length; k += kFloatStep, ahead += stride) {
        _mm_prefetch(ahead, _MM_HINT_T1);
#pragma GCC unroll 2
        for (int64_t i = k; i < k + kFloatStep; i += 2) {
            const __m256 first = _mm256_load_ps(weights + i * kTile), second = _mm256_load_ps(weights + i * kTile + kHalf);
#pragma GCC unroll 6
            for (int t = 0; t < R; t++) {
                __m256 factor;
                asm("vbroadcastss %3, %2\n\tvfmadd231ps %2, %4, %0\n\tvfmadd231ps %2, %5, %1"
                    : "+&x"(sums[t][0]), "+&x"(sums[t][1]), "=&x"(factor)
                    : "m"(x[i + t * kStride]), "x"(first), "x"(second));
            }
        }
    }
#pragma GCC unroll 6
    for (int t = 0; t < R; t++) made[t] = {sums[t][0], sums[t][1]};
}

// R rows and a block of one tile: y [16] of each row, or what is added to it.
template <int R>
void rows_of_block(const BlockOfTile& block, const float* x, const char* ahead, float* y, int64_t y_stride) {
    for (int t = 0; t < R; t++) _mm_prefetch(reinterpret_cast<const char*>(y + t * y_stride), _MM_HINT_T0);
    Pair even[R], odd[R];
    multiply<R>(block.length, block.weights, x, even, ahead, block.stride);
    multiply<R>(block.length, block.weights + kTile, x + 1, odd, ahead + block.length / kFloatStep * block.stride, block.stride);
    for (int t = 0; t < R; t++, y += y_stride) {
        for (int h = 0; h < 2; h++) {
            const __m256 sum = _mm256_add_ps(even[t].half[h], odd[t].half[h]);
            const __m256 before = block.first ? _mm256_setzero_ps() : _mm256_loadu_ps(y + h * kHalf);
            _mm256_storeu_ps(y + h * kHalf, _mm256_add_ps(before, sum));
        }
    }
}

// The same of fewer rows than R, or as many.
template <int R>
void up_to(int64_t rows, const BlockOfTile& block, const float* x, const char* ahead, float* y, int64_t y_stride) {
    if constexpr (R > 1) {
        if (rows < R) return up_to<R - 1>(rows, block, x, ahead, y, y_stride);
    }
    rows_of_block<R>(block, x, ahead, y, y_stride);
}

template <WeightType type>
void run_many(const LinearShape& shape, const char* packed, const char* activations, int64_t rows, int64_t tile_begin,
              int64_t tile_end, float* y, int64_t y_stride) {
    const int64_t tile_bytes = round_up(float_tile_bytes(shape), 64), row_bytes = activation_bytes(shape);
    const int64_t steps = float_steps(shape);
    const int64_t panels = divide_up(rows, kPanelRows), most = round_up(divide_up(rows, panels), kMany);
    alignas(64) float panel[kPanelRows * kStride];
    alignas(64) float widened[kLength * kTile];
    for (int64_t begin = 0; begin < rows; begin += most) {
        const int64_t count = smaller(most, rows - begin);
        for (int64_t k = 0; k < steps; k += kLength) {
            BlockOfTile block{smaller(kLength, steps - k), widened, k == 0, 0};
            for (int64_t t = 0; t < count; t++) {
                const char* from = activations + (begin + t) * row_bytes + k * 4;
                std::memcpy(panel + t * kStride, from, static_cast<size_t>(block.length) * 4);
            }
            block.stride = divide_up(2 * kTile * value_bytes(type), divide_up(count, kMany));
            for (int64_t tile = tile_begin; tile < tile_end; tile++) {
                const char* at = packed + tile * tile_bytes + k * kTile * value_bytes(type);
                if constexpr (type == WeightType::f32) {
                    block.weights = reinterpret_cast<const float*>(at);
                } else {
                    for (int64_t i = 0; i < block.length; i++) {
                        for (int h = 0; h < 2; h++) _mm256_store_ps(widened + i * kTile + h * kHalf, load<type>(at, i, h));
                    }
                }
                const char* ahead = at + tile_bytes;
                const int64_t outputs = smaller(kTile, shape.n - tile * kTile);
                for (int64_t t = 0; t < count; t += kMany, ahead += block.length / 2 * block.stride) {
                    const int64_t few = smaller(kMany, count - t);
                    float* out = y + (begin + t) * y_stride + tile * kTile;
                    if (outputs == kTile) {
                        up_to<kMany>(few, block, panel + t * kStride, ahead, out, y_stride);
                        continue;
                    }
                    float part[kMany][kTile] = {};
                    const auto kept = static_cast<size_t>(outputs) * 4;
                    for (int64_t i = 0; i < few && k > 0; i++) std::memcpy(part[i], out + i * y_stride, kept);
                    up_to<kMany>(few, block, panel + t * kStride, ahead, part[0], kTile);
                    for (int64_t i = 0; i < few; i++) std::memcpy(out + i * y_stride, part[i], kept);
                }
            }
        }
    }
}

template <WeightType type>
void run(const LinearShape& shape, const char* packed, const char* activations, int64_t rows, int64_t tile_begin,
         int64_t tile_end, float* y, int64_t y_stride) {
    (rows < kMany ? run_few<type> : run_many<type>)(shape, packed, activations, rows, tile_begin, tile_end, y, y_stride);
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
