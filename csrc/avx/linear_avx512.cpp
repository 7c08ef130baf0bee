// The linear of AVX-512, compiled twice: with the VNNI instructions (level avx512vnni) and without (level avx512).
//
//   y[t, r] = sum over blocks of (sum over k of q x - z sum(x)) * (s * scale of x)  +  sum over outliers of (q - z) s x
//
// with q and z the codes and zeros of row r, s its scale for the group, and x integers in planes of bytes. A lane of 32
// bits is a row of the tile (linear_layout.h draws it); 8 k of codes are two registers of bytes, k..k+3 and k+4..k+7, each
// multiplied with 4 broadcast bytes of each plane:
//
//   VNNI:    vpdpbusd, which adds the 4 products to the lane
//   without: vpmaddubsw, which adds them in pairs to the halves of a lane. 8 sums of two products fit in int16 where codes
//            have 4 bits: 8 * 2 * 15 * 128 = 30720. Then vpmaddwd with ones widens them. Codes of 8 bits are taken as two
//            of 4, the upper widened with 16 in place of ones.
//
// All sums of a block are exact, so a row's result does not depend on the rows and tiles that are computed with it.
// Speed: one row runs at 0.95 or more of the speed at which a thread reads memory (benchmarks/linear.py), as codes are
// fetched 4 KiB ahead; several rows share the unpacking, two tiles the broadcasts, and many rows go in panels whose
// activations stay in the cache.
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

// Codes of `bits`: load() gives a step as two registers of bytes, and asks for what lies kAhead; one() gives a single k of
// the 16 rows.
template <int bits>
struct Codes;

template <>
struct Codes<4> {
    static constexpr int64_t kBytes = kStep * kTile / 2;  // of a step
    __attribute__((always_inline)) static void load(const char* at, __m512i (&q)[2]) {
        const __m512i mask = _mm512_set1_epi8(15), both = _mm512_load_si512(at);
        _mm_prefetch(at + kAhead, _MM_HINT_T0);
        q[0] = _mm512_and_si512(both, mask);
        q[1] = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
    }
    static __m512i one(const char* at, int32_t k) {
        const __m512i lanes = _mm512_load_si512(at + k / 8 * kBytes);
        const __m128i shift = _mm_cvtsi32_si128(k % 4 * 8 + k % 8 / 4 * 4);
        return _mm512_and_si512(_mm512_srl_epi32(lanes, shift), _mm512_set1_epi32(15));
    }
};

template <>
struct Codes<8> {
    static constexpr int64_t kBytes = kStep * kTile;
    __attribute__((always_inline)) static void load(const char* at, __m512i (&q)[2]) {
        _mm_prefetch(at + kAhead, _MM_HINT_T0);
        _mm_prefetch(at + kAhead + 64, _MM_HINT_T0);
        q[0] = _mm512_load_si512(at);
        q[1] = _mm512_load_si512(at + 64);
    }
    static __m512i one(const char* at, int32_t k) {
        const __m512i lanes = _mm512_load_si512(at + k / 4 * 64);
        return _mm512_and_si512(_mm512_srl_epi32(lanes, _mm_cvtsi32_si128(k % 4 * 8)), _mm512_set1_epi32(255));
    }
};

#ifdef __AVX512VNNI__

__m512i add_pairs(__m512i sum, __m512i a, __m512i b) { return _mm512_dpwssd_epi32(sum, a, b); }

// sums[p][t][j] += sum over k of q x for plane p, row t and tile j, in `steps` steps of 8 k.
template <int bits, int planes, int R, int T>
__attribute__((always_inline)) inline void dot(const char* codes, int64_t tile_bytes, const char* x, int64_t stride,
                                               int64_t steps, __m512i (&sums)[planes][R][T]) {
    // Few sums would wait for themselves: they are split in chains.
    constexpr int kSums = planes * R * T, kChains = kSums <= 2 ? 4 : kSums <= 8 ? 2 : 1;
    __m512i chains[kChains][planes][R][T];
    for (int c = 1; c < kChains; c++) {
        for (int t = 0; t < R; t++) {
            for (int p = 0; p < planes; p++) {
                for (int j = 0; j < T; j++) chains[c][p][t][j] = _mm512_setzero_si512();
            }
        }
    }
    for (int t = 0; t < R; t++) {
        for (int p = 0; p < planes; p++) {
            for (int j = 0; j < T; j++) chains[0][p][t][j] = sums[p][t][j];
        }
    }
    const auto step = [&](int64_t i, int odd) __attribute__((always_inline)) {
        __m512i q[T][2];
        for (int j = 0; j < T; j++) Codes<bits>::load(codes + j * tile_bytes + i * Codes<bits>::kBytes, q[j]);
        for (int t = 0; t < R; t++) {
            for (int p = 0; p < planes; p++) {
                const char* at = x + t * stride + (p * steps + i) * kStep;
                for (int half = 0; half < 2; half++) {
                    const __m512i factor = broadcast(at + half * 4);
                    for (int j = 0; j < T; j++) {
                        __m512i& sum = chains[(odd * 2 + half) % kChains][p][t][j];
                        sum = _mm512_dpbusd_epi32(sum, q[j][half], factor);
                    }
                }
            }
        }
    };
    int64_t i = 0;
#pragma GCC unroll 2
    for (; i + 2 <= steps; i += 2) {
        step(i, 0);
        step(i + 1, 1);
    }
    if (i < steps) step(i, 0);
    for (int t = 0; t < R; t++) {
        for (int p = 0; p < planes; p++) {
            for (int j = 0; j < T; j++) {
                sums[p][t][j] = chains[0][p][t][j];
                for (int c = 1; c < kChains; c++) sums[p][t][j] = _mm512_add_epi32(sums[p][t][j], chains[c][p][t][j]);
            }
        }
    }
}

#else

__m512i add_pairs(__m512i sum, __m512i a, __m512i b) { return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b)); }

// sums[p][t][j] += sum over k of q x for plane p, row t and tile j, in `steps` steps of 8 k.
template <int bits, int planes, int R, int T>
__attribute__((always_inline)) inline void dot(const char* codes, int64_t tile_bytes, const char* x, int64_t stride,
                                               int64_t steps, __m512i (&sums)[planes][R][T]) {
    constexpr int kParts = bits > 4 ? 2 : 1;  // of a code
    const __m512i mask = _mm512_set1_epi8(15);
    for (int64_t begin = 0; begin < steps; begin += 4) {
        const int64_t end = smaller(begin + 4, steps);
        __m512i narrow[kParts][planes][R][T];
        for (int part = 0; part < kParts; part++) {
            for (int p = 0; p < planes; p++) {
                for (int t = 0; t < R; t++) {
                    for (int j = 0; j < T; j++) narrow[part][p][t][j] = _mm512_setzero_si512();
                }
            }
        }
        for (int64_t i = begin; i < end; i++) {
            __m512i q[kParts][T][2];
            for (int j = 0; j < T; j++) {
                Codes<bits>::load(codes + j * tile_bytes + i * Codes<bits>::kBytes, q[0][j]);
                for (int h = 0; kParts == 2 && h < 2; h++) {
                    q[kParts - 1][j][h] = _mm512_and_si512(_mm512_srli_epi16(q[0][j][h], 4), mask);
                    q[0][j][h] = _mm512_and_si512(q[0][j][h], mask);
                }
            }
            for (int t = 0; t < R; t++) {
                for (int p = 0; p < planes; p++) {
                    const char* at = x + t * stride + (p * steps + i) * kStep;
                    const __m512i first = broadcast(at), second = broadcast(at + 4);
                    for (int j = 0; j < T; j++) {
                        for (int part = 0; part < kParts; part++) {
                            __m512i& sum = narrow[part][p][t][j];
                            sum = _mm512_add_epi16(sum, _mm512_maddubs_epi16(q[part][j][0], first));
                            sum = _mm512_add_epi16(sum, _mm512_maddubs_epi16(q[part][j][1], second));
                        }
                    }
                }
            }
        }
        for (int part = 0; part < kParts; part++) {
            const __m512i weight = _mm512_set1_epi16(part == 0 ? 1 : 16);
            for (int p = 0; p < planes; p++) {
                for (int t = 0; t < R; t++) {
                    for (int j = 0; j < T; j++) sums[p][t][j] = add_pairs(sums[p][t][j], narrow[part][p][t][j], weight);
                }
            }
        }
    }
}

#endif

// What stays the same for all tiles and rows of a call.
struct Call {
    QuantizedLayout layout;
    bool wide_scales;
    int64_t n, y_stride;
};

// R rows of T tiles: sums[t][j].
template <int bits, int planes, int R, int T>
__attribute__((always_inline)) inline void tiles(const Call& call, const char* at, const char* activation,
                                                 __m512 (&sums)[R][T]) {
    const QuantizedLayout& layout = call.layout;
    const int64_t stride = layout.activation_bytes, tile_bytes = layout.tile_bytes;
    const char *x = activation, *blocks = activation + layout.blocks_at, *outliers = activation + layout.outliers_at;
    for (int t = 0; t < R; t++) {
        for (int j = 0; j < T; j++) sums[t][j] = _mm512_setzero_ps();
    }
    for (int64_t first = 0; first < layout.groups; first += kChunk) {
        const int64_t m = smaller(kChunk, layout.groups - first);
        const char *scales = at, *zeros = at + m * layout.scale_bytes;
        at += layout.header_bytes(m);
        for (int64_t g = first; g < first + m; g++, scales += layout.scale_bytes, zeros += kTile) {
            __m512 scale[T];
            __m512i zero[T];  // z and 128 z, as Block::halves wants them
            for (int j = 0; j < T; j++) {
                const char* own = scales + j * tile_bytes;
                scale[j] = call.wide_scales ? _mm512_load_ps(own)
                                            : _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(own)));
                const __m128i z = _mm_load_si128(reinterpret_cast<const __m128i*>(zeros + j * tile_bytes));
                zero[j] = _mm512_cvtepu8_epi32(z);
                zero[j] = _mm512_or_si512(zero[j], _mm512_slli_epi32(zero[j], 16 + 7));
            }
            const int64_t all = layout.padded(g) / kStep;
            for (int64_t begin = 0; begin < all; begin += kBlockSteps) {
                const int64_t steps = smaller(kBlockSteps, all - begin);
                __m512i products[planes][R][T];
                for (int t = 0; t < R; t++) {
                    const __m512i halves = _mm512_set1_epi32(reinterpret_cast<const Block*>(blocks + t * stride)->halves);
                    for (int j = 0; j < T; j++) {
                        for (int p = 0; p < planes - 1; p++) products[p][t][j] = _mm512_setzero_si512();
                        products[planes - 1][t][j] = add_pairs(_mm512_setzero_si512(), zero[j], halves);
                    }
                }
                if (steps == kBlockSteps) {
                    dot<bits, planes, R, T>(at, tile_bytes, x, stride, kBlockSteps, products);
                } else {
                    dot<bits, planes, R, T>(at, tile_bytes, x, stride, steps, products);
                }
                for (int t = 0; t < R; t++) {
                    const Block& block = *reinterpret_cast<const Block*>(blocks + t * stride);
                    for (int j = 0; j < T; j++) {
                        __m512i product = products[planes - 1][t][j];
                        if (planes == 2) product = _mm512_add_epi32(product, _mm512_slli_epi32(products[0][t][j], 8));
                        const __m512 factor = _mm512_mul_ps(scale[j], _mm512_set1_ps(block.scale));
                        sums[t][j] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(product), factor, sums[t][j]);
                    }
                    const auto* list = reinterpret_cast<const Outlier*>(outliers + t * stride);
                    for (int32_t o = 0; __builtin_expect(o < block.outliers, 0); o++) {
                        for (int j = 0; j < T; j++) {
                            const __m512i code = Codes<bits>::one(at + j * tile_bytes, list[o].index);
                            const __m512i z = _mm512_and_si512(zero[j], _mm512_set1_epi32(255));
                            const __m512 weight = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(code, z)), scale[j]);
                            sums[t][j] = _mm512_fmadd_ps(weight, _mm512_set1_ps(list[o].value), sums[t][j]);
                        }
                    }
                }
                at += steps * Codes<bits>::kBytes;
                x += steps * kStep * planes;
                blocks += sizeof(Block);
                outliers += layout.block_outliers * int64_t{sizeof(Outlier)};
            }
        }
    }
}

// R rows of T tiles, of which the first `outputs` rows of weights exist.
template <int bits, int planes, int R, int T>
__attribute__((noinline)) void store_tiles(const Call& call, const char* at, const char* activation, int64_t outputs, float* y) {
    __m512 sums[R][T];
    tiles<bits, planes, R, T>(call, at, activation, sums);
    for (int j = 0; j < T; j++) {
        const auto mask = static_cast<__mmask16>((1u << smaller(kTile, outputs - j * kTile)) - 1);
        for (int t = 0; t < R; t++) _mm512_mask_storeu_ps(y + t * call.y_stride + j * kTile, mask, sums[t][j]);
    }
}

// `rows` rows of T tiles, so many at a time as the registers hold.
template <int bits, int planes, int T>
void rows_of_tiles(const Call& call, const char* at, const char* x, int64_t rows, int64_t outputs, float* y) {
    constexpr int kMost = T == 2 ? 12 / planes : 8;
    while (rows > 0) {
        int64_t count = 1;
        if (rows >= kMost) {
            count = kMost;
            store_tiles<bits, planes, kMost, T>(call, at, x, outputs, y);
        } else if (rows >= 4) {
            count = 4;
            store_tiles<bits, planes, 4, T>(call, at, x, outputs, y);
        } else if (rows >= 2) {
            count = 2;
            store_tiles<bits, planes, 2, T>(call, at, x, outputs, y);
        } else {
            store_tiles<bits, planes, 1, T>(call, at, x, outputs, y);
        }
        rows -= count;
        x += count * call.layout.activation_bytes;
        y += count * call.y_stride;
    }
}

template <int bits, int planes>
void run(const Call& call, const char* packed, const char* activations, int64_t rows, int64_t tile_begin,
         int64_t tile_end, float* y) {
    constexpr int64_t kRows = 12;
    const int64_t row_bytes = call.layout.activation_bytes, fit = kPanelBytes / row_bytes / kRows * kRows;
    const int64_t panel = fit > kRows ? fit : kRows;
    for (int64_t begin = 0; begin < rows; begin += panel) {
        const int64_t count = smaller(panel, rows - begin), together = count >= 12 / planes ? 2 : 1;
        const char* x = activations + begin * row_bytes;
        for (int64_t tile = tile_begin; tile < tile_end;) {
            const char* at = packed + tile * call.layout.tile_bytes;
            const int64_t outputs = call.n - tile * kTile;
            float* out = y + begin * call.y_stride + tile * kTile;
            if (tile + together > tile_end || together == 1) {
                rows_of_tiles<bits, planes, 1>(call, at, x, count, outputs, out);
                tile++;
            } else {
                rows_of_tiles<bits, planes, 2>(call, at, x, count, outputs, out);
                tile += 2;
            }
        }
    }
}

void linear(const LinearShape& shape, const void* packed, const void* activations, int64_t rows, int64_t tile_begin,
            int64_t tile_end, float* y, int64_t y_stride) {
    if (shape.type != WeightType::quantized) {
        linear_float_avx512(shape, packed, activations, rows, tile_begin, tile_end, y, y_stride);
        return;
    }
    const Call call{QuantizedLayout(shape), shape.wide_scales, shape.n, y_stride};
    const char *at = static_cast<const char*>(packed), *x = static_cast<const char*>(activations);
    switch (shape.bits * 100 + shape.activation_bits) {
        case 416: run<4, 2>(call, at, x, rows, tile_begin, tile_end, y); break;
        case 408: run<4, 1>(call, at, x, rows, tile_begin, tile_end, y); break;
        case 816: run<8, 2>(call, at, x, rows, tile_begin, tile_end, y); break;
        case 808: run<8, 1>(call, at, x, rows, tile_begin, tile_end, y); break;
    }
}

constexpr LinearKernels table{kTile, packed_bytes, pack, unpack, unpack_row, activation_bytes, prepare_step,
                              prepare_part, linear};

}  // namespace

#ifdef __AVX512VNNI__
const LinearKernels& linear_avx512vnni() { return table; }
#else
const LinearKernels& linear_avx512() { return table; }
#endif

}  // namespace tinychat
