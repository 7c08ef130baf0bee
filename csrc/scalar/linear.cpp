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

void store_register(const int32_t* integers, char* out) {
    int16_t narrow[8];
    for (int i = 0; i < 8; i++) narrow[i] = static_cast<int16_t>(integers[i]);
    std::memcpy(out, narrow, 16);
}

void prepare(const WeightShape& shape, const float* x, void* activation) {
    prepare_row(shape, x, activation, [](const int32_t* integers, char* out) { store_register(integers, out); });
}

void tile_q4(const Q4Layout& layout, bool wide_scales, const char* at, const char* activation, float* y) {
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
                scale[r] = load(scales, r, wide_scales ? WeightType::f32 : WeightType::f16);
                zero[r] = static_cast<uint8_t>(zeros[r]);
            }
            const int64_t registers = layout.registers_of(g);
            for (int64_t begin = 0; begin < registers; begin += kBlockRegisters) {
                const int64_t count = smaller(kBlockRegisters, registers - begin);
                int32_t sums[kTile] = {};
                for (int64_t i = 0; i < count; i++) {
                    uint32_t lanes[kTile];
                    int16_t factors[8];
                    std::memcpy(lanes, at + i * kRegisterBytes, kRegisterBytes);
                    std::memcpy(factors, x + i * 16, 16);
                    for (int j = 0; j < 4; j++) {
                        for (int64_t r = 0; r < kTile; r++) {
                            sums[r] += static_cast<int32_t>(lanes[r] >> 8 * j & 15) * factors[j] +
                                       static_cast<int32_t>(lanes[r] >> (8 * j + 4) & 15) * factors[j + 4];
                        }
                    }
                }
                for (int64_t r = 0; r < kTile; r++) {
                    y[r] += static_cast<float>(sums[r] - zero[r] * block->sum) * (scale[r] * block->scale);
                }
                for (int32_t o = 0; o < block->outliers; o++) {
                    const int64_t in_register = outliers[o].index % 8;
                    const auto shift = static_cast<uint32_t>(in_register % 4 * 8 + in_register / 4 * 4);
                    uint32_t lanes[kTile];
                    std::memcpy(lanes, at + outliers[o].index / 8 * kRegisterBytes, kRegisterBytes);
                    for (int64_t r = 0; r < kTile; r++) {
                        const int32_t code = static_cast<int32_t>(lanes[r] >> shift & 15);
                        y[r] += static_cast<float>(code - zero[r]) * scale[r] * outliers[o].value;
                    }
                }
                at += count * kRegisterBytes;
                x += count * 16;
                block++;
                outliers += layout.block_outliers;
            }
        }
    }
}

void tile_float(const WeightShape& shape, const char* at, const float* x, float* y) {
    float sums[kFloatStep][kTile] = {};
    for (int64_t k = 0; k < float_steps(shape); k += kFloatStep) {
        for (int64_t j = 0; j < kFloatStep; j++) {
            for (int64_t r = 0; r < kTile; r++) sums[j][r] += load(at, (k + j) * kTile + r, shape.type) * x[k + j];
        }
    }
    for (int64_t r = 0; r < kTile; r++) y[r] = (sums[0][r] + sums[1][r]) + (sums[2][r] + sums[3][r]);
}

void linear(const WeightShape& shape, const void* packed, const void* activations, int64_t rows, int64_t tile_begin,
            int64_t tile_end, float* y, int64_t y_stride) {
    const int64_t tile_bytes = packed_bytes(shape) / divide_up(shape.n, kTile), row_bytes = activation_bytes(shape);
    for (int64_t tile = tile_begin; tile < tile_end; tile++) {
        const char* at = static_cast<const char*>(packed) + tile * tile_bytes;
        const int64_t outputs = smaller(kTile, shape.n - tile * kTile);
        for (int64_t t = 0; t < rows; t++) {
            const char* activation = static_cast<const char*>(activations) + t * row_bytes;
            float results[kTile];
            if (shape.type == WeightType::q4) {
                tile_q4(Q4Layout(shape), shape.wide_scales, at, activation, results);
            } else {
                tile_float(shape, at, reinterpret_cast<const float*>(activation), results);
            }
            std::memcpy(y + t * y_stride + tile * kTile, results, static_cast<size_t>(outputs) * 4);
        }
    }
}

}  // namespace

const LinearKernels& linear_scalar() {
    static constexpr LinearKernels table{kTile, packed_bytes, pack, unpack, activation_bytes, prepare, linear};
    return table;
}

}  // namespace tinychat
