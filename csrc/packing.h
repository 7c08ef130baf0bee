// Packing, one unit for each kind of source; linear_layout.cpp chooses, and unpacks. Compiled once, for every level.
//
// A packer writes every byte of its tiles, padding included, and so asks for no memory that is zero.
#pragma once
#include <cstdint>

#include "linear_layout.h"

namespace tinychat {

void pack_codes(const LinearShape& shape, const WeightData& data, void* packed, int64_t tile_begin, int64_t tile_end);
void pack_awq(const LinearShape& shape, const WeightData& data, void* packed, int64_t tile_begin, int64_t tile_end);
void pack_stream(const LinearShape& shape, const WeightData& data, void* packed, int64_t tile_begin, int64_t tile_end);
void pack_rounded(const LinearShape& shape, const WeightData& data, void* packed, int64_t tile_begin, int64_t tile_end);
void pack_values(const LinearShape& shape, const WeightData& data, void* packed, int64_t tile_begin, int64_t tile_end);

namespace {

// Where the scales, zeros and codes of group `g` of a tile begin, in bytes from the tile's begin.
struct GroupPlace {
    int64_t scales, zeros, codes;
};

// Visits the groups of a tile in order: visit(group, its first k, its length, places).
template <class Visit>
void each_group(const LinearShape& shape, const QuantizedLayout& layout, const Visit& visit) {
    int64_t at = 0;
    for (int64_t first = 0; first < layout.groups; first += kChunk) {
        const int64_t m = smaller(kChunk, layout.groups - first);
        GroupPlace place{at, at + m * layout.scale_bytes, at + layout.header_bytes(m)};
        for (int64_t g = first; g < first + m; g++) {
            visit(g, g * layout.group, smaller(layout.group, shape.k - g * layout.group), place);
            place.scales += layout.scale_bytes;
            place.zeros += kTile;
            place.codes += layout.code_bytes(layout.padded(g));
        }
        at = place.codes;
    }
}

// The codes of a unit of a row, one in a byte, to its lanes; `count` of them are there, the others zero. unpacked() undoes it.
template <int bits>
void join(const uint8_t* codes, int64_t count, char* lane) {
    constexpr int64_t kLength = unit_length(bits);
    uint32_t h[kLength / 4] = {}, registers[unit_bytes(bits) / kRegisterBytes] = {};
    if (count >= kLength) {
        std::memcpy(h, codes, kLength);
    } else {
        std::memcpy(h, codes, static_cast<size_t>(count));
    }
    if constexpr (bits == 3) {
        for (int i = 0; i < 3; i++) registers[i] = h[2 * i] | h[2 * i + 1] << 3;
        registers[0] |= (h[6] & 0x03030303u) << 6;
        registers[1] |= (h[7] & 0x03030303u) << 6;
        registers[2] |= (h[6] & 0x04040404u) << 4 | (h[7] & 0x04040404u) << 5;
    } else {
        for (int i = 0; i < kLength / 4; i++) registers[i * bits / 8] |= h[i] << i * bits % 8;
    }
    for (uint32_t joined : registers) {
        std::memcpy(lane, &joined, 4);
        lane += kRegisterBytes;
    }
}

// Scale and zero of group g of row `row`, which is row r of its tile, from the canonical form.
[[maybe_unused]] void copy_header(const QuantizedLayout& layout, const WeightData& data, int64_t row, int64_t r, int64_t g,
                                  const GroupPlace& place, char* tile) {
    const int64_t scale_bytes = layout.scale_bytes / kTile, index = row * layout.groups + g;
    std::memcpy(tile + place.scales + r * scale_bytes, static_cast<const char*>(data.scales) + index * scale_bytes,
                static_cast<size_t>(scale_bytes));
    tile[place.zeros + r] = static_cast<const char*>(data.zeros)[index];
}

// Clears the bytes of a tile's headers that hold neither scales nor zeros.
[[maybe_unused]] void clear_header_padding(const QuantizedLayout& layout, char* tile) {
    for (int64_t first = 0; first < layout.groups; first += kChunk) {
        const int64_t m = smaller(kChunk, layout.groups - first), used = m * (layout.scale_bytes + kTile);
        std::memset(tile + used, 0, static_cast<size_t>(layout.header_bytes(m) - used));
        tile += layout.header_bytes(m);
        for (int64_t g = first; g < first + m; g++) tile += layout.code_bytes(layout.padded(g));
    }
}

}  // namespace
}  // namespace tinychat
