// Packing, one unit for each kind of source; linear_layout.cpp chooses, and unpacks. Compiled once, for every level.
//
// A packer writes every byte of its tiles, padding included, and so asks for no memory that is zero.
#pragma once
#include <cstdint>

#include "linear_layout.h"

namespace tinychat {

void pack_awq(const LinearShape& shape, const WeightData& data, void* packed, int64_t tile_begin, int64_t tile_end);
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
            place.codes += layout.padded(g) / kStep * layout.step_bytes;
        }
        at = place.codes;
    }
}

// 8 codes of a row, one in a byte, to its lanes in the registers of a step; `count` of them are there, the others zero.
[[maybe_unused]] void join(const uint8_t* codes, int64_t count, int32_t bits, char* lane) {
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

// Clears the bytes of a tile's headers that hold neither scales nor zeros.
[[maybe_unused]] void clear_header_padding(const QuantizedLayout& layout, char* tile) {
    for (int64_t first = 0; first < layout.groups; first += kChunk) {
        const int64_t m = smaller(kChunk, layout.groups - first), used = m * (layout.scale_bytes + kTile);
        std::memset(tile + used, 0, static_cast<size_t>(layout.header_bytes(m) - used));
        tile += layout.header_bytes(m);
        for (int64_t g = first; g < first + m; g++) tile += layout.padded(g) / kStep * layout.step_bytes;
    }
}

}  // namespace
}  // namespace tinychat
