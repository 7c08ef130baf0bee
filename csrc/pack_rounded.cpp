// Values rounded while they are packed: an output head of 16 bits kept in 8, symmetric, groups along k.
//
//   scale = the least number of the scales' type that is not below (largest |w| of the group) / most,
//           or the largest number of the type where there is none; most = 2^(bits - 1) - 1
//   code  = w / scale, in fp32, to the nearest integer (of two, the even one), within +-most, plus 2^(bits - 1)
//
// A group of zeros has scale 0. Rounding scales up keeps the largest weight from being cut. tinychat/qtensor.py states the
// same in numpy, bit by bit. Values are finite (the reader has looked). A row is widened by 128 values at a time.
#include "half.h"
#include "packing.h"

namespace tinychat {
namespace {

constexpr int64_t kPiece = 128;  // values at a time
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, the even one of two

// Without branches, for the compiler to turn into vectors; finite values only.
inline float widen(uint16_t half) {
    const uint32_t rest = half & 0x7fffu;
    const float subnormal = static_cast<float>(static_cast<int32_t>(rest)) * 0x1p-24f;
    uint32_t small;
    std::memcpy(&small, &subnormal, 4);
    const uint32_t is_small = 0u - (rest < 0x400u), normal = (rest << 13) + (112u << 23);
    return from_bits((small & is_small) | (normal & ~is_small) | (half & 0x8000u) << 16);
}

// `length` values from index `from`, at most kPiece.
void read(Source source, const void* values, int64_t from, int64_t length, float* out) {
    if (source == Source::f32) {
        std::memcpy(out, static_cast<const float*>(values) + from, static_cast<size_t>(length) * 4);
    } else {
        const uint16_t* at = static_cast<const uint16_t*>(values) + from;
        if (source == Source::f16) {
            for (int64_t i = 0; i < length; i++) out[i] = widen(at[i]);
        } else {
            for (int64_t i = 0; i < length; i++) out[i] = from_bf16(at[i]);
        }
    }
}

// The largest magnitude: of finite numbers, the one whose bits without the sign are the largest integer.
template <class Integer>
Integer most_bits(const void* values, int64_t from, int64_t length, Integer magnitude) {
    const Integer* at = static_cast<const Integer*>(values) + from;
    Integer most = 0;
    for (int64_t i = 0; i < length; i++) {
        const auto size = static_cast<Integer>(at[i] & magnitude);
        most = size > most ? size : most;
    }
    return most;
}

float largest(Source source, const void* values, int64_t from, int64_t length) {
    if (source == Source::f32) return from_bits(static_cast<uint32_t>(most_bits<int32_t>(values, from, length, 0x7fffffff)));
    const auto bits = static_cast<uint16_t>(most_bits<int16_t>(values, from, length, 0x7fff));
    return source == Source::f16 ? from_half(bits) : from_bf16(bits);
}

// The least fp16 that is not below `value` >= 0, or the largest that is finite.
uint16_t half_above(float value) {
    if (!(value > 0)) return 0;
    if (value >= 65504.0f) return 0x7bff;
    if (value <= 0x1p-14f) {  // subnormal: a multiple of 2^-24
        const float steps = value * 0x1p24f;  // exact
        auto whole = static_cast<uint16_t>(steps);
        return static_cast<float>(whole) < steps ? ++whole : whole;
    }
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return static_cast<uint16_t>((bits - (112u << 23) + 0x1fffu) >> 13);
}

void codes_of(const float* values, int64_t length, float scale, int32_t most, uint8_t* codes) {
    int32_t offset;
    std::memcpy(&offset, &kRound, 4);
    const auto end = static_cast<float>(most);
    float scaled[kPiece];
    int32_t integers[kPiece];
    for (int64_t i = 0; i < length; i++) {
        float quotient = values[i] / scale;
        quotient = quotient < -end ? -end : quotient;
        quotient = quotient > end ? end : quotient;
        scaled[i] = quotient + kRound;
    }
    std::memcpy(integers, scaled, static_cast<size_t>(length) * 4);
    for (int64_t i = 0; i < length; i++) codes[i] = static_cast<uint8_t>(integers[i] - offset + most + 1);
}

// Group of row r of a tile: its scale, zero and codes to their places.
template <int bits>
void pack_group(const LinearShape& shape, const WeightData& data, int64_t from, int64_t length, int64_t r,
                const GroupPlace& place, char* tile) {
    constexpr int32_t most = (1 << (bits - 1)) - 1;
    const float size = largest(data.source, data.values, from, length);
    float scale = size / static_cast<float>(most);
    if (shape.wide_scales) {
        std::memcpy(tile + place.scales + r * 4, &scale, 4);
    } else {
        const uint16_t half = half_above(scale);
        std::memcpy(tile + place.scales + r * 2, &half, 2);
        scale = from_half(half);
    }
    tile[place.zeros + r] = static_cast<char>(most + 1);
    char* lane = tile + place.codes + r * 4;
    for (int64_t i = 0; i < length; i += kPiece) {
        const int64_t piece = smaller(kPiece, length - i);
        float values[kPiece];
        read(data.source, data.values, from + i, piece, values);
        uint8_t codes[kPiece] = {};
        if (scale > 0) {
            codes_of(values, piece, scale, most, codes);
        } else {
            std::memset(codes, most + 1, static_cast<size_t>(piece));
        }
        for (int64_t j = 0; j < piece; j += unit_length(bits), lane += unit_bytes(bits)) {
            join<bits>(codes + j, unit_length(bits), lane);
        }
    }
}

}  // namespace

void pack_rounded(const LinearShape& shape, const WeightData& data, void* packed, int64_t tile_begin, int64_t tile_end) {
    const QuantizedLayout layout(shape);
    for (int64_t index = tile_begin; index < tile_end; index++) {
        char* tile = static_cast<char*>(packed) + index * layout.tile_bytes;
        const int64_t row = index * kTile, rows = smaller(kTile, shape.n - row);
        if (rows < kTile) std::memset(tile, 0, static_cast<size_t>(layout.tile_bytes));
        clear_header_padding(layout, tile);
        each_group(shape, layout, [&](int64_t, int64_t k, int64_t length, const GroupPlace& place) {
            with_bits(shape.bits, [&](auto bits) {
                for (int64_t r = 0; r < rows; r++) {
                    pack_group<bits.value>(shape, data, (row + r) * shape.k + k, length, r, place, tile);
                }
            });
        });
    }
}

}  // namespace tinychat
