// Packing and unpacking, the same at every level: see linear_layout.h for the layout.
#include "linear_layout.h"

namespace tinychat {
namespace {

// 8 codes, one in a byte, to the 4 bytes of a lane; `count` of them are there, the others are zero.
uint32_t join(const uint8_t* codes, int64_t count) {
    uint32_t halves[2] = {0, 0};
    std::memcpy(halves, codes, static_cast<size_t>(count));
    return halves[0] | halves[1] << 4;
}

void split(uint32_t lane, uint8_t* codes, int64_t count) {
    const uint32_t halves[2] = {lane & 0x0f0f0f0fu, lane >> 4 & 0x0f0f0f0fu};
    std::memcpy(codes, halves, static_cast<size_t>(count));
}

// Visits every group of the rows of tile `tile`: visit(group, k, length, scales, zeros, codes) with the packed places.
template <class Visit>
void each_group(const WeightShape& shape, const Q4Layout& layout, char* at, Visit visit) {
    const int64_t group = group_length(shape);
    for (int64_t first = 0; first < layout.groups; first += kChunk) {
        const int64_t m = smaller(kChunk, layout.groups - first);
        char *scales = at, *zeros = at + m * layout.scale_bytes;
        at += layout.header_bytes(m);
        for (int64_t g = first; g < first + m; g++) {
            visit(g, g * group, smaller(group, shape.k - g * group), scales, zeros, at);
            scales += layout.scale_bytes;
            zeros += kTile;
            at += layout.registers_of(g) * kRegisterBytes;
        }
    }
}

void pack_q4(const WeightShape& shape, const WeightData& data, char* at, int64_t row, int64_t rows) {
    const Q4Layout layout(shape);
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
            for (int64_t i = 0; i < length; i += 8) {
                const uint32_t lane = join(source + i, smaller(8, length - i));
                std::memcpy(registers + i * 8 + r * 4, &lane, 4);
            }
        }
    });
}

void unpack_q4(const WeightShape& shape, const char* at, const WeightData& data, int64_t row, int64_t rows) {
    const Q4Layout layout(shape);
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
                       for (int64_t i = 0; i < length; i += 8) {
                           uint32_t lane;
                           std::memcpy(&lane, registers + i * 8 + r * 4, 4);
                           split(lane, target + i, smaller(8, length - i));
                       }
                   }
               });
}

template <class Value>
void pack_values(const WeightShape& shape, const WeightData& data, char* at, int64_t row, int64_t rows) {
    std::memset(at, 0, static_cast<size_t>(float_tile_bytes(shape)));
    auto* packed = reinterpret_cast<Value*>(at);
    for (int64_t r = 0; r < rows; r++) {
        const Value* source = static_cast<const Value*>(data.values) + (row + r) * shape.k;
        for (int64_t k = 0; k < shape.k; k++) packed[k * kTile + r] = source[k];
    }
}

template <class Value>
void unpack_values(const WeightShape& shape, const char* at, const WeightData& data, int64_t row, int64_t rows) {
    const auto* packed = reinterpret_cast<const Value*>(at);
    for (int64_t r = 0; r < rows; r++) {
        Value* target = static_cast<Value*>(data.values) + (row + r) * shape.k;
        for (int64_t k = 0; k < shape.k; k++) target[k] = packed[k * kTile + r];
    }
}

int64_t tile_bytes(const WeightShape& shape) {
    return shape.type == WeightType::q4 ? Q4Layout(shape).tile_bytes : round_up(float_tile_bytes(shape), 64);
}

}  // namespace

int64_t packed_bytes(const WeightShape& shape) { return divide_up(shape.n, kTile) * tile_bytes(shape); }

void pack(const WeightShape& shape, const WeightData& data, void* packed, int64_t tile_begin, int64_t tile_end) {
    const int64_t bytes = tile_bytes(shape);
    for (int64_t tile = tile_begin; tile < tile_end; tile++) {
        char* at = static_cast<char*>(packed) + tile * bytes;
        const int64_t row = tile * kTile, rows = smaller(kTile, shape.n - row);
        if (shape.type == WeightType::q4) {
            pack_q4(shape, data, at, row, rows);
        } else if (shape.type == WeightType::f32) {
            pack_values<uint32_t>(shape, data, at, row, rows);
        } else {
            pack_values<uint16_t>(shape, data, at, row, rows);
        }
    }
}

void unpack(const WeightShape& shape, const void* packed, const WeightData& data) {
    const int64_t bytes = tile_bytes(shape);
    for (int64_t row = 0; row < shape.n; row += kTile) {
        const char* at = static_cast<const char*>(packed) + row / kTile * bytes;
        const int64_t rows = smaller(kTile, shape.n - row);
        if (shape.type == WeightType::q4) {
            unpack_q4(shape, at, data, row, rows);
        } else if (shape.type == WeightType::f32) {
            unpack_values<uint32_t>(shape, at, data, row, rows);
        } else {
            unpack_values<uint16_t>(shape, at, data, row, rows);
        }
    }
}

}  // namespace tinychat
