// From the words of AWQ's "gemm" layout, as a checkpoint has them mapped, to the layout of linear_layout.h.
//
// A word holds 8 outputs of one k, a lane of a packed register 8 k of one output: a transpose of 8 x 8 nibbles, done in
// the bits of 8 words at once, 4 columns of words in a vector. Rows k are taken in the order of a register's nibbles,
// and columns come out in the order of a word's, so that nothing else is permuted:
//
//   in    word of k + kNibbleK[p]         nibble i: output 8 c + kNibbleOutput[i]
//   out   lane of 8 c + kNibbleOutput[i]  nibble p: k + kNibbleK[p]
//
// In three stages, as any transpose: swap the off-diagonal 4 x 4 blocks, in those the 2 x 2, in those the nibbles.
//
// Speed: that of memory. A line of 16 words is 8 tiles, so these are packed together and every line is fetched once. A
// piece of 128 rows is packed for all tiles before the next, or rows a power of two apart would meet in few sets of the
// caches; lines lie too far apart for the hardware to foresee, so those of the next 8 tiles are asked for meanwhile.
#include "lanes.h"
#include "packing.h"

namespace tinychat {
namespace {

constexpr int64_t kNibbleK[8] = {0, 4, 1, 5, 2, 6, 3, 7};
constexpr int64_t kNibbleOutput[8] = {0, 2, 4, 6, 1, 3, 5, 7};
constexpr int64_t kColumns = 16;  // words of a line
constexpr int64_t kTileColumns = kTile / 8;
constexpr int64_t kTiles = kColumns / kTileColumns;
constexpr int64_t kPiece = 128;  // rows

// Swaps the nibbles of `a` that `mask`, moved up by `shift`, covers with those of `b` that it covers as it is.
template <int shift, uint32_t mask>
inline void swap(Lanes32& a, Lanes32& b) {
    const Lanes32 change = ((a >> shift) ^ b) & mask;
    b ^= change;
    a ^= change << shift;
}

// 8 rows of up to 16 words to a register in each of up to 8 tiles, `tile_bytes` apart: row p lies at rows[p].
inline void turn(const uint32_t* const* rows, char* registers, int64_t tile_bytes, int64_t tiles) {
    for (int64_t tile = 0; tile < tiles; tile += 2) {
        Lanes32 w[8];
        for (int p = 0; p < 8; p++) w[p] = load_lanes<Lanes32>(rows[p] + tile * kTileColumns);
        for (int p = 0; p < 4; p++) swap<16, 0x0000ffffu>(w[p], w[p + 4]);
        for (int p = 0; p < 4; p++) {
            const int q = p + p / 2 * 2;  // 0 1 4 5
            swap<8, 0x00ff00ffu>(w[q], w[q + 2]);
        }
        for (int p = 0; p < 8; p += 2) swap<4, 0x0f0f0f0fu>(w[p], w[p + 1]);
        Lanes32 first[4], second[4];  // of each column: outputs 0-3, 4-7
        transpose(w[0], w[4], w[1], w[5], first);
        transpose(w[2], w[6], w[3], w[7], second);
        for (int i = 0; i < 2 && tile + i < tiles; i++, registers += tile_bytes) {
            stream_lanes(registers, first[2 * i]);
            stream_lanes(registers + 16, second[2 * i]);
            stream_lanes(registers + 32, first[2 * i + 1]);
            stream_lanes(registers + 48, second[2 * i + 1]);
        }
    }
}

// Scales and zeros of a group for the outputs from `output` on, `outputs` of them, in `tiles` tiles from `tile` on.
void pack_header(const LinearShape& shape, const QuantizedLayout& layout, const WeightData& data, int64_t g, int64_t output,
                 int64_t outputs, const GroupPlace& place, char* tile, int64_t tiles) {
    const int64_t scale_bytes = layout.scale_bytes / kTile;
    uint8_t zeros[kTiles * kTile] = {};
    char scales[kTiles * kTile * 4] = {};
    const uint32_t* words = static_cast<const uint32_t*>(data.zeros) + (g * shape.n + output) / 8;
    for (int64_t c = 0; c < outputs / 8; c++) {
        for (int i = 0; i < 8; i++) zeros[c * 8 + kNibbleOutput[i]] = words[c] >> 4 * i & 15;
    }
    std::memcpy(scales, static_cast<const char*>(data.scales) + (g * shape.n + output) * scale_bytes,
                static_cast<size_t>(outputs * scale_bytes));
    for (int64_t t = 0; t < tiles; t++, tile += layout.tile_bytes) {
        std::memcpy(tile + place.scales, scales + t * layout.scale_bytes, static_cast<size_t>(layout.scale_bytes));
        std::memcpy(tile + place.zeros, zeros + t * kTile, kTile);
    }
}

// `length` rows of `columns` words, the words of a row `stride` after those of the row before, to registers.
void pack_piece(const uint32_t* words, int64_t stride, int64_t length, int64_t columns, char* registers,
                int64_t tile_bytes, int64_t tiles, const uint32_t* next) {
    alignas(64) static constexpr uint32_t kNone[kColumns] = {};
    for (int64_t k = 0; k < length; k += kStep, words += kStep * stride, registers += kRegisterBytes) {
        const uint32_t* rows[8];
        uint32_t room[8][kColumns];
        for (int p = 0; p < 8; p++) {
            const uint32_t* row = words + kNibbleK[p] * stride;
            if (k + kNibbleK[p] >= length) {
                row = kNone;
            } else {
                if (next) {  // both ends: in a file words begin anywhere in a line
                    const uint32_t* there = next + (k + kNibbleK[p]) * stride;
                    __builtin_prefetch(there, 0, 2);
                    __builtin_prefetch(reinterpret_cast<const char*>(there) + kColumns * 4 - 1, 0, 2);
                }
                if (columns < kColumns) {  // not to read beyond the row's end
                    std::memset(room[p], 0, sizeof room[p]);
                    std::memcpy(room[p], row, static_cast<size_t>(columns) * 4);
                    row = room[p];
                }
            }
            rows[p] = row;
        }
        turn(rows, registers, tile_bytes, tiles);
    }
}

}  // namespace

void pack_awq(const LinearShape& shape, const WeightData& data, void* packed, int64_t tile_begin, int64_t tile_end) {
    const QuantizedLayout layout(shape);
    const int64_t stride = shape.n / 8;
    const auto* words = static_cast<const uint32_t*>(data.values);
    char* const first = static_cast<char*>(packed);
    for (int64_t tile = tile_begin; tile < tile_end; tile++) clear_header_padding(layout, first + tile * layout.tile_bytes);
    each_group(shape, layout, [&](int64_t g, int64_t k, int64_t length, const GroupPlace& place) {
        for (int64_t piece = 0; piece < length; piece += kPiece) {
            const int64_t rows = smaller(kPiece, length - piece);
            for (int64_t begin = tile_begin, tiles; begin < tile_end; begin += tiles) {
                tiles = smaller(kTiles - begin % kTiles, tile_end - begin);
                char* tile = first + begin * layout.tile_bytes;
                const int64_t column = begin * kTileColumns, columns = smaller(tiles * kTileColumns, stride - column);
                if (!piece) pack_header(shape, layout, data, g, column * 8, columns * 8, place, tile, tiles);
                const uint32_t* from = words + (k + piece) * stride + column;
                const bool more = begin + tiles < tile_end;  // else the next piece, as far as there is one
                const uint32_t* next = more                              ? from + columns
                                       : k + piece + 2 * rows <= shape.k ? from + rows * stride - (column - tile_begin * kTileColumns)
                                                                         : nullptr;
                pack_piece(from, stride, rows, columns, tile + place.codes + piece / kStep * kRegisterBytes, layout.tile_bytes,
                           tiles, next);
            }
        }
    });
#if defined(__SSE2__)
    _mm_sfence();  // streamed stores are seen by whoever sees that this call is over
#endif
}

}  // namespace tinychat
