// The linear of ARMv8.0 (Cortex-A53 to A73), which multiplies and widens but has no dot product.
//
// Activations of 16 bits. A vector multiplier of an A72 makes four products of 16 bits, or eight of 8 bits, in a cycle, so
// that a plane of bytes at a time costs no less than 16 bits at once: a quarter of a cycle a product. But there is only one
// multiplier and there are two adders, and half of the products can be had for additions (S. Winograd, IEEE Transactions on
// Computers C-17, 1968): of codes q and activations x in pairs,
//
//   q0 x0 + q1 x1 = (x0 + q1) (x1 + q0) - x0 x1 - q0 q1
//
// where sums of the x0 x1 belong to a block of activations and are taken once, when it is prepared (in Block::halves, which
// no other code of this level reads), and those of the q0 q1 belong to a block of weights: products of bytes, half as many
// again for one row, and shared by several. A sum fits in 16 bits, 32639 + 128 = 32767, and 32 bits may wrap on the way,
// since the result fits. A pair is k, k + 4, which share a byte of codes of 4 bits.
//
// Activations of 8 bits are multiplied as they are, eight at a time.
#include "neon/linear_tiles.h"

namespace tinychat {
namespace {

template <int bits, int planes>
struct Dots;

template <int bits>
struct Dots<bits, 2> {
    static constexpr int kOffset = bits == 8 ? 128 : 0;
    static constexpr bool kCrowded = true;

    // Of a pair of registers of codes: sums of products with signs, or without, which 16 bits hold up to 128 k.
    struct Own {
        uint16x8_t narrow[2];
        int32x4_t wide[2];
    };

    template <int R, int H>
    struct Sums {
        int32x4_t rows[R][H][4];  // of each row of four, its products in four parts
        Own own[H];
    };

    // 8 k: fours h and h + 1 of a unit.
    template <int R, int H>
    __attribute__((always_inline)) static void pair(const char* unit, int h, const char* x, int64_t stride, Sums<R, H>& sums) {
        int16x8_t first[R], second[R];
        for (int t = 0; t < R; t++) {
            const int64x2_t words = vld1q_s64(reinterpret_cast<const int64_t*>(x + t * stride));
            first[t] = vreinterpretq_s16_s64(vdupq_laneq_s64(words, 0));
            second[t] = vreinterpretq_s16_s64(vdupq_laneq_s64(words, 1));
        }
        for (int j = 0; j < H; j++) {
            const uint8x16_t low = four_codes<bits>(unit + j * 16, h), high = four_codes<bits>(unit + j * 16, h + 1);
            Own& own = sums.own[j];
            if (bits == 8) {
                const int8x16_t a = vreinterpretq_s8_u8(low ^ 128), b = vreinterpretq_s8_u8(high ^ 128);
                own.wide[0] = vpadalq_s16(own.wide[0], vmull_s8(vget_low_s8(a), vget_low_s8(b)));
                own.wide[1] = vpadalq_s16(own.wide[1], vmull_high_s8(a, b));
                for (int t = 0; t < R; t++) {
                    multiply(vaddw_s8(first[t], vget_low_s8(b)), vaddw_s8(second[t], vget_low_s8(a)), &sums.rows[t][j][0]);
                    multiply(vaddw_high_s8(first[t], b), vaddw_high_s8(second[t], a), &sums.rows[t][j][2]);
                }
            } else {
                own.narrow[0] = vmlal_u8(own.narrow[0], vget_low_u8(low), vget_low_u8(high));
                own.narrow[1] = vmlal_high_u8(own.narrow[1], low, high);
                for (int t = 0; t < R; t++) {
                    const uint16x8_t a = vreinterpretq_u16_s16(first[t]), b = vreinterpretq_u16_s16(second[t]);
                    multiply(vreinterpretq_s16_u16(vaddw_u8(a, vget_low_u8(high))),
                             vreinterpretq_s16_u16(vaddw_u8(b, vget_low_u8(low))), &sums.rows[t][j][0]);
                    multiply(vreinterpretq_s16_u16(vaddw_high_u8(a, high)), vreinterpretq_s16_u16(vaddw_high_u8(b, low)),
                             &sums.rows[t][j][2]);
                }
            }
        }
    }

    // Of two rows of weights.
    __attribute__((always_inline)) static void multiply(int16x8_t a, int16x8_t b, int32x4_t* sums) {
        sums[0] = vmlal_s16(sums[0], vget_low_s16(a), vget_low_s16(b));
        sums[1] = vmlal_high_s16(sums[1], a, b);
    }

    // R rows of activations, H quarters of a tile from quarter `at` on.
    template <int R, int H>
    __attribute__((always_inline)) static void quarters(const char* codes, int at, const char* x, const char* blocks,
                                                        int64_t stride, int64_t length, int32x4_t (*products)[4]) {
        constexpr int kPairs = unit_length(bits) / 8;
        Sums<R, H> sums;
        for (int j = 0; j < H; j++) {
            for (int t = 0; t < R; t++) {
                for (int i = 0; i < 4; i++) sums.rows[t][j][i] = vdupq_n_s32(0);
            }
            for (int i = 0; i < 2; i++) {
                sums.own[j].narrow[i] = vdupq_n_u16(0);
                sums.own[j].wide[i] = vdupq_n_s32(0);
            }
        }
        const char* unit = codes + at * 16;
#pragma GCC unroll 2
        for (int64_t k = 0; k < length; k += unit_length(bits), unit += unit_bytes(bits)) {
            if (R == 1) fetch_unit<bits>(unit);
            each<kPairs>([&](auto number) __attribute__((always_inline)) {
                constexpr int i = decltype(number)::value;
                // What follows a block's integers is not zero, and x0 x1 would not be taken away.
                if (i == 0 || k + i * 8 < length) pair<R, H>(unit, 2 * i, x + (k + i * 8) * 2, stride, sums);
            });
        }
        for (int j = 0; j < H; j++) {
            const Own& own = sums.own[j];
            int32x4_t wide[2];
            for (int i = 0; i < 2; i++) wide[i] = bits == 8 ? own.wide[i] : vreinterpretq_s32_u32(vpaddlq_u16(own.narrow[i]));
            const int32x4_t codes_alone = vpaddq_s32(wide[0], wide[1]);
            for (int t = 0; t < R; t++) {
                const int32x4_t* rows = sums.rows[t][j];
                const int32x4_t alone = vdupq_n_s32(reinterpret_cast<const Block*>(blocks + t * stride)->halves);
                const int32x4_t both = vpaddq_s32(vpaddq_s32(rows[0], rows[1]), vpaddq_s32(rows[2], rows[3]));
                products[t][at + j] = (int32x4_t)((Lanes)products[t][at + j] + (Lanes)both - (Lanes)codes_alone - (Lanes)alone);
            }
        }
    }

    template <int R>
    __attribute__((always_inline)) static void add(const char* codes, const char* x, const char* blocks, int64_t stride,
                                                   int64_t length, int32x4_t (&products)[R][4]) {
        if (R == 1) return quarters<1, 4>(codes, 0, x, blocks, stride, length, products);
        for (int t = 0; t < R; t += 2) {
            const char *row = x + t * stride, *block = blocks + t * stride;
            quarters<2, 2>(codes, 0, row, block, stride, length, products + t);
            quarters<2, 2>(codes, 2, row, block, stride, length, products + t);
        }
    }
};

// smlal multiplies bytes and adds to int16: so many registers of 4 k until 16 bits are full, then sadalp adds pairs to int32.
template <int bits>
struct Dots<bits, 1> {
    static constexpr int kOffset = bits == 8 ? 128 : 0;
    static constexpr bool kCrowded = false;
    static constexpr int kFull = bits == 8 ? 2 : bits == 4 ? 16 : 32;  // 2 * 128 * 127, 16 * 15 * 128, ...

    template <int R>
    __attribute__((always_inline)) static void add(const char* codes, const char* x, const char*, int64_t stride,
                                                   int64_t length, int32x4_t (&products)[R][4]) {
        constexpr int kFours = unit_length(bits) / 4, kUnits = kFull < kFours ? 1 : kFull / kFours;
        const int64_t all = divide_up(length, unit_length(bits));
        for (int t = 0; t < R; t++) {
            int32x4_t sums[4][2];
            for (int j = 0; j < 4; j++) sums[j][0] = sums[j][1] = vdupq_n_s32(0);
            for (int64_t begin = 0; begin < all; begin += kUnits) {
                int16x8_t narrow[4][2];
                for (int j = 0; j < 4; j++) narrow[j][0] = narrow[j][1] = vdupq_n_s16(0);
                for (int64_t i = begin; i < smaller(begin + kUnits, all); i++) {
                    const char* unit = codes + i * unit_bytes(bits);
                    const char* from = x + t * stride + i * unit_length(bits);
                    if (R == 1) fetch_unit<bits>(unit);
                    each<kFours>([&](auto number) __attribute__((always_inline)) {
                        constexpr int four = decltype(number)::value;
                        const auto* bytes = reinterpret_cast<const int32_t*>(from + four * 4);
                        const int8x16_t factor = vreinterpretq_s8_s32(vld1q_dup_s32(bytes));
                        for (int j = 0; j < 4; j++) {
                            const uint8x16_t code = four_codes<bits>(unit + j * 16, four);
                            const int8x16_t q = vreinterpretq_s8_u8(bits == 8 ? code ^ 128 : code);
                            narrow[j][0] = vmlal_s8(narrow[j][0], vget_low_s8(q), vget_low_s8(factor));
                            narrow[j][1] = vmlal_high_s8(narrow[j][1], q, factor);
                        }
                    });
                }
                for (int j = 0; j < 4; j++) {
                    for (int h = 0; h < 2; h++) sums[j][h] = vpadalq_s16(sums[j][h], narrow[j][h]);
                }
            }
            for (int j = 0; j < 4; j++) products[t][j] += vpaddq_s32(sums[j][0], sums[j][1]);
        }
    }
};

// The planes of a block of `length` integers become words, and the sum of x0 x1 is put beside them.
void join_planes(int8_t* planes, int64_t length, Block* block) {
    int16_t words[kBlock];
    for (int64_t i = 0; i < length; i++) words[i] = static_cast<int16_t>(planes[i] * 256 + planes[length + i]);
    uint32_t alone = 0;
    for (int64_t i = 0; i < length; i += 8) {
        for (int64_t j = i; j < i + 4; j++) alone += static_cast<uint32_t>(words[j] * words[j + 4]);
    }
    std::memcpy(planes, words, static_cast<size_t>(length) * 2);
    std::memcpy(&block->halves, &alone, 4);
}

constexpr LinearKernels table{kTile, packed_bytes, pack, unpack, unpack_row, activation_bytes, prepare_step,
                              prepare<join_planes>, linear<Dots>};

}  // namespace

const LinearKernels& linear_neon() { return table; }

}  // namespace tinychat
