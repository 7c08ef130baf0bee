// The linear of AVX-512, compiled twice: with the VNNI instructions (level avx512vnni) and without (level avx512).
//
//   y[t, r] = sum over blocks of (sum over k of q x - z sum(x)) * (s * scale of x)  +  sum over outliers of (q - z) s x
//
// with q and z the codes and zeros of row r, s its scale for the group, and x integers in planes of bytes. A lane of 32
// bits is a row of the tile; codes of any width unpack to registers of 4 k, a byte each (linear_layout.h draws it), and
// these are multiplied with 4 broadcast bytes of each plane:
//
//   VNNI:    vpdpbusd, which adds the 4 products to the lane
//   without: vpmaddubsw, which adds them in pairs to the halves of a lane. 8 sums of two products fit in int16 where codes
//            have 4 bits: 8 * 2 * 15 * 128 = 30720; of 3 bits 16, of 2 bits 32. Then vpmaddwd with ones widens them. Codes
//            of 8 bits are taken as two of 4, the upper widened with 16 in place of ones.
//
// All sums of a block are exact, so a row's result does not depend on the rows that are computed with it.
// Speed: one row runs at the speed at which a thread reads memory on Zen 4, where codes must not be asked for ahead and long
// rows are read faster by two tiles far apart at once; at 0.89 of it on Emerald Rapids, where codes must be asked for far ahead
// (benchmarks/linear.py). Several rows share the unpacking; with VNNI they go to linear_rows_avx512vnni.cpp.
#include <immintrin.h>

#include "levels.h"
#include "linear_layout.h"

namespace tinychat {
namespace {

constexpr int64_t kAhead = 8192, kNear = 1024, kAlone = 3072;  // bytes from what is read to what is asked for
constexpr int64_t kPanelBytes = 1 << 19;  // of activations: half of a usual level-2 cache

int32_t word(const char* at) {
    int32_t value;
    std::memcpy(&value, at, 4);
    return value;
}

__m512i broadcast(const char* at) { return _mm512_set1_epi32(word(at)); }

// Decoding waits for memory. Far: a line is asked for into the second cache long before it is read, of which some cores keep
// more on the way than into the first, and from there into the first shortly before.
template <int bits, Fetch fetch>
__attribute__((always_inline)) inline void fetch_unit(const char* at, int64_t ahead) {
    if constexpr (fetch == Fetch::none) return;
    for (int64_t line = 0; line < unit_bytes(bits); line += 64) {
        if constexpr (fetch == Fetch::far) _mm_prefetch(at + line + ahead, _MM_HINT_T1);
        _mm_prefetch(at + line + (fetch == Fetch::far ? kNear : kAlone), _MM_HINT_T0);
    }
}

// Rows of a tile as `unpacked` wants them.
typedef uint32_t Lanes __attribute__((vector_size(64)));

#ifdef __AVX512VNNI__

constexpr int64_t kPanelTiles = 4;

__m512i add_pairs(__m512i sum, __m512i a, __m512i b) { return _mm512_dpwssd_epi32(sum, a, b); }

// The registers of a unit of 2 bits; of those with odd numbers 4 times the codes, for a shift less.
__attribute__((always_inline)) inline void unpack_lifted(const char* at, Lanes (&q)[4]) {
    Lanes lower;
    std::memcpy(&lower, at, sizeof lower);
    asm("" : "+v"(lower));  // or each AND would load it anew
    const Lanes upper = lower >> 4;
    q[0] = lower & 0x03030303u;
    q[1] = lower & 0x0c0c0c0cu;
    q[2] = upper & 0x03030303u;
    q[3] = upper & 0x0c0c0c0cu;
}

// sum + q x, of 4 bytes x for all rows.
template <int bits>
__attribute__((always_inline)) inline __m512i with_products(__m512i sum, __m512i q, const char* x) {
    if constexpr (bits == 2) {  // waits for instructions: this is one less
        asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(q), "m"(*reinterpret_cast<const char(*)[4]>(x)));
        return sum;
    } else {  // waits for memory, of which more is on the way if factors are loaded early
        return _mm512_dpbusd_epi32(sum, q, broadcast(x));
    }
}

// sums[p][t] += sum over k of q x for plane p and row t, in `length` k.
template <int bits, int planes, int R, Fetch fetch>
__attribute__((always_inline)) inline void dot(const char* codes, int64_t ahead, const char* x, int64_t stride,
                                               int64_t length, __m512i (&sums)[planes][R]) {
    // Few sums would wait for themselves: they are split in chains.
    constexpr int kSums = planes * R, kChains = kSums == 1 ? 4 : kSums <= 8 ? 2 : 1;
    constexpr int kFours = unit_length(bits) / 4, kTogether = kFours < 4 ? 4 / kFours : 1;
    constexpr bool kLifts = bits == 2 && kChains > 1;  // of odd chains 4 times the products
    __m512i chains[kChains][planes][R];
    for (int p = 0; p < planes; p++) {
        for (int t = 0; t < R; t++) {
            chains[0][p][t] = sums[p][t];
            for (int c = 1; c < kChains; c++) chains[c][p][t] = _mm512_setzero_si512();
        }
    }
    const auto units = [&](int64_t first, int count) __attribute__((always_inline)) {
#pragma GCC unroll 2
        for (int i = 0; i < count; i++) {
            const char *at = codes + (first + i) * unit_bytes(bits), *factors = x + (first + i) * unit_length(bits);
            fetch_unit<bits, fetch>(at, ahead);
            Lanes lifted[4];
            if constexpr (kLifts) unpack_lifted(at, lifted);
#pragma GCC unroll 8
            for (int h = 0; h < kFours; h++) {
                const auto q = (__m512i)(kLifts ? lifted[h] : unpacked<bits, Lanes>(at, h));
                for (int t = 0; t < R; t++) {
                    for (int p = 0; p < planes; p++) {
                        __m512i& sum = chains[(i * kFours + h) % kChains][p][t];
                        sum = with_products<bits>(sum, q, factors + t * stride + p * length + h * 4);
                    }
                }
            }
        }
    };
    const int64_t end = divide_up(length, unit_length(bits));
    int64_t i = 0;
    if constexpr (kSums <= 2) {  // a whole block without a branch or a copy
#pragma GCC unroll 8
        for (; i + kTogether <= end; i += kTogether) units(i, kTogether);
    } else {
#pragma GCC unroll 2
        for (; i + kTogether <= end; i += kTogether) units(i, kTogether);
    }
    if (i < end) units(i, 1);
    for (int p = 0; p < planes; p++) {
        for (int t = 0; t < R; t++) {
            sums[p][t] = chains[0][p][t];
            for (int c = 1; c < kChains; c++) {
                const __m512i chain = kLifts && c % 2 ? _mm512_srai_epi32(chains[c][p][t], 2) : chains[c][p][t];
                sums[p][t] = _mm512_add_epi32(sums[p][t], chain);
            }
        }
    }
}

#else

__m512i add_pairs(__m512i sum, __m512i a, __m512i b) { return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b)); }

// sums[p][t] += sum over k of q x for plane p and row t, in `length` k.
template <int bits, int planes, int R, Fetch fetch>
__attribute__((always_inline)) inline void dot(const char* codes, int64_t ahead, const char* x, int64_t stride,
                                               int64_t length, __m512i (&sums)[planes][R]) {
    constexpr int kParts = bits > 4 ? 2 : 1;  // of a code
    constexpr int kFours = unit_length(bits) / 4;
    constexpr int64_t kUnits = (bits == 2 ? 128 : bits == 3 ? 64 : 32) / unit_length(bits);  // that int16 sums hold
    const int64_t all = divide_up(length, unit_length(bits));
    for (int64_t begin = 0; begin < all; begin += kUnits) {
        const int64_t end = smaller(begin + kUnits, all);
        __m512i narrow[kParts][planes][R];
        for (int part = 0; part < kParts; part++) {
            for (int p = 0; p < planes; p++) {
                for (int t = 0; t < R; t++) narrow[part][p][t] = _mm512_setzero_si512();
            }
        }
        for (int64_t i = begin; i < end; i++) {
            const char *at = codes + i * unit_bytes(bits), *factors = x + i * unit_length(bits);
            fetch_unit<bits, fetch>(at, ahead);
#pragma GCC unroll 8
            for (int h = 0; h < kFours; h++) {
                const Lanes whole = unpacked<bits, Lanes>(at, h);
                const Lanes q[2] = {kParts == 2 ? whole & 0x0f0f0f0fu : whole, whole >> 4 & 0x0f0f0f0fu};
                for (int t = 0; t < R; t++) {
                    for (int p = 0; p < planes; p++) {
                        const __m512i factor = broadcast(factors + t * stride + p * length + h * 4);
                        for (int part = 0; part < kParts; part++) {
                            __m512i& sum = narrow[part][p][t];
                            sum = _mm512_add_epi16(sum, _mm512_maddubs_epi16((__m512i)q[part], factor));
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
    Fetch fetch;
    bool two_tiles;
    int64_t n, y_stride;
};

__m512 load_scales(const char* at, bool wide) {
    return wide ? _mm512_load_ps(at) : _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(at)));
}

// -z sum, of zeros z in each lane and the sum of a block's integers.
__m512i less_zeros(__m512i z, const Block& block) {
    const __m512i both = _mm512_or_si512(z, _mm512_slli_epi32(z, 16 + 7));  // z and 128 z
    return add_pairs(_mm512_setzero_si512(), both, _mm512_set1_epi32(block.halves));
}

// `sum` with what a block's outliers add to a tile, whose codes, zeros and scales these are.
template <int bits>
__attribute__((noinline, cold)) __m512 with_outliers(const char* codes, const Block& block, const Outlier* list, __m512i z,
                                                     __m512 scale, __m512 sum) {
    for (int32_t o = 0; o < block.outliers; o++) {
        const auto code = (__m512i)one_code<bits, Lanes>(codes, list[o].index);
        const __m512 weight = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(code, z)), scale);
        sum = _mm512_fmadd_ps(weight, _mm512_set1_ps(list[o].value), sum);
    }
    return sum;
}

__mmask16 existing(int64_t outputs) { return static_cast<__mmask16>((1u << outputs) - 1); }

// R rows of a tile, of which the first `outputs` rows of weights exist. Far, codes are asked for `ahead` bytes before their turn.
template <int bits, int planes, int R, Fetch fetch>
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
            const __m512 scale = load_scales(scales, call.wide_scales);
            const __m512i z = _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(zeros)));
            for (int64_t begin = 0; begin < layout.padded(g); begin += kBlock) {
                const int64_t length = smaller(kBlock, layout.padded(g) - begin);
                __m512i products[planes][R];
                for (int t = 0; t < R; t++) {
                    const auto* block = reinterpret_cast<const Block*>(blocks + t * stride);
                    products[0][t] = _mm512_setzero_si512();
                    products[planes - 1][t] = less_zeros(z, *block);
                }
                if (length == kBlock) {
                    dot<bits, planes, R, fetch>(at, ahead, x, stride, kBlock, products);
                } else {
                    dot<bits, planes, R, fetch>(at, ahead, x, stride, length, products);
                }
                for (int t = 0; t < R; t++) {
                    const auto* block = reinterpret_cast<const Block*>(blocks + t * stride);
                    __m512i product = products[planes - 1][t];
                    if (planes == 2) product = _mm512_add_epi32(product, _mm512_slli_epi32(products[0][t], 8));
                    const __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(block->scale));
                    sums[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(product), factor, sums[t]);
                    if (__builtin_expect(block->outliers > 0, 0)) {
                        const auto* list = reinterpret_cast<const Outlier*>(outliers + t * stride);
                        sums[t] = with_outliers<bits>(at, *block, list, z, scale, sums[t]);
                    }
                }
                at += layout.code_bytes(length);
                x += length * planes;
                blocks += sizeof(Block);
                outliers += layout.block_outliers * int64_t{sizeof(Outlier)};
            }
        }
    }
    for (int t = 0; t < R; t++) _mm512_mask_storeu_ps(y + t * call.y_stride, existing(outputs), sums[t]);
}

// The same, asking as the call says where that matters. With few sums a processor that fetches by itself is ahead of them; with
// more it is not, as the loads that would lead it come late; with many, arithmetic takes longer than memory. (With VNNI only
// a few tiles come here with more than two sums.)
template <int bits, int planes, int R>
void ask_and_compute(const Call& call, const char* at, int64_t ahead, const char* x, int64_t outputs, float* y) {
    constexpr int kSums = planes * R;
#ifdef __AVX512VNNI__
    constexpr int kMost = 2;
#else
    constexpr int kMost = 8;
#endif
    constexpr Fetch kNone = kSums <= 2 ? Fetch::none : kSums <= kMost ? Fetch::near : Fetch::far;
    constexpr Fetch kAsked = kSums <= kMost ? Fetch::near : Fetch::far;
    switch (call.fetch) {
        case Fetch::none: return rows_of_tile<bits, planes, R, kNone>(call, at, ahead, x, outputs, y);
        case Fetch::near: return rows_of_tile<bits, planes, R, kAsked>(call, at, ahead, x, outputs, y);
        case Fetch::far: return rows_of_tile<bits, planes, R, Fetch::far>(call, at, ahead, x, outputs, y);
    }
}

#ifdef __AVX512VNNI__

// sums[j][p] += sum over k of q x for tile j and plane p, in `length` k of one row: of two tiles, whose factors are the same.
// Split: every other product goes to sums of its own, as few sums wait for themselves; of a short block that is not worth adding
// them up.
template <int bits, int planes, bool split>
__attribute__((always_inline)) inline void dot_two(const char* const (&codes)[2], const char* x, int64_t length,
                                                   __m512i (&sums)[2][planes]) {
    constexpr int kFours = unit_length(bits) / 4;
    constexpr bool kLifts = bits == 2 && split;
    __m512i second[2][planes];
    for (auto& of_tile : second) {
        for (__m512i& sum : of_tile) sum = _mm512_setzero_si512();
    }
    const int64_t end = divide_up(length, unit_length(bits));
#pragma GCC unroll 32
    for (int64_t i = 0; i < end; i++) {
        const char* at[2] = {codes[0] + i * unit_bytes(bits), codes[1] + i * unit_bytes(bits)};
        Lanes lifted[2][4];
        for (int j = 0; kLifts && j < 2; j++) unpack_lifted(at[j], lifted[j]);
#pragma GCC unroll 8
        for (int h = 0; h < kFours; h++) {
            __m512i q[2];
            for (int j = 0; j < 2; j++) q[j] = (__m512i)(kLifts ? lifted[j][h] : unpacked<bits, Lanes>(at[j], h));
            for (int p = 0; p < planes; p++) {
                for (int j = 0; j < 2; j++) {
                    __m512i& sum = split && h % 2 ? second[j][p] : sums[j][p];
                    sum = with_products<bits>(sum, q[j], x + p * length + i * unit_length(bits) + h * 4);
                }
            }
        }
    }
    for (int j = 0; split && j < 2; j++) {
        for (int p = 0; p < planes; p++) {
            const __m512i sum = kLifts ? _mm512_srai_epi32(second[j][p], 2) : second[j][p];
            sums[j][p] = _mm512_add_epi32(sums[j][p], sum);
        }
    }
}

// One row and two tiles that lie far apart. What rows_of_tile computes, in the order of its sums; nothing is asked for ahead.
template <int bits, int planes>
__attribute__((noinline)) void row_of_two_tiles(const Call& call, const char* const (&tiles)[2], const char* x,
                                                __m512 (&sums)[2]) {
    const QuantizedLayout& layout = call.layout;
    const auto* block = reinterpret_cast<const Block*>(x + layout.blocks_at);
    const auto* list = reinterpret_cast<const Outlier*>(x + layout.outliers_at);
    const char* at[2] = {tiles[0], tiles[1]};
    for (__m512& sum : sums) sum = _mm512_setzero_ps();
    for (int64_t first = 0; first < layout.groups; first += kChunk) {
        const int64_t m = smaller(kChunk, layout.groups - first);
        const char* scales[2] = {at[0], at[1]};
        const char* zeros[2] = {at[0] + m * layout.scale_bytes, at[1] + m * layout.scale_bytes};
        for (const char*& codes : at) codes += layout.header_bytes(m);
        for (int64_t g = first; g < first + m; g++) {
            __m512 scale[2];
            __m512i z[2];
            for (int j = 0; j < 2; j++) {
                scale[j] = load_scales(scales[j], call.wide_scales);
                z[j] = _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(zeros[j])));
                scales[j] += layout.scale_bytes;
                zeros[j] += kTile;
            }
            for (int64_t left = layout.padded(g); left > 0; left -= kBlock) {
                const int64_t length = smaller(kBlock, left);
                __m512i products[2][planes];
                for (int j = 0; j < 2; j++) {
                    products[j][0] = _mm512_setzero_si512();
                    products[j][planes - 1] = less_zeros(z[j], *block);
                }
                if (length == kBlock) {
                    dot_two<bits, planes, true>(at, x, kBlock, products);
                } else if (bits == 2 && length == kBlock / 2) {  // the usual group of 2 bits
                    dot_two<bits, planes, true>(at, x, kBlock / 2, products);
                } else {
                    dot_two<bits, planes, false>(at, x, length, products);
                }
                for (int j = 0; j < 2; j++) {
                    __m512i product = products[j][planes - 1];
                    if (planes == 2) product = _mm512_add_epi32(product, _mm512_slli_epi32(products[j][0], 8));
                    const __m512 factor = _mm512_mul_ps(scale[j], _mm512_set1_ps(block->scale));
                    sums[j] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(product), factor, sums[j]);
                    if (__builtin_expect(block->outliers > 0, 0)) {
                        sums[j] = with_outliers<bits>(at[j], *block, list, z[j], scale[j], sums[j]);
                    }
                    at[j] += layout.code_bytes(length);
                }
                x += length * planes;
                block++;
                list += layout.block_outliers;
            }
        }
    }
}

// One row and the tiles from `tile_begin` on, two at a time, in two streams (linear_layout.h: tile_pairs). Returns the first
// tile that is left.
template <int bits, int planes>
int64_t run_two(const Call& call, const char* packed, const char* x, int64_t tile_begin, int64_t tile_end, float* y) {
    const int64_t bytes = call.layout.tile_bytes, pairs = tile_pairs(tile_end - tile_begin, bytes);
    for (int64_t i = 0; i < pairs; i++) {
        const int64_t tile[2] = {tile_begin + i, tile_begin + pairs + i};
        __m512 sums[2];
        row_of_two_tiles<bits, planes>(
            call, {packed + tile[0] * bytes, packed + tile[1] * bytes}, x, sums);
        for (int j = 0; j < 2; j++) {
            _mm512_mask_storeu_ps(y + tile[j] * kTile, existing(smaller(kTile, call.n - tile[j] * kTile)), sums[j]);
        }
    }
    return tile_begin + 2 * pairs;
}

#endif

template <int bits, int planes>
void run(const Call& call, const char* packed, const char* activations, int64_t rows, int64_t tile_begin,
         int64_t tile_end, float* y) {
#ifdef __AVX512VNNI__
    if (rows == 1 && call.two_tiles) {
        tile_begin = run_two<bits, planes>(call, packed, activations, tile_begin, tile_end, y);
    }
#endif
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
                    ask_and_compute<bits, planes, kMost>(call, at, ahead, x, outputs, out);
                    t += kMost;
                } else if (left >= 8) {
                    ask_and_compute<bits, planes, 8>(call, at, ahead, x, outputs, out);
                    t += 8;
                } else if (left >= 4) {
                    ask_and_compute<bits, planes, 4>(call, at, ahead, x, outputs, out);
                    t += 4;
                } else if (left >= 2) {
                    ask_and_compute<bits, planes, 2>(call, at, ahead, x, outputs, out);
                    t += 2;
                } else {
                    ask_and_compute<bits, planes, 1>(call, at, ahead, x, outputs, out);
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
#ifdef __AVX512VNNI__
    // From three sums on, and of tiles enough to be worth a panel. (Two sums would wait for each other there.)
    if (rows * shape.activation_bits / 8 > 2 && tile_end - tile_begin >= kPanelTiles) {
        linear_rows_avx512vnni(shape, packed, activations, rows, tile_begin, tile_end, y, y_stride);
        return;
    }
#endif
    const Call call{QuantizedLayout(shape), shape.wide_scales, shape.fetch, shape.two_tiles, shape.n, y_stride};
    const char *at = static_cast<const char*>(packed), *x = static_cast<const char*>(activations);
    with_bits(shape.bits, [&](auto bits) {
        const auto work = shape.activation_bits == 8 ? run<bits.value, 1> : run<bits.value, 2>;
        work(call, at, x, rows, tile_begin, tile_end, y);
    });
}

#ifdef __AVX512VNNI__
bool pairs(const LinearShape& shape) { return shape.type == WeightType::quantized; }

constexpr LinearKernels table{kTile, packed_bytes, pack, unpack, unpack_row, activation_bytes, prepare_step,
                              prepare_part, linear, true, pairs, 2, kPanelTiles};
#else
constexpr LinearKernels table{kTile, packed_bytes, pack, unpack, unpack_row, activation_bytes, prepare_step,
                              prepare_part, linear, true};
#endif

}  // namespace

#ifdef __AVX512VNNI__
const LinearKernels& linear_avx512vnni() { return table; }
#else
const LinearKernels& linear_avx512() { return table; }
#endif

}  // namespace tinychat
