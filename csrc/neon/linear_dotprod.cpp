// The linear of ARM cores with the dot product of bytes (Cortex-A76, A78AE, Neoverse N1), compiled once more where products
// of 2 x 8 by 8 x 2 bytes exist too (level i8mm).
//
// sdot multiplies four bytes of each of four rows with four bytes that it takes from any lane of a second register: the 4 k
// of 4 rows that codes unpack to, against a lane of the activations, so that nothing is broadcast. Activations of 16 bits
// are two planes of bytes, each with sums of its own, joined as hi 256 + lo at the end of a block; both of 8 k share a
// register, hi[8] lo[8]. Codes of 8 bits change their top bit, since sdot's bytes have signs: q - 128.
//
// Of 4 bits, 8 k of a tile are 4 loads, 4 AND, 4 shifts and 16 sdot for 128 weights, 24 instructions for the two vector pipes
// of an A76; memory gives a Pi 5 less than that (benchmarks/results/arm.md). Two and more rows share the unpacking. Where
// smmla is, they take it: 4 k and the next 4 k of four rows, zipped, are twice 8 k of two rows, which meet the two planes
// of a row, or bytes of two rows, in one instruction. One row would pay more for the zips than it gains.
#include "neon/linear_tiles.h"

namespace tinychat {
namespace {

template <int bits>
__attribute__((always_inline)) inline int8x16_t codes_with_sign(const char* at, int h) {
    const uint8x16_t codes = four_codes<bits>(at, h);
    return vreinterpretq_s8_u8(bits == 8 ? codes ^ 128 : codes);
}

__attribute__((always_inline)) inline const int8_t* bytes(const char* at) { return reinterpret_cast<const int8_t*>(at); }

template <int bits, int planes>
struct Dots {
    static constexpr int kOffset = bits == 8 ? 128 : 0;
    static constexpr bool kCrowded = false;

    template <int R, int H>
    using Sums = int32x4_t[planes][R][H];

    // `units` units from `codes` on, of R rows and H quarters of a tile.
    template <int R, int H, int units>
    __attribute__((always_inline)) static void some(const char* codes, const char* x, int64_t stride, Sums<R, H>& sums) {
        constexpr int kFours = unit_length(bits) / 4, kAll = units * kFours;
        int8x16_t factors[R][(kAll * planes + 3) / 4];
        for (int t = 0; t < R; t++) {
            const char* from = x + t * stride;
            if (kAll * planes == 2) {
                factors[t][0] = vcombine_s8(vld1_s8(bytes(from)), vdup_n_s8(0));
            } else {
                for (int i = 0; i < kAll * planes / 4; i++) factors[t][i] = vld1q_s8(bytes(from + i * 16));
            }
        }
        each<kAll>([&](auto number) __attribute__((always_inline)) {
            constexpr int four = decltype(number)::value;
            const char* at = codes + four / kFours * unit_bytes(bits);
            if (R == 1 && four % kFours == 0) fetch_unit<bits>(at);
            int8x16_t q[H];
            for (int j = 0; j < H; j++) q[j] = codes_with_sign<bits>(at + j * 16, four % kFours);
            for (int t = 0; t < R; t++) {
                each<planes>([&](auto plane) __attribute__((always_inline)) {
                    constexpr int p = decltype(plane)::value, lane = planes == 1 ? four : four / 2 * 4 + p * 2 + four % 2;
                    for (int j = 0; j < H; j++) {
                        sums[p][t][j] = vdotq_laneq_s32(sums[p][t][j], q[j], factors[t][lane / 4], lane % 4);
                    }
                });
            }
        });
    }

    template <int R, int H>
    __attribute__((always_inline)) static void quarters(const char* codes, const char* x, int64_t stride, int64_t length,
                                                        Sums<R, H>& sums) {
        // At a time whole registers of activations.
        constexpr int kTaken = bits == 3 ? 32 : 16, kUnits = kTaken / unit_length(bits);
        if (R == 1 && __builtin_constant_p(length)) {
            each<kBlock / kTaken>([&](auto number) __attribute__((always_inline)) {
                constexpr int i = decltype(number)::value * kUnits;
                some<R, H, kUnits>(codes + i * unit_bytes(bits), x + i * unit_length(bits) * planes, stride, sums);
                __asm__ volatile("" ::: "memory");  // or GCC loads all that there is, and spills it
            });
            return;
        }
        int64_t k = 0;
        for (; k + (kTaken - 1) < length; k += kTaken, codes += kUnits * unit_bytes(bits)) {
            some<R, H, kUnits>(codes, x + k * planes, stride, sums);
        }
        for (; k < length; k += unit_length(bits), codes += unit_bytes(bits)) some<R, H, 1>(codes, x + k * planes, stride, sums);
    }

    template <int R>
    __attribute__((always_inline)) static void add(const char* codes, const char* x, const char*, int64_t stride,
                                                   int64_t length, int32x4_t (&products)[R][4]) {
#ifdef __ARM_FEATURE_MATMUL_INT8
        if constexpr (R > 1) return add_matrices<R>(codes, x, stride, length, products);
#endif
        constexpr int H = R * planes > 4 ? 2 : 4;  // as many as the registers hold sums of
        for (int first = 0; first < 4; first += H) {
            Sums<R, H> sums;
            for (int t = 0; t < R; t++) {
                for (int j = 0; j < H; j++) {
                    sums[0][t][j] = vdupq_n_s32(0);
                    sums[planes - 1][t][j] = products[t][first + j];
                }
            }
            quarters<R, H>(codes + first * 16, x, stride, length, sums);
            for (int t = 0; t < R; t++) {
                for (int j = 0; j < H; j++) {
                    products[t][first + j] = planes == 1 ? sums[0][t][j] : joined(sums[planes - 1][t][j], sums[0][t][j]);
                }
            }
        }
    }

    __attribute__((always_inline)) static int32x4_t joined(int32x4_t low, int32x4_t high) {
        int32x4_t weight = vdupq_n_s32(256);
        __asm__("" : "+w"(weight));  // or GCC shifts and adds
        return vmlaq_s32(low, high, weight);
    }

#ifdef __ARM_FEATURE_MATMUL_INT8
    template <int R>
    __attribute__((always_inline)) static void add_matrices(const char* codes, const char* x, int64_t stride,
                                                            int64_t length, int32x4_t (&products)[R][4]) {
        constexpr int kPairs = R * planes / 2, kFours = unit_length(bits) / 4;  // pairs of bytes that a row of weights meets
        constexpr int H = kPairs > 2 ? 2 : 4;
        for (int first = 0; first < 4; first += H) {
            int32x4_t sums[kPairs][H][2];  // lanes: rows 0, 0, 1, 1 of two with the first and second of a pair
            for (int i = 0; i < kPairs; i++) {
                for (int j = 0; j < H; j++) sums[i][j][0] = sums[i][j][1] = vdupq_n_s32(0);
            }
            const char *unit = codes + first * 16, *from = x;
            for (int64_t k = 0; k < length; k += unit_length(bits), unit += unit_bytes(bits)) {
                for (int h = 0; h < kFours; h += 2, from += 8 * planes) {
                    int8x16_t factors[kPairs];
                    for (int i = 0; i < kPairs; i++) {
                        const int8_t* row = bytes(from + i * (2 / planes) * stride);
                        factors[i] = planes == 2 ? vld1q_s8(row) : vcombine_s8(vld1_s8(row), vld1_s8(row + stride));
                    }
                    for (int j = 0; j < H; j++) {
                        const int32x4_t low = vreinterpretq_s32_s8(codes_with_sign<bits>(unit + j * 16, h));
                        const int32x4_t high = vreinterpretq_s32_s8(codes_with_sign<bits>(unit + j * 16, h + 1));
                        const int8x16_t two[2] = {vreinterpretq_s8_s32(vzip1q_s32(low, high)),
                                                  vreinterpretq_s8_s32(vzip2q_s32(low, high))};
                        for (int i = 0; i < kPairs; i++) {
                            for (int w = 0; w < 2; w++) sums[i][j][w] = vmmlaq_s32(sums[i][j][w], two[w], factors[i]);
                        }
                    }
                }
            }
            for (int i = 0; i < kPairs; i++) {
                for (int j = 0; j < H; j++) {
                    const int32x4_t one = vuzp1q_s32(sums[i][j][0], sums[i][j][1]), other = vuzp2q_s32(sums[i][j][0], sums[i][j][1]);
                    if (planes == 2) {
                        products[i][first + j] = joined(vaddq_s32(products[i][first + j], other), one);
                    } else {
                        products[2 * i][first + j] += one;
                        products[2 * i + 1][first + j] += other;
                    }
                }
            }
        }
    }
#endif
};

// The two planes of a block of `length` integers are interleaved, 8 k at a time.
void interleave(int8_t* planes, int64_t length, Block*) {
    int8_t copy[2 * kBlock];
    std::memcpy(copy, planes, static_cast<size_t>(length) * 2);
    for (int64_t i = 0; i < length; i += 8) {
        std::memcpy(planes + i * 2, copy + i, 8);
        std::memcpy(planes + i * 2 + 8, copy + length + i, 8);
    }
}

constexpr LinearKernels table{kTile, packed_bytes, pack, unpack, unpack_row, activation_bytes, prepare_step,
                              prepare<interleave>, linear<Dots>};

}  // namespace

#ifdef __ARM_FEATURE_MATMUL_INT8
const LinearKernels& linear_i8mm() { return table; }
#else
const LinearKernels& linear_dotprod() { return table; }
#endif

}  // namespace tinychat
