// What the quantized linears of all ARM levels have in common, for their units only: rows and tiles, scales and zeros,
// outliers. A level brings Dots<bits, planes>, the sums of products of a block:
//
//   static constexpr int kOffset          what it takes away from codes: 128 where bytes with sign hold 8 bits
//   static constexpr bool kCrowded        whether add() needs all registers
//   template <R> static void add(codes, x, block, stride, length, sums[R][4])
//                                         sums[t][j] += sum over k of (q - kOffset) x, of row t and the four rows j of a
//                                         tile, in `length` k; block is the first row's
//
// Codes unpack to registers of 4 k of 4 rows, a byte each (linear_layout.h draws it): the four registers of a line are the
// 16 rows of a tile, so that no sum runs across a register before the end of a block, and every level reads one packing.
#pragma once
#include <arm_neon.h>

#include "levels.h"
#include "linear_layout.h"

namespace tinychat {
namespace {

constexpr int64_t kAhead = 1024;          // bytes
constexpr int64_t kPanelBytes = 1 << 17;  // of activations: a share of the level-2 cache that four cores of a board have

// work(Number<0>) .. work(Number<n - 1>), for lanes that instructions take as constants.
template <int n, class Work>
__attribute__((always_inline)) inline void each(const Work& work) {
    if constexpr (n > 0) {
        each<n - 1>(work);
        work(Number<n - 1>{});
    }
}

// Codes 4 h .. 4 h + 3 of a unit, of the four rows whose lanes are at `at`. A shift of bytes needs no mask where it leaves
// nothing beside the code.
template <int bits>
__attribute__((always_inline)) inline uint8x16_t four_codes(const char* at, int h) {
    const auto line = [at](int i) __attribute__((always_inline)) {
        return vld1q_u8(reinterpret_cast<const uint8_t*>(at) + i * kRegisterBytes);
    };
    if (bits == 8) return line(h);
    if (bits == 3 && h >= 6) return (line(h - 6) >> 6) | ((line(2) >> (h - 2)) & 4);
    constexpr int kInByte = 8 / bits;
    const int shift = h % kInByte * bits;
    const uint8x16_t shifted = shift == 0 ? line(h / kInByte) : line(h / kInByte) >> shift;
    return shift + bits == 8 ? shifted : shifted & static_cast<uint8_t>((1 << bits) - 1);
}

template <int bits>
__attribute__((always_inline)) inline void fetch_unit(const char* at) {
    for (int64_t line = 0; line < unit_bytes(bits); line += 64) __builtin_prefetch(at + kAhead + line);
}

// Rows of a quarter of a tile as `one_code` wants them.
typedef uint32_t Lanes __attribute__((vector_size(16)));

// LinearKernels::prepare of a level that reads activations of 16 bits in an order of its own: order(planes, length, block)
// makes it of the planes of a block.
template <void (*order)(int8_t*, int64_t, Block*)>
void prepare(const LinearShape& shape, const float* x, void* activation, int64_t begin, int64_t end) {
    prepare_part(shape, x, activation, begin, end);
    if (shape.type != WeightType::quantized || shape.activation_bits != 16) return;
    const QuantizedLayout layout(shape);
    const int64_t first = begin / layout.group, in_first = begin % layout.group;
    auto* row = static_cast<char*>(activation);
    auto* planes = reinterpret_cast<int8_t*>(row) + (first * layout.padded_group + in_first) * 2;
    auto* block = reinterpret_cast<Block*>(row + layout.blocks_at) + first * layout.group_blocks + in_first / kBlock;
    for (int64_t k = begin; k < end; block++) {
        const int64_t length = smaller(smaller(kBlock, layout.group - k % layout.group), end - k);
        const int64_t padded = round_up(length, kStep);
        order(planes, padded, block);
        planes += padded * 2;
        k += length;
    }
}

// What stays the same for all tiles and rows of a call.
struct Call {
    QuantizedLayout layout;
    bool wide_scales;
    int64_t n, y_stride;
};

__attribute__((always_inline)) inline void load_scales(const char* at, bool wide, float32x4_t (&scales)[4]) {
    if (__builtin_expect(wide, 0)) {
        for (int j = 0; j < 4; j++) scales[j] = vld1q_f32(reinterpret_cast<const float*>(at) + j * 4);
        return;
    }
    for (int h = 0; h < 2; h++) {
        const float16x8_t halves = vreinterpretq_f16_u16(vld1q_u16(reinterpret_cast<const uint16_t*>(at) + h * 8));
        scales[2 * h] = vcvt_f32_f16(vget_low_f16(halves));
        scales[2 * h + 1] = vcvt_high_f32_f16(halves);
    }
}

// `offset` less the zeros of a group.
__attribute__((always_inline)) inline void load_zeros(const char* at, uint8_t offset, int32x4_t (&zero)[4]) {
    const uint8x16_t bytes = vld1q_u8(reinterpret_cast<const uint8_t*>(at)), from = vdupq_n_u8(offset);
    const int16x8_t low = vreinterpretq_s16_u16(vsubl_u8(vget_low_u8(from), vget_low_u8(bytes)));
    const int16x8_t high = vreinterpretq_s16_u16(vsubl_high_u8(from, bytes));
    zero[0] = vmovl_s16(vget_low_s16(low));
    zero[1] = vmovl_high_s16(low);
    zero[2] = vmovl_s16(vget_low_s16(high));
    zero[3] = vmovl_high_s16(high);
}

// A block of a tile, at `codes`, `scales` and `zeros`, with R rows, the first of them at `row`: adds to sums.
template <class Dots, int bits, int R>
__attribute__((always_inline)) inline void block_of_tile(const Call& call, const char* codes, const char* scales,
                                                         const char* zeros, int64_t length, const char* x,
                                                         const char* row, const char* blocks, float32x4_t (&sums)[R][4]) {
    const int64_t stride = call.layout.activation_bytes;
    int32x4_t products[R][4], zero[4];
    load_zeros(zeros, Dots::kOffset, zero);
    for (int t = 0; t < R; t++) {
        const int32_t sum = reinterpret_cast<const Block*>(blocks + t * stride)->sum;
        for (int j = 0; j < 4; j++) products[t][j] = vmulq_n_s32(zero[j], sum);
    }
    if (Dots::kCrowded) __asm__ volatile("" : "+m"(sums));  // no register is left for them
    if (length == kBlock) {
        Dots::template add<R>(codes, x, blocks, stride, kBlock, products);
    } else {
        Dots::template add<R>(codes, x, blocks, stride, length, products);
    }
    float32x4_t scale[4];
    load_scales(scales, call.wide_scales, scale);
    for (int t = 0; t < R; t++) {
        const Block& block = *reinterpret_cast<const Block*>(blocks + t * stride);
        for (int j = 0; j < 4; j++) {
            sums[t][j] = vfmaq_f32(sums[t][j], vcvtq_f32_s32(products[t][j]), vmulq_n_f32(scale[j], block.scale));
        }
        if (__builtin_expect(block.outliers == 0, 1)) continue;
        __asm__("" : "+r"(zeros));  // loaded again: registers do not hold them for a rare case
        load_zeros(zeros, Dots::kOffset, zero);
        const int64_t index = (blocks - row - call.layout.blocks_at) / int64_t{sizeof(Block)};
        const auto* list = reinterpret_cast<const Outlier*>(row + t * stride + call.layout.outliers_at) + index * call.layout.block_outliers;
        for (int32_t o = 0; o < block.outliers; o++) {
            for (int j = 0; j < 4; j++) {
                const auto code = (int32x4_t)one_code<bits, Lanes>(codes + j * 16, list[o].index) - Dots::kOffset;
                const float32x4_t weight = vcvtq_f32_s32(code + zero[j]) * scale[j];
                sums[t][j] = vfmaq_n_f32(sums[t][j], weight, list[o].value);
            }
        }
    }
}

// R rows of one tile, of which the first `outputs` rows of weights exist. `whole`: all blocks are of full length.
template <class Dots, int bits, int planes, int R, bool whole>
__attribute__((noinline)) void rows_of_tile(const Call& call, const char* at, const char* row, int64_t outputs, float* y) {
    const QuantizedLayout& layout = call.layout;
    const int64_t groups = layout.groups, scale_bytes = layout.scale_bytes, group = layout.padded_group;
    const char *x = row, *blocks = row + layout.blocks_at;
    float32x4_t sums[R][4];
    for (int t = 0; t < R; t++) {
        for (int j = 0; j < 4; j++) sums[t][j] = vdupq_n_f32(0);
    }
    for (int64_t first = 0; first < groups; first += kChunk) {
        const int64_t m = smaller(kChunk, groups - first);
        const char *scales = at, *zeros = at + m * scale_bytes;
        at += layout.header_bytes(m);
        for (const char* const last = zeros + m * kTile; zeros < last; scales += scale_bytes, zeros += kTile) {
            const bool partial = !whole && first + m == groups && zeros + kTile == last;
            const int64_t padded = partial ? layout.padded_last : group;
            for (int64_t left = padded; left > 0; left -= kBlock) {
                const int64_t length = whole ? kBlock : smaller(kBlock, left);
                block_of_tile<Dots, bits, R>(call, at, scales, zeros, length, x, row, blocks, sums);
                at += divide_up(length, unit_length(bits)) * unit_bytes(bits);
                x += length * planes;
                blocks += sizeof(Block);
            }
        }
    }
    for (int t = 0; t < R; t++) {
        float results[kTile];
        for (int j = 0; j < 4; j++) vst1q_f32(results + j * 4, sums[t][j]);
        std::memcpy(y + t * call.y_stride, results, static_cast<size_t>(outputs) * 4);
    }
}

// Rows in fours, twos and ones, which meet the whole tile before the next; many rows in panels that stay in the cache.
template <class Dots, int bits, int planes>
void run(const Call& call, const char* packed, const char* activations, int64_t rows, int64_t tile_begin,
         int64_t tile_end, float* y) {
    constexpr int kMost = 4;
    const int64_t row_bytes = call.layout.activation_bytes, fit = kPanelBytes / row_bytes / kMost * kMost;
    const int64_t panel = fit > kMost ? fit : kMost;
    const bool whole = call.layout.padded_group % kBlock == 0 && call.layout.padded_last % kBlock == 0;
    for (int64_t begin = 0; begin < rows; begin += panel) {
        const int64_t end = smaller(begin + panel, rows);
        for (int64_t tile = tile_begin; tile < tile_end; tile++) {
            const char* at = packed + tile * call.layout.tile_bytes;
            const int64_t outputs = smaller(kTile, call.n - tile * kTile);
            for (int64_t t = begin; t < end;) {
                const char* x = activations + t * row_bytes;
                float* out = y + t * call.y_stride + tile * kTile;
                const auto take = [&](auto some) {
                    constexpr int R = decltype(some)::value;
                    if (R == 1 && whole) {
                        rows_of_tile<Dots, bits, planes, R, R == 1>(call, at, x, outputs, out);
                    } else {
                        rows_of_tile<Dots, bits, planes, R, false>(call, at, x, outputs, out);
                    }
                    t += R;
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

// LinearKernels::linear of the level whose sums Dots<bits, planes> computes.
template <template <int, int> class Dots>
void linear(const LinearShape& shape, const void* packed, const void* activations, int64_t rows, int64_t tile_begin,
            int64_t tile_end, float* y, int64_t y_stride) {
    if (shape.type != WeightType::quantized) {
        linear_float_neon(shape, packed, activations, rows, tile_begin, tile_end, y, y_stride);
        return;
    }
    const Call call{QuantizedLayout(shape), shape.wide_scales, shape.n, y_stride};
    const char *at = static_cast<const char*>(packed), *x = static_cast<const char*>(activations);
    with_bits(shape.bits, [&](auto width) {
        constexpr int bits = decltype(width)::value;
        const auto work = shape.activation_bits == 8 ? run<Dots<bits, 1>, bits, 1> : run<Dots<bits, 2>, bits, 2>;
        work(call, at, x, rows, tile_begin, tile_end, y);
    });
}

}  // namespace
}  // namespace tinychat
