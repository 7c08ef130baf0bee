// The portable linear: what the other levels must equal, and what runs where none of them does.
//
//   y[t, r] = sum over blocks of (sum over k of q x - z sum(x)) * (s * scale of x)  +  sum over outliers of (q - z) s x
//
// with q and z the codes and zeros of row r, s its scale for the group, and x integers: the inner sums are exact.
// Speed: whatever the compiler makes of loops over the 16 rows of a tile.
#include "half.h"
#include "levels.h"
#include "linear_layout.h"

namespace tinychat {
namespace {

float load(const char* values, int64_t index, WeightType type) {
    if (type == WeightType::f32) {
        float value;
        std::memcpy(&value, values + index * 4, 4);
        return value;
    }
    uint16_t bits;
    std::memcpy(&bits, values + index * 2, 2);
    return type == WeightType::f16 ? from_half(bits) : from_bf16(bits);
}

// Integer i of a block of `length`.
int32_t integer(const char* x, int64_t i, int64_t length, int64_t planes) {
    const auto* bytes = reinterpret_cast<const int8_t*>(x);
    return planes == 1 ? bytes[i] : bytes[i] * 256 + bytes[length + i];
}

// The code of row r and element i of the block whose codes begin at `at`.
template <int bits>
int32_t code(const char* at, int64_t i, int64_t r) {
    return static_cast<int32_t>(one_code<bits, uint32_t>(at + r * 4, i));
}

template <int bits>
void tile_quantized(const LinearShape& shape, const QuantizedLayout& layout, const char* at, const char* activation,
                    float* y) {
    const char* x = activation;
    const auto* block = reinterpret_cast<const Block*>(activation + layout.blocks_at);
    const auto* outliers = reinterpret_cast<const Outlier*>(activation + layout.outliers_at);
    for (int64_t r = 0; r < kTile; r++) y[r] = 0;
    for (int64_t first = 0; first < layout.groups; first += kChunk) {
        const int64_t m = smaller(kChunk, layout.groups - first);
        const char *scales = at, *zeros = at + m * layout.scale_bytes;
        at += layout.header_bytes(m);
        for (int64_t g = first; g < first + m; g++, scales += layout.scale_bytes, zeros += kTile) {
            float scale[kTile];
            int32_t zero[kTile];
            for (int64_t r = 0; r < kTile; r++) {
                scale[r] = load(scales, r, shape.wide_scales ? WeightType::f32 : WeightType::f16);
                zero[r] = static_cast<uint8_t>(zeros[r]);
            }
            for (int64_t begin = 0; begin < layout.padded(g); begin += kBlock) {
                const int64_t length = smaller(kBlock, layout.padded(g) - begin);
                int32_t sums[kTile] = {};
                for (int64_t i = 0; i < length; i++) {
                    const int32_t factor = integer(x, i, length, layout.integer_bytes);
                    for (int64_t r = 0; r < kTile; r++) sums[r] += code<bits>(at, i, r) * factor;
                }
                for (int64_t r = 0; r < kTile; r++) {
                    y[r] += static_cast<float>(sums[r] - zero[r] * block->sum) * (scale[r] * block->scale);
                }
                for (int32_t o = 0; o < block->outliers; o++) {
                    for (int64_t r = 0; r < kTile; r++) {
                        const int32_t difference = code<bits>(at, outliers[o].index, r) - zero[r];
                        y[r] += static_cast<float>(difference) * scale[r] * outliers[o].value;
                    }
                }
                at += layout.code_bytes(length);
                x += length * layout.integer_bytes;
                block++;
                outliers += layout.block_outliers;
            }
        }
    }
}

void tile_float(const LinearShape& shape, const char* at, const float* x, float* y) {
    float sums[kFloatStep][kTile] = {};
    for (int64_t k = 0; k < float_steps(shape); k += kFloatStep) {
        for (int64_t j = 0; j < kFloatStep; j++) {
            for (int64_t r = 0; r < kTile; r++) sums[j][r] += load(at, (k + j) * kTile + r, shape.type) * x[k + j];
        }
    }
    for (int64_t r = 0; r < kTile; r++) y[r] = (sums[0][r] + sums[1][r]) + (sums[2][r] + sums[3][r]);
}

void linear(const LinearShape& shape, const void* packed, const void* activations, int64_t rows, int64_t tile_begin,
            int64_t tile_end, float* y, int64_t y_stride) {
    const int64_t tile_bytes = packed_bytes(shape) / divide_up(shape.n, kTile), row_bytes = activation_bytes(shape);
    for (int64_t tile = tile_begin; tile < tile_end; tile++) {
        const char* at = static_cast<const char*>(packed) + tile * tile_bytes;
        const int64_t outputs = smaller(kTile, shape.n - tile * kTile);
        for (int64_t t = 0; t < rows; t++) {
            const char* activation = static_cast<const char*>(activations) + t * row_bytes;
            float results[kTile];
            if (shape.type == WeightType::quantized) {
                with_bits(shape.bits, [&](auto bits) {
                    tile_quantized<bits.value>(shape, QuantizedLayout(shape), at, activation, results);
                });
            } else {
                tile_float(shape, at, reinterpret_cast<const float*>(activation), results);
            }
            std::memcpy(y + t * y_stride + tile * kTile, results, static_cast<size_t>(outputs) * 4);
        }
    }
}

}  // namespace

const LinearKernels& linear_scalar() {
    static constexpr LinearKernels table{kTile, packed_bytes, pack, unpack, unpack_row, activation_bytes, prepare_step, prepare_part,
                                         linear};
    return table;
}

}  // namespace tinychat
