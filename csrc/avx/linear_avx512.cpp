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
// All sums of a block are exact, so a row's result does not depend on the rows that are computed with it.
// Speed: one row runs at 0.89 of the speed at which a thread reads memory (Emerald Rapids; benchmarks/linear.py), as codes are
// fetched ahead; several rows share the unpacking, and many go in panels whose activations stay in the cache, with
// VNNI at 0.65 or more of what its multipliers can do. (Two tiles at once share the broadcasts, and were no faster.)
#include <immintrin.h>

#include "levels.h"
#include "linear_layout.h"

namespace tinychat {
namespace {

constexpr int64_t kBlockSteps = kBlock / kStep;
constexpr int64_t kAhead = 8192, kNear = 1024;  // bytes; without them 0.6 of the speed of reading
constexpr int64_t kPanelBytes = 1 << 19;  // of activations: half of a usual level-2 cache

int32_t word(const char* at) {
    int32_t value;
    std::memcpy(&value, at, 4);
    return value;
}

__m512i broadcast(const char* at) { return _mm512_set1_epi32(word(at)); }

// Codes of `bits`: load() gives a step as two registers of bytes, and asks for what lies `ahead`; one() gives a single k of
// the 16 rows.
// Decoding waits for memory: a line is asked for into the second cache long before it is read, of which a core keeps more
// on the way than into the first, and from there into the first shortly before.
__attribute__((always_inline)) inline void fetch(const char* at, int64_t ahead) {
    _mm_prefetch(at + ahead, _MM_HINT_T1);
    _mm_prefetch(at + kNear, _MM_HINT_T0);
}

template <int bits>
struct Codes;

template <>
struct Codes<4> {
    static constexpr int64_t kBytes = kStep * kTile / 2;  // of a step
    __attribute__((always_inline)) static void load(const char* at, int64_t ahead, __m512i (&q)[2]) {
        const __m512i mask = _mm512_set1_epi8(15), both = _mm512_load_si512(at);
        fetch(at, ahead);
        q[0] = _mm512_and_si512(both, mask);
        q[1] = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
    }
    static __m512i one(const char* at, uint32_t k) {
        const __m512i lanes = _mm512_load_si512(at + k / 8 * kBytes);
        const __m128i shift = _mm_cvtsi32_si128(static_cast<int>(k % 4 * 8 + k % 8 / 4 * 4));
        return _mm512_and_si512(_mm512_srl_epi32(lanes, shift), _mm512_set1_epi32(15));
    }
};

template <>
struct Codes<8> {
    static constexpr int64_t kBytes = kStep * kTile;
    __attribute__((always_inline)) static void load(const char* at, int64_t ahead, __m512i (&q)[2]) {
        fetch(at, ahead);
        fetch(at + 64, ahead);
        q[0] = _mm512_load_si512(at);
        q[1] = _mm512_load_si512(at + 64);
    }
    static __m512i one(const char* at, uint32_t k) {
        const __m512i lanes = _mm512_load_si512(at + k / 4 * 64);
        const __m128i shift = _mm_cvtsi32_si128(static_cast<int>(k % 4 * 8));
        return _mm512_and_si512(_mm512_srl_epi32(lanes, shift), _mm512_set1_epi32(255));
    }
};

#ifdef __AVX512VNNI__

__m512i add_pairs(__m512i sum, __m512i a, __m512i b) { return _mm512_dpwssd_epi32(sum, a, b); }

// sums[p][t] += sum over k of q x for plane p and row t, in `steps` steps of 8 k.
template <int bits, int planes, int R>
__attribute__((always_inline)) inline void dot(const char* codes, int64_t ahead, const char* x, int64_t stride,
                                               int64_t steps, __m512i (&sums)[planes][R]) {
    // Few sums would wait for themselves: they are split in chains.
    constexpr int kSums = planes * R, kChains = kSums <= 2 ? 4 : kSums <= 8 ? 2 : 1;
    __m512i chains[kChains][planes][R];
    for (int p = 0; p < planes; p++) {
        for (int t = 0; t < R; t++) {
            chains[0][p][t] = sums[p][t];
            for (int c = 1; c < kChains; c++) chains[c][p][t] = _mm512_setzero_si512();
        }
    }
    const auto step = [&](int64_t i, int odd) __attribute__((always_inline)) {
        __m512i q[2];
        Codes<bits>::load(codes + i * Codes<bits>::kBytes, ahead, q);
        for (int t = 0; t < R; t++) {
            for (int p = 0; p < planes; p++) {
                const char* at = x + t * stride + (p * steps + i) * kStep;
                for (int half = 0; half < 2; half++) {
                    __m512i& sum = chains[(odd * 2 + half) % kChains][p][t];
                    sum = _mm512_dpbusd_epi32(sum, q[half], broadcast(at + half * 4));
                }
            }
        }
    };
    const auto two_steps = [&](int64_t i) __attribute__((always_inline)) {
        step(i, 0);
        step(i + 1, 1);
    };
    int64_t i = 0;
    if constexpr (kSums <= 2) {  // a whole block without a branch or a copy
#pragma GCC unroll 8
        for (; i + 2 <= steps; i += 2) two_steps(i);
    } else {
#pragma GCC unroll 2
        for (; i + 2 <= steps; i += 2) two_steps(i);
    }
    if (i < steps) step(i, 0);
    for (int p = 0; p < planes; p++) {
        for (int t = 0; t < R; t++) {
            sums[p][t] = chains[0][p][t];
            for (int c = 1; c < kChains; c++) sums[p][t] = _mm512_add_epi32(sums[p][t], chains[c][p][t]);
        }
    }
}

#else

__m512i add_pairs(__m512i sum, __m512i a, __m512i b) { return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b)); }

// sums[p][t] += sum over k of q x for plane p and row t, in `steps` steps of 8 k.
template <int bits, int planes, int R>
__attribute__((always_inline)) inline void dot(const char* codes, int64_t ahead, const char* x, int64_t stride,
                                               int64_t steps, __m512i (&sums)[planes][R]) {
    constexpr int kParts = bits > 4 ? 2 : 1;  // of a code
    const __m512i mask = _mm512_set1_epi8(15);
    for (int64_t begin = 0; begin < steps; begin += 4) {
        const int64_t end = smaller(begin + 4, steps);
        __m512i narrow[kParts][planes][R];
        for (int part = 0; part < kParts; part++) {
            for (int p = 0; p < planes; p++) {
                for (int t = 0; t < R; t++) narrow[part][p][t] = _mm512_setzero_si512();
            }
        }
        for (int64_t i = begin; i < end; i++) {
            __m512i q[2][2];  // parts, halves of the step
            Codes<bits>::load(codes + i * Codes<bits>::kBytes, ahead, q[0]);
            for (int half = 0; kParts == 2 && half < 2; half++) {
                q[1][half] = _mm512_and_si512(_mm512_srli_epi16(q[0][half], 4), mask);
                q[0][half] = _mm512_and_si512(q[0][half], mask);
            }
            for (int t = 0; t < R; t++) {
                for (int p = 0; p < planes; p++) {
                    const char* at = x + t * stride + (p * steps + i) * kStep;
                    for (int half = 0; half < 2; half++) {
                        const __m512i factor = broadcast(at + half * 4);
                        for (int part = 0; part < kParts; part++) {
                            __m512i& sum = narrow[part][p][t];
                            sum = _mm512_add_epi16(sum, _mm512_maddubs_epi16(q[part][half], factor));
                        }
                    }
                }
            }
        }
        for (int part = 0; part < kParts; part++) {
            const __m512i weight = _mm512_set1_epi16(part == 0 ? 1 : 16);
            for (int p = 0; p < planes; p++) {
                for (int t = 0; t < R; t++) sums[p][t] = add_pairs(sums[p][t], narrow[part][p][t], weight);
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

// R rows of a tile, of which the first `outputs` rows of weights exist. Codes are asked for `ahead` bytes before their turn.
template <int bits, int planes, int R>
__attribute__((noinline)) void rows_of_tile(const Call& call, const char* at, int64_t ahead, const char* x,
                                            int64_t outputs, float* y) {
    const QuantizedLayout& layout = call.layout;
    const int64_t stride = layout.activation_bytes;
    const char *blocks = x + layout.blocks_at, *outliers = x + layout.outliers_at;
    __m512 sums[R];
    for (int t = 0; t < R; t++) sums[t] = _mm512_setzero_ps();
    for (int64_t first = 0; first < layout.groups; first += kChunk) {
        const int64_t m = smaller(kChunk, layout.groups - first);
        const char *scales = at, *zeros = at + m * layout.scale_bytes;
        at += layout.header_bytes(m);
        for (int64_t g = first; g < first + m; g++, scales += layout.scale_bytes, zeros += kTile) {
            const __m512 scale = call.wide_scales
                                     ? _mm512_load_ps(scales)
                                     : _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(scales)));
            const __m512i z = _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(zeros)));
            const __m512i zero = _mm512_or_si512(z, _mm512_slli_epi32(z, 16 + 7));  // z and 128 z, for Block::halves
            const int64_t all = layout.padded(g) / kStep;
            for (int64_t begin = 0; begin < all; begin += kBlockSteps) {
                const int64_t steps = smaller(kBlockSteps, all - begin);
                __m512i products[planes][R];
                for (int t = 0; t < R; t++) {
                    const auto* block = reinterpret_cast<const Block*>(blocks + t * stride);
                    products[0][t] = _mm512_setzero_si512();
                    products[planes - 1][t] =
                        add_pairs(_mm512_setzero_si512(), zero, _mm512_set1_epi32(block->halves));
                }
                if (steps == kBlockSteps) {
                    dot<bits, planes, R>(at, ahead, x, stride, kBlockSteps, products);
                } else {
                    dot<bits, planes, R>(at, ahead, x, stride, steps, products);
                }
                for (int t = 0; t < R; t++) {
                    const auto* block = reinterpret_cast<const Block*>(blocks + t * stride);
                    __m512i product = products[planes - 1][t];
                    if (planes == 2) product = _mm512_add_epi32(product, _mm512_slli_epi32(products[0][t], 8));
                    const __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(block->scale));
                    sums[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(product), factor, sums[t]);
                    const auto* list = reinterpret_cast<const Outlier*>(outliers + t * stride);
                    for (int32_t o = 0; __builtin_expect(o < block->outliers, 0); o++) {
                        const __m512i code = Codes<bits>::one(at, static_cast<uint32_t>(list[o].index));
                        const __m512i difference = _mm512_sub_epi32(code, z);
                        const __m512 weight = _mm512_mul_ps(_mm512_cvtepi32_ps(difference), scale);
                        sums[t] = _mm512_fmadd_ps(weight, _mm512_set1_ps(list[o].value), sums[t]);
                    }
                }
                at += steps * Codes<bits>::kBytes;
                x += steps * kStep * planes;
                blocks += sizeof(Block);
                outliers += layout.block_outliers * int64_t{sizeof(Outlier)};
            }
        }
    }
    const auto mask = static_cast<__mmask16>((1u << outputs) - 1);
    for (int t = 0; t < R; t++) _mm512_mask_storeu_ps(y + t * call.y_stride, mask, sums[t]);
}

template <int bits, int planes>
void run(const Call& call, const char* packed, const char* activations, int64_t rows, int64_t tile_begin,
         int64_t tile_end, float* y) {
    constexpr int kMost = 16 / planes;  // rows at a time: what the registers hold
    const int64_t row_bytes = call.layout.activation_bytes, fit = kPanelBytes / row_bytes / kMost * kMost;
    const int64_t panel = fit > kMost ? fit : kMost;
    for (int64_t begin = 0; begin < rows; begin += panel) {
        const int64_t end = smaller(begin + panel, rows);
        for (int64_t tile = tile_begin; tile < tile_end; tile++) {
            const char* at = packed + tile * call.layout.tile_bytes;
            const int64_t outputs = smaller(kTile, call.n - tile * kTile);
            for (int64_t t = begin; t < end;) {
                const char* x = activations + t * row_bytes;
                float* out = y + t * call.y_stride + tile * kTile;
                const int64_t left = end - t;
                // The only pass over a tile asks for what follows soon; the last of several, for the next tile.
                const int64_t ahead = end - begin <= kMost || left > kMost ? kAhead : call.layout.tile_bytes;
                if (left >= kMost) {
                    rows_of_tile<bits, planes, kMost>(call, at, ahead, x, outputs, out);
                    t += kMost;
                } else if (left >= 8) {
                    rows_of_tile<bits, planes, 8>(call, at, ahead, x, outputs, out);
                    t += 8;
                } else if (left >= 4) {
                    rows_of_tile<bits, planes, 4>(call, at, ahead, x, outputs, out);
                    t += 4;
                } else if (left >= 2) {
                    rows_of_tile<bits, planes, 2>(call, at, ahead, x, outputs, out);
                    t += 2;
                } else {
                    rows_of_tile<bits, planes, 1>(call, at, ahead, x, outputs, out);
                    t += 1;
                }
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
