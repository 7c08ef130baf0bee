// The linear of AVX-512 VNNI for many rows: what linear_avx512.cpp computes, in the order of its sums, bit for bit, from
// activations in panels, where what 16 dot products in a row multiply lies side by side:
//
//   set of rows, block: | Head | 4 k of each row, of 16 bits of the upper plane, then of the lower | the next 4 k .. |
//
// so that a product is one instruction, with its factor broadcast from the panel; with rows where they lie it is two, and
// one more for where each row is. Registers hold 16 sums: 16 rows of 8 bits, or 8 of 16. Fewer rows go in smaller sets.
//
// On Zen 4 a block of 128 k takes 512 products for 16 sums and 48 other instructions of the same units (of 16 bits 24): 0.91 and
// 0.95 of their peak are all there is. Found: 0.86 and 0.90 (benchmarks/results/speed.md).
#include <immintrin.h>

#include "levels.h"
#include "linear_layout.h"
#include "linear_place.h"

namespace tinychat {
namespace {

constexpr int kSums = 16;
constexpr int64_t kSets = 4;              // of a panel, at most
constexpr int64_t kPanelBytes = 3 << 17;  // of a level-2 cache of 1 MiB
constexpr int64_t kFour = 4;              // k, a byte each

typedef uint32_t Lanes __attribute__((vector_size(64)));

// A block of a set of rows; its integers follow.
struct alignas(64) Head {
    float scale[kSums];     // of each row
    int32_t halves[kSums];  // see Block
    uint32_t outliers;      // a bit for each row that has some
};

// Lines of 4 k of a block: whole units, of which those beyond the block meet codes of zero.
template <int bits>
int64_t fours_of(int64_t length) {
    return divide_up(length, unit_length(bits)) * unit_length(bits) / kFour;
}

// Of a set of R rows, a block.
template <int planes, int R>
int64_t set_bytes(int64_t fours) {
    return static_cast<int64_t>(sizeof(Head)) + round_up(fours * planes * R * kFour, 64);
}

// What stays the same for a call.
struct Call {
    QuantizedLayout layout;
    bool wide_scales;
    int64_t n;
    const char* packed;
    int64_t tile_begin, tile_end;
    int64_t y_stride;
    char* panel;  // kPanelBytes
};

// ---- panels ----------------------------------------------------------------------------------------------------------

// 16 lines of 16 words, transposed.
__attribute__((always_inline)) inline void transpose(__m512i (&lines)[16]) {
    __m512i pairs[16], fours[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {  // words 2 q, 2 q + 1 of lines 2 p, 2 p + 1, in each quarter of a register
        const int at = i / 2 * 2;
        pairs[i] = i % 2 ? _mm512_unpackhi_epi32(lines[at], lines[at + 1]) : _mm512_unpacklo_epi32(lines[at], lines[at + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {  // word i % 4 of four lines
        const int at = i / 4 * 4 + i % 4 / 2;
        fours[i] = i % 2 ? _mm512_unpackhi_epi64(pairs[at], pairs[at + 2]) : _mm512_unpacklo_epi64(pairs[at], pairs[at + 2]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {  // quarters of a register are columns i, i + 4, i + 8, i + 12
        const __m512i low = _mm512_shuffle_i32x4(fours[i], fours[i + 4], 0x88);
        const __m512i low_odd = _mm512_shuffle_i32x4(fours[i], fours[i + 4], 0xdd);
        const __m512i high = _mm512_shuffle_i32x4(fours[i + 8], fours[i + 12], 0x88);
        const __m512i high_odd = _mm512_shuffle_i32x4(fours[i + 8], fours[i + 12], 0xdd);
        lines[i] = _mm512_shuffle_i32x4(low, high, 0x88);
        lines[i + 8] = _mm512_shuffle_i32x4(low, high, 0xdd);
        lines[i + 4] = _mm512_shuffle_i32x4(low_odd, high_odd, 0x88);
        lines[i + 12] = _mm512_shuffle_i32x4(low_odd, high_odd, 0xdd);
    }
}

__mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << (n < 0 ? 0 : smaller(n, 16))) - 1); }

// The block at `place` of `rows` rows, R at most, to `panel`; returns where that ends.
template <int bits, int planes, int R>
char* gather(const QuantizedLayout& layout, const char* activations, int64_t rows, const Place& place, char* panel) {
    Head head{};
    for (int64_t t = 0; t < rows; t++) {
        const char* row = activations + t * layout.activation_bytes;
        const auto& block = reinterpret_cast<const Block*>(row + layout.blocks_at)[place.index];
        head.scale[t] = block.scale;
        head.halves[t] = block.halves;
        head.outliers |= static_cast<uint32_t>(block.outliers > 0) << t;
    }
    std::memcpy(panel, &head, sizeof head);
    const int64_t fours = fours_of<bits>(place.length);
    const char* from = activations + place.integers;
    char* to = panel + sizeof(Head);
    for (int64_t four = 0; four < fours; four += 16, from += 16 * kFour) {
        const __mmask16 there = first_lanes(place.length / kFour - four);
        __m512i lines[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            const bool some = i < planes * R && i % R < rows;
            const char* at = from + (some ? i / R * place.length + i % R * layout.activation_bytes : 0);
            lines[i] = _mm512_maskz_loadu_epi32(some ? there : 0, at);
        }
        transpose(lines);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++, to += planes * R * kFour) {
            if (four + i < fours) _mm512_mask_storeu_epi32(to, first_lanes(planes * R), lines[i]);
        }
    }
    return panel + set_bytes<planes, R>(fours);
}

// ---- products --------------------------------------------------------------------------------------------------------

// What a block of a tile has for all rows.
struct Weights {
    const char* codes;
    int64_t length;
    __m512 scale;
    __m512i zero;
};

__attribute__((always_inline)) inline void add_product(__m512i& sum, __m512i codes, const char* factor) {
    // GCC would load the factor first, an instruction more.
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes), "m"(*reinterpret_cast<const char(*)[kFour]>(factor)));
}

// sums[t] [16] += a block of R rows and a tile, all but the outliers.
template <int bits, int planes, int R>
__attribute__((always_inline)) inline void rows_of_block(const Weights& weights, const Head& head, const char* lines,
                                                         int64_t fours, float* sums) {
    constexpr int kFours = unit_length(bits) / kFour;
    const __m512i both = _mm512_or_si512(weights.zero, _mm512_slli_epi32(weights.zero, 16 + 7));  // for Block::halves
    __m512i products[planes][R];
#pragma GCC unroll 16
    for (int t = 0; t < R; t++) {
        products[0][t] = _mm512_setzero_si512();
        products[planes - 1][t] = _mm512_dpwssd_epi32(_mm512_setzero_si512(), both, _mm512_set1_epi32(head.halves[t]));
    }
    const char* codes = weights.codes;
#pragma GCC unroll 2
    for (int64_t four = 0; four < fours; four += kFours, codes += unit_bytes(bits)) {
#pragma GCC unroll 8
        for (int h = 0; h < kFours; h++, lines += planes * R * kFour) {
            const auto q = (__m512i)unpacked<bits, Lanes>(codes, h);
#pragma GCC unroll 2
            for (int p = 0; p < planes; p++) {
#pragma GCC unroll 16
                for (int t = 0; t < R; t++) add_product(products[p][t], q, lines + (p * R + t) * kFour);
            }
        }
    }
#pragma GCC unroll 16
    for (int t = 0; t < R; t++) {
        __m512i product = products[planes - 1][t];
        if (planes == 2) product = _mm512_add_epi32(product, _mm512_slli_epi32(products[0][t], 8));
        const __m512 factor = _mm512_mul_ps(weights.scale, _mm512_set1_ps(head.scale[t]));
        float* at = sums + t * kTile;
        _mm512_store_ps(at, _mm512_fmadd_ps(_mm512_cvtepi32_ps(product), factor, _mm512_load_ps(at)));
    }
}

// What the outliers of a block add to sums [rows][16]; bit t of `some`: row t has some.
template <int bits>
__attribute__((noinline, cold)) void add_outliers(const Call& call, const Weights& weights, const char* activations,
                                                  uint32_t some, int64_t index, float* sums) {
    const QuantizedLayout& layout = call.layout;
    for (; some; some &= some - 1) {
        const int64_t t = __builtin_ctz(some);
        const char* row = activations + t * layout.activation_bytes;
        const auto& block = reinterpret_cast<const Block*>(row + layout.blocks_at)[index];
        const auto* list = reinterpret_cast<const Outlier*>(row + layout.outliers_at) + index * layout.block_outliers;
        __m512 sum = _mm512_load_ps(sums + t * kTile);
        for (int32_t o = 0; o < block.outliers; o++) {
            const auto code = (__m512i)one_code<bits, Lanes>(weights.codes, list[o].index);
            const __m512 weight =
                _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(code, weights.zero)), weights.scale);
            sum = _mm512_fmadd_ps(weight, _mm512_set1_ps(list[o].value), sum);
        }
        _mm512_store_ps(sums + t * kTile, sum);
    }
}

// Blocks of a linear, from the first to before the last.
struct Piece {
    Place first, last;
};

// A set of `rows` rows, R at most, and a piece of a tile: y [rows, 16] of it, added to what the pieces before gave.
template <int bits, int planes, int R>
__attribute__((noinline)) void set_of_tile(const Call& call, const Piece& piece, const char* tile, const char* panel,
                                           const char* activations, int64_t rows, const char* ahead, int64_t lines_ahead,
                                           __mmask16 outputs, float* y) {
    const QuantizedLayout& layout = call.layout;
    alignas(64) float sums[R * kTile];
    for (int64_t t = 0; t < R; t++) {
        const bool begun = piece.first.index > 0 && t < rows;
        _mm512_store_ps(sums + t * kTile, begun ? _mm512_maskz_loadu_ps(outputs, y + t * call.y_stride) : _mm512_setzero_ps());
    }
    for (Place place = piece.first; place.index < piece.last.index; place.next(layout)) {
        for (int64_t line = 0; line < lines_ahead; line++, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
        // Where sums will go, a row with each block: rows of y lie far apart, and stores that find none of them wait.
        const int64_t t = place.index - piece.first.index;
        if (t < rows) _mm_prefetch(reinterpret_cast<const char*>(y + t * call.y_stride), _MM_HINT_T0);
        const char* scales = place.scales(layout, tile);
        const auto* zeros = reinterpret_cast<const __m128i*>(place.zeros(layout, tile));
        const Weights weights{tile + place.codes, place.length,
                              call.wide_scales
                                  ? _mm512_load_ps(scales)
                                  : _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(scales))),
                              _mm512_cvtepu8_epi32(_mm_load_si128(zeros))};
        const auto& head = *reinterpret_cast<const Head*>(panel);
        const int64_t fours = fours_of<bits>(place.length);
        if (place.length == kBlock) {  // the usual one
            rows_of_block<bits, planes, R>(weights, head, panel + sizeof head, kBlock / kFour, sums);
        } else {
            rows_of_block<bits, planes, R>(weights, head, panel + sizeof head, fours, sums);
        }
        if (__builtin_expect(head.outliers != 0, 0)) {
            add_outliers<bits>(call, weights, activations, head.outliers, place.index, sums);
        }
        panel += set_bytes<planes, R>(fours);
    }
    for (int64_t t = 0; t < rows; t++) _mm512_mask_storeu_ps(y + t * call.y_stride, outputs, _mm512_load_ps(sums + t * kTile));
}

// ---- panels times tiles ----------------------------------------------------------------------------------------------

thread_local struct alignas(64) {
    char bytes[kPanelBytes];
} panel_of_thread;

// work(Number<R>) for the smallest set that holds `rows` rows, of those that are whole steps. (Two sums alone would wait for
// themselves.)
template <int planes, int R = kSums / planes, class Work>
void with_set(int64_t rows, const Work& work) {
    constexpr int kStep = kSums / 8 / planes, kLeast = 4 / planes;
    if constexpr (R > kLeast) {
        if (rows <= R - kStep) return with_set<planes, R - kStep>(rows, work);
    }
    work(Number<R>{});
}

// A panel of so many rows. It holds all of their k, or a piece where that is too much for one set: what a piece adds to y costs
// as much as some blocks.
template <int bits, int planes>
void run_panel(const Call& call, const char* activations, int64_t rows, float* y) {
    constexpr int64_t kRows = kSums / planes;  // of a set
    const QuantizedLayout& layout = call.layout;
    const int64_t sets = divide_up(rows, kRows), room = kPanelBytes / sets / 64 * 64;
    const auto each_set = [&](const auto& work) {
        for (int64_t set = 0; set < sets; set++) {
            const int64_t count = smaller(kRows, rows - set * kRows);
            with_set<planes>(count, [&](auto R) {
                work(R, call.panel + set * room, activations + set * kRows * layout.activation_bytes, count,
                     y + set * kRows * call.y_stride);
            });
        }
    };
    for (Piece piece{Place(layout), Place(layout)}; piece.first.index < layout.blocks; piece.first = piece.last) {
        int64_t filled = 0, bytes = 0;
        for (;; piece.last.next(layout), filled += bytes) {
            if (piece.last.index == layout.blocks) break;
            bytes = set_bytes<planes, kRows>(fours_of<bits>(piece.last.length));
            if (filled + bytes > room) break;
        }
        each_set([&](auto R, char* panel, const char* x, int64_t count, float*) {
            for (Place place = piece.first; place.index < piece.last.index; place.next(layout)) {
                panel = gather<bits, planes, R.value>(layout, x, count, place, panel);
            }
        });
        // Of the next tile, a few lines with each block.
        const bool header = piece.first.in_chunk == 0 && piece.first.begin == 0;
        const int64_t from = header ? piece.first.header : piece.first.codes;
        const int64_t blocks = (piece.last.index - piece.first.index) * sets;
        const int64_t lines = divide_up(piece.last.codes - from, blocks * 64);
        for (int64_t tile = call.tile_begin; tile < call.tile_end; tile++) {
            const char* at = call.packed + tile * layout.tile_bytes;
            const char* ahead = at + layout.tile_bytes + from;
            const auto outputs = static_cast<__mmask16>((1u << smaller(kTile, call.n - tile * kTile)) - 1);
            each_set([&](auto R, const char* panel, const char* x, int64_t count, float* out) {
                set_of_tile<bits, planes, R.value>(call, piece, at, panel, x, count, ahead, lines, outputs, out + tile * kTile);
                ahead += lines * 64 * blocks / sets;
            });
        }
    }
}

template <int bits, int planes>
void run(const Call& call, const char* activations, int64_t rows, float* y) {
    constexpr int64_t kRows = kSums / planes;
    int64_t bytes = 0;
    for (Place place(call.layout); place.index < call.layout.blocks; place.next(call.layout)) {
        bytes += set_bytes<planes, kRows>(fours_of<bits>(place.length));
    }
    const int64_t fit = smaller(kPanelBytes / bytes, kSets), most = (fit > 0 ? fit : 1) * kRows;
    for (int64_t begin = 0; begin < rows; begin += most) {
        run_panel<bits, planes>(call, activations + begin * call.layout.activation_bytes, smaller(most, rows - begin),
                                y + begin * call.y_stride);
    }
}

}  // namespace

void linear_rows_avx512vnni(const LinearShape& shape, const void* packed, const void* activations, int64_t rows,
                            int64_t tile_begin, int64_t tile_end, float* y, int64_t y_stride) {
    const Call call{QuantizedLayout(shape), shape.wide_scales, shape.n, static_cast<const char*>(packed),
                    tile_begin, tile_end, y_stride, panel_of_thread.bytes};
    with_bits(shape.bits, [&](auto bits) {
        const auto work = shape.activation_bits == 8 ? run<bits.value, 1> : run<bits.value, 2>;
        work(call, static_cast<const char*>(activations), rows, y);
    });
}

}  // namespace tinychat
