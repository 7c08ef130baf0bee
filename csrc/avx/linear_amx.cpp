// The linear of many rows on AMX: the level avx512vnni, whose packing and activations it takes as they are, with tiles
// in place of dot products wherever there are rows enough to fill some.
//
//   y[t, r] = sum over blocks of (sum over k of (q - z) x) * (s * scale of x)  +  sum over outliers of (q - z) s x
//
// in the order of operations of avx512vnni, so that both levels give the same bits. A tile of the matrix unit is 16
// lines of 64 bytes, and tdpbssd multiplies bytes with sign:
//
//   A: 16 rows of activations x 64 k, one plane of x = 256 hi + lo; read where they lie
//   B: 16 lines of 4 k x 16 outputs x 4 k; codes unpacked to q - z once for all rows, in a scratch of this thread
//   C: 16 rows x 16 outputs, int32, exact; one for each plane
//
// Codes of 8 bits are unpacked to q - 128, and (128 - z) sum(x) is added where z is another. B is filled with zeros
// beyond the end of a block, and what A reads there (never beyond its row) does not count.
//
// Order of work: a panel of rows that stays in the level-2 cache; kTogether tiles of outputs; a piece of k whose B and A
// stay in the level-1 cache; 16 rows; a tile of outputs; its blocks. Sums of 16 x 16 outputs lie in registers over a
// piece. While the matrix unit multiplies a block, C of the block before is stored, and that of the one before it is
// scaled and added: what limits is this, and moving A and the sums between the caches, not the matrix unit.
#include <immintrin.h>

#include "levels.h"
#include "linear_layout.h"

namespace tinychat {
namespace {

// Below, by activation bits, dot products are faster: those of before linear_rows_avx512vnni.cpp, and not measured since.
constexpr int64_t kLeastRows16 = 12, kLeastRows8 = 14;
constexpr int64_t kLines = 16;           // of a tile
constexpr int64_t kDepth = 64;           // k of a tile
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kPieceTiles = 4;       // of B
constexpr int64_t kTogether = 4;         // tiles of outputs
constexpr int64_t kPanelTiles = 32;      // of rows, at most
constexpr int64_t kPanelBlocks = 2048;   // tiles of rows times blocks of k, at most
constexpr int64_t kPanelBytes = 5 << 18;  // of integers

// A block of a piece: where it lies in a tile of packed weights and in an activation.
struct Place {
    int64_t codes, scales, zeros, x;  // bytes
    int64_t length, depth;            // k, tiles
    int64_t index;                    // in the row
};

// One block of B for one tile of outputs.
struct alignas(64) Factors {
    float scale[kTile];
    int32_t shift[kTile];  // added to each code: nothing but 128 - z of 8 bits
    int64_t shifted;
};

// A block of a tile of outputs, for any 16 rows.
struct Item {
    const int8_t* lines;  // of B
    const Factors* factors;
    int64_t x, plane, depth;  // bytes in an activation; of a plane; tiles
    int64_t block;            // in the row
    int64_t output;
    bool first, last;  // block of the piece
};

struct Scratch {
    alignas(64) int8_t weights[kTogether][kPieceTiles][kTileBytes];
    alignas(64) int32_t products[2][2][kLines][kTile];  // of even and odd blocks; of each plane
    alignas(64) Factors factors[kTogether][kPieceTiles];
    alignas(64) Place places[kPieceTiles];
    alignas(64) Item items[kTogether * kPieceTiles];
    alignas(64) float sums[kPanelTiles][kTogether][kLines][kTile];
    alignas(64) float spilled[kLines][kTile];
    alignas(64) float scales[kPanelBlocks][kLines];  // of the blocks of x: [tile of rows][block]
    alignas(64) uint16_t outliers[kPanelBlocks];     // a bit for each row that has some
};
thread_local Scratch scratch_of_thread;

struct alignas(64) TileConfig {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t line_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t lines[16] = {};
};

// Memory is read and written by tile instructions of which the compiler knows nothing.
void barrier() { __asm__ volatile("" ::: "memory"); }

// What stays the same for all tiles and rows of a call.
struct Call {
    const LinearShape& shape;
    QuantizedLayout layout;
    const char* packed;
    const char* activations;
    int64_t rows, tile_rows;  // tile_rows: of activations in a tile, at most 16
    float* y;
    int64_t y_stride;
    Scratch& scratch;  // found once: finding it is a call
};

// ---- weights ---------------------------------------------------------------------------------------------------------

// Walks the blocks of a tile, piece by piece.
struct Walk {
    const QuantizedLayout& layout;
    int64_t at = 0, group = 0, in_group = 0, x = 0, index = 0;

    bool done() const { return group == layout.groups; }

    // Fills places and returns how many blocks there are: as many as B has room for.
    int64_t next(Place* places) {
        int64_t count = 0, depth = 0;
        while (!done()) {
            const int64_t length = smaller(kBlock, layout.padded(group) - in_group);
            const int64_t in_chunk = group % kChunk, m = smaller(kChunk, layout.groups - (group - in_chunk));
            Place place{};
            place.depth = divide_up(length, kDepth);
            if (depth + place.depth > kPieceTiles) break;
            depth += place.depth;
            if (in_chunk == 0 && in_group == 0) {
                header = at;
                at += layout.header_bytes(m);
            }
            place.codes = at;
            place.scales = header + in_chunk * layout.scale_bytes;
            place.zeros = header + m * layout.scale_bytes + in_chunk * kTile;
            place.x = x;
            place.length = length;
            place.index = index++;
            places[count++] = place;
            at += layout.code_bytes(length);
            x += length * layout.integer_bytes;
            in_group += length;
            if (in_group == layout.padded(group)) {
                group++;
                in_group = 0;
            }
        }
        return count;
    }

    int64_t header = 0;
};

// One block of a tile of packed weights to lines of B.
template <int bits>
void unpack_block(const LinearShape& shape, const char* tile, const Place& place, int8_t* lines, Factors* factors) {
    typedef uint32_t Lanes __attribute__((vector_size(64)));
    constexpr int kFours = unit_length(bits) / 4;
    const char* scales = tile + place.scales;
    const auto* half = reinterpret_cast<const __m256i*>(scales);
    const __m512 scale = shape.wide_scales ? _mm512_load_ps(scales) : _mm512_cvtph_ps(_mm256_load_si256(half));
    const __m512i zero = _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(tile + place.zeros)));
    const __m512i taken = bits == 8 ? _mm512_set1_epi32(128) : zero, shift = _mm512_sub_epi32(taken, zero);
    _mm512_store_ps(factors->scale, scale);
    _mm512_store_si512(factors->shift, shift);
    factors->shifted = _mm512_test_epi32_mask(shift, shift);
    const __m512i bytes = _mm512_mullo_epi32(taken, _mm512_set1_epi32(0x01010101));
    const char* codes = tile + place.codes;
    for (int64_t i = 0; i < place.length; i += unit_length(bits), codes += unit_bytes(bits)) {
#pragma GCC unroll 8
        for (int h = 0; h < kFours; h++) {
            const auto q = (__m512i)unpacked<bits, Lanes>(codes, h);
            _mm512_store_si512(lines + (i / 4 + h) * kRegisterBytes, _mm512_sub_epi8(q, bytes));
        }
    }
    for (int64_t i = place.length / 4; i < place.depth * kLines; i++) {
        _mm512_store_si512(lines + i * kRegisterBytes, _mm512_setzero_si512());
    }
}

// ---- rows ------------------------------------------------------------------------------------------------------------

// The first of the rows of tile `index`: the last tile shares rows with the one before rather than be a smaller one.
int64_t first_row(const Call& call, int64_t index) {
    return smaller(index * call.tile_rows, call.rows - call.tile_rows);
}

// Scales and outliers of the rows of tiles [begin, end), in the order that the sums want.
void gather(const Call& call, int64_t begin, int64_t end) {
    const int64_t blocks = call.layout.blocks, stride = call.layout.activation_bytes;
    for (int64_t tile = begin; tile < end; tile++) {
        const char* row = call.activations + first_row(call, tile) * stride + call.layout.blocks_at;
        float(*scales)[kLines] = call.scratch.scales + (tile - begin) * blocks;
        uint16_t* outliers = call.scratch.outliers + (tile - begin) * blocks;
        for (int64_t b = 0; b < blocks; b++) {
            outliers[b] = 0;
            for (int64_t t = 0; t < kLines; t++) scales[b][t] = 0;
        }
        for (int64_t t = 0; t < call.tile_rows; t++, row += stride) {
            const auto* block = reinterpret_cast<const Block*>(row);
            for (int64_t b = 0; b < blocks; b++) {
                scales[b][t] = block[b].scale;
                outliers[b] = static_cast<uint16_t>(outliers[b] | (block[b].outliers != 0) << t);
            }
        }
    }
}

// Calls work(Number<i>) for each i < count: an array indexed so stays in registers.
template <int count, int i = 0, class Work>
__attribute__((always_inline)) inline void each(const Work& work) {
    if constexpr (i < count) {
        work(Number<i>{});
        each<count, i + 1>(work);
    }
}

// 16 rows of activations, or fewer: where what belongs to them begins.
struct Rows {
    const char* x;
    const float (*scales)[kLines];  // of their blocks
    const uint16_t* outliers;
    float (*sums)[kLines][kTile];   // of their outputs
    const char* next;               // the x of the rows after them
};

// products += shift * sum of x; any plane will do that is not shifted up.
__attribute__((noinline)) void shift_products(const Call& call, const Item& item, const char* x,
                                              int32_t (*products)[kTile]) {
    const __m512i shift = _mm512_load_si512(item.factors->shift);
    const char* row = x + call.layout.blocks_at + item.block * int64_t{sizeof(Block)};
    for (int64_t t = 0; t < call.tile_rows; t++, row += call.layout.activation_bytes) {
        const __m512i product = _mm512_mullo_epi32(shift, _mm512_set1_epi32(reinterpret_cast<const Block*>(row)->sum));
        _mm512_store_si512(products[t], _mm512_add_epi32(_mm512_load_si512(products[t]), product));
    }
}

// The outliers of one block of the rows that have some: sum + (q - z) s x for each.
__attribute__((noinline)) void add_outliers(const Call& call, const Item& item, const char* x) {
    const QuantizedLayout& layout = call.layout;
    const __m512 scale = _mm512_load_ps(item.factors->scale);
    for (int64_t t = 0; t < call.tile_rows; t++) {
        const char* row = x + t * layout.activation_bytes;
        const int64_t count = (reinterpret_cast<const Block*>(row + layout.blocks_at) + item.block)->outliers;
        const auto* list = reinterpret_cast<const Outlier*>(row + layout.outliers_at);
        const Outlier* outliers = list + item.block * layout.block_outliers;
        __m512 sum = _mm512_load_ps(call.scratch.spilled[t]);
        for (int64_t o = 0; o < count; o++) {
            const int64_t index = outliers[o].index;
            const __m512i lanes = _mm512_load_si512(item.lines + index / 4 * kRegisterBytes);
            const __m128i up = _mm_cvtsi32_si128(static_cast<int32_t>(24 - index % 4 * 8));
            __m512i code = _mm512_srai_epi32(_mm512_sll_epi32(lanes, up), 24);
            if (item.factors->shifted) code = _mm512_add_epi32(code, _mm512_load_si512(item.factors->shift));
            const __m512 weight = _mm512_mul_ps(_mm512_cvtepi32_ps(code), scale);
            sum = _mm512_fmadd_ps(weight, _mm512_set1_ps(outliers[o].value), sum);
        }
        _mm512_store_ps(call.scratch.spilled[t], sum);
    }
}

// Products of a block: C of its planes = A B. The tile numbers are part of the instructions.
#define TINYCHAT_MULTIPLY(high, low)                    \
    do {                                                \
        _tile_zero(high);                               \
        if constexpr (planes == 2) _tile_zero(low);     \
        _tile_loadd(6, b, kRegisterBytes);              \
        _tile_loadd(4, a, stride);                      \
        _tile_dpbssd(high, 4, 6);                       \
        if constexpr (planes == 2) {                    \
            _tile_loadd(5, a + plane, stride);          \
            _tile_dpbssd(low, 5, 6);                    \
        }                                               \
        if (item.depth == 1) break;                     \
        _tile_loadd(7, b + kTileBytes, kRegisterBytes); \
        _tile_loadd(4, a + kDepth, stride);             \
        _tile_dpbssd(high, 4, 7);                       \
        if constexpr (planes == 2) {                    \
            _tile_loadd(5, a + plane + kDepth, stride); \
            _tile_dpbssd(low, 5, 7);                    \
        }                                               \
    } while (false)

template <int planes, bool odd>
__attribute__((always_inline)) inline void multiply(const Item& item, const char* x, int64_t stride) {
    const char* a = x + item.x;
    const int8_t* b = item.lines;
    const int64_t plane = item.plane;
    if constexpr (odd) {
        TINYCHAT_MULTIPLY(2, 3);
    } else {
        TINYCHAT_MULTIPLY(0, 1);
    }
}

#undef TINYCHAT_MULTIPLY

template <int planes, bool odd>
__attribute__((always_inline)) inline void store_products(Scratch& scratch) {
    if constexpr (odd) {
        _tile_stored(2, scratch.products[1][0], kRegisterBytes);
        if constexpr (planes == 2) _tile_stored(3, scratch.products[1][1], kRegisterBytes);
    } else {
        _tile_stored(0, scratch.products[0][0], kRegisterBytes);
        if constexpr (planes == 2) _tile_stored(1, scratch.products[0][1], kRegisterBytes);
    }
}

// Adds the stored products of a block to the sums of R rows.
template <int planes, int R, bool odd>
__attribute__((always_inline)) inline void add_products(const Call& call, const Rows& rows, const Item& item,
                                                        __m512 (&sums)[R]) {
    int32_t(*products)[kLines][kTile] = call.scratch.products[odd];
    if (__builtin_expect(item.factors->shifted != 0, 0)) shift_products(call, item, rows.x, products[planes - 1]);
    float* kept = rows.sums[item.output][0];
    if (item.first) each<R>([&](auto t) { sums[t.value] = _mm512_load_ps(kept + t.value * kTile); });
    const float* scales = rows.scales[item.block];
    const __m512 scale = _mm512_load_ps(item.factors->scale);
    each<R>([&](auto t) {
        __m512i exact = _mm512_load_si512(products[0][t.value]);
        if constexpr (planes == 2) {
            exact = _mm512_add_epi32(_mm512_slli_epi32(exact, 8), _mm512_load_si512(products[1][t.value]));
        }
        const __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(scales[t.value]));
        sums[t.value] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact), factor, sums[t.value]);
    });
    if (__builtin_expect(rows.outliers[item.block] != 0, 0)) {
        each<R>([&](auto t) { _mm512_store_ps(call.scratch.spilled[t.value], sums[t.value]); });
        add_outliers(call, item, rows.x);
        each<R>([&](auto t) { sums[t.value] = _mm512_load_ps(call.scratch.spilled[t.value]); });
    }
    if (item.last) each<R>([&](auto t) { _mm512_store_ps(kept + t.value * kTile, sums[t.value]); });
}

// Fetches an item's share of its block of the next rows: each of kTogether outputs takes some of the 16.
template <int planes>
__attribute__((always_inline)) inline void fetch_rows(const Item& item, const char* next, int64_t stride) {
    constexpr int64_t kShare = kLines / kTogether;
    const char* row = next + item.x + item.output * kShare * stride;
    for (int64_t t = 0; t < kShare; t++, row += stride) {
        for (int64_t i = 0; i < kBlock * planes; i += 64) _mm_prefetch(row + i, _MM_HINT_T0);
    }
}

// One tile of rows times the `count` blocks of a piece. R rows of a tile of C are added up.
// A pipeline of three: one block is multiplied while that before is stored and that before it is added.
template <int planes, int R>
__attribute__((noinline)) void multiply_piece(const Call& call, const Rows& rows, int64_t count) {
    const int64_t stride = call.layout.activation_bytes;
    const Item* items = call.scratch.items;
    __m512 sums[R];
    each<R>([&](auto t) { sums[t.value] = _mm512_setzero_ps(); });
    multiply<planes, false>(items[0], rows.x, stride);
    if (count > 1) multiply<planes, true>(items[1], rows.x, stride);
    store_products<planes, false>(call.scratch);
    int64_t i = 2;
    for (; i + 1 < count; i += 2) {
        multiply<planes, false>(items[i], rows.x, stride);
        fetch_rows<planes>(items[i], rows.next, stride);
        store_products<planes, true>(call.scratch);
        add_products<planes, R, false>(call, rows, items[i - 2], sums);
        multiply<planes, true>(items[i + 1], rows.x, stride);
        fetch_rows<planes>(items[i + 1], rows.next, stride);
        store_products<planes, false>(call.scratch);
        add_products<planes, R, true>(call, rows, items[i - 1], sums);
    }
    if (count > 1) store_products<planes, true>(call.scratch);
    add_products<planes, R, false>(call, rows, items[i - 2], sums);
    if (count > 1) add_products<planes, R, true>(call, rows, items[i - 1], sums);
    if (i < count) {
        multiply<planes, false>(items[i], rows.x, stride);
        store_products<planes, false>(call.scratch);
        add_products<planes, R, false>(call, rows, items[i], sums);
    }
}

// Lines that will be read soon: so many of each of some streams. Fetched a few at a time while others are multiplied.
struct Ahead {
    const char* stream;
    int64_t stride, streams, lines;
    int64_t line = 0;

    void fetch(int64_t count) {
        for (int64_t i = 0; i < count && streams > 0; i++) {
            _mm_prefetch(stream + line * kRegisterBytes, _MM_HINT_T1);
            if (++line == lines) {
                line = 0;
                stream += stride;
                streams--;
            }
        }
    }
};

// Sums of a panel to y.
void write(const Call& call, int64_t begin, int64_t end, int64_t tile_begin, int64_t outputs) {
    for (int64_t rows = 0; rows < end - begin; rows++) {
        for (int64_t output = 0; output < outputs; output++) {
            const int64_t tile = tile_begin + output, width = smaller(kTile, call.shape.n - tile * kTile);
            const auto mask = static_cast<__mmask16>((1u << width) - 1);
            float* y = call.y + first_row(call, begin + rows) * call.y_stride + tile * kTile;
            for (int64_t t = 0; t < call.tile_rows; t++) {
                _mm512_mask_storeu_ps(y + t * call.y_stride, mask, _mm512_load_ps(call.scratch.sums[rows][output][t]));
            }
        }
    }
}

// All rows of a panel, tiles [begin, end) of them, times `outputs` tiles from tile_begin on.
template <int planes>
void multiply_tiles(const Call& call, int64_t begin, int64_t end, int64_t tile_begin, int64_t outputs) {
    const int64_t tile_bytes = call.layout.tile_bytes;
    Scratch& scratch = call.scratch;
    std::memset(scratch.sums, 0, static_cast<size_t>(end - begin) * sizeof scratch.sums[0]);
    for (Walk walk{call.layout}; !walk.done();) {
        const int64_t piece_begin = walk.at, count = walk.next(scratch.places);
        Item* item = scratch.items;
        for (int64_t output = 0; output < outputs; output++) {
            const char* tile = call.packed + (tile_begin + output) * tile_bytes;
            int8_t* lines = scratch.weights[output][0];
            for (int64_t b = 0; b < count; b++) {
                const Place& place = scratch.places[b];
                with_bits(call.shape.bits, [&](auto bits) {
                    unpack_block<bits.value>(call.shape, tile, place, lines, &scratch.factors[output][b]);
                });
                *item++ = {lines, &scratch.factors[output][b], place.x, place.length, place.depth, place.index, output,
                           b == 0, b == count - 1};
                lines += place.depth * kTileBytes;
            }
        }
        barrier();
        const int64_t lines = divide_up(walk.at - piece_begin, kRegisterBytes);
        const int64_t next = walk.done() ? outputs * tile_bytes : walk.at;
        Ahead ahead{call.packed + tile_begin * tile_bytes + next, tile_bytes, outputs, lines};
        for (int64_t t = begin; t < end; t++) {
            const int64_t entry = (t - begin) * call.layout.blocks;
            const auto x = [&](int64_t tile) {
                return call.activations + first_row(call, tile) * call.layout.activation_bytes;
            };
            const Rows rows{x(t), scratch.scales + entry, scratch.outliers + entry, scratch.sums[t - begin], x(t + 1)};
            ahead.fetch(divide_up(lines * outputs, end - begin));
            if (call.tile_rows > 8) {
                multiply_piece<planes, 16>(call, rows, outputs * count);
            } else {
                multiply_piece<planes, 8>(call, rows, outputs * count);
            }
        }
    }
    write(call, begin, end, tile_begin, outputs);
}

void configure(int64_t rows) {
    TileConfig config;
    for (int i = 0; i < 8; i++) config.lines[i] = static_cast<uint8_t>(i < 6 ? rows : kLines);
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
}

void linear(const LinearShape& shape, const void* packed, const void* activations, int64_t rows, int64_t tile_begin,
            int64_t tile_end, float* y, int64_t y_stride) {
    const int64_t least = shape.activation_bits == 8 ? kLeastRows8 : kLeastRows16;
    if (rows < least || shape.type != WeightType::quantized || QuantizedLayout(shape).blocks > kPanelBlocks) {
        return linear_avx512vnni().linear(shape, packed, activations, rows, tile_begin, tile_end, y, y_stride);
    }
    const int64_t row_tiles = divide_up(rows, kLines), tile_rows = divide_up(rows, row_tiles);
    const auto *weights = static_cast<const char*>(packed), *x = static_cast<const char*>(activations);
    const Call call{shape, QuantizedLayout(shape), weights, x, rows, tile_rows, y, y_stride, scratch_of_thread};
    int64_t panel = kPanelBytes / (call.layout.padded_k * call.layout.integer_bytes * tile_rows);
    panel = smaller(smaller(panel > 1 ? panel : 1, kPanelTiles), kPanelBlocks / call.layout.blocks);
    configure(tile_rows);
    for (int64_t begin = 0; begin < row_tiles; begin += panel) {
        const int64_t end = smaller(begin + panel, row_tiles);
        gather(call, begin, end);
        for (int64_t tile = tile_begin; tile < tile_end; tile += kTogether) {
            const int64_t outputs = smaller(kTogether, tile_end - tile);
            if (shape.activation_bits == 8) {
                multiply_tiles<1>(call, begin, end, tile, outputs);
            } else {
                multiply_tiles<2>(call, begin, end, tile, outputs);
            }
        }
    }
    _tile_release();
}

}  // namespace

// Filled when the levels are listed, which is once: a static that fills itself would need code to guard it.
const LinearKernels& linear_amx() {
    static LinearKernels table;
    table = linear_avx512vnni();
    table.linear = linear;
    table.panel_tiles = 8;
    return table;
}

}  // namespace tinychat
