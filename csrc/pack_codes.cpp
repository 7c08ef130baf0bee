// From codes that lie row by row, one in a byte or in the blocks of GGUF files, to the layout of linear_layout.h.
//
// A reader gives the codes of a group of a row as bytes: read(row, k, length) -> their address. Of the blocks,
//
//   Q4_0   32 codes:  | fp16 scale | byte i: code i in the low nibble, i + 16 in the high one |
//   Q8_0   32 codes:  | fp16 scale | code i - 128, with its sign |
//   Q6_K  256 codes:  | nibbles: 2 halves x 64 bytes | pairs: 2 halves x 32 bytes | 16 int8 scales | fp16 scale |
//                     of a half, code i has nibble i / 64 of byte i % 64, pair i / 32 of byte i % 32 on top
//
// where groups are blocks, of Q6_K sixteenths.
#include "lanes.h"
#include "packing.h"

namespace tinychat {
namespace {

struct Codes {
    const uint8_t* values;
    int64_t k;

    const uint8_t* read(int64_t row, int64_t first, int64_t) const { return values + row * k + first; }
};

struct Blocks {
    const uint8_t* values;
    int64_t k;
    uint8_t room[32] = {};

    // The block that holds code `first` of a row, of blocks of `length` codes and `bytes`.
    const uint8_t* block(int64_t row, int64_t first, int64_t length, int64_t bytes) const {
        return values + (row * (k / length) + first / length) * bytes;
    }
};

struct Q4_0 : Blocks {
    const uint8_t* read(int64_t row, int64_t first, int64_t) {
        const uint8_t* bytes = block(row, first, 32, 18) + 2;
        for (int i = 0; i < 16; i++) {
            room[i] = bytes[i] & 15;
            room[i + 16] = bytes[i] >> 4;
        }
        return room;
    }
};

struct Q8_0 : Blocks {
    const uint8_t* read(int64_t row, int64_t first, int64_t) {
        const uint8_t* bytes = block(row, first, 32, 34) + 2;
        for (int i = 0; i < 32; i++) room[i] = bytes[i] ^ 128;
        return room;
    }
};

struct Q6_K : Blocks {
    const uint8_t* read(int64_t row, int64_t first, int64_t) {
        const uint8_t* bytes = block(row, first, 256, 210);
        const int64_t half = first % 256 / 128, i = first % 128;
        const uint8_t *nibbles = bytes + half * 64 + i % 64, *pairs = bytes + 128 + half * 32 + i % 32;
        const auto nibble = static_cast<int>(i / 64 * 4), pair = static_cast<int>(i / 32 * 2);
        const Lanes32 low = load_lanes<Lanes32>(nibbles) >> nibble & 0x0f0f0f0fu;
        store_lanes(room, low | (load_lanes<Lanes32>(pairs) >> pair & 0x03030303u) << 4);
        return room;
    }
};

template <int bits, class Reader>
void pack_tile(const LinearShape& shape, const WeightData& data, Reader reader, char* tile, int64_t row, int64_t rows) {
    const QuantizedLayout layout(shape);
    if (rows < kTile) std::memset(tile, 0, static_cast<size_t>(layout.tile_bytes));
    clear_header_padding(layout, tile);
    each_group(shape, layout, [&](int64_t g, int64_t k, int64_t length, const GroupPlace& place) {
        for (int64_t r = 0; r < rows; r++) {
            copy_header(layout, data, row + r, r, g, place, tile);
            const uint8_t* codes = reader.read(row + r, k, length);
            char* lane = tile + place.codes + r * 4;
            for (int64_t i = 0; i < length; i += unit_length(bits), lane += unit_bytes(bits)) {
                join<bits>(codes + i, length - i, lane);
            }
        }
    });
}

template <class Reader>
void pack_tiles(const LinearShape& shape, const WeightData& data, char* packed, int64_t tile_begin, int64_t tile_end) {
    const int64_t bytes = QuantizedLayout(shape).tile_bytes;
    Reader reader{};
    reader.values = static_cast<const uint8_t*>(data.values);
    reader.k = shape.k;
    for (int64_t tile = tile_begin; tile < tile_end; tile++) {
        const int64_t row = tile * kTile;
        with_bits(shape.bits, [&](auto bits) {
            pack_tile<bits.value>(shape, data, reader, packed + tile * bytes, row, smaller(kTile, shape.n - row));
        });
    }
}

}  // namespace

void pack_codes(const LinearShape& shape, const WeightData& data, void* packed, int64_t tile_begin, int64_t tile_end) {
    char* const at = static_cast<char*>(packed);
    switch (data.source) {
        case Source::q4_0: return pack_tiles<Q4_0>(shape, data, at, tile_begin, tile_end);
        case Source::q8_0: return pack_tiles<Q8_0>(shape, data, at, tile_begin, tile_end);
        case Source::q6_k: return pack_tiles<Q6_K>(shape, data, at, tile_begin, tile_end);
        default: return pack_tiles<Codes>(shape, data, at, tile_begin, tile_end);
    }
}

}  // namespace tinychat
