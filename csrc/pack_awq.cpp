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
// Speed: that of memory. A line of 16 words is 8 tiles, so these are packed together and every line is fetched once; the
// rows lie in pages of their own, too far apart for the hardware to foresee, so lines are asked for ahead.
#include "lanes.h"
#include "packing.h"

namespace tinychat {
namespace {

constexpr int64_t kNibbleK[8] = {0, 4, 1, 5, 2, 6, 3, 7};
constexpr int64_t kNibbleOutput[8] = {0, 2, 4, 6, 1, 3, 5, 7};
constexpr int64_t kColumns = 16;  // words of a line
constexpr int64_t kTileColumns = kTile / 8;
constexpr int64_t kTiles = kColumns / kTileColumns;
constexpr int64_t kAhead = 64;  // rows

// Swaps the nibbles of `a` that `mask`, moved up by `shift`, covers with those of `b` that it covers as it is.
template <int shift, uint32_t mask>
inline void swap(Lanes32& a, Lanes32& b) {
    const Lanes32 change = ((a >> shift) ^ b) & mask;
    b ^= change;
    a ^= change << shift;
}

// 8 rows of 16 words to one register in each of 8 tiles: row p lies at rows[p].
inline void turn(const uint32_t* const* rows, char* const* registers, int64_t tiles) {
    for (int64_t c = 0; c < kTileColumns * tiles; c += 4) {
        Lanes32 w[8];
        for (int p = 0; p < 8; p++) w[p] = load_lanes<Lanes32>(rows[p] + c);
        for (int p = 0; p < 4; p++) swap<16, 0x0000ffffu>(w[p], w[p + 4]);
        for (int p = 0; p < 4; p++) {
            const int q = p + p / 2 * 2;  // 0 1 4 5
            swap<8, 0x00ff00ffu>(w[q], w[q + 2]);
        }
        for (int p = 0; p < 8; p += 2) swap<4, 0x0f0f0f0fu>(w[p], w[p + 1]);
        Lanes32 first[4], second[4];  // of each column: outputs 0-3, 4-7
        transpose(w[0], w[4], w[1], w[5], first);
        transpose(w[2], w[6], w[3], w[7], second);
        for (int column = 0; column < 4; column++) {
            const int64_t tile = (c + column) / kTileColumns;
            if (tile >= tiles) break;
            char* lanes = registers[tile] + (c + column) % kTileColumns * 32;
            stream_lanes(lanes, first[column]);
            stream_lanes(lanes + 16, second[column]);
        }
    }
}

// `words` of a row, from `from`, where the line at `room` may be used to fill it up with zeros.
inline const uint32_t* whole_line(const uint32_t* from, int64_t words, uint32_t* room) {
    if (words == kColumns) return from;
    std::memset(room, 0, kColumns * 4);
    std::memcpy(room, from, static_cast<size_t>(words) * 4);
    return room;
}

}  // namespace

void pack_awq(const LinearShape& shape, const WeightData& data, void* packed, int64_t tile_begin, int64_t tile_end) {
    const QuantizedLayout layout(shape);
    const int64_t row_words = shape.n / 8, scale_bytes = layout.scale_bytes / kTile;
    const auto* words = static_cast<const uint32_t*>(data.values);
    const auto* zero_words = static_cast<const uint32_t*>(data.zeros);
    const auto* scales = static_cast<const char*>(data.scales);
    alignas(64) static constexpr uint32_t kNone[kColumns] = {};
    for (int64_t begin = tile_begin, tiles; begin < tile_end; begin += tiles) {
        tiles = smaller(kTiles - begin % kTiles, tile_end - begin);
        char* at = static_cast<char*>(packed) + begin * layout.tile_bytes;
        const int64_t column = begin * kTileColumns, columns = smaller(tiles * kTileColumns, row_words - column);
        for (int64_t tile = 0; tile < tiles; tile++) clear_header_padding(layout, at + tile * layout.tile_bytes);
        each_group(shape, layout, [&](int64_t g, int64_t k, int64_t length, GroupPlace place) {
            uint8_t zeros[kColumns * 8] = {};
            char line[kColumns * 8 * 4] = {};  // of scales
            for (int64_t c = 0; c < columns; c++) {
                const uint32_t word = zero_words[g * row_words + column + c];
                for (int i = 0; i < 8; i++) zeros[c * 8 + kNibbleOutput[i]] = word >> 4 * i & 15;
            }
            std::memcpy(line, scales + (g * shape.n + column * 8) * scale_bytes, static_cast<size_t>(columns * 8 * scale_bytes));
            char* registers[kTiles];
            for (int64_t tile = 0; tile < tiles; tile++) {
                char* start = at + tile * layout.tile_bytes;
                std::memcpy(start + place.scales, line + tile * layout.scale_bytes, static_cast<size_t>(layout.scale_bytes));
                std::memcpy(start + place.zeros, zeros + tile * kTile, kTile);
                registers[tile] = start + place.codes;
            }
            for (int64_t step = k; step < k + length; step += kStep) {
                const uint32_t* rows[8];
                uint32_t room[8][kColumns];
                for (int p = 0; p < 8; p++) {
                    const uint32_t* from = words + (step + kNibbleK[p]) * row_words + column;
                    const bool there = step + kNibbleK[p] < k + length;
                    rows[p] = there ? whole_line(from, columns, room[p]) : kNone;
                    if (step + kNibbleK[p] + kAhead < shape.k) __builtin_prefetch(from + kAhead * row_words);
                }
                turn(rows, registers, tiles);
                for (int64_t tile = 0; tile < tiles; tile++) registers[tile] += kRegisterBytes;
            }
        });
    }
#if defined(__SSE2__)
    _mm_sfence();  // streamed stores are seen by whoever sees that this call is over
#endif
}

}  // namespace tinychat
