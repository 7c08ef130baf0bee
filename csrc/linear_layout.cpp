// Unpacking, the same at every level, and the choice of who packs: see linear_layout.h for the layout.
#include "linear_layout.h"

#include "half.h"
#include "packing.h"

namespace tinychat {
namespace {

float load(const char* values, int64_t index, WeightType type) {
    if (type == WeightType::f32) return reinterpret_cast<const float*>(values)[index];
    const uint16_t bits = reinterpret_cast<const uint16_t*>(values)[index];
    return type == WeightType::f16 ? from_half(bits) : from_bf16(bits);
}

// The first `count` codes of the unit of a row whose lane is given.
template <int bits>
void split(const char* lane, int64_t count, uint8_t* codes) {
    uint32_t h[unit_length(bits) / 4];
    for (int i = 0; i < unit_length(bits) / 4; i++) h[i] = unpacked<bits, uint32_t>(lane, i);
    std::memcpy(codes, h, static_cast<size_t>(count));
}

template <int bits>
void unpack_codes(const LinearShape& shape, const char* tile, const WeightData& data, int64_t row, int64_t rows) {
    const QuantizedLayout layout(shape);
    const int64_t scale_bytes = layout.scale_bytes / kTile;
    auto* codes = static_cast<uint8_t*>(data.values);
    each_group(shape, layout, [&](int64_t g, int64_t k, int64_t length, const GroupPlace& place) {
        for (int64_t r = 0; r < rows; r++) {
            const int64_t index = (row + r) * layout.groups + g;
            std::memcpy(static_cast<char*>(data.scales) + index * scale_bytes, tile + place.scales + r * scale_bytes,
                        static_cast<size_t>(scale_bytes));
            static_cast<char*>(data.zeros)[index] = tile[place.zeros + r];
            uint8_t* target = codes + (row + r) * shape.k + k;
            const char* lane = tile + place.codes + r * 4;
            for (int64_t i = 0; i < length; i += unit_length(bits), lane += unit_bytes(bits)) {
                split<bits>(lane, smaller(unit_length(bits), length - i), target + i);
            }
        }
    });
}

template <int bits>
void unpack_row_codes(const LinearShape& shape, const char* tile, int64_t r, float* values) {
    const QuantizedLayout layout(shape);
    each_group(shape, layout, [&](int64_t, int64_t k, int64_t length, const GroupPlace& place) {
        const float scale = load(tile + place.scales, r, shape.wide_scales ? WeightType::f32 : WeightType::f16);
        const auto zero = static_cast<uint8_t>(tile[place.zeros + r]);
        const char* lane = tile + place.codes + r * 4;
        for (int64_t i = 0; i < length; i += unit_length(bits), lane += unit_bytes(bits)) {
            uint8_t codes[unit_length(bits)];
            split<bits>(lane, unit_length(bits), codes);
            for (int64_t j = 0; j < smaller(unit_length(bits), length - i); j++) {
                values[k + i + j] = static_cast<float>(codes[j] - zero) * scale;
            }
        }
    });
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

}  // namespace

int64_t packed_bytes(const LinearShape& shape) { return divide_up(shape.n, kTile) * tile_bytes(shape); }

int64_t stored_bytes(Source source, int64_t k, int32_t bits) {
    switch (source) {
        case Source::stream: return divide_up(k * bits, 32) * 4;
        case Source::q4_0: return divide_up(k, 32) * 18;
        case Source::q8_0: return divide_up(k, 32) * 34;
        case Source::q6_k: return divide_up(k, 256) * 210;
        default: return 0;
    }
}

void pack(const LinearShape& shape, const WeightData& data, void* packed, int64_t tile_begin, int64_t tile_end) {
    if (shape.type != WeightType::quantized) return pack_values(shape, data, packed, tile_begin, tile_end);
    switch (data.source) {
        case Source::awq: return pack_awq(shape, data, packed, tile_begin, tile_end);
        case Source::stream: return pack_stream(shape, data, packed, tile_begin, tile_end);
        case Source::f32:
        case Source::f16:
        case Source::bf16: return pack_rounded(shape, data, packed, tile_begin, tile_end);
        default: return pack_codes(shape, data, packed, tile_begin, tile_end);
    }
}

void unpack(const LinearShape& shape, const void* packed, const WeightData& data) {
    const int64_t bytes = tile_bytes(shape);
    for (int64_t row = 0; row < shape.n; row += kTile) {
        const char* at = static_cast<const char*>(packed) + row / kTile * bytes;
        const int64_t rows = smaller(kTile, shape.n - row);
        if (shape.type == WeightType::quantized) {
            with_bits(shape.bits, [&](auto bits) { unpack_codes<bits.value>(shape, at, data, row, rows); });
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
    with_bits(shape.bits, [&](auto bits) { unpack_row_codes<bits.value>(shape, at, r, values); });
}

}  // namespace tinychat
