// Packing and unpacking, the same at every level: see linear_layout.h for the layout.
#include "linear_layout.h"

#include "half.h"

namespace tinychat {
namespace {

// 8 codes of a row, one in a byte, to its lanes in the registers of a step; `count` of them are there, the others zero.
void join(const uint8_t* codes, int64_t count, int32_t bits, char* lane) {
    uint32_t halves[2] = {0, 0};
    std::memcpy(halves, codes, static_cast<size_t>(count));
    if (bits == 4) {
        halves[0] |= halves[1] << 4;
        std::memcpy(lane, halves, 4);
    } else {
        std::memcpy(lane, halves, 4);
        std::memcpy(lane + kRegisterBytes, halves + 1, 4);
    }
}

void split(const char* lane, int64_t count, int32_t bits, uint8_t* codes) {
    uint32_t halves[2];
    std::memcpy(halves, lane, 4);
    if (bits == 4) {
        halves[1] = halves[0] >> 4 & 0x0f0f0f0fu;
        halves[0] &= 0x0f0f0f0fu;
    } else {
        std::memcpy(halves + 1, lane + kRegisterBytes, 4);
    }
    std::memcpy(codes, halves, static_cast<size_t>(count));
}

// Visits every group of the rows of tile `tile`: visit(group, k, length, scales, zeros, codes) with the packed places.
template <class Visit>
void each_group(const LinearShape& shape, const QuantizedLayout& layout, char* at, Visit visit) {
    for (int64_t first = 0; first < layout.groups; first += kChunk) {
        const int64_t m = smaller(kChunk, layout.groups - first);
        char *scales = at, *zeros = at + m * layout.scale_bytes;
        at += layout.header_bytes(m);
        for (int64_t g = first; g < first + m; g++) {
            visit(g, g * layout.group, smaller(layout.group, shape.k - g * layout.group), scales, zeros, at);
            scales += layout.scale_bytes;
            zeros += kTile;
            at += layout.padded(g) / kStep * layout.step_bytes;
        }
    }
}

void pack_codes(const LinearShape& shape, const WeightData& data, char* at, int64_t row, int64_t rows) {
    const QuantizedLayout layout(shape);
    const int64_t scale_bytes = layout.scale_bytes / kTile;
    const auto* codes = static_cast<const uint8_t*>(data.values);
    std::memset(at, 0, static_cast<size_t>(layout.tile_bytes));
    each_group(shape, layout, at, [&](int64_t g, int64_t k, int64_t length, char* scales, char* zeros, char* registers) {
        for (int64_t r = 0; r < rows; r++) {
            const int64_t index = (row + r) * layout.groups + g;
            std::memcpy(scales + r * scale_bytes, static_cast<const char*>(data.scales) + index * scale_bytes,
                        static_cast<size_t>(scale_bytes));
            zeros[r] = static_cast<const char*>(data.zeros)[index];
            const uint8_t* source = codes + (row + r) * shape.k + k;
            for (int64_t i = 0; i < length; i += kStep) {
                join(source + i, smaller(kStep, length - i), shape.bits, registers + i / kStep * layout.step_bytes + r * 4);
            }
        }
    });
}

void unpack_codes(const LinearShape& shape, const char* at, const WeightData& data, int64_t row, int64_t rows) {
    const QuantizedLayout layout(shape);
    const int64_t scale_bytes = layout.scale_bytes / kTile;
    auto* codes = static_cast<uint8_t*>(data.values);
    each_group(shape, layout, const_cast<char*>(at),
               [&](int64_t g, int64_t k, int64_t length, const char* scales, const char* zeros, const char* registers) {
                   for (int64_t r = 0; r < rows; r++) {
                       const int64_t index = (row + r) * layout.groups + g;
                       std::memcpy(static_cast<char*>(data.scales) + index * scale_bytes, scales + r * scale_bytes,
                                   static_cast<size_t>(scale_bytes));
                       static_cast<char*>(data.zeros)[index] = zeros[r];
                       uint8_t* target = codes + (row + r) * shape.k + k;
                       for (int64_t i = 0; i < length; i += kStep) {
                           split(registers + i / kStep * layout.step_bytes + r * 4, smaller(kStep, length - i), shape.bits,
                                 target + i);
                       }
                   }
               });
}

template <class Value>
void pack_values(const LinearShape& shape, const WeightData& data, char* at, int64_t row, int64_t rows) {
    std::memset(at, 0, static_cast<size_t>(float_tile_bytes(shape)));
    auto* packed = reinterpret_cast<Value*>(at);
    for (int64_t r = 0; r < rows; r++) {
        const Value* source = static_cast<const Value*>(data.values) + (row + r) * shape.k;
        for (int64_t k = 0; k < shape.k; k++) packed[k * kTile + r] = source[k];
    }
}

template <class Value>
void unpack_values(const LinearShape& shape, const char* at, const WeightData& data, int64_t row, int64_t rows) {
    const auto* packed = reinterpret_cast<const Value*>(at);
    for (int64_t r = 0; r < rows; r++) {
        Value* target = static_cast<Value*>(data.values) + (row + r) * shape.k;
        for (int64_t k = 0; k < shape.k; k++) target[k] = packed[k * kTile + r];
    }
}

int64_t tile_bytes(const LinearShape& shape) {
    return shape.type == WeightType::quantized ? QuantizedLayout(shape).tile_bytes : round_up(float_tile_bytes(shape), 64);
}

float load(const char* values, int64_t index, WeightType type) {
    if (type == WeightType::f32) return reinterpret_cast<const float*>(values)[index];
    const uint16_t bits = reinterpret_cast<const uint16_t*>(values)[index];
    return type == WeightType::f16 ? from_half(bits) : from_bf16(bits);
}

}  // namespace

int64_t packed_bytes(const LinearShape& shape) { return divide_up(shape.n, kTile) * tile_bytes(shape); }

void pack(const LinearShape& shape, const WeightData& data, void* packed, int64_t tile_begin, int64_t tile_end) {
    const int64_t bytes = tile_bytes(shape);
    for (int64_t tile = tile_begin; tile < tile_end; tile++) {
        char* at = static_cast<char*>(packed) + tile * bytes;
        const int64_t row = tile * kTile, rows = smaller(kTile, shape.n - row);
        if (shape.type == WeightType::quantized) {
            pack_codes(shape, data, at, row, rows);
        } else if (shape.type == WeightType::f32) {
            pack_values<uint32_t>(shape, data, at, row, rows);
        } else {
            pack_values<uint16_t>(shape, data, at, row, rows);
        }
    }
}

void unpack(const LinearShape& shape, const void* packed, const WeightData& data) {
    const int64_t bytes = tile_bytes(shape);
    for (int64_t row = 0; row < shape.n; row += kTile) {
        const char* at = static_cast<const char*>(packed) + row / kTile * bytes;
        const int64_t rows = smaller(kTile, shape.n - row);
        if (shape.type == WeightType::quantized) {
            unpack_codes(shape, at, data, row, rows);
        } else if (shape.type == WeightType::f32) {
            unpack_values<uint32_t>(shape, at, data, row, rows);
        } else {
            unpack_values<uint16_t>(shape, at, data, row, rows);
        }
    }
}

void unpack_row(const LinearShape& shape, const void* packed, int64_t row, float* values) {
    const char* at = static_cast<const char*>(packed) + row / kTile * tile_bytes(shape);
    const int64_t r = row % kTile;
    if (shape.type != WeightType::quantized) {
        for (int64_t k = 0; k < shape.k; k++) values[k] = load(at, k * kTile + r, shape.type);
        return;
    }
    const QuantizedLayout layout(shape);
    each_group(shape, layout, const_cast<char*>(at),
               [&](int64_t, int64_t k, int64_t length, const char* scales, const char* zeros, const char* registers) {
                   const float scale = load(scales, r, shape.wide_scales ? WeightType::f32 : WeightType::f16);
                   const auto zero = static_cast<uint8_t>(zeros[r]);
                   for (int64_t i = 0; i < length; i += kStep) {
                       uint8_t codes[kStep];
                       split(registers + i / kStep * layout.step_bytes + r * 4, kStep, shape.bits, codes);
                       for (int64_t j = 0; j < smaller(kStep, length - i); j++) {
                           values[k + i + j] = static_cast<float>(codes[j] - zero) * scale;
                       }
                   }
               });
}

}  // namespace tinychat
