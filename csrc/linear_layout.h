// How linears lie in memory at every level: packed weights, and activations prepared for them.
//
// Weights. A tile is 16 output rows; tiles follow one another, and a tile is one linear stream. Codes lie in registers of
// 64 bytes with one 32-bit lane for each row (the SIMD-aware packing of arXiv 2306.00978, section 4.2, with a lane per row
// in place of a byte). Of 4 bits, a register holds 8 consecutive k, so that one AND and one shift with AND unpack it:
//
//            row 0                                row 1     ...  row 15
//   byte     0         1         2         3      4              63
//   bits 0-3 k         k+1       k+2       k+3    k ...
//   bits 4-7 k+4       k+5       k+6       k+7    k+4 ...
//
// Of 8 bits, a register holds 4 consecutive k, and needs no unpacking; of 2 bits 16, four in a byte. Of 3 bits, three
// registers hold 32: each byte two codes, and what is left in the three bytes another two, so that 17 instructions unpack
// eight registers (a plane of 2 bits and one of 1 bit would take 29). Below, byte 0 of row 0; "k" is its whole code,
// "k: 1 0" are bits 1 and 0 of it:
//
//              2 bits            3 bits: first   second           third
//   bits 0-1   k       bits 0-2  k               k+8              k+16
//   bits 2-3   k+4     bits 3-5  k+4             k+12             k+20
//   bits 4-5   k+8     bits 6-7  k+24: 1 0       k+28: 1 0        k+28: 2, k+24: 2
//   bits 6-7   k+12
//
// Unpacked, all widths are the same: 64 bytes of 4 k of 16 rows, which is what vpdpbusd multiplies with 4 broadcast
// activations, and a row of an AMX tile. What fills whole registers is a unit: 8 k, of 2 bits 16, of 3 bits 32.
//
// A row's sum stays in its lane: activations are broadcast, and no sum runs across a register. Groups are padded to whole
// steps of 8 k, their codes to whole units, and come in chunks of four (the last chunk of a tile may hold fewer, m), scales
// and zeros inline before the codes, padded to a cache line. In fp16 with groups of 128 that adds 0.1875 bits to a code,
// with groups of 64 0.375.
//
//   chunk: | m x scales[16] | m x zeros[16] (uint8) | pad to 64 | codes of group 0 | .. | codes of group m-1 |
//
// Padding (rows beyond n, k beyond a group's end) is zero: codes, scales and zeros. A kernel may multiply whole units: the
// bytes that follow a block's integers in an activation, 64 at the least, then meet codes of zero.
// Weights of the other types are k-major within the tile, values[k][16], k padded to 4 with zeros.
//
// Activations. For the other types: the row as fp32, padded to 4. For quantized weights: integers x with a scale per block.
// A block is a group, or a piece of at most 128 of one that is longer: 128 * 255 * 32639 = 1.07e9 fits in int32, and one
// scale should not serve more. The integers of a block of L values (padded to 8) are planes of bytes with sign: of 16 bits
// hi[L], then lo[L], x = 256 hi + lo; of 8 bits one plane. Instructions that multiply bytes are the fast ones nearly
// everywhere, and codes of any width meet the same activations. Levels of ARM put them in an order of their own, in the
// same space (csrc/neon/linear_tiles.h: prepare).
//
//   row: | planes of the blocks | pad to 64 | Block per block | Outlier[block_outliers] per block |
//
// Every function here has internal linkage: this header is compiled anew, with other flags, in each level's unit.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels.h"

namespace tinychat {

// In linear_layout.cpp, compiled once for every level.
int64_t packed_bytes(const LinearShape& shape);
// What pack() reads of a row of k codes of `bits`, of sources that have rows; 0 of others.
int64_t stored_bytes(Source source, int64_t k, int32_t bits);
void pack(const LinearShape& shape, const WeightData& data, void* packed, int64_t tile_begin, int64_t tile_end);
void unpack(const LinearShape& shape, const void* packed, const WeightData& data);
void unpack_row(const LinearShape& shape, const void* packed, int64_t row, float* values);

namespace {

constexpr int64_t kTile = 16;
static_assert(kTile % kPeak == 0);  // who computes a tile of logits finds its peaks
constexpr int64_t kChunk = 4;    // groups
constexpr int64_t kStep = 8;     // k: the least that a group is padded to
constexpr int64_t kBlock = 128;  // k, at most
constexpr int64_t kRegisterBytes = 64;
constexpr int64_t kFloatStep = 4;  // k of the other types are padded to this

struct Block {
    float scale;       // of the integers; NaN where the block holds NaN or infinity
    int32_t sum;       // of the integers, for the zero point
    int32_t outliers;  // how many were taken out
    int32_t halves;    // int16 a and b, a in the low half: -sum = a + 128 b; with z and 128 z, vpmaddwd makes -z sum
};

struct Outlier {
    int32_t index;  // within the block
    float value;
};

[[maybe_unused]] int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
[[maybe_unused]] int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }
[[maybe_unused]] int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- codes -----------------------------------------------------------------------------------------------------------

constexpr int64_t unit_length(int32_t bits) { return bits == 3 ? 32 : bits == 2 ? 16 : 8; }  // k
constexpr int64_t unit_bytes(int32_t bits) { return unit_length(bits) * kTile * bits / 8; }

// Codes 4 h .. 4 h + 3 of a unit, a byte each: of the row whose lane is at `at` (V = uint32_t), or of as many rows as V has
// lanes of 32 bits.
template <int bits, class V>
__attribute__((always_inline)) inline V unpacked(const char* at, int64_t h) {
    const auto part = [at](int64_t i, int64_t shift, uint32_t mask) __attribute__((always_inline)) {
        V lanes;
        std::memcpy(&lanes, at + i * kRegisterBytes, sizeof lanes);
        return lanes >> static_cast<int>(shift) & mask * 0x01010101u;
    };
    if (bits == 3 && h >= 6) return part(h - 6, 6, 3) | part(2, h - 2, 4);
    constexpr int64_t kInByte = 8 / bits;
    return part(h / kInByte, h % kInByte * bits, (1u << bits) - 1);
}

// Code k of a block, in every lane of V; any k, for which `unpacked` is too much.
template <int bits, class V>
inline V one_code(const char* at, int64_t k) {
    const int64_t unit = k / unit_length(bits) * unit_bytes(bits), h = k % unit_length(bits) / 4;
    return unpacked<bits, V>(at + unit, h) >> static_cast<int>(k % 4 * 8) & 255u;
}

template <int n>
struct Number {
    static constexpr int value = n;
};

// work(Number<bits>) for a width that there are kernels of.
template <class Work>
void with_bits(int32_t bits, const Work& work) {
    switch (bits) {
        case 2: return work(Number<2>{});
        case 3: return work(Number<3>{});
        case 4: return work(Number<4>{});
        case 8: return work(Number<8>{});
    }
}

// ---- sizes -----------------------------------------------------------------------------------------------------------

// Length of a group; one group per row where there are none (the other types leave it 0).
[[maybe_unused]] int64_t group_length(const LinearShape& shape) {
    return shape.group > 0 && shape.group < shape.k ? shape.group : shape.k;
}

// Sizes of a quantized linear; lengths in k.
struct QuantizedLayout {
    int64_t group, groups;
    int64_t padded_group, padded_last;  // of a full group, of the last
    int64_t group_blocks, blocks;       // blocks of a full group, of a row
    int64_t padded_k;                   // of a row
    int32_t bits;
    int64_t scale_bytes;                // of one group of a tile
    int64_t tile_bytes;
    int64_t integer_bytes;           // of one activation: its planes
    int64_t block_outliers;          // at most so many in a block
    int64_t blocks_at, outliers_at;  // byte offsets in an activation
    int64_t activation_bytes;

    explicit QuantizedLayout(const LinearShape& shape) {
        group = group_length(shape);
        groups = divide_up(shape.k, group);
        padded_group = round_up(group, kStep);
        padded_last = round_up(shape.k - (groups - 1) * group, kStep);
        group_blocks = divide_up(padded_group, kBlock);
        blocks = (groups - 1) * group_blocks + divide_up(padded_last, kBlock);
        padded_k = (groups - 1) * padded_group + padded_last;
        bits = shape.bits;
        scale_bytes = kTile * (shape.wide_scales ? 4 : 2);
        tile_bytes = (groups - 1) * code_bytes(padded_group) + code_bytes(padded_last) +
                     (groups / kChunk) * header_bytes(kChunk) + header_bytes(groups % kChunk);
        integer_bytes = shape.activation_bits / 8;
        block_outliers = divide_up(smaller(group, kBlock), 16);
        blocks_at = round_up(padded_k * integer_bytes, 64);
        outliers_at = blocks_at + blocks * int64_t{sizeof(Block)};
        activation_bytes = round_up(outliers_at + blocks * block_outliers * int64_t{sizeof(Outlier)}, 64);
    }

    // Scales and zeros of a chunk of m groups.
    int64_t header_bytes(int64_t m) const { return round_up(m * (scale_bytes + kTile), 64); }
    // Codes of `length` k of a tile, of which only the last of a group may end within a unit.
    int64_t code_bytes(int64_t length) const { return divide_up(length, unit_length(bits)) * unit_bytes(bits); }
    int64_t padded(int64_t g) const { return g == groups - 1 ? padded_last : padded_group; }
};

// How many pairs of tiles one row takes at once: tile i with tile i + pairs, and the last tile alone where they are odd.
// Memory is then read in two long streams, which Zen 4 keeps up with better than with one, and a row's integers, which codes
// push out of the first cache where there are many, half as often. Short streams of large tiles are slower than one, and left.
[[maybe_unused]] int64_t tile_pairs(int64_t tiles, int64_t tile_bytes) {
    constexpr int64_t kSmallTile = 1 << 14, kLongStream = 1 << 18;  // bytes
    const int64_t half = tiles / 2;
    return tile_bytes > kSmallTile && half * tile_bytes < kLongStream ? 0 : half;
}

[[maybe_unused]] constexpr int64_t value_bytes(WeightType type) { return type == WeightType::f32 ? 4 : 2; }
[[maybe_unused]] int64_t float_steps(const LinearShape& shape) { return round_up(shape.k, kFloatStep); }
[[maybe_unused]] int64_t float_tile_bytes(const LinearShape& shape) {
    return float_steps(shape) * kTile * value_bytes(shape.type);
}

[[maybe_unused]] int64_t activation_bytes(const LinearShape& shape) {
    if (shape.type == WeightType::quantized) return QuantizedLayout(shape).activation_bytes;
    return round_up(float_steps(shape) * 4, 64);
}

// Pieces of a row begin where a block does.
[[maybe_unused]] int64_t prepare_step(const LinearShape& shape) {
    if (shape.type != WeightType::quantized) return 1;
    const int64_t group = group_length(shape);
    return group > kBlock && (group % kBlock == 0 || group == shape.k) ? kBlock : group;
}

// ---- preparing activations -------------------------------------------------------------------------------------------

// As many lanes as the level's registers have; a block is summed in 16 lanes at every level, so that all round alike.
#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#elif defined(__AVX__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif
typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Integers __attribute__((vector_size(kLanes * 4)));

// 16 lanes, added as a tree whatever the registers: j and j + 8, then j and j + 4, j + 2, j + 1.
template <class V>
auto tree_sum(const V* lanes) {
    typedef std::remove_cv_t<std::remove_reference_t<decltype(lanes[0][0])>> Number;
    typedef Number Quad __attribute__((vector_size(16)));
    Quad quads[4];
    std::memcpy(quads, lanes, sizeof quads);
    const Quad sum = quads[0] + quads[2] + (quads[1] + quads[3]);
    return sum[0] + sum[2] + (sum[1] + sum[3]);
}

// Sum and largest of the sizes of `count` values, a multiple of 16; the largest as the bits of a float.
[[maybe_unused]] void measure(const float* values, int64_t count, float* sum, int32_t* largest) {
    Floats sums[16 / kLanes] = {};
    Integers most[16 / kLanes] = {};
    for (int64_t i = 0; i < count; i += 16) {
        for (int64_t j = 0; j < 16 / kLanes; j++) {
            Integers size;
            std::memcpy(&size, values + i + j * kLanes, sizeof size);
            size &= 0x7fffffff;
            most[j] = size > most[j] ? size : most[j];
            sums[j] += (Floats)size;
        }
    }
    typedef int32_t Quad __attribute__((vector_size(16)));
    Quad quads[4];
    std::memcpy(quads, most, sizeof quads);
    for (int i = 2; i > 0; i /= 2) {
        for (int j = 0; j < i; j++) quads[j] = quads[j] > quads[j + i] ? quads[j] : quads[j + i];
    }
    const auto larger = [](int32_t a, int32_t b) { return a > b ? a : b; };
    *largest = larger(larger(quads[0][0], quads[0][1]), larger(quads[0][2], quads[0][3]));
    *sum = tree_sum(sums);
}

// Sum of what the sizes of `count` values, a multiple of 16, have above `limit`.
[[maybe_unused]] float sum_above(const float* values, int64_t count, float limit) {
    Floats sums[16 / kLanes] = {};
    for (int64_t i = 0; i < count; i += 16) {
        for (int64_t j = 0; j < 16 / kLanes; j++) {
            Integers size;
            std::memcpy(&size, values + i + j * kLanes, sizeof size);
            size &= 0x7fffffff;
            const Floats above = (Floats)size - limit;
            sums[j] += above > 0 ? above : Floats{};
        }
    }
    return tree_sum(sums);
}

// One block of `length` values to integers within +-Limits::range, round(x / scale), zero from length on: as planes.
//
// What it guarantees of 16 bits (range 32639 = 127 * 256 + 127, so that two int8 planes hold them). A step of the integers is
// at most 1/32639 of the largest value, so that against the product of norms |x||w| the error is of NMSE 1e-8 or less.
// Beyond that, of the largest values, one in 16, those more than 32 times the mean size of the other 15 in 16 are taken
// out, and multiplied in fp32. What remains has steps of at most 1/1020 of that mean: results that the taken do not touch,
// their weights being zero, keep an NMSE of about 1e-7. The usual block pays one comparison for it. Not guaranteed: results
// carried only by values much smaller than the mean of their block.
// Of 8 bits (range 127), those more than 24 times the mean are taken out, which few blocks have: steps of at most 1/5 of the
// mean, and of 1/40 of the standard deviation in a block of normal values, whose NMSE is then 5e-5.
// Blocks whose values are all below 1e-33 count as zero; a block with NaN or infinity makes every output NaN.
struct Limits {
    float range;
    float noise;  // an outlier is so many times the mean
};
constexpr Limits kLimits16{32639.0f, 32.0f}, kLimits8{127.0f, 24.0f};

// Takes the outliers out of values[0, length), padded with zeros to `count`: at most one in 16, the largest first. The m
// largest of n sizes sum to at most m l + (what all have above l) for any l, which bounds the mean of the others from below
// without sorting, and closely for l near the m-th largest: 2.5 times the mean is there for normal and heavier tails. What
// is taken although it is no outlier costs a little time. Returns the bits of the largest size that remains.
[[maybe_unused]] __attribute__((noinline)) int32_t take_outliers(float* values, int64_t length, int64_t count,
                                                                 float noise, Block* block, Outlier* outliers) {
    const int64_t most = divide_up(length, 16);
    for (;;) {
        float sum, size;
        int32_t largest;
        measure(values, count, &sum, &largest);
        std::memcpy(&size, &largest, 4);
        const float left = static_cast<float>(most - block->outliers), rest = static_cast<float>(length - most);
        const float limit = 2.5f * sum / (left + rest);
        if (left == 0 || size * rest <= noise * (sum - left * limit - sum_above(values, count, limit))) return largest;
        int64_t at = 0;
        while (values[at] != size && values[at] != -size) at++;
        outliers[block->outliers++] = {static_cast<int32_t>(at), values[at]};
        values[at] = 0;
    }
}

__attribute__((always_inline)) inline void quantize_block(const float* x, int64_t length, Limits limits, int64_t planes,
                                                          int8_t* codes, Block* block, Outlier* outliers) {
    constexpr float kTiny = 1e-33f;
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the rounded integer in the low bits
    const int64_t count = round_up(length, 16), padded = round_up(length, kStep);
    float values[kBlock];  // a copy, where the values are not used as they are
    const auto copy = [&] {
        std::memcpy(values, x, static_cast<size_t>(length) * 4);
        for (int64_t i = length; i < count; i++) values[i] = 0;
        x = values;
    };
    if (length != count) copy();

    *block = Block{0, 0, 0, 0};
    float sum, size;
    int32_t largest;
    measure(x, count, &sum, &largest);
    std::memcpy(&size, &largest, 4);
    const bool finite = largest < 0x7f800000;
    const int64_t most = divide_up(length, 16);
    // True wherever there is an outlier; else rare.
    if (finite && size * (static_cast<float>(most) + static_cast<float>(length - most) / limits.noise) > sum) {
        if (x != values) copy();
        largest = take_outliers(values, length, count, limits.noise, block, outliers);
        std::memcpy(&size, &largest, 4);
    }
    if (!finite || size < kTiny) {
        const uint32_t nan = 0x7fc00000u;
        if (!finite) std::memcpy(&block->scale, &nan, 4);
        std::memset(codes, 0, static_cast<size_t>(padded * planes));
        return;
    }
    block->scale = size / limits.range;
    const float inverse = limits.range / size;
    int32_t offset;
    std::memcpy(&offset, &kRound, 4);
    int32_t integers[kBlock];
    Integers totals = {};
    for (int64_t i = 0; i < count; i += kLanes) {
        Floats value;
        std::memcpy(&value, x + i, sizeof value);
        value = value * inverse + kRound;
        const Integers integer = (Integers)value - offset;
        totals += integer;
        std::memcpy(integers + i, &integer, sizeof integer);
    }
    Integers lanes[16 / kLanes] = {totals};
    const int32_t total = tree_sum(lanes);
    const int32_t upper = (64 - total) >> 7;
    block->sum = total;
    block->halves = static_cast<int32_t>(static_cast<uint32_t>(upper) << 16 |
                                         (static_cast<uint32_t>(-total - upper * 128) & 0xffffu));
    int8_t* low = codes + (planes - 1) * padded;
    for (int64_t i = 0; i < padded; i++) low[i] = static_cast<int8_t>(integers[i]);
    if (planes == 1) return;
    for (int64_t i = 0; i < padded; i++) codes[i] = static_cast<int8_t>((integers[i] + 128) >> 8);
}

// LinearKernels::prepare; each level compiles it with its own instructions.
[[maybe_unused]] void prepare_part(const LinearShape& shape, const float* x, void* activation, int64_t begin,
                                   int64_t end) {
    char* row = static_cast<char*>(activation);
    if (shape.type != WeightType::quantized) {
        std::memcpy(row + begin * 4, x, static_cast<size_t>(end - begin) * 4);
        if (end == shape.k) std::memset(row + end * 4, 0, static_cast<size_t>(activation_bytes(shape) - end * 4));
        return;
    }
    const QuantizedLayout layout(shape);
    const Limits limits = shape.activation_bits == 8 ? kLimits8 : kLimits16;
    const int64_t first = begin / layout.group, planes = layout.integer_bytes;
    int64_t in_group = begin - first * layout.group;  // a multiple of kBlock
    const int64_t index = first * layout.group_blocks + in_group / kBlock;
    auto* codes = reinterpret_cast<int8_t*>(row) + (first * layout.padded_group + in_group) * planes;
    Block* block = reinterpret_cast<Block*>(row + layout.blocks_at) + index;
    Outlier* outliers = reinterpret_cast<Outlier*>(row + layout.outliers_at) + index * layout.block_outliers;
    for (int64_t k = begin; k < end;) {
        const int64_t length = smaller(smaller(kBlock, layout.group - in_group), shape.k - k);
        if (length == kBlock) {  // the usual one, for the compiler to unroll
            quantize_block(x, kBlock, limits, planes, codes, block, outliers);
        } else {
            quantize_block(x, length, limits, planes, codes, block, outliers);
        }
        k += length;
        x += length;
        in_group = in_group + length < layout.group ? in_group + length : 0;
        codes += round_up(length, kStep) * planes;
        block++;
        outliers += layout.block_outliers;
    }
}

}  // namespace
}  // namespace tinychat
