// The linear of ARMv8.0 (Cortex-A53 to A73), which multiplies and widens but has no dot product.
#include "neon/linear_tiles.h"

namespace tinychat {
namespace {

// smlal multiplies bytes and adds to int16: so many registers of 4 k until 16 bits are full, then sadalp adds pairs to int32.
template <int bits, int planes>
struct Dots {
    static constexpr int kOffset = bits == 8 ? 128 : 0;
    static constexpr int kFull = bits == 8 ? 2 : bits == 4 ? 16 : 32;  // 128 * 128 * 2 - 1, 15 * 128 * 16, ...

    template <int R>
    __attribute__((always_inline)) static void add(const char* codes, const char* x, const char*, int64_t stride,
                                                   int64_t length, int32x4_t (&products)[R][4]) {
        constexpr int kFours = unit_length(bits) / 4, kUnits = kFull < kFours ? 1 : kFull / kFours;
        for (int t = 0; t < R; t++) {
            int32x4_t sums[planes][4][2];
            for (int p = 0; p < planes; p++) {
                for (int j = 0; j < 4; j++) sums[p][j][0] = sums[p][j][1] = vdupq_n_s32(0);
            }
            const int64_t all = divide_up(length, unit_length(bits));
            for (int64_t begin = 0; begin < all; begin += kUnits) {
                int16x8_t narrow[planes][4][2];
                for (int p = 0; p < planes; p++) {
                    for (int j = 0; j < 4; j++) narrow[p][j][0] = narrow[p][j][1] = vdupq_n_s16(0);
                }
                for (int64_t i = begin; i < smaller(begin + kUnits, all); i++) {
                    const char* at = codes + i * unit_bytes(bits);
                    const char* from = x + t * stride + i * unit_length(bits);
                    each<kFours>([&](auto number) __attribute__((always_inline)) {
                        constexpr int four = decltype(number)::value;
                        int8x16_t factor[planes];
                        for (int p = 0; p < planes; p++) {
                            factor[p] = vreinterpretq_s8_s32(vld1q_dup_s32(reinterpret_cast<const int32_t*>(from + p * length + four * 4)));
                        }
                        for (int j = 0; j < 4; j++) {
                            const uint8x16_t code = four_codes<bits>(at + j * 16, four);
                            const int8x16_t q = vreinterpretq_s8_u8(bits == 8 ? code ^ 128 : code);
                            for (int p = 0; p < planes; p++) {
                                narrow[p][j][0] = vmlal_s8(narrow[p][j][0], vget_low_s8(q), vget_low_s8(factor[p]));
                                narrow[p][j][1] = vmlal_high_s8(narrow[p][j][1], q, factor[p]);
                            }
                        }
                    });
                }
                for (int p = 0; p < planes; p++) {
                    for (int j = 0; j < 4; j++) {
                        for (int h = 0; h < 2; h++) sums[p][j][h] = vpadalq_s16(sums[p][j][h], narrow[p][j][h]);
                    }
                }
            }
            for (int j = 0; j < 4; j++) {
                products[t][j] = vpaddq_s32(sums[planes - 1][j][0], sums[planes - 1][j][1]);
                if (planes == 2) products[t][j] += vpaddq_s32(sums[0][j][0], sums[0][j][1]) << 8;
            }
        }
    }
};

constexpr LinearKernels table{kTile, packed_bytes, pack, unpack, unpack_row, activation_bytes, prepare_step,
                              prepare_part, linear<Dots>};

}  // namespace

const LinearKernels& linear_neon() { return table; }

}  // namespace tinychat
