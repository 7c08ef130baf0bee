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
//
// Speed: one row waits for memory, which is read at 0.8 to 0.9 of the speed of reading alone; in
// the cache Zen 3 takes 8 cycles for 128 weights, 64 bytes of 4-bit codes, Zen 4 7.5 (benchmarks/results/speed.md). Two tiles
// at once, far apart, share the broadcasts (6.8 cycles), and long activations are read half as often. A few rows share the
// unpacking, many go to linear_rows_avx2.cpp. Loops over sums are written out by pragmas, or GCC would keep the sums in memory.
#include <immintrin.h>

#include "levels.h"
#include "linear_layout.h"

namespace tinychat {
namespace {

constexpr int64_t kAhead = 8192, kNear = 1024, kAlone = 6144;  // bytes from what is read to what is asked for
constexpr int64_t kPanelBytes = 1 << 18;  // of activations: half of a small level-2 cache
constexpr int64_t kHalf = 8;              // rows in a register
constexpr int64_t kHalfBytes = 32;        // of a register

int32_t word(const char* at) {
    int32_t value;
    std::memcpy(&value, at, 4);
    return value;
}

__m256i broadcast(const char* at) { return _mm256_set1_epi32(word(at)); }

// Decoding waits for memory. Far: a line is asked for into the second cache long before it is read, of which some cores keep
// more on the way than into the first, and from there into the first shortly before.
template <int bits, Fetch fetch>
__attribute__((always_inline)) inline void fetch_unit(const char* at) {
    if constexpr (fetch == Fetch::none) return;
    for (int64_t line = 0; line < unit_bytes(bits); line += 64) {
        if constexpr (fetch == Fetch::far) _mm_prefetch(at + line + kAhead, _MM_HINT_T1);
        _mm_prefetch(at + line + (fetch == Fetch::far ? kNear : kAlone), _MM_HINT_T0);
    }
}

// Rows of half a tile as `unpacked` wants them.
typedef uint32_t Lanes __attribute__((vector_size(32)));

// Where the codes of half j of some tiles are.
template <int tiles>
__attribute__((always_inline)) inline const char* half(const char* const (&codes)[tiles], int j) {
    return codes[j / 2] + j % 2 * kHalfBytes;
}

#ifdef __AVXVNNI__

constexpr int sums_of(int planes) { return planes; }
constexpr int rows_at_once(int, int planes) { return 4 / planes; }  // 8 registers of sums
constexpr bool two_at_once(int, int) { return true; }

// sums[p][t][j] += sum over k of q x for plane p, row t and half j of the tiles, in `length` k.
template <int bits, int planes, int R, Fetch fetch, int tiles>
__attribute__((always_inline)) inline void dot(const char* const (&codes)[tiles], const char* x, int64_t stride,
                                               int64_t length, __m256i (&sums)[planes][R][2 * tiles]) {
    constexpr int kFours = unit_length(bits) / 4, kHalves = 2 * tiles;
    constexpr bool kSplit = planes * R * tiles <= 2;  // few sums would wait for themselves: every second has its own
    __m256i second[planes][R][kHalves];
    for (int p = 0; p < planes; p++) {
        for (int t = 0; t < R; t++) {
            for (int j = 0; j < kHalves; j++) second[p][t][j] = _mm256_setzero_si256();
        }
    }
    const int64_t end = divide_up(length, unit_length(bits));
#pragma GCC unroll 4
    for (int64_t i = 0; i < end; i++) {
        const char* factors = x + i * unit_length(bits);
        for (const char* of_tile : codes) fetch_unit<bits, fetch>(of_tile + i * unit_bytes(bits));
#pragma GCC unroll 8
        for (int h = 0; h < kFours; h++) {
            __m256i q[kHalves];
            for (int j = 0; j < kHalves; j++) q[j] = (__m256i)unpacked<bits, Lanes>(half(codes, j) + i * unit_bytes(bits), h);
            for (int t = 0; t < R; t++) {
                for (int p = 0; p < planes; p++) {
                    const __m256i factor = broadcast(factors + t * stride + p * length + h * 4);
                    for (int j = 0; j < kHalves; j++) {
                        __m256i& sum = kSplit && h % 2 == 1 ? second[p][t][j] : sums[p][t][j];
                        sum = _mm256_dpbusd_avx_epi32(sum, q[j], factor);
                    }
                }
            }
        }
    }
    for (int p = 0; kSplit && p < planes; p++) {
        for (int t = 0; t < R; t++) {
            for (int j = 0; j < kHalves; j++) sums[p][t][j] = _mm256_add_epi32(sums[p][t][j], second[p][t][j]);
        }
    }
}

#else

constexpr int sums_of(int) { return 1; }  // planes are widened with their weights
constexpr int rows_at_once(int bits, int planes) { return bits > 4 || planes == 2 ? 2 : 4; }  // 8 registers of sums
constexpr bool two_at_once(int bits, int planes) { return bits <= 4 || planes == 1; }                 // likewise

// sums[0][t][j] += sum over k of q x for row t and half j of the tiles, in `length` k.
template <int bits, int planes, int R, Fetch fetch, int tiles>
__attribute__((always_inline)) inline void dot(const char* const (&codes)[tiles], const char* x, int64_t stride,
                                               int64_t length, __m256i (&sums)[1][R][2 * tiles]) {
    constexpr int kParts = bits > 4 ? 2 : 1;  // of a code
    constexpr int kFours = unit_length(bits) / 4, kHalves = 2 * tiles;
    constexpr int64_t kUnits = (bits == 2 ? 128 : bits == 3 ? 64 : 32) / unit_length(bits);  // that int16 sums hold
    const int64_t all = divide_up(length, unit_length(bits));
    for (int64_t first = 0; first < all; first += kUnits) {
        __m256i narrow[kParts][planes][R][kHalves];
        const auto unit = [&](auto begin, int64_t i) __attribute__((always_inline)) {
            const char* factors = x + i * unit_length(bits);
            for (const char* of_tile : codes) fetch_unit<bits, fetch>(of_tile + i * unit_bytes(bits));
#pragma GCC unroll 8
            for (int h = 0; h < kFours; h++) {
                Lanes q[2][kHalves];
#pragma GCC unroll 4
                for (int j = 0; j < kHalves; j++) {
                    const Lanes whole = unpacked<bits, Lanes>(half(codes, j) + i * unit_bytes(bits), h);
                    q[0][j] = kParts == 2 ? whole & 0x0f0f0f0fu : whole;
                    q[1][j] = whole >> 4 & 0x0f0f0f0fu;
                }
#pragma GCC unroll 4
                for (int t = 0; t < R; t++) {
#pragma GCC unroll 2
                    for (int p = 0; p < planes; p++) {
                        const __m256i factor = broadcast(factors + t * stride + p * length + h * 4);
#pragma GCC unroll 4
                        for (int j = 0; j < kHalves; j++) {
#pragma GCC unroll 2
                            for (int part = 0; part < kParts; part++) {
                                __m256i& sum = narrow[part][p][t][j];
                                const __m256i product = _mm256_maddubs_epi16((__m256i)q[part][j], factor);
                                sum = begin.value && h == 0 ? product : _mm256_add_epi16(sum, product);
                                asm("" : "+x"(sum));  // in its place: GCC 12 puts some off, and spills the products
                            }
                        }
                    }
                }
            }
        };
        unit(Number<1>{}, first);
        const int64_t end = smaller(first + kUnits, all);
        for (int64_t i = first + 1; i < end; i++) unit(Number<0>{}, i);
#pragma GCC unroll 2
        for (int p = 0; p < planes; p++) {
#pragma GCC unroll 2
            for (int part = 0; part < kParts; part++) {
                const __m256i weight = _mm256_set1_epi16((part == 0 ? 1 : 16) * (p < planes - 1 ? 256 : 1));
#pragma GCC unroll 4
                for (int t = 0; t < R; t++) {
#pragma GCC unroll 4
                    for (int j = 0; j < kHalves; j++) {
                        const __m256i wide = _mm256_madd_epi16(narrow[part][p][t][j], weight);
                        sums[0][t][j] = _mm256_add_epi32(sums[0][t][j], wide);
                    }
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
    Fetch fetch;
    bool two_tiles;
    int64_t n, y_stride;
};

// Scales of both halves of a tile.
__attribute__((always_inline)) inline void load_scales(const char* at, bool wide, __m256* scales) {
    if (wide) {
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) scales[j] = _mm256_load_ps(reinterpret_cast<const float*>(at) + j * kHalf);
    } else {
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) scales[j] = _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(at) + j));
    }
}

__m256i load_zeros(const char* at) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)));
}

// `sum` with what the outliers of a block add to half a tile, whose codes, zeros and scales these are.
template <int bits>
__attribute__((noinline, cold)) __m256 with_outliers(const QuantizedLayout& layout, const char* row, const Block* block,
                                                     const char* codes, __m256i zero, __m256 scale, __m256 sum) {
    const int64_t index = block - reinterpret_cast<const Block*>(row + layout.blocks_at);
    const auto* list = reinterpret_cast<const Outlier*>(row + layout.outliers_at) + index * layout.block_outliers;
    for (int32_t o = 0; o < block->outliers; o++) {
        const auto code = (__m256i)one_code<bits, Lanes>(codes, list[o].index);
        const __m256 weight = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(code, zero)), scale);
        sum = _mm256_fmadd_ps(weight, _mm256_set1_ps(list[o].value), sum);
    }
    return sum;
}

// Where a block of some tiles and of activations is.
template <int tiles>
struct Place {
    const char *codes[tiles], *scales[tiles], *zeros[tiles];
    const char *row, *integers, *block;  // of the first row
};

// A block of R rows and of some tiles: adds to sums[t][j] of half j.
template <int bits, int planes, int R, Fetch fetch, int tiles>
__attribute__((always_inline)) inline void block_of_tiles(const Call& call, const Place<tiles>& at, int64_t length,
                                                          __m256 (&sums)[R][2 * tiles]) {
    constexpr int kSums = sums_of(planes), kHalves = 2 * tiles;
    const int64_t stride = call.layout.activation_bytes;
    __m256i products[kSums][R][kHalves];
#pragma GCC unroll 2
    for (int p = 0; p < kSums; p++) {  // memset would keep them in memory
#pragma GCC unroll 4
        for (int t = 0; t < R; t++) {
#pragma GCC unroll 4
            for (int j = 0; j < kHalves; j++) products[p][t][j] = _mm256_setzero_si256();
        }
    }
    dot<bits, planes, R, fetch, tiles>(at.codes, at.integers, stride, length, products);
    __m256 scale[kHalves];
#pragma GCC unroll 2
    for (int i = 0; i < tiles; i++) load_scales(at.scales[i], call.wide_scales, &scale[2 * i]);
#pragma GCC unroll 4
    for (int j = 0; j < kHalves; j++) {
        const __m256i zero = load_zeros(at.zeros[j / 2] + j % 2 * kHalf);
#pragma GCC unroll 4
        for (int t = 0; t < R; t++) {
            const auto* block = reinterpret_cast<const Block*>(at.block + t * stride);
            __m256i product = products[kSums - 1][t][j];
            if (kSums == 2) product = _mm256_add_epi32(product, _mm256_slli_epi32(products[0][t][j], 8));
            product = _mm256_sub_epi32(product, _mm256_mullo_epi32(zero, _mm256_set1_epi32(block->sum)));
            const __m256 factor = _mm256_mul_ps(scale[j], _mm256_set1_ps(block->scale));
            sums[t][j] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(product), factor, sums[t][j]);
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < R; t++) {
        const auto* block = reinterpret_cast<const Block*>(at.block + t * stride);
        if (__builtin_expect(block->outliers == 0, 1)) continue;
#pragma GCC unroll 4
        for (int j = 0; j < kHalves; j++) {
            sums[t][j] = with_outliers<bits>(call.layout, at.row + t * stride, block, half(at.codes, j),
                                             load_zeros(at.zeros[j / 2] + j % 2 * kHalf), scale[j], sums[t][j]);
        }
    }
}

// R rows of some tiles, of which the first outputs[i] rows of weights exist and go to y[i].
template <int bits, int planes, int R, Fetch fetch, int tiles>
__attribute__((noinline)) void rows_of_tiles(const Call& call, const char* const (&packed)[tiles], const char* x,
                                             const int64_t (&outputs)[tiles], float* const (&y)[tiles]) {
    const QuantizedLayout& layout = call.layout;
    __m256 sums[R][2 * tiles];
#pragma GCC unroll 4
    for (int t = 0; t < R; t++) {
#pragma GCC unroll 4
        for (int j = 0; j < 2 * tiles; j++) sums[t][j] = _mm256_setzero_ps();
    }
    Place<tiles> at{{}, {}, {}, x, x, x + layout.blocks_at};
    for (int i = 0; i < tiles; i++) at.codes[i] = packed[i];
    for (int64_t first = 0; first < layout.groups; first += kChunk) {
        const int64_t m = smaller(kChunk, layout.groups - first);
        for (int i = 0; i < tiles; i++) {
            at.scales[i] = at.codes[i];
            at.zeros[i] = at.codes[i] + m * layout.scale_bytes;
            at.codes[i] += layout.header_bytes(m);
        }
        for (int64_t g = first; g < first + m; g++) {
            for (int64_t left = layout.padded(g); left > 0; left -= kBlock, at.block += sizeof(Block)) {
                const auto through = [&](int64_t length) __attribute__((always_inline)) {
                    block_of_tiles<bits, planes, R, fetch, tiles>(call, at, length, sums);
                    for (const char*& codes : at.codes) codes += divide_up(length, unit_length(bits)) * unit_bytes(bits);
                    at.integers += length * planes;
                };
                if (left >= kBlock) {  // the usual one, for the compiler to unroll
                    through(kBlock);
                } else {
                    through(left);
                }
            }
            for (int i = 0; i < tiles; i++) {
                at.scales[i] += layout.scale_bytes;
                at.zeros[i] += kTile;
            }
        }
    }
    for (int t = 0; t < R; t++) {
        for (int i = 0; i < tiles; i++) {
            float values[kTile];
            for (int j = 0; j < 2; j++) _mm256_storeu_ps(values + j * kHalf, sums[t][2 * i + j]);
            std::memcpy(y[i] + t * call.y_stride, values, static_cast<size_t>(outputs[i]) * 4);
        }
    }
}

// The same, asking as the call says. With few sums a processor that fetches by itself is ahead of them; with more it is not, as
// the loads that would lead it come late.
template <int bits, int planes, int R>
void ask_and_compute(const Call& call, const char* packed, const char* x, int64_t outputs, float* y) {
    constexpr Fetch kNone = planes * R <= 2 ? Fetch::none : Fetch::near;
    switch (call.fetch) {
        case Fetch::none: return rows_of_tiles<bits, planes, R, kNone, 1>(call, {packed}, x, {outputs}, {y});
        case Fetch::near: return rows_of_tiles<bits, planes, R, Fetch::near, 1>(call, {packed}, x, {outputs}, {y});
        case Fetch::far: return rows_of_tiles<bits, planes, R, Fetch::far, 1>(call, {packed}, x, {outputs}, {y});
    }
}

// One row and the tiles from `tile_begin` on, two at a time, in two streams (linear_layout.h: tile_pairs). Returns the first
// tile that is left.
template <int bits, int planes>
int64_t run_two(const Call& call, const char* packed, const char* x, int64_t tile_begin, int64_t tile_end, float* y) {
    const int64_t bytes = call.layout.tile_bytes, pairs = tile_pairs(tile_end - tile_begin, bytes);
    for (int64_t a = tile_begin; a < tile_begin + pairs; a++) {
        const int64_t b = a + pairs;
        rows_of_tiles<bits, planes, 1, Fetch::none, 2>(
            call, {packed + a * bytes, packed + b * bytes}, x,
            {smaller(kTile, call.n - a * kTile), smaller(kTile, call.n - b * kTile)}, {y + a * kTile, y + b * kTile});
    }
    return tile_begin + 2 * pairs;
}

template <int bits, int planes>
void run(const Call& call, const char* packed, const char* activations, int64_t rows, int64_t tile_begin,
         int64_t tile_end, float* y) {
    if constexpr (two_at_once(bits, planes)) {
        if (rows == 1 && call.two_tiles) {
            tile_begin = run_two<bits, planes>(call, packed, activations, tile_begin, tile_end, y);
        }
    }
    constexpr int kMost = rows_at_once(bits, planes);
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
                const auto next = [&](auto some) {
                    ask_and_compute<bits, planes, some.value>(call, at, x, outputs, out);
                    t += some.value;
                };
                if (end - t >= kMost) {
                    next(Number<kMost>{});
                } else if (end - t >= 2) {
                    next(Number<2>{});
                } else {
                    next(Number<1>{});
                }
            }
        }
    }
}

#ifndef __AVXVNNI__
// From how many rows on it pays to unpack to words, once for all of them. It never does where one plane meets codes of 4 bits
// or fewer: vpmaddubsw makes 32 products of bytes, vpmaddwd 16 of words.
int64_t many_rows(const LinearShape& shape) {
    if (shape.activation_bits == 16) return shape.bits == 8 ? 2 : 12;
    return shape.bits == 8 ? 8 : INT64_MAX;
}
#endif

void linear(const LinearShape& shape, const void* packed, const void* activations, int64_t rows, int64_t tile_begin,
            int64_t tile_end, float* y, int64_t y_stride) {
    if (shape.type != WeightType::quantized) {
        linear_float_avx2(shape, packed, activations, rows, tile_begin, tile_end, y, y_stride);
        return;
    }
#ifndef __AVXVNNI__
    if (rows >= many_rows(shape)) {
        linear_rows_avx2(shape, packed, activations, rows, tile_begin, tile_end, y, y_stride);
        return;
    }
#endif
    // Tiles that pairs leave, all of a short part, are asked for shortly ahead: with nothing asked for they are read a third slower.
    const Fetch fetch = shape.two_tiles && rows == 1 ? Fetch::near : shape.fetch;
    const Call call{QuantizedLayout(shape), shape.wide_scales, fetch, shape.two_tiles, shape.n, y_stride};
    const char *at = static_cast<const char*>(packed), *x = static_cast<const char*>(activations);
    with_bits(shape.bits, [&](auto bits) {
        const auto work = shape.activation_bits == 8 ? run<bits.value, 1> : run<bits.value, 2>;
        work(call, at, x, rows, tile_begin, tile_end, y);
    });
}

bool pairs(const LinearShape& shape) {
    return shape.type == WeightType::quantized && two_at_once(shape.bits, shape.activation_bits / 8);
}

constexpr LinearKernels table{kTile, packed_bytes, pack, unpack, unpack_row, activation_bytes, prepare_step,
                              prepare_part, linear, true, pairs};

}  // namespace

#ifdef __AVXVNNI__
const LinearKernels& linear_avxvnni() { return table; }
#else
const LinearKernels& linear_avx2() { return table; }
#endif

}  // namespace tinychat
