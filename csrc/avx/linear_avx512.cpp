// The linear of AVX-512, compiled twice: with the VNNI instructions (level avx512vnni) and without (level avx512).
//
//   y[t, r] = sum over blocks of (sum over k of q x - z sum(x)) * (s * scale of x)  +  sum over outliers of (q - z) s x
//
// with q and z the codes and zeros of row r, s its scale for the group, and x integers of 16 bits. A lane of 32 bits is a
// row of the tile (linear_layout.h draws it); a register of codes gives two of unpacked bytes, k..k+3 and k+4..k+7:
//
//   VNNI:    x = 256 hi + lo, bytes with sign; vpdpbusd of the unpacked codes with 4 broadcast bytes of each plane
//            integers of a block of L: hi[L], lo[L]
//   without: vpmaddwd of pairs of codes, one in each half of a lane, with 2 broadcast integers. Codes are masked, not
//            shifted, where they may stay 16 times too large: an accumulator of their own takes those.
//            16 bytes for 8 codes: x0 x2 | x4 x6 | x1 x3 | x5 x7
//
// All sums of a block are exact in int32: below 128 * 15 * 32639 * 16 = 1.0e9.
// Speed: one row runs at 0.9 or more of the speed at which a thread reads memory (benchmarks/linear.py), as codes are
// fetched 4 KiB ahead; up to 8 rows share the unpacking, and more go in panels whose activations stay in the cache.
#include <immintrin.h>

#include "levels.h"
#include "linear_layout.h"

namespace tinychat {
namespace {

constexpr int64_t kBlockSteps = kBlock / kStep;
constexpr int64_t kAhead = 4096;          // bytes; without it the sums wait for memory (2/3 of the speed of reading)
constexpr int64_t kPanelBytes = 1 << 19;  // of activations: half of a usual level-2 cache

int32_t word(const char* at) {
    int32_t value;
    std::memcpy(&value, at, 4);
    return value;
}

__m512i broadcast(const char* at) { return _mm512_set1_epi32(word(at)); }

#ifdef __AVX512VNNI__

void store_integers(const int32_t* integers, char* codes, int64_t i, int64_t length) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(integers));
    const __m256i low = _mm256_srai_epi32(_mm256_slli_epi32(x, 24), 24);  // the low byte, with its sign
    const __m256i high = _mm256_srai_epi32(_mm256_sub_epi32(x, low), 8);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + i), _mm256_cvtepi32_epi8(high));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + length + i), _mm256_cvtepi32_epi8(low));
}

// sums[t] = sum of q x over `count` registers of codes, for R rows of activations `stride` bytes apart.
template <int R>
__attribute__((always_inline)) inline void dot(const char* codes, const char* x, int64_t stride, int64_t count,
                                               __m512i* sums) {
    constexpr int kChains = R == 1 ? 2 : 1;  // a single row would wait for its own sums
    const __m512i mask = _mm512_set1_epi8(15);
    __m512i high[R][kChains], low[R][kChains];
    for (int t = 0; t < R; t++) {
        for (int c = 0; c < kChains; c++) high[t][c] = low[t][c] = _mm512_setzero_si512();
    }
#pragma GCC unroll 4
    for (int64_t i = 0; i < count; i++) {
        _mm_prefetch(codes + i * kRegisterBytes + kAhead, _MM_HINT_T0);
        const __m512i q = _mm512_load_si512(codes + i * kRegisterBytes);
        const __m512i first = _mm512_and_si512(q, mask), second = _mm512_and_si512(_mm512_srli_epi16(q, 4), mask);
        for (int t = 0; t < R; t++) {
            const char *hi = x + t * stride + i * 8, *lo = hi + count * 8;
            high[t][0] = _mm512_dpbusd_epi32(high[t][0], first, broadcast(hi));
            high[t][kChains - 1] = _mm512_dpbusd_epi32(high[t][kChains - 1], second, broadcast(hi + 4));
            low[t][0] = _mm512_dpbusd_epi32(low[t][0], first, broadcast(lo));
            low[t][kChains - 1] = _mm512_dpbusd_epi32(low[t][kChains - 1], second, broadcast(lo + 4));
        }
    }
    for (int t = 0; t < R; t++) {
        for (int c = 1; c < kChains; c++) {
            high[t][0] = _mm512_add_epi32(high[t][0], high[t][c]);
            low[t][0] = _mm512_add_epi32(low[t][0], low[t][c]);
        }
        sums[t] = _mm512_add_epi32(_mm512_slli_epi32(high[t][0], 8), low[t][0]);
    }
}

#else

void store_integers(const int32_t* integers, char* codes, int64_t i, int64_t) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(integers));
    const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i * 2), _mm256_cvtepi32_epi16(_mm256_permutevar8x32_epi32(x, order)));
}

// sums[t] = sum of q x over `count` registers of codes, for R rows of activations `stride` bytes apart.
template <int R>
__attribute__((always_inline)) inline void dot(const char* codes, const char* x, int64_t stride, int64_t count,
                                               __m512i* sums) {
    const __m512i mask = _mm512_set1_epi16(0x000f), mask16 = _mm512_set1_epi16(0x00f0);
    __m512i one[R], sixteen[R];
    for (int t = 0; t < R; t++) one[t] = sixteen[t] = _mm512_setzero_si512();
#pragma GCC unroll 2
    for (int64_t i = 0; i < count; i++) {
        _mm_prefetch(codes + i * kRegisterBytes + kAhead, _MM_HINT_T0);
        const __m512i q = _mm512_load_si512(codes + i * kRegisterBytes), odd = _mm512_srli_epi16(q, 8);
        const __m512i q02 = _mm512_and_si512(q, mask), q46 = _mm512_and_si512(q, mask16);
        const __m512i q13 = _mm512_and_si512(odd, mask), q57 = _mm512_and_si512(odd, mask16);
        for (int t = 0; t < R; t++) {
            const char* at = x + t * stride + i * 16;
            one[t] = _mm512_add_epi32(one[t], _mm512_madd_epi16(q02, broadcast(at)));
            sixteen[t] = _mm512_add_epi32(sixteen[t], _mm512_madd_epi16(q46, broadcast(at + 4)));
            one[t] = _mm512_add_epi32(one[t], _mm512_madd_epi16(q13, broadcast(at + 8)));
            sixteen[t] = _mm512_add_epi32(sixteen[t], _mm512_madd_epi16(q57, broadcast(at + 12)));
        }
    }
    for (int t = 0; t < R; t++) sums[t] = _mm512_add_epi32(one[t], _mm512_srai_epi32(sixteen[t], 4));
}

#endif

void prepare(const LinearShape& shape, const float* x, void* activation, int64_t begin, int64_t end) {
    prepare_part(shape, x, activation, begin, end, [](const int32_t* integers, char* codes, int64_t i, int64_t length) {
        store_integers(integers, codes, i, length);
    });
}

// The outliers of one block of one row: sum + (q - z) s x for each.
__m512 add_outliers(__m512 sum, const Block& block, const Outlier* outliers, const char* codes, __m512i zero,
                    __m512 scale) {
    for (int32_t o = 0; o < block.outliers; o++) {
        const int32_t index = outliers[o].index, shift = index % 4 * 8 + index % 8 / 4 * 4;
        const __m512i lanes = _mm512_load_si512(codes + index / 8 * kRegisterBytes);
        const __m512i code = _mm512_and_si512(_mm512_srl_epi32(lanes, _mm_cvtsi32_si128(shift)), _mm512_set1_epi32(15));
        const __m512 weight = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(code, zero)), scale);
        sum = _mm512_fmadd_ps(weight, _mm512_set1_ps(outliers[o].value), sum);
    }
    return sum;
}

template <int R>
void tile_quantized(const QuantizedLayout& layout, bool wide_scales, const char* at, const char* activation, __m512* y) {
    const int64_t stride = layout.activation_bytes;
    const char *x = activation, *blocks = activation + layout.blocks_at, *outliers = activation + layout.outliers_at;
    __m512 sums[R];
    for (int t = 0; t < R; t++) sums[t] = _mm512_setzero_ps();
    for (int64_t first = 0; first < layout.groups; first += kChunk) {
        const int64_t m = smaller(kChunk, layout.groups - first);
        const char *scales = at, *zeros = at + m * layout.scale_bytes;
        at += layout.header_bytes(m);
        for (int64_t g = first; g < first + m; g++, scales += layout.scale_bytes, zeros += kTile) {
            const __m512 scale = wide_scales
                                     ? _mm512_load_ps(scales)
                                     : _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(scales)));
            const __m512i zero = _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(zeros)));
            const int64_t registers = layout.padded(g) / kStep;
            for (int64_t begin = 0; begin < registers; begin += kBlockSteps) {
                const int64_t count = smaller(kBlockSteps, registers - begin);
                __m512i products[R];
                if (count == kBlockSteps) {
                    dot<R>(at, x, stride, kBlockSteps, products);
                } else {
                    dot<R>(at, x, stride, count, products);
                }
                for (int t = 0; t < R; t++) {
                    const Block& block = *reinterpret_cast<const Block*>(blocks + t * stride);
                    const __m512i shift = _mm512_mullo_epi32(zero, _mm512_set1_epi32(block.sum));
                    const __m512 exact = _mm512_cvtepi32_ps(_mm512_sub_epi32(products[t], shift));
                    sums[t] = _mm512_fmadd_ps(exact, _mm512_mul_ps(scale, _mm512_set1_ps(block.scale)), sums[t]);
                    if (__builtin_expect(block.outliers != 0, 0)) {
                        const auto* list = reinterpret_cast<const Outlier*>(outliers + t * stride);
                        sums[t] = add_outliers(sums[t], block, list, at, zero, scale);
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
template <WeightType type, int R>
void tile_float(int64_t steps, const char* values, const char* activation, int64_t stride, __m512* y) {
    __m512 sums[R][kFloatStep];
    for (int t = 0; t < R; t++) {
        for (int j = 0; j < kFloatStep; j++) sums[t][j] = _mm512_setzero_ps();
    }
    for (int64_t k = 0; k < steps; k += kFloatStep) {
        const char* line = values + k * kTile * value_bytes(type) + kAhead;
        for (int64_t i = 0; i < kFloatStep * kTile * value_bytes(type); i += 64) _mm_prefetch(line + i, _MM_HINT_T0);
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

// What stays the same for all tiles and rows of a call.
struct Call {
    const LinearShape& shape;
    QuantizedLayout layout;  // of quantized weights only
    int64_t row_bytes;
};

// R rows of one tile.
template <int R>
void rows_of_tile(const Call& call, const char* at, const char* activation, __mmask16 outputs, float* y,
                  int64_t y_stride) {
    __m512 results[R];
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
    for (int t = 0; t < R; t++) _mm512_mask_storeu_ps(y + t * y_stride, outputs, results[t]);
}

void linear(const LinearShape& shape, const void* packed, const void* activations, int64_t rows, int64_t tile_begin,
            int64_t tile_end, float* y, int64_t y_stride) {
    const bool quantized = shape.type == WeightType::quantized;
    const Call call{shape, QuantizedLayout(shape), activation_bytes(shape)};
    const int64_t tile_bytes = quantized ? call.layout.tile_bytes : round_up(float_tile_bytes(shape), 64);
    const int64_t widest = quantized ? 8 : 4;  // rows at a time: what the registers hold
    const int64_t fit = kPanelBytes / call.row_bytes / widest * widest, panel = fit > widest ? fit : widest;
    for (int64_t begin = 0; begin < rows; begin += panel) {
        const int64_t end = smaller(begin + panel, rows);
        for (int64_t tile = tile_begin; tile < tile_end; tile++) {
            const char* at = static_cast<const char*>(packed) + tile * tile_bytes;
            const int64_t outputs = smaller(kTile, shape.n - tile * kTile);
            const auto mask = static_cast<__mmask16>((1u << outputs) - 1);
            for (int64_t t = begin; t < end;) {
                const char* x = static_cast<const char*>(activations) + t * call.row_bytes;
                float* out = y + t * y_stride + tile * kTile;
                const int64_t left = end - t;
                if (left >= 8 && quantized) {
                    rows_of_tile<8>(call, at, x, mask, out, y_stride);
                    t += 8;
                } else if (left >= 4) {
                    rows_of_tile<4>(call, at, x, mask, out, y_stride);
                    t += 4;
                } else if (left >= 2) {
                    rows_of_tile<2>(call, at, x, mask, out, y_stride);
                    t += 2;
                } else {
                    rows_of_tile<1>(call, at, x, mask, out, y_stride);
                    t += 1;
                }
            }
        }
    }
}

constexpr LinearKernels table{kTile, packed_bytes, pack, unpack, unpack_row, activation_bytes, prepare_step, prepare,
                             linear};

}  // namespace

#ifdef __AVX512VNNI__
const LinearKernels& linear_avx512vnni() { return table; }
#else
const LinearKernels& linear_avx512() { return table; }
#endif

}  // namespace tinychat
