// The linear of AVX2 for many rows: a block of codes is unpacked once for a panel of rows, and six of these meet it at a time.
//
// What is computed, and the order of its sums, is that of linear_avx2.cpp, bit for bit. Only the integers are multiplied in
// another way: unpacked codes cost nothing here, so they become words, from which z is taken away. Activations are words
// too: vpmaddwd adds two products to a lane of 32 bits. 16 products take it and an addition, as many as two planes of bytes
// take, but no sums of int16 need widening.
//
//          unpacked: k k+2 of 8 rows, of the other 8, k+1 k+3 of 8 rows, ..
//
// Six rows by two halves of a tile are 12 sums, which with two registers of codes, one of activations and one product fill
// the 16 registers. Zen 3 multiplies twice and computes four times in a cycle: 32 products.
// Loops of these instructions alone reach 0.8 of that, the kernel 0.65 (benchmarks/results/speed.md).
#include <immintrin.h>

#include "levels.h"
#include "linear_layout.h"
#include "linear_place.h"

namespace tinychat {
namespace {

constexpr int kRows = 6;               // at a time
constexpr int64_t kPanelRows = 60;
constexpr int64_t kPanelLength = 512;  // k of a panel
constexpr int64_t kHalf = 8;           // rows of a tile in a register
constexpr int64_t kHalfBytes = 32;

typedef uint32_t Lanes __attribute__((vector_size(32)));

__m256i load(const char* at) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(at)); }

constexpr int64_t kWord = 2;  // bytes
// Rows of a panel lie a cache line further apart than they are long: 4 KiB apart the first cache would take them for one.
constexpr int64_t kStride = kPanelLength * kWord + 64;

// ---- codes and activations unpacked ----------------------------------------------------------------------------------

Lanes less(Lanes words, Lanes z) { return (Lanes)_mm256_sub_epi16((__m256i)words, (__m256i)z); }

template <int bits>
void unpack_codes(const char* codes, int64_t length, const __m256i (&zeros)[2], char* out) {
    Lanes z[2];  // in both words of a lane
    for (int j = 0; j < 2; j++) z[j] = (Lanes)zeros[j] * 0x10001u;

    const int64_t units = divide_up(length, unit_length(bits));
    for (int64_t i = 0; i < units; i++, codes += unit_bytes(bits)) {
        for (int h = 0; h < unit_length(bits) / 4; h++, out += 4 * kHalfBytes) {
            for (int j = 0; j < 2; j++) {
                const Lanes four = unpacked<bits, Lanes>(codes + j * kHalfBytes, h);
                auto* to = reinterpret_cast<Lanes*>(out) + j;
                to[0] = less(four & 0x00ff00ffu, z[j]);
                to[2] = less(four >> 8 & 0x00ff00ffu, z[j]);
            }
        }
    }
}

// The integers of a block, whose planes are at `from`, in the order of the codes.
template <int planes>
void unpack_integers(const char* from, int64_t length, char* to) {
    for (int64_t k = 0; k < length; k += 8) {
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + (planes - 1) * length + k));
        __m128i even = _mm_srai_epi16(_mm_slli_epi16(bytes, 8), 8), odd = _mm_srai_epi16(bytes, 8);
        if (planes == 2) {
            const __m128i high = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + k));
            even = _mm_add_epi16(even, _mm_slli_epi16(high, 8));
            odd = _mm_add_epi16(odd, _mm_andnot_si128(_mm_set1_epi16(255), high));
        }
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + k * kWord), _mm_unpacklo_epi32(even, odd));
    }
}

// ---- products --------------------------------------------------------------------------------------------------------

// The products of two broadcast words of activations with both halves of a tile: the first ones, or added to those before.
// Written out, because GCC loads the factors of all rows first and then has no registers for the sums; both multiplications
// before both additions, because Zen 3 then finds places for more of them.
template <bool begin>
__attribute__((always_inline)) inline void multiply(__m256i first, __m256i second, const char* x, __m256i (&sums)[2]) {
    const auto& pair = *reinterpret_cast<const char(*)[4]>(x);
    if constexpr (begin) {
        asm("vpbroadcastd %2, %1\n\t"
            "vpmaddwd %1, %3, %0\n\t"
            "vpmaddwd %1, %4, %1"
            : "=&x"(sums[0]), "=&x"(sums[1])
            : "m"(pair), "x"(first), "x"(second));
    } else {
        __m256i factor, product;
        asm("vpbroadcastd %4, %2\n\t"
            "vpmaddwd %2, %5, %3\n\t"
            "vpmaddwd %2, %6, %2\n\t"
            "vpaddd %3, %0, %0\n\t"
            "vpaddd %2, %1, %1"
            : "+x"(sums[0]), "+x"(sums[1]), "=&x"(factor), "=&x"(product)
            : "m"(pair), "x"(first), "x"(second));
    }
}

// sums[t][j] = sum over k of (q - z) x for row t and half j, in `length` k.
template <int R>
__attribute__((always_inline)) inline void dot(const char* codes, const char* x, int64_t length, __m256i (&sums)[R][2]) {
    const auto step = [&](auto begin) __attribute__((always_inline)) {
        const __m256i first = load(codes), second = load(codes + kHalfBytes);
#pragma GCC unroll 6
        for (int t = 0; t < R; t++) multiply<begin.value>(first, second, x + t * kStride, sums[t]);
        codes += 2 * kHalfBytes;
        x += 2 * kWord;
    };
    step(Number<1>{});
#pragma GCC unroll 4
    for (int64_t k = 2; k < length; k += 2) step(Number<0>{});
}

// What a block of a tile has for all rows.
struct Weights {
    const char* packed;  // its codes as they lie
    const char* codes;   // and unpacked
    int64_t length;
    __m256 scales[2];
    __m256i zeros[2];
};

// What the outliers of a block add to the sums [rows][16].
template <int bits>
__attribute__((noinline)) void add_outliers(const Weights& weights, const char* blocks, const char* outliers, int64_t rows,
                                            int64_t activation_bytes, float* sums) {
    for (int64_t t = 0; t < rows; t++, sums += kTile) {
        const auto& block = *reinterpret_cast<const Block*>(blocks + t * activation_bytes);
        const auto* list = reinterpret_cast<const Outlier*>(outliers + t * activation_bytes);
        for (int32_t o = 0; o < block.outliers; o++) {
            for (int j = 0; j < 2; j++) {
                const auto code = (__m256i)one_code<bits, Lanes>(weights.packed + j * kHalfBytes, list[o].index);
                const __m256i difference = _mm256_sub_epi32(code, weights.zeros[j]);
                const __m256 weight = _mm256_mul_ps(_mm256_cvtepi32_ps(difference), weights.scales[j]);
                float* at = sums + j * kHalf;
                _mm256_store_ps(at, _mm256_fmadd_ps(weight, _mm256_set1_ps(list[o].value), _mm256_load_ps(at)));
            }
        }
    }
}

// R rows: adds to sums [R][16], all but the outliers; whether there are any. The Block of row t is at t * activation_bytes.
template <int R>
__attribute__((noinline)) bool rows_of_block(const Weights& weights, const char* x, const char* blocks,
                                             int64_t activation_bytes, float* sums) {
    const auto block = [&](int t) -> const Block& {
        return *reinterpret_cast<const Block*>(blocks + t * activation_bytes);
    };
    __m256i products[R][2];
    if (weights.length == kBlock) {
        dot<R>(weights.codes, x, kBlock, products);
    } else {
        dot<R>(weights.codes, x, weights.length, products);
    }
    int32_t outliers = 0;
#pragma GCC unroll 6
    for (int t = 0; t < R; t++) {
        const __m256 scale = _mm256_set1_ps(block(t).scale);
        for (int j = 0; j < 2; j++) {
            float* at = sums + t * kTile + j * kHalf;
            const __m256 factor = _mm256_mul_ps(weights.scales[j], scale);
            _mm256_store_ps(at, _mm256_fmadd_ps(_mm256_cvtepi32_ps(products[t][j]), factor, _mm256_load_ps(at)));
        }
        outliers |= block(t).outliers;
    }
    return outliers != 0;
}

// The same of fewer rows than R, or as many.
template <int R>
bool up_to(int64_t rows, const Weights& weights, const char* x, const char* blocks, int64_t activation_bytes, float* sums) {
    if constexpr (R > 1) {
        if (rows < R) return up_to<R - 1>(rows, weights, x, blocks, activation_bytes, sums);
    }
    return rows_of_block<R>(weights, x, blocks, activation_bytes, sums);
}

// ---- panels ----------------------------------------------------------------------------------------------------------

// What stays the same for a call.
struct Call {
    QuantizedLayout layout;
    bool wide_scales;
    int64_t n;
    const char* packed;
    int64_t tile_begin, tile_end;
    float* y;
    int64_t y_stride;
};

// A few rows times the blocks from `first` on that fit into `panel`; how many blocks of a row are done is known by `first`
// after it.
template <int bits, int planes>
void some_blocks(const Call& call, const char* activations, int64_t rows, float* y, char* panel, Place& first) {
    const QuantizedLayout& layout = call.layout;
    Place place = first;
    int64_t filled = 0;
    while (place.group < layout.groups && filled + place.length <= kPanelLength) {
        for (int64_t t = 0; t < rows; t++) {
            unpack_integers<planes>(activations + t * layout.activation_bytes + place.integers, place.length,
                                    panel + t * kStride + filled * kWord);
        }
        filled += place.length;
        place.next(layout);
    }
    const Place end = place;
    const int64_t lines = divide_up(end.codes - first.header, (end.index - first.index) * divide_up(rows, kRows) * 64);
    const int64_t list_bytes = layout.block_outliers * int64_t{sizeof(Outlier)};
    alignas(64) char codes[kBlock * kTile * kWord];
    alignas(64) float sums[kPanelRows * kTile];
    for (int64_t tile = call.tile_begin; tile < call.tile_end; tile++) {
        const char* at = call.packed + tile * layout.tile_bytes;
        float* out = y + tile * kTile;
        const auto bytes = static_cast<size_t>(smaller(kTile, call.n - tile * kTile)) * 4;
        std::memset(sums, 0, sizeof sums);
        for (int64_t t = 0; t < rows && first.index > 0; t++) std::memcpy(sums + t * kTile, out + t * call.y_stride, bytes);
        // Of the next tile, a few lines with each few rows.
        const char* ahead = at + layout.tile_bytes + first.header;
        const char* x = panel;
        for (place = first; place.index < end.index; place.next(layout)) {
            const char *scales = place.scales(layout, at), *zeros = place.zeros(layout, at);
            Weights weights{at + place.codes, codes, place.length, {}, {}};
            for (int j = 0; j < 2; j++) {
                const char* half = scales + j * layout.scale_bytes / 2;
                weights.scales[j] = call.wide_scales
                                        ? _mm256_load_ps(reinterpret_cast<const float*>(half))
                                        : _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(half)));
                const auto* z = reinterpret_cast<const __m128i*>(zeros + j * kHalf);
                weights.zeros[j] = _mm256_cvtepu8_epi32(_mm_loadl_epi64(z));
            }
            unpack_codes<bits>(weights.packed, place.length, weights.zeros, codes);
            const char* blocks = activations + layout.blocks_at + place.index * int64_t{sizeof(Block)};
            bool outliers = false;
            for (int64_t t = 0; t < rows; t += kRows) {
                for (int64_t line = 0; line < lines; line++, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
                outliers |= up_to<kRows>(rows - t, weights, x + t * kStride, blocks + t * layout.activation_bytes,
                                         layout.activation_bytes, sums + t * kTile);
            }
            if (__builtin_expect(outliers, 0)) {
                add_outliers<bits>(weights, blocks, activations + layout.outliers_at + place.index * list_bytes, rows,
                                   layout.activation_bytes, sums);
            }
            x += place.length * kWord;
        }
        for (int64_t t = 0; t < rows; t++) std::memcpy(out + t * call.y_stride, sums + t * kTile, bytes);
    }
    first = end;
}

template <int bits, int planes>
void run(const Call& call, const char* activations, int64_t rows) {
    alignas(64) char panel[kPanelRows * kStride];
    const int64_t row_bytes = call.layout.activation_bytes;
    const int64_t panels = divide_up(rows, kPanelRows), most = round_up(divide_up(rows, panels), kRows);
    for (int64_t begin = 0; begin < rows; begin += most) {
        const int64_t count = smaller(most, rows - begin);
        Place place(call.layout);
        while (place.group < call.layout.groups) {
            some_blocks<bits, planes>(call, activations + begin * row_bytes, count, call.y + begin * call.y_stride, panel,
                                      place);
        }
    }
}

}  // namespace

void linear_rows_avx2(const LinearShape& shape, const void* packed, const void* activations, int64_t rows,
                      int64_t tile_begin, int64_t tile_end, float* y, int64_t y_stride) {
    const Call call{QuantizedLayout(shape), shape.wide_scales, shape.n, static_cast<const char*>(packed),
                    tile_begin, tile_end, y, y_stride};
    with_bits(shape.bits, [&](auto bits) {
        if (shape.activation_bits == 16) {
            run<bits.value, 2>(call, static_cast<const char*>(activations), rows);
        } else if constexpr (bits.value == 8) {  // others do not come here: many_rows() in linear_avx2.cpp
            run<bits.value, 1>(call, static_cast<const char*>(activations), rows);
        }
    });
}

}  // namespace tinychat
