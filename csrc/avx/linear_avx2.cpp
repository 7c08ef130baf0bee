// The linear of AVX2 with FMA and F16C.
//
//   y[t, r] = sum over blocks of (sum over k of q x - z sum(x)) * (s * scale of x)  +  sum over outliers of (q - z) s x
//
// with q and z the codes and zeros of row r, s its scale for the group, and x integers of 16 bits. A lane of 32 bits is a
// row of the tile (linear_layout.h draws it); 64 bytes of codes are two registers of 8 rows. vpmaddwd multiplies pairs of
// codes, one in each half of a lane, with 2 broadcast integers. Codes are masked, not shifted, where they may stay 16
// times too large: an accumulator of their own takes those.
//
//   16 bytes of activations for 8 codes: x0 x2 | x4 x6 | x1 x3 | x5 x7
//
// All sums of a block are exact in int32: below 128 * 15 * 32639 * 16 = 1.0e9.
// Speed: one row runs at 0.8 or more of the speed at which a thread reads memory (benchmarks/linear.py), as codes are
// fetched 4 KiB ahead; up to 4 rows share the unpacking, and more go in panels whose activations stay in the cache.
#include <immintrin.h>

#include "levels.h"
#include "linear_layout.h"

namespace tinychat {
namespace {

constexpr int64_t kBlockSteps = kBlock / kStep;
constexpr int64_t kAhead = 4096;          // bytes; without it the sums wait for memory
constexpr int64_t kPanelBytes = 1 << 18;  // of activations: half of a small level-2 cache
constexpr int64_t kHalf = 8;              // rows in a register

struct Pair {  // one value for each row of a tile
    __m256 half[2];
};

__m256i load_bytes(const char* at) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(at)); }

__m256i broadcast(const char* at) {
    int32_t value;
    std::memcpy(&value, at, 4);
    return _mm256_set1_epi32(value);
}

void store_integers(const int32_t* integers, char* codes, int64_t i, int64_t) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(integers));
    const __m256i ordered = _mm256_permutevar8x32_epi32(x, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
    const __m128i narrow = _mm_packs_epi32(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i * 2), narrow);
}

void prepare(const LinearShape& shape, const float* x, void* activation, int64_t begin, int64_t end) {
    prepare_part(shape, x, activation, begin, end, [](const int32_t* integers, char* codes, int64_t i, int64_t length) {
        store_integers(integers, codes, i, length);
    });
}

// sums[t][h] = sum of q x over `count` registers of codes, for R rows of activations `stride` bytes apart and H halves of
// the tile: both where the accumulators fit in 16 registers, as each broadcast then serves twice.
template <int R, int H>
__attribute__((always_inline)) inline void dot(const char* codes, const char* x, int64_t stride, int64_t count,
                                               __m256i (*sums)[H]) {
    const __m256i mask = _mm256_set1_epi16(0x000f), mask16 = _mm256_set1_epi16(0x00f0);
    __m256i one[R][H], sixteen[R][H];
    for (int t = 0; t < R; t++) {
        for (int h = 0; h < H; h++) one[t][h] = sixteen[t][h] = _mm256_setzero_si256();
    }
    for (int64_t i = 0; i < count; i++) {
        _mm_prefetch(codes + i * kRegisterBytes + kAhead, _MM_HINT_T0);
        for (int h = 0; h < H; h++) {
            const __m256i q = load_bytes(codes + i * kRegisterBytes + h * 32), odd = _mm256_srli_epi16(q, 8);
            const __m256i q02 = _mm256_and_si256(q, mask), q46 = _mm256_and_si256(q, mask16);
            const __m256i q13 = _mm256_and_si256(odd, mask), q57 = _mm256_and_si256(odd, mask16);
            for (int t = 0; t < R; t++) {
                const char* at = x + t * stride + i * 16;
                one[t][h] = _mm256_add_epi32(one[t][h], _mm256_madd_epi16(q02, broadcast(at)));
                sixteen[t][h] = _mm256_add_epi32(sixteen[t][h], _mm256_madd_epi16(q46, broadcast(at + 4)));
                one[t][h] = _mm256_add_epi32(one[t][h], _mm256_madd_epi16(q13, broadcast(at + 8)));
                sixteen[t][h] = _mm256_add_epi32(sixteen[t][h], _mm256_madd_epi16(q57, broadcast(at + 12)));
            }
        }
    }
    for (int t = 0; t < R; t++) {
        for (int h = 0; h < H; h++) sums[t][h] = _mm256_add_epi32(one[t][h], _mm256_srai_epi32(sixteen[t][h], 4));
    }
}

// The outliers of one block of one row, for half a tile: sum + (q - z) s x for each.
__m256 add_outliers(__m256 sum, const Block& block, const Outlier* outliers, const char* codes, __m256i zero,
                    __m256 scale) {
    for (int32_t o = 0; o < block.outliers; o++) {
        const int32_t index = outliers[o].index, shift = index % 4 * 8 + index % 8 / 4 * 4;
        const __m256i lanes = load_bytes(codes + index / 8 * kRegisterBytes);
        const __m256i code = _mm256_and_si256(_mm256_srl_epi32(lanes, _mm_cvtsi32_si128(shift)), _mm256_set1_epi32(15));
        const __m256 weight = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(code, zero)), scale);
        sum = _mm256_fmadd_ps(weight, _mm256_set1_ps(outliers[o].value), sum);
    }
    return sum;
}

__m256 load_scales(const char* at, bool wide) {
    if (wide) return _mm256_load_ps(reinterpret_cast<const float*>(at));
    return _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(at)));
}

template <int R>
void tile_quantized(const QuantizedLayout& layout, bool wide_scales, const char* at, const char* activation, Pair* y) {
    constexpr int H = R <= 2 ? 2 : 1;
    const int64_t stride = layout.activation_bytes;
    const char *x = activation, *blocks = activation + layout.blocks_at, *outliers = activation + layout.outliers_at;
    Pair sums[R];
    for (int t = 0; t < R; t++) sums[t].half[0] = sums[t].half[1] = _mm256_setzero_ps();
    for (int64_t first = 0; first < layout.groups; first += kChunk) {
        const int64_t m = smaller(kChunk, layout.groups - first);
        const char *scales = at, *zeros = at + m * layout.scale_bytes;
        at += layout.header_bytes(m);
        for (int64_t g = first; g < first + m; g++, scales += layout.scale_bytes, zeros += kTile) {
            const int64_t registers = layout.padded(g) / kStep;
            for (int64_t begin = 0; begin < registers; begin += kBlockSteps) {
                const int64_t count = smaller(kBlockSteps, registers - begin);
                for (int first_half = 0; first_half < 2; first_half += H) {
                    __m256i products[R][H];
                    if (count == kBlockSteps) {
                        dot<R, H>(at + first_half * 32, x, stride, kBlockSteps, products);
                    } else {
                        dot<R, H>(at + first_half * 32, x, stride, count, products);
                    }
                    for (int i = 0; i < H; i++) {
                        const int h = first_half + i;
                        const __m256 scale = load_scales(scales + h * layout.scale_bytes / 2, wide_scales);
                        const __m256i zero =
                            _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(zeros + h * kHalf)));
                        for (int t = 0; t < R; t++) {
                            const Block& block = *reinterpret_cast<const Block*>(blocks + t * stride);
                            const __m256i shift = _mm256_mullo_epi32(zero, _mm256_set1_epi32(block.sum));
                            const __m256 exact = _mm256_cvtepi32_ps(_mm256_sub_epi32(products[t][i], shift));
                            __m256& sum = sums[t].half[h];
                            sum = _mm256_fmadd_ps(exact, _mm256_mul_ps(scale, _mm256_set1_ps(block.scale)), sum);
                            if (__builtin_expect(block.outliers != 0, 0)) {
                                const auto* list = reinterpret_cast<const Outlier*>(outliers + t * stride);
                                sum = add_outliers(sum, block, list, at + h * 32, zero, scale);
                            }
                        }
                    }
                }
                at += count * kRegisterBytes;
                x += count * 16;
                blocks += sizeof(Block);
                outliers += layout.block_outliers * int64_t{sizeof(Outlier)};
            }
        }
    }
    for (int t = 0; t < R; t++) y[t] = sums[t];
}

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
        _mm_prefetch(line + kAhead, _MM_HINT_T0);
        if constexpr (type == WeightType::f32) _mm_prefetch(line + kAhead + 64, _MM_HINT_T0);
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

// What stays the same for all tiles and rows of a call.
struct Call {
    const LinearShape& shape;
    QuantizedLayout layout;  // of quantized weights only
    int64_t row_bytes;
};

// R rows of one tile, of which the first `outputs` columns exist.
template <int R>
void rows_of_tile(const Call& call, const char* at, const char* activation, int64_t outputs, float* y,
                  int64_t y_stride) {
    Pair results[R];
    switch (call.shape.type) {
        case WeightType::quantized:
            tile_quantized<R>(call.layout, call.shape.wide_scales, at, activation, results);
            break;
        case WeightType::f32:
            tile_float<WeightType::f32, R>(float_steps(call.shape), at, activation, call.row_bytes, results);
            break;
        case WeightType::f16:
            tile_float<WeightType::f16, R>(float_steps(call.shape), at, activation, call.row_bytes, results);
            break;
        case WeightType::bf16:
            tile_float<WeightType::bf16, R>(float_steps(call.shape), at, activation, call.row_bytes, results);
            break;
    }
    for (int t = 0; t < R; t++) std::memcpy(y + t * y_stride, &results[t], static_cast<size_t>(outputs) * 4);
}

void linear(const LinearShape& shape, const void* packed, const void* activations, int64_t rows, int64_t tile_begin,
            int64_t tile_end, float* y, int64_t y_stride) {
    const bool quantized = shape.type == WeightType::quantized;
    const Call call{shape, QuantizedLayout(shape), activation_bytes(shape)};
    const int64_t tile_bytes = quantized ? call.layout.tile_bytes : round_up(float_tile_bytes(shape), 64);
    const int64_t widest = quantized ? 4 : 2;  // rows at a time: what the registers hold
    const int64_t fit = kPanelBytes / call.row_bytes / widest * widest, panel = fit > widest ? fit : widest;
    for (int64_t begin = 0; begin < rows; begin += panel) {
        const int64_t end = smaller(begin + panel, rows);
        for (int64_t tile = tile_begin; tile < tile_end; tile++) {
            const char* at = static_cast<const char*>(packed) + tile * tile_bytes;
            const int64_t outputs = smaller(kTile, shape.n - tile * kTile);
            for (int64_t t = begin; t < end;) {
                const char* x = static_cast<const char*>(activations) + t * call.row_bytes;
                float* out = y + t * y_stride + tile * kTile;
                const int64_t left = end - t;
                if (left >= 4 && quantized) {
                    rows_of_tile<4>(call, at, x, outputs, out, y_stride);
                    t += 4;
                } else if (left >= 2) {
                    rows_of_tile<2>(call, at, x, outputs, out, y_stride);
                    t += 2;
                } else {
                    rows_of_tile<1>(call, at, x, outputs, out, y_stride);
                    t += 1;
                }
            }
        }
    }
}

}  // namespace

const LinearKernels& linear_avx2() {
    static constexpr LinearKernels table{kTile, packed_bytes, pack, unpack, unpack_row, activation_bytes, prepare_step, prepare,
                             linear};
    return table;
}

}  // namespace tinychat
