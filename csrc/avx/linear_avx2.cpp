// The linear of AVX2 with FMA and F16C, compiled twice: with the AVX-VNNI instructions (level avxvnni) and without (avx2).
//
//   y[t, r] = sum over blocks of (sum over k of q x - z sum(x)) * (s * scale of x)  +  sum over outliers of (q - z) s x
//
// with q and z the codes and zeros of row r, s its scale for the group, and x integers in planes of bytes. A lane of 32
// bits is a row of the tile, so that two registers, the halves of a tile, stand where AVX-512 has one. Codes of any width
// unpack to registers of 4 k of half a tile, a byte each (linear_layout.h draws it), and these are multiplied with 4
// broadcast bytes of each plane:
//
//   VNNI:    vpdpbusd, which adds the 4 products to the lane
//   without: vpmaddubsw, which adds them in pairs to the halves of a lane. 8 sums of two products fit in int16 where codes
//            have 4 bits: 8 * 2 * 15 * 128 = 30720; of 3 bits 16, of 2 bits 32. Then vpmaddwd widens them, with ones, or
//            with 256 those of the upper plane. Codes of 8 bits are taken as two of 4, the upper widened with 16 times as much.
//
// All sums of a block are exact, so a row's result does not depend on the rows that are computed with it.
// Speed: one row runs at 0.82 of the speed at which a thread reads memory (Emerald Rapids), on Zen 3 at 0.83 to 0.87
// (benchmarks/linear.py), as codes are fetched ahead; a few rows share the unpacking, many go to linear_rows_avx2.cpp.
#include <immintrin.h>

#include "levels.h"
#include "linear_layout.h"

namespace tinychat {
namespace {

constexpr int64_t kAhead = 8192, kNear = 1024;  // bytes; without them the sums wait for memory
constexpr int64_t kPanelBytes = 1 << 18;  // of activations: half of a small level-2 cache
constexpr int64_t kHalf = 8;              // rows in a register
constexpr int64_t kHalfBytes = 32;        // of a register

int32_t word(const char* at) {
    int32_t value;
    std::memcpy(&value, at, 4);
    return value;
}

__m256i broadcast(const char* at) { return _mm256_set1_epi32(word(at)); }

// Decoding waits for memory: a line is asked for into the second cache long before it is read, of which a core keeps more
// on the way than into the first, and from there into the first shortly before.
__attribute__((always_inline)) inline void fetch(const char* at) {
    _mm_prefetch(at + kAhead, _MM_HINT_T1);
    _mm_prefetch(at + kNear, _MM_HINT_T0);
}

template <int bits>
__attribute__((always_inline)) inline void fetch_unit(const char* at) {
    for (int64_t line = 0; line < unit_bytes(bits); line += 64) fetch(at + line);
}

// Rows of half a tile as `unpacked` wants them.
typedef uint32_t Lanes __attribute__((vector_size(32)));

#ifdef __AVXVNNI__

constexpr int sums_of(int planes) { return planes; }

__m256i add_pairs(__m256i sum, __m256i a, __m256i b) { return _mm256_dpwssd_avx_epi32(sum, a, b); }

// sums[p][t][j] += sum over k of q x for plane p, row t and half j, in `length` k.
template <int bits, int planes, int R, int H>
__attribute__((always_inline)) inline void dot(const char* codes, const char* x, int64_t stride, int64_t length,
                                               __m256i (&sums)[planes][R][H]) {
    constexpr int kFours = unit_length(bits) / 4;
    constexpr bool kSplit = planes * R * H <= 4;  // few sums would wait for themselves: every second has its own
    __m256i second[planes][R][H];
    for (int p = 0; p < planes; p++) {
        for (int t = 0; t < R; t++) {
            for (int j = 0; j < H; j++) second[p][t][j] = _mm256_setzero_si256();
        }
    }
    const int64_t end = divide_up(length, unit_length(bits));
#pragma GCC unroll 4
    for (int64_t i = 0; i < end; i++) {
        const char *at = codes + i * unit_bytes(bits), *factors = x + i * unit_length(bits);
        fetch_unit<bits>(at);
#pragma GCC unroll 8
        for (int h = 0; h < kFours; h++) {
            __m256i q[H];
            for (int j = 0; j < H; j++) q[j] = (__m256i)unpacked<bits, Lanes>(at + j * kHalfBytes, h);
            for (int t = 0; t < R; t++) {
                for (int p = 0; p < planes; p++) {
                    const __m256i factor = broadcast(factors + t * stride + p * length + h * 4);
                    for (int j = 0; j < H; j++) {
                        __m256i& sum = kSplit && h % 2 == 1 ? second[p][t][j] : sums[p][t][j];
                        sum = _mm256_dpbusd_avx_epi32(sum, q[j], factor);
                    }
                }
            }
        }
    }
    for (int p = 0; kSplit && p < planes; p++) {
        for (int t = 0; t < R; t++) {
            for (int j = 0; j < H; j++) sums[p][t][j] = _mm256_add_epi32(sums[p][t][j], second[p][t][j]);
        }
    }
}

#else

constexpr int sums_of(int) { return 1; }  // planes are widened with their weights

__m256i add_pairs(__m256i sum, __m256i a, __m256i b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }

// sum = the products of q and x in pairs, or added to it.
template <bool begin>
__attribute__((always_inline)) inline void multiply(__m256i q, __m256i x, __m256i& sum) {
    const __m256i product = _mm256_maddubs_epi16(q, x);
    sum = begin ? product : _mm256_add_epi16(sum, product);
}

// sums[0][t][j] += sum over k of q x for row t and half j, in `length` k.
template <int bits, int planes, int R, int H>
__attribute__((always_inline)) inline void dot(const char* codes, const char* x, int64_t stride, int64_t length,
                                               __m256i (&sums)[1][R][H]) {
    constexpr int kParts = bits > 4 ? 2 : 1;  // of a code
    constexpr int kFours = unit_length(bits) / 4;
    constexpr int64_t kUnits = (bits == 2 ? 128 : bits == 3 ? 64 : 32) / unit_length(bits);  // that int16 sums hold
    const int64_t all = divide_up(length, unit_length(bits));
    for (int64_t first = 0; first < all; first += kUnits) {
        const int64_t end = smaller(first + kUnits, all);
        __m256i narrow[kParts][planes][R][H];
        const auto four = [&](auto begin, const char* at, const char* factors, int h) __attribute__((always_inline)) {
            Lanes q[2][H];
            for (int j = 0; j < H; j++) {
                const Lanes whole = unpacked<bits, Lanes>(at + j * kHalfBytes, h);
                q[0][j] = kParts == 2 ? whole & 0x0f0f0f0fu : whole;
                q[1][j] = whole >> 4 & 0x0f0f0f0fu;
            }
            for (int t = 0; t < R; t++) {
                for (int p = 0; p < planes; p++) {
                    const __m256i factor = broadcast(factors + t * stride + p * length + h * 4);
                    for (int j = 0; j < H; j++) {
                        for (int part = 0; part < kParts; part++) {
                            multiply<begin.value>((__m256i)q[part][j], factor, narrow[part][p][t][j]);
                        }
                    }
                }
            }
        };
        const auto unit = [&](auto begin, int64_t i) __attribute__((always_inline)) {
            const char *at = codes + i * unit_bytes(bits), *factors = x + i * unit_length(bits);
            fetch_unit<bits>(at);
            four(begin, at, factors, 0);
#pragma GCC unroll 8
            for (int h = 1; h < kFours; h++) four(Number<0>{}, at, factors, h);
        };
        int64_t i = first;
        if constexpr (bits == 4) {
            unit(Number<1>{}, i++);
        } else {  // their units are long: twice in a loop would be too much for the registers
            std::memset(&narrow, 0, sizeof narrow);
        }
        for (; i < end; i++) unit(Number<0>{}, i);
        for (int p = 0; p < planes; p++) {
            for (int part = 0; part < kParts; part++) {
                const __m256i weight = _mm256_set1_epi16((part == 0 ? 1 : 16) * (p < planes - 1 ? 256 : 1));
                for (int t = 0; t < R; t++) {
                    for (int j = 0; j < H; j++) sums[0][t][j] = add_pairs(sums[0][t][j], narrow[part][p][t][j], weight);
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

__m256 load_scales(const char* at, bool wide) {
    if (wide) return _mm256_load_ps(reinterpret_cast<const float*>(at));
    return _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(at)));
}

// A block of R rows and H halves of a tile, the first of them at `codes`, `scales` and `zeros`: adds to sums[t * 2 + j].
template <int bits, int planes, int R, int H>
__attribute__((always_inline)) inline void block_of_tile(const Call& call, const char* codes, const char* scales,
                                                         const char* zeros, int64_t length, const char* x,
                                                         const char* blocks, const char* outliers, __m256* sums) {
    const int64_t stride = call.layout.activation_bytes;
    constexpr int kSums = sums_of(planes);
    __m256i zero[H], products[kSums][R][H];
    for (int j = 0; j < H; j++) {  // z and 128 z, as Block::halves wants them
        zero[j] = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(zeros + j * kHalf)));
        zero[j] = _mm256_or_si256(zero[j], _mm256_slli_epi32(zero[j], 16 + 7));
    }
    for (int t = 0; t < R; t++) {
        const __m256i halves = _mm256_set1_epi32(reinterpret_cast<const Block*>(blocks + t * stride)->halves);
        for (int j = 0; j < H; j++) {
            for (int p = 0; p < kSums - 1; p++) products[p][t][j] = _mm256_setzero_si256();
            products[kSums - 1][t][j] = add_pairs(_mm256_setzero_si256(), zero[j], halves);
        }
    }
    if (length == kBlock) {
        dot<bits, planes, R, H>(codes, x, stride, kBlock, products);
    } else {
        dot<bits, planes, R, H>(codes, x, stride, length, products);
    }
#pragma GCC unroll 2
    for (int j = 0; j < H; j++) {
        const __m256 scale = load_scales(scales + j * call.layout.scale_bytes / 2, call.wide_scales);
        for (int t = 0; t < R; t++) {
            const Block& block = *reinterpret_cast<const Block*>(blocks + t * stride);
            const auto* list = reinterpret_cast<const Outlier*>(outliers + t * stride);
            __m256i product = products[kSums - 1][t][j];
            if (kSums == 2) product = _mm256_add_epi32(product, _mm256_slli_epi32(products[0][t][j], 8));
            const __m256 factor = _mm256_mul_ps(scale, _mm256_set1_ps(block.scale));
            __m256 sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(product), factor, sums[t * 2 + j]);
            for (int32_t o = 0; __builtin_expect(o < block.outliers, 0); o++) {
                const auto code = (__m256i)one_code<bits, Lanes>(codes + j * kHalfBytes, list[o].index);
                const __m256i z = _mm256_and_si256(zero[j], _mm256_set1_epi32(255));
                const __m256 weight = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(code, z)), scale);
                sum = _mm256_fmadd_ps(weight, _mm256_set1_ps(list[o].value), sum);
            }
            sums[t * 2 + j] = sum;
        }
    }
}

// R rows of one tile, of which the first `outputs` rows of weights exist.
template <int bits, int planes, int R>
__attribute__((noinline)) void rows_of_tile(const Call& call, const char* at, const char* x, int64_t outputs,
                                            float* y) {
    constexpr int H = R * planes <= 4 ? 2 : 1;  // both halves where the registers hold the sums: they share the broadcasts
    const QuantizedLayout& layout = call.layout;
    const char *blocks = x + layout.blocks_at, *outliers = x + layout.outliers_at;
    __m256 sums[R * 2];
    for (int t = 0; t < R * 2; t++) sums[t] = _mm256_setzero_ps();
    for (int64_t first = 0; first < layout.groups; first += kChunk) {
        const int64_t m = smaller(kChunk, layout.groups - first);
        const char *scales = at, *zeros = at + m * layout.scale_bytes;
        at += layout.header_bytes(m);
        for (int64_t g = first; g < first + m; g++, scales += layout.scale_bytes, zeros += kTile) {
            for (int64_t begin = 0; begin < layout.padded(g); begin += kBlock) {
                const int64_t length = smaller(kBlock, layout.padded(g) - begin);
                for (int h = 0; h < 2; h += H) {
                    block_of_tile<bits, planes, R, H>(call, at + h * kHalfBytes, scales + h * layout.scale_bytes / 2,
                                                      zeros + h * kHalf, length, x, blocks, outliers, sums + h);
                }
                at += layout.code_bytes(length);
                x += length * planes;
                blocks += sizeof(Block);
                outliers += layout.block_outliers * int64_t{sizeof(Outlier)};
            }
        }
    }
    for (int t = 0; t < R; t++) std::memcpy(y + t * call.y_stride, &sums[t * 2], static_cast<size_t>(outputs) * 4);
}

template <int bits, int planes>
void run(const Call& call, const char* packed, const char* activations, int64_t rows, int64_t tile_begin,
         int64_t tile_end, float* y) {
    constexpr int kMost = 4;  // rows at a time: what the registers hold
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
                if (end - t >= kMost) {
                    rows_of_tile<bits, planes, kMost>(call, at, x, outputs, out);
                    t += kMost;
                } else if (end - t >= 2) {
                    rows_of_tile<bits, planes, 2>(call, at, x, outputs, out);
                    t += 2;
                } else {
                    rows_of_tile<bits, planes, 1>(call, at, x, outputs, out);
                    t += 1;
                }
            }
        }
    }
}

void linear(const LinearShape& shape, const void* packed, const void* activations, int64_t rows, int64_t tile_begin,
            int64_t tile_end, float* y, int64_t y_stride) {
    if (shape.type != WeightType::quantized) {
        linear_float_avx2(shape, packed, activations, rows, tile_begin, tile_end, y, y_stride);
        return;
    }
#ifndef __AVXVNNI__
    const int64_t many = (shape.bits == 8 ? 2 : 6) * (shape.activation_bits == 8 ? 2 : 1);  // from which unpacking apart pays
    if (rows >= many) {
        linear_rows_avx2(shape, packed, activations, rows, tile_begin, tile_end, y, y_stride);
        return;
    }
#endif
    const Call call{QuantizedLayout(shape), shape.wide_scales, shape.n, y_stride};
    const char *at = static_cast<const char*>(packed), *x = static_cast<const char*>(activations);
    with_bits(shape.bits, [&](auto bits) {
        const auto work = shape.activation_bits == 8 ? run<bits.value, 1> : run<bits.value, 2>;
        work(call, at, x, rows, tile_begin, tile_end, y);
    });
}

constexpr LinearKernels table{kTile, packed_bytes, pack, unpack, unpack_row, activation_bytes, prepare_step,
                              prepare_part, linear};

}  // namespace

#ifdef __AVXVNNI__
const LinearKernels& linear_avxvnni() { return table; }
#else
const LinearKernels& linear_avx2() { return table; }
#endif

}  // namespace tinychat
