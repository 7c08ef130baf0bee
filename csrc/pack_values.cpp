// Weights that are not quantized: rows of k become columns of 16 values, k-major. 8 x 8 values of 16 bits, or 4 x 4 of 32,
// are transposed at a time, in registers, so that rows are read and tiles written in whole lines.
#include "lanes.h"
#include "packing.h"

namespace tinychat {
namespace {

// Value k of row r goes to packed[k * 16 + r]. The values of each row lie `stride` after those of the row before.
void turn(const uint16_t* rows, int64_t stride, int64_t k, uint16_t* packed) {
    for (int64_t half = 0; half < kTile; half += 8) {
        Lanes16 in[8], out[8];
        for (int64_t r = 0; r < 8; r++) in[r] = load_lanes<Lanes16>(rows + (half + r) * stride + k);
        transpose(in, out);
        for (int64_t j = 0; j < 8; j++) store_lanes(packed + (k + j) * kTile + half, out[j]);
    }
}

void turn(const uint32_t* rows, int64_t stride, int64_t k, uint32_t* packed) {
    for (int64_t quarter = 0; quarter < kTile; quarter += 4) {
        for (int64_t i = 0; i < 8; i += 4) {
            const uint32_t* from = rows + quarter * stride + k + i;
            Lanes32 out[4];
            transpose(load_lanes<Lanes32>(from), load_lanes<Lanes32>(from + stride), load_lanes<Lanes32>(from + 2 * stride),
                      load_lanes<Lanes32>(from + 3 * stride), out);
            for (int64_t j = 0; j < 4; j++) store_lanes(packed + (k + i + j) * kTile + quarter, out[j]);
        }
    }
}

template <class Value>
void pack_tile(const LinearShape& shape, const Value* source, int64_t rows, Value* packed) {
    int64_t k = 0;
    if (rows == kTile) {
        for (; k + 8 <= shape.k; k += 8) turn(source, shape.k, k, packed);
    }
    const int64_t end = round_up(float_tile_bytes(shape), 64) / static_cast<int64_t>(kTile * sizeof(Value));
    for (; k < end; k++) {
        for (int64_t r = 0; r < kTile; r++) packed[k * kTile + r] = k < shape.k && r < rows ? source[r * shape.k + k] : 0;
    }
}

template <class Value>
void pack_tiles(const LinearShape& shape, const void* values, char* packed, int64_t begin, int64_t end) {
    const int64_t bytes = round_up(float_tile_bytes(shape), 64);
    for (int64_t tile = begin; tile < end; tile++) {
        const int64_t row = tile * kTile;
        pack_tile(shape, static_cast<const Value*>(values) + row * shape.k, smaller(kTile, shape.n - row),
                  reinterpret_cast<Value*>(packed + tile * bytes));
    }
}

}  // namespace

void pack_values(const LinearShape& shape, const WeightData& data, void* packed, int64_t tile_begin, int64_t tile_end) {
    char* at = static_cast<char*>(packed);
    if (value_bytes(shape.type) == 4) {
        pack_tiles<uint32_t>(shape, data.values, at, tile_begin, tile_end);
    } else {
        pack_tiles<uint16_t>(shape, data.values, at, tile_begin, tile_end);
    }
}

}  // namespace tinychat
