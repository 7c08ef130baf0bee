// From a stream of bits in 32-bit words, as GPTQ and compressed-tensors have a row's codes, to the layout of linear_layout.h.
//
// Code i of a row takes the bits i * bits .. (i + 1) * bits - 1 of the row's words, laid end to end from the lowest bit on;
// of 3 bits some lie across two words. GPTQ has the words of a column of the weight together, so that neighbouring rows are
// neighbours, compressed-tensors those of a row. Either way a lane works for its row: 16 rows are 4 vectors, a code of each
// is cut out of their words by the same shifts, and joined with others as join() in packing.h does it for one row.
// Columns in an order of their own (act-order) are cut out in that order: no copy of the codes is made.
#include "lanes.h"
#include "packing.h"

namespace tinychat {
namespace {

constexpr int kVectors = kTile / 4;

struct Rows {
    Lanes32 lanes[kVectors];
};

// The words of the rows of a tile, one vector register of 16 at a time; rows that are not there are zero.
class Words {
  public:
    Words(const WeightData& data, int64_t row, int64_t rows)
        : first_(static_cast<const uint32_t*>(data.values) + row * data.row_stride), row_(data.row_stride),
          word_(data.word_stride), rows_(rows) {}

    void read(int64_t word, Rows& to) const {
        const uint32_t* from = first_ + word * word_;
        if (row_ == 1 && rows_ == kTile) {
            std::memcpy(&to, from, sizeof to);
        } else {
            uint32_t lanes[kTile] = {};
            for (int64_t r = 0; r < rows_; r++) lanes[r] = from[r * row_];
            std::memcpy(&to, lanes, sizeof to);
        }
    }

    // The same; what was asked for last is still there.
    const Rows& at(int64_t word) {
        if (word != found_) read(found_ = word, words_);
        return words_;
    }

  private:
    const uint32_t* first_;
    int64_t row_, word_, rows_, found_ = -1;
    Rows words_;
};

// Code `i` of the stream of each row, moved up by `up` bits, into `to`; `words` gives the words of a number.
template <int bits, class WordsOf>
__attribute__((always_inline)) inline void cut(WordsOf&& words, int64_t i, int up, Rows& to) {
    const int64_t word = i * bits / 32;
    const auto shift = static_cast<int>(i * bits % 32);
    const Rows& low = words(word);
    if (bits != 3 || shift <= 32 - bits) {
        for (int v = 0; v < kVectors; v++) to.lanes[v] |= (low.lanes[v] >> shift & ((1u << bits) - 1)) << up;
        return;
    }
    Rows part;
    for (int v = 0; v < kVectors; v++) part.lanes[v] = low.lanes[v] >> shift;
    const Rows& high = words(word + 1);
    for (int v = 0; v < kVectors; v++) to.lanes[v] |= ((part.lanes[v] | high.lanes[v] << (32 - shift)) & 7u) << up;
}

// Codes h[0 ..], four to a lane, to the registers of a unit; for one row join() does the same.
template <int bits>
void join_rows(const Rows* h, char* unit) {
    Rows registers[unit_bytes(bits) / kRegisterBytes] = {};
    for (int v = 0; v < kVectors; v++) {
        if constexpr (bits == 3) {
            for (int i = 0; i < 3; i++) registers[i].lanes[v] = h[2 * i].lanes[v] | h[2 * i + 1].lanes[v] << 3;
            const Lanes32 a = h[6].lanes[v], b = h[7].lanes[v];
            registers[0].lanes[v] |= (a & 0x03030303u) << 6;
            registers[1].lanes[v] |= (b & 0x03030303u) << 6;
            registers[2].lanes[v] |= (a & 0x04040404u) << 4 | (b & 0x04040404u) << 5;
        } else {
            for (int i = 0; i < unit_length(bits) / 4; i++) {
                registers[i * bits / 8].lanes[v] |= h[i].lanes[v] << i * bits % 8;
            }
        }
    }
    std::memcpy(unit, registers, sizeof registers);
}

template <int bits>
void pack_tile(const LinearShape& shape, const WeightData& data, char* tile, int64_t row, int64_t rows) {
    constexpr int64_t kLength = unit_length(bits), kWords = kLength * bits / 32;
    const QuantizedLayout layout(shape);
    if (rows < kTile) std::memset(tile, 0, static_cast<size_t>(layout.tile_bytes));
    clear_header_padding(layout, tile);
    Words words(data, row, rows);
    each_group(shape, layout, [&](int64_t g, int64_t k, int64_t length, const GroupPlace& place) {
        for (int64_t r = 0; r < rows; r++) copy_header(layout, data, row + r, r, g, place, tile);
        char* unit = tile + place.codes;
        for (int64_t i = 0; i < length; i += kLength, unit += unit_bytes(bits)) {
            Rows h[kLength / 4] = {};
            const int64_t first = k + i;
            if (!data.permutation && first * bits % 32 == 0 && i + kLength <= length) {  // whole words
                Rows whole[kWords];
                for (int64_t w = 0; w < kWords; w++) words.read(first * bits / 32 + w, whole[w]);
#pragma GCC unroll 32
                for (int64_t j = 0; j < kLength; j++) {
                    cut<bits>([&](int64_t w) -> const Rows& { return whole[w]; }, j, static_cast<int>(j % 4 * 8), h[j / 4]);
                }
            } else {
                for (int64_t j = 0; j < smaller(kLength, length - i); j++) {
                    const int64_t at = data.permutation ? data.permutation[first + j] : first + j;
                    cut<bits>([&](int64_t w) -> const Rows& { return words.at(w); }, at, static_cast<int>(j % 4 * 8), h[j / 4]);
                }
            }
            join_rows<bits>(h, unit);
        }
    });
}

}  // namespace

void pack_stream(const LinearShape& shape, const WeightData& data, void* packed, int64_t tile_begin, int64_t tile_end) {
    const int64_t bytes = QuantizedLayout(shape).tile_bytes;
    for (int64_t tile = tile_begin; tile < tile_end; tile++) {
        const int64_t row = tile * kTile;
        with_bits(shape.bits, [&](auto bits) {
            pack_tile<bits.value>(shape, data, static_cast<char*>(packed) + tile * bytes, row, smaller(kTile, shape.n - row));
        });
    }
}

}  // namespace tinychat
