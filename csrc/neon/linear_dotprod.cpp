// The linear of ARM cores with the dot product of bytes (Cortex-A76, A78AE, Neoverse N1), compiled once more where products
// of 2 x 8 by 8 x 2 bytes exist too (level i8mm).
//
// sdot multiplies four bytes of each of four rows with four bytes that it takes from any lane of a second register: the 4 k
// of 4 rows that codes unpack to, against a lane of the activations, so that nothing is broadcast. Activations of 16 bits
// are two planes of bytes, each with sums of its own, joined as hi 256 + lo at the end of a block. Codes of 8 bits change
// their top bit, since sdot's bytes have signs: q - 128.
//
// Of 4 bits, 8 k of a tile are 4 loads, 4 AND, 4 shifts and 16 sdot for 128 weights, 24 instructions for the two vector pipes
// of an A76; memory gives a Pi 5 less than that (benchmarks/results/arm.md). Many rows share the unpacking; where smmla is,
// two rows of weights meet two rows of activations in one instruction, twice the products of sdot.
#include "neon/linear_tiles.h"

namespace tinychat {
namespace {

template <int bits, int planes>
struct Dots {
    static constexpr int kOffset = bits == 8 ? 128 : 0;

    template <int R, int H>
    using Sums = int32x4_t[planes][R][H];

    __attribute__((always_inline)) static int8x16_t codes_with_sign(const char* at, int h) {
        const uint8x16_t codes = four_codes<bits>(at, h);
        return vreinterpretq_s8_u8(bits == 8 ? codes ^ 128 : codes);
    }

    // `units` units from `codes` on, of R rows and H quarters of a tile.
    template <int R, int H, int units>
    __attribute__((always_inline)) static void some(const char* codes, const char* x, int64_t stride, int64_t length,
                                                    Sums<R, H>& sums) {
        constexpr int kFours = unit_length(bits) / 4, kAll = units * kFours;
        int8x16_t factors[planes][R][(kAll + 3) / 4];
        for (int t = 0; t < R; t++) {
            for (int p = 0; p < planes; p++) {
                const auto* from = reinterpret_cast<const int8_t*>(x) + t * stride + p * length;
                if (kAll == 2) {
                    factors[p][t][0] = vcombine_s8(vld1_s8(from), vdup_n_s8(0));
                } else {
                    for (int i = 0; i < kAll / 4; i++) factors[p][t][i] = vld1q_s8(from + i * 16);
                }
            }
        }
        each<kAll>([&](auto number) __attribute__((always_inline)) {
            constexpr int four = decltype(number)::value;
            const char* at = codes + four / kFours * unit_bytes(bits);
            if (R == 1 && four % kFours == 0) fetch_unit<bits>(at);
            int8x16_t q[H];
            for (int j = 0; j < H; j++) q[j] = codes_with_sign(at + j * 16, four % kFours);
            for (int t = 0; t < R; t++) {
                for (int p = 0; p < planes; p++) {
                    for (int j = 0; j < H; j++) {
                        sums[p][t][j] = vdotq_laneq_s32(sums[p][t][j], q[j], factors[p][t][four / 4], four % 4);
                    }
                }
            }
        });
    }

    template <int R, int H>
    __attribute__((always_inline)) static void quarters(const char* codes, const char* x, int64_t stride, int64_t length,
                                                        Sums<R, H>& sums) {
        constexpr int kUnits = bits == 4 || bits == 8 ? 2 : 1;  // 16 k are a register of activations
        constexpr int64_t kTaken = kUnits * unit_length(bits);
        int64_t k = 0;
        for (; k + (kUnits - 1) * unit_length(bits) < length; k += kTaken) {
            some<R, H, kUnits>(codes + k / unit_length(bits) * unit_bytes(bits), x + k, stride, length, sums);
        }
        if (kUnits == 2 && k < length) {
            some<R, H, 1>(codes + k / unit_length(bits) * unit_bytes(bits), x + k, stride, length, sums);
        }
    }

    template <int R>
    __attribute__((always_inline)) static void add(const char* codes, const char* x, const char*, int64_t stride,
                                                   int64_t length, int32x4_t (&products)[R][4]) {
        constexpr int H = R * planes > 4 ? 2 : 4;  // as many as the registers hold sums of
        for (int first = 0; first < 4; first += H) {
            Sums<R, H> sums;
            for (int p = 0; p < planes; p++) {
                for (int t = 0; t < R; t++) {
                    for (int j = 0; j < H; j++) sums[p][t][j] = vdupq_n_s32(0);
                }
            }
            quarters<R, H>(codes + first * 16, x, stride, length, sums);
            for (int t = 0; t < R; t++) {
                for (int j = 0; j < H; j++) {
                    products[t][first + j] = planes == 1 ? sums[0][t][j] : sums[planes - 1][t][j] + (sums[0][t][j] << 8);
                }
            }
        }
    }
};

constexpr LinearKernels table{kTile, packed_bytes, pack, unpack, unpack_row, activation_bytes, prepare_step,
                              prepare_part, linear<Dots>};

}  // namespace

#ifdef __ARM_FEATURE_MATMUL_INT8
const LinearKernels& linear_i8mm() { return table; }
#else
const LinearKernels& linear_dotprod() { return table; }
#endif

}  // namespace tinychat
