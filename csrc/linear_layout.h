// How linears lie in memory at every level: packed weights, and activations prepared for them.
//
// Weights. A tile is 16 output rows; tiles follow one another, and a tile is one linear stream. Of 4-bit weights, a
// "register" of 64 bytes holds 8 consecutive k of the 16 rows, so that one AND and one shift with AND unpack it (the
// SIMD-aware packing of arXiv 2306.00978, section 4.2, with one 32-bit lane per row in place of one byte):
//
//            row 0                                row 1     ...  row 15
//   byte     0         1         2         3      4              63
//   bits 0-3 k         k+1       k+2       k+3    k ...
//   bits 4-7 k+4       k+5       k+6       k+7    k+4 ...
//
// A row's sum stays in its lane: activations are broadcast, and no sum runs across a register. Groups are padded to whole
// registers, and come in chunks of four (the last chunk of a tile may hold fewer, m), scales and zeros inline before the
// codes, padded to a cache line. In fp16 with groups of 128 that is 4.1875 bits for a weight.
//
//   chunk: | m x scales[16] | m x zeros[16] (uint8) | pad to 64 | codes of group 0 | .. | codes of group m-1 |
//
// Padding (rows beyond n, k beyond a group's end) is zero: codes, scales and zeros.
// Weights of the other types are k-major within the tile, values[k][16], k padded to 4 with zeros.
//
// Activations. For the other types: the row as fp32, padded to 4. For 4-bit weights: integers x with a scale per block. A
// block is a group, or a piece of at most 128 of one that is longer: 128 * 15 * 32639 fits in int32 many times over, and
// one scale should not serve more. A register of 8 codes takes 16 bytes, in the order that the level likes:
//
//   row: | 16 bytes per register | pad to 64 | Block per block | Outlier[block_outliers] per block |
//
// Every function here has internal linkage: this header is compiled anew, with other flags, in each level's unit.
#pragma once
#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace tinychat {

// In linear_layout.cpp, compiled once for every level.
int64_t packed_bytes(const WeightShape& shape);
void pack(const WeightShape& shape, const WeightData& data, void* packed, int64_t tile_begin, int64_t tile_end);
void unpack(const WeightShape& shape, const void* packed, const WeightData& data);

namespace {

constexpr int64_t kTile = 16;
constexpr int64_t kChunk = 4;           // groups
constexpr int64_t kBlockRegisters = 16;  // of 8 codes: 128
constexpr int64_t kRegisterBytes = 64;
constexpr int64_t kFloatStep = 4;  // k of the other types are padded to this

struct Block {
    float scale;       // of the integers; NaN where the block holds NaN or infinity
    int32_t sum;       // of the integers, for the zero point
    int32_t outliers;  // how many were taken out
    int32_t unused;
};

struct Outlier {
    int32_t index;  // within the block
    float value;
};

[[maybe_unused]] int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
[[maybe_unused]] int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }
[[maybe_unused]] int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Length of a group; one group per row where there are none (the other types leave it 0).
[[maybe_unused]] int64_t group_length(const WeightShape& shape) {
    return shape.group > 0 && shape.group < shape.k ? shape.group : shape.k;
}

// Sizes of a 4-bit linear, in registers of 8 codes unless named otherwise.
struct Q4Layout {
    int64_t groups, group_registers, last_registers;
    int64_t group_blocks, blocks;   // blocks of a full group, of a row
    int64_t registers;              // of a row
    int64_t scale_bytes;            // of one group of a tile
    int64_t tile_bytes;
    int64_t block_outliers;         // at most so many in a block
    int64_t blocks_at, outliers_at;  // byte offsets in an activation
    int64_t activation_bytes;

    explicit Q4Layout(const WeightShape& shape) {
        const int64_t group = group_length(shape);
        groups = divide_up(shape.k, group);
        group_registers = divide_up(group, 8);
        last_registers = divide_up(shape.k - (groups - 1) * group, 8);
        group_blocks = divide_up(group_registers, kBlockRegisters);
        blocks = (groups - 1) * group_blocks + divide_up(last_registers, kBlockRegisters);
        registers = (groups - 1) * group_registers + last_registers;
        scale_bytes = kTile * (shape.wide_scales ? 4 : 2);
        tile_bytes = registers * kRegisterBytes + (groups / kChunk) * header_bytes(kChunk) + header_bytes(groups % kChunk);
        block_outliers = divide_up(smaller(group, kBlockRegisters * 8), 16);
        blocks_at = round_up(registers * 16, 64);
        outliers_at = blocks_at + blocks * int64_t{sizeof(Block)};
        activation_bytes = round_up(outliers_at + blocks * block_outliers * int64_t{sizeof(Outlier)}, 64);
    }

    // Scales and zeros of a chunk of m groups.
    int64_t header_bytes(int64_t m) const { return round_up(m * (scale_bytes + kTile), 64); }
    int64_t registers_of(int64_t group) const { return group == groups - 1 ? last_registers : group_registers; }
};

[[maybe_unused]] constexpr int64_t value_bytes(WeightType type) { return type == WeightType::f32 ? 4 : 2; }
[[maybe_unused]] int64_t float_steps(const WeightShape& shape) { return round_up(shape.k, kFloatStep); }
[[maybe_unused]] int64_t float_tile_bytes(const WeightShape& shape) {
    return float_steps(shape) * kTile * value_bytes(shape.type);
}

[[maybe_unused]] int64_t activation_bytes(const WeightShape& shape) {
    if (shape.type == WeightType::q4) return Q4Layout(shape).activation_bytes;
    return round_up(float_steps(shape) * 4, 64);
}

// ---- preparing activations -------------------------------------------------------------------------------------------

// One block of `length` values to integers within +-32639 (= 127 * 256 + 127, so that two int8 planes hold them):
// integers[i] = round(x[i] / scale), zero from length to the end of the block.
//
// What it guarantees. A step of the integers is at most 1/32639 of the largest value, so that against the product of
// norms |x||w| the error is of NMSE 1e-8 or less. Beyond that, of the largest values, one in 16, those more than 32 times
// the mean size of the other 15 in 16 are taken out, and multiplied in fp32. What remains has steps of at most 1/1020 of
// that mean: results that the taken do not touch, their weights being zero, keep an NMSE of about 1e-7. The usual block
// pays one comparison for it. Not guaranteed: results carried only by values much smaller than the mean of their block.
// Blocks whose values are all below 1e-33 count as zero; a block with NaN or infinity makes every output NaN.
[[maybe_unused]] void quantize_block(const float* x, int64_t length, int32_t* integers, Block* block,
                                     Outlier* outliers) {
    constexpr int64_t kMost = kBlockRegisters * 8;
    constexpr float kNoise = 32.0f, kTiny = 1e-33f, kRange = 32639.0f;
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the rounded integer in the low bits
    float values[kMost];
    std::memcpy(values, x, static_cast<size_t>(length) * 4);
    const int64_t padded = length == kMost ? kMost : round_up(length, 16);
    for (int64_t i = length; i < padded; i++) values[i] = 0;

    float sum = 0, largest = 0;
    uint32_t bits[kMost];
    auto measure = [&] {  // sum and largest of |values|, in lanes that the compiler turns into vectors
        std::memcpy(bits, values, static_cast<size_t>(padded) * 4);
        float sums[16] = {};
        int32_t most[16] = {};
        for (int64_t i = 0; i < padded; i += 16) {
            for (int64_t j = 0; j < 16; j++) {
                const int32_t size = static_cast<int32_t>(bits[i + j] & 0x7fffffffu);
                most[j] = size > most[j] ? size : most[j];
                sums[j] += values[i + j] < 0 ? -values[i + j] : values[i + j];
            }
        }
        sum = 0;
        int32_t most_bits = 0;
        for (int64_t j = 0; j < 16; j++) {
            sum += sums[j];
            most_bits = most[j] > most_bits ? most[j] : most_bits;
        }
        std::memcpy(&largest, &most_bits, 4);
        return most_bits < 0x7f800000;
    };

    block->outliers = 0;
    block->sum = 0;
    block->unused = 0;
    const bool finite = measure();
    const int64_t most = divide_up(length, 16);
    const float count = static_cast<float>(most), rest = static_cast<float>(length - most);
    if (finite && largest * (count + rest / kNoise) > sum) {  // true wherever there is an outlier; else rare
        for (int64_t i = 0; i < most; i++) {
            int64_t at = 0;
            while (values[at] != largest && values[at] != -largest) at++;
            outliers[i] = {static_cast<int32_t>(at), values[at]};
            values[at] = 0;
            measure();
        }
        const float limit = kNoise * sum / rest;
        for (int64_t i = 0; i < most; i++) {  // from the largest down
            const float value = outliers[i].value, size = value < 0 ? -value : value;
            if (size > limit) {
                block->outliers++;
            } else {
                values[outliers[i].index] = value;
                largest = size > largest ? size : largest;
            }
        }
    }
    if (!finite || largest < kTiny) {
        const uint32_t nan = 0x7fc00000u;
        block->scale = 0;
        if (!finite) std::memcpy(&block->scale, &nan, 4);
        std::memset(integers, 0, static_cast<size_t>(padded) * 4);
        return;
    }
    block->scale = largest / kRange;
    const float inverse = kRange / largest;
    int32_t total = 0, offset;
    std::memcpy(&offset, &kRound, 4);
    for (int64_t i = 0; i < padded; i++) values[i] = values[i] * inverse + kRound;
    std::memcpy(bits, values, static_cast<size_t>(padded) * 4);
    for (int64_t i = 0; i < padded; i++) {
        integers[i] = static_cast<int32_t>(bits[i]) - offset;
        total += integers[i];
    }
    block->sum = total;
}

// One row for the kernels of a level. store(integers, register) writes the 16 bytes of a register from its 8 integers.
template <class Store>
void prepare_row(const WeightShape& shape, const float* x, void* activation, Store store) {
    if (shape.type != WeightType::q4) {
        std::memcpy(activation, x, static_cast<size_t>(shape.k) * 4);
        const int64_t padding = activation_bytes(shape) - shape.k * 4;
        std::memset(static_cast<char*>(activation) + shape.k * 4, 0, static_cast<size_t>(padding));
        return;
    }
    const Q4Layout layout(shape);
    char* codes = static_cast<char*>(activation);
    Block* block = reinterpret_cast<Block*>(codes + layout.blocks_at);
    Outlier* outliers = reinterpret_cast<Outlier*>(codes + layout.outliers_at);
    const int64_t group = group_length(shape);
    alignas(64) int32_t integers[kBlockRegisters * 8];
    for (int64_t begin = 0; begin < shape.k; begin += group) {
        const int64_t end = smaller(begin + group, shape.k);
        for (int64_t k = begin; k < end; k += kBlockRegisters * 8) {
            const int64_t length = smaller(end - k, kBlockRegisters * 8);
            quantize_block(x + k, length, integers, block++, outliers);
            outliers += layout.block_outliers;
            for (int64_t i = 0; i < length; i += 8, codes += 16) store(integers + i, codes);
        }
    }
}

}  // namespace
}  // namespace tinychat
