// The linear of AVX2 for many rows: a block of codes is unpacked once for a panel of rows, and six of these meet it at a time.
//
// What is computed, and the order of its sums, is that of linear_avx2.cpp, bit for bit. Only the integers are multiplied in
// another way: unpacked codes cost nothing here, so that they may be as wide as the instruction likes.
//
//   words: activations of 16 bits, or codes of 8, meet as int16: vpmaddwd adds two products to a lane of 32 bits. 16
//          products take it and an addition, as many as two planes of bytes take, but no sums of int16 need widening.
//   bytes: activations of 8 bits meet codes of 4 or fewer in vpmaddubsw, 32 products to sums of int16, widened when full.
//
//          unpacked, words: k k+2 of 8 rows, of the other 8, k+1 k+3, ..       bytes: k .. k+3 of 8 rows, of the other 8, ..
//
// Six rows by two halves of a tile are 12 sums, which with two registers of codes, one of activations and one product fill
// the 16 registers. Zen 3 multiplies twice and computes four times in a cycle: 32 products of words, 64 of bytes.
// Loops of these instructions alone reach 0.8 of that, the kernel 0.65 and 0.55 (benchmarks/results/speed.md).
#include <immintrin.h>

#include <type_traits>

#include "levels.h"
#include "linear_layout.h"

namespace tinychat {
namespace {

constexpr int kRows = 6;               // at a time
constexpr int64_t kPanelRows = 60;
constexpr int64_t kPanelLength = 512;  // k of a panel
constexpr int64_t kHalf = 8;           // rows of a tile in a register
constexpr int64_t kHalfBytes = 32;

typedef uint32_t Lanes __attribute__((vector_size(32)));

__m256i load(const char* at) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(at)); }

// How integers meet; `length` k of them are summed in int16.
template <bool words_, int64_t length_ = kBlock>
struct Way {
    static constexpr bool words = words_;
    static constexpr int64_t value_bytes = words ? 2 : 1, length = length_;
    // Rows of a panel lie a cache line further apart than they are long: 4 KiB apart the first cache would take them for one.
    static constexpr int64_t stride = kPanelLength * value_bytes + 64;
};

template <int bits_, int planes_>
struct Kind {
    static constexpr int bits = bits_, planes = planes_;
    static constexpr bool words = planes == 2 || bits == 8;
    using With = std::conditional_t<words, Way<true>, Way<false, bits == 2 ? 128 : bits == 3 ? 64 : 32>>;
};

// A block of a linear: where it lies in a tile, and its activations in a row.
struct Place {
    int64_t group = 0, begin = 0, length = 0;  // of the group `begin`, of the block `length`
    int64_t header = 0, in_chunk = 0;          // where the chunk begins; the group's number in it
    int64_t codes = 0, integers = 0, index = 0;

    void enter(const QuantizedLayout& layout) {
        const int64_t left = layout.padded(group) - begin;
        length = smaller(kBlock, left);
    }
    int64_t chunk_groups(const QuantizedLayout& layout) const {
        return smaller(kChunk, layout.groups - (group - in_chunk));
    }
    void next(const QuantizedLayout& layout) {
        codes += layout.code_bytes(length);
        integers += length * layout.integer_bytes;
        index++;
        begin += length;
        if (begin == layout.padded(group)) {
            begin = 0;
            group++;
            if (++in_chunk == kChunk) start_chunk(layout);
        }
        if (group < layout.groups) enter(layout);
    }
    void start_chunk(const QuantizedLayout& layout) {
        in_chunk = 0;
        header = codes;
        codes += layout.header_bytes(chunk_groups(layout));
    }
};

// ---- codes and activations unpacked ----------------------------------------------------------------------------------

Lanes less(Lanes words, Lanes z) { return (Lanes)_mm256_sub_epi16((__m256i)words, (__m256i)z); }

template <class K, class W = typename K::With>
void unpack_codes(const char* codes, int64_t length, const __m256i (&zeros)[2], char* out) {
    Lanes z[2];  // in both words of a lane
    for (int j = 0; j < 2; j++) z[j] = ((Lanes)zeros[j] & 255u) * 0x10001u;

    const int64_t units = divide_up(length, unit_length(K::bits));
    for (int64_t i = 0; i < units; i++, codes += unit_bytes(K::bits)) {
        for (int h = 0; h < unit_length(K::bits) / 4; h++) {
            for (int j = 0; j < 2; j++) {
                const Lanes four = unpacked<K::bits, Lanes>(codes + j * kHalfBytes, h);
                auto* to = reinterpret_cast<Lanes*>(out) + j;
                if (K::words) {
                    to[0] = less(four & 0x00ff00ffu, z[j]);
                    to[2] = less(four >> 8 & 0x00ff00ffu, z[j]);
                } else {
                    to[0] = four;
                }
            }
            out += 2 * kHalfBytes * W::value_bytes;
        }
    }
}

// The integers of a block, whose planes are at `from`, in the order of the codes.
template <class K, class W = typename K::With>
void unpack_integers(const char* from, int64_t length, char* to) {
    if constexpr (!K::words) {
        std::memcpy(to, from, static_cast<size_t>(length));
        return;
    }
    for (int64_t k = 0; k < length; k += 8) {
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + (K::planes - 1) * length + k));
        __m128i even = _mm_srai_epi16(_mm_slli_epi16(bytes, 8), 8), odd = _mm_srai_epi16(bytes, 8);
        if (K::planes == 2) {
            const __m128i high = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + k));
            even = _mm_add_epi16(even, _mm_slli_epi16(high, 8));
            odd = _mm_add_epi16(odd, _mm_andnot_si128(_mm_set1_epi16(255), high));
        }
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + k * 2), _mm_unpacklo_epi32(even, odd));
    }
}

// ---- products --------------------------------------------------------------------------------------------------------

// The products of one broadcast word of activations with both halves of a tile: the first ones, or added to those before.
// Written out, because GCC loads the factors of all rows first and then has no registers for the sums; both multiplications
// before both additions, because Zen 3 then finds places for more of them.
#define TINYCHAT_BEGIN(multiply)                                         \
    asm("vpbroadcastd %2, %1\n\t" multiply " %1, %3, %0\n\t" multiply " %1, %4, %1" \
        : "=&x"(sums[0]), "=&x"(sums[1])                                 \
        : "m"(word), "x"(first), "x"(second))
#define TINYCHAT_ADD(multiply, add)                                                                    \
    asm("vpbroadcastd %4, %2\n\t" multiply " %2, %5, %3\n\t" multiply " %2, %6, %2\n\t" add " %3, %0, %0\n\t" add \
        " %2, %1, %1"                                                                                  \
        : "+x"(sums[0]), "+x"(sums[1]), "=&x"(factor), "=&x"(product)                                  \
        : "m"(word), "x"(first), "x"(second))

template <bool words, bool begin>
__attribute__((always_inline)) inline void multiply(__m256i first, __m256i second, const char* x, __m256i (&sums)[2]) {
    const auto& word = *reinterpret_cast<const char(*)[4]>(x);
    [[maybe_unused]] __m256i factor, product;
    if constexpr (begin) {
        if constexpr (words) TINYCHAT_BEGIN("vpmaddwd");
        else TINYCHAT_BEGIN("vpmaddubsw");
    } else {
        if constexpr (words) TINYCHAT_ADD("vpmaddwd", "vpaddd");
        else TINYCHAT_ADD("vpmaddubsw", "vpaddw");
    }
}

// sums[t][j] = sum over k of q x for row t and half j, in `steps` registers of codes.
template <class W, int R>
__attribute__((always_inline)) inline void dot(const char* codes, const char* x, int64_t steps, __m256i (&sums)[R][2]) {
    const auto step = [&](auto begin) __attribute__((always_inline)) {
        const __m256i first = load(codes), second = load(codes + kHalfBytes);
#pragma GCC unroll 6
        for (int t = 0; t < R; t++) multiply<W::words, begin.value>(first, second, x + t * W::stride, sums[t]);
        codes += 2 * kHalfBytes;
        x += 4;
    };
    step(Number<1>{});
#pragma GCC unroll 4
    for (int64_t i = 1; i < steps; i++) step(Number<0>{});
}

// The same of a block of `length` k: words, from which z was taken away.
template <class W, int R>
__attribute__((always_inline)) inline void dot_block(const char* codes, const char* x, int64_t length,
                                                     __m256i (&sums)[R][2]) {
    if constexpr (W::words) {
        dot<W, R>(codes, x, length / 2, sums);
    } else {  // added to what sums hold
        for (int64_t begin = 0; begin < length; begin += W::length) {
            __m256i narrow[R][2];
            asm("" : "+m"(sums));  // they stay in memory: the registers are for the narrow ones
            dot<W, R>(codes + begin * kTile, x + begin, smaller(W::length, length - begin) / 4, narrow);
            const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 6
            for (int t = 0; t < R; t++) {
                for (int j = 0; j < 2; j++) {
                    sums[t][j] = _mm256_add_epi32(sums[t][j], _mm256_madd_epi16(narrow[t][j], ones));
                }
            }
        }
    }
}

// What a block of a tile has for all rows.
struct Weights {
    const char* packed;  // its codes as they lie
    const char* codes;   // and unpacked
    int64_t length;
    __m256 scales[2];
    __m256i zeros[2];  // z and 128 z, as Block::halves wants them
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
                const __m256i z = _mm256_and_si256(weights.zeros[j], _mm256_set1_epi32(255));
                const __m256 weight = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(code, z)), weights.scales[j]);
                float* at = sums + j * kHalf;
                _mm256_store_ps(at, _mm256_fmadd_ps(weight, _mm256_set1_ps(list[o].value), _mm256_load_ps(at)));
            }
        }
    }
}

// R rows: adds to sums [R][16], all but the outliers; whether there are any. The Block of row t is at t * activation_bytes.
template <class W, int R>
__attribute__((noinline)) bool rows_of_block(const Weights& weights, const char* x, const char* blocks,
                                             int64_t activation_bytes, float* sums) {
    const auto block = [&](int t) -> const Block& {
        return *reinterpret_cast<const Block*>(blocks + t * activation_bytes);
    };
    __m256i products[R][2];
    if constexpr (!W::words) {
#pragma GCC unroll 6
        for (int t = 0; t < R; t++) {
            const __m256i halves = _mm256_set1_epi32(block(t).halves);
            for (int j = 0; j < 2; j++) products[t][j] = _mm256_madd_epi16(weights.zeros[j], halves);
        }
    }
    if (weights.length == kBlock) {
        dot_block<W, R>(weights.codes, x, kBlock, products);
    } else {
        dot_block<W, R>(weights.codes, x, weights.length, products);
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
template <class W, int R>
bool up_to(int64_t rows, const Weights& weights, const char* x, const char* blocks, int64_t activation_bytes, float* sums) {
    if constexpr (R > 1) {
        if (rows < R) return up_to<W, R - 1>(rows, weights, x, blocks, activation_bytes, sums);
    }
    return rows_of_block<W, R>(weights, x, blocks, activation_bytes, sums);
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
template <class K, class W = typename K::With>
void some_blocks(const Call& call, const char* activations, int64_t rows, float* y, char* panel, Place& first) {
    const QuantizedLayout& layout = call.layout;
    Place place = first;
    int64_t filled = 0;
    while (place.group < layout.groups && filled + place.length <= kPanelLength) {
        for (int64_t t = 0; t < rows; t++) {
            unpack_integers<K>(activations + t * layout.activation_bytes + place.integers, place.length,
                               panel + t * W::stride + filled * W::value_bytes);
        }
        filled += place.length;
        place.next(layout);
    }
    const Place end = place;
    const int64_t lines = divide_up(end.codes - first.header, (end.index - first.index) * divide_up(rows, kRows) * 64);
    const int64_t list_bytes = layout.block_outliers * int64_t{sizeof(Outlier)};
    alignas(64) char codes[kBlock * kTile * W::value_bytes];
    alignas(64) float sums[kPanelRows * kTile];
    for (int64_t tile = call.tile_begin; tile < call.tile_end; tile++) {
        const char* at = call.packed + tile * layout.tile_bytes;
        float* out = y + tile * kTile;
        const auto bytes = static_cast<size_t>(smaller(kTile, call.n - tile * kTile)) * 4;
        for (int64_t t = 0; t < rows; t++) {
            if (first.index == 0) {
                std::memset(sums + t * kTile, 0, kTile * 4);
            } else {
                std::memcpy(sums + t * kTile, out + t * call.y_stride, bytes);
            }
        }
        // Of the next tile, a few lines with each few rows.
        const char* ahead = at + layout.tile_bytes + first.header;
        const char* x = panel;
        for (place = first; place.index < end.index; place.next(layout)) {
            const char* header = at + place.header;
            const char* scales = header + place.in_chunk * layout.scale_bytes;
            const char* zeros = header + place.chunk_groups(layout) * layout.scale_bytes + place.in_chunk * kTile;
            Weights weights{at + place.codes, codes, place.length, {}, {}};
            for (int j = 0; j < 2; j++) {
                const char* half = scales + j * layout.scale_bytes / 2;
                weights.scales[j] = call.wide_scales
                                        ? _mm256_load_ps(reinterpret_cast<const float*>(half))
                                        : _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(half)));
                const auto* z = reinterpret_cast<const __m128i*>(zeros + j * kHalf);
                weights.zeros[j] = _mm256_cvtepu8_epi32(_mm_loadl_epi64(z));
                weights.zeros[j] = _mm256_or_si256(weights.zeros[j], _mm256_slli_epi32(weights.zeros[j], 16 + 7));
            }
            unpack_codes<K>(weights.packed, place.length, weights.zeros, codes);
            const char* blocks = activations + layout.blocks_at + place.index * int64_t{sizeof(Block)};
            bool outliers = false;
            for (int64_t t = 0; t < rows; t += kRows) {
                for (int64_t line = 0; line < lines; line++, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
                outliers |= up_to<W, kRows>(rows - t, weights, x + t * W::stride, blocks + t * layout.activation_bytes,
                                            layout.activation_bytes, sums + t * kTile);
            }
            if (__builtin_expect(outliers, 0)) {
                add_outliers<K::bits>(weights, blocks, activations + layout.outliers_at + place.index * list_bytes, rows,
                                      layout.activation_bytes, sums);
            }
            x += place.length * W::value_bytes;
        }
        for (int64_t t = 0; t < rows; t++) std::memcpy(out + t * call.y_stride, sums + t * kTile, bytes);
    }
    first = end;
}

template <class K, class W = typename K::With>
void run(const Call& call, const char* activations, int64_t rows) {
    alignas(64) char panel[kPanelRows * W::stride];
    const int64_t panels = divide_up(rows, kPanelRows), most = round_up(divide_up(rows, panels), kRows);
    for (int64_t begin = 0; begin < rows; begin += most) {
        const int64_t count = smaller(most, rows - begin);
        Place place;
        place.start_chunk(call.layout);
        place.enter(call.layout);
        while (place.group < call.layout.groups) {
            some_blocks<K>(call, activations + begin * call.layout.activation_bytes, count, call.y + begin * call.y_stride,
                           panel, place);
        }
    }
}

}  // namespace

void linear_rows_avx2(const LinearShape& shape, const void* packed, const void* activations, int64_t rows,
                      int64_t tile_begin, int64_t tile_end, float* y, int64_t y_stride) {
    const Call call{QuantizedLayout(shape), shape.wide_scales, shape.n, static_cast<const char*>(packed),
                    tile_begin, tile_end, y, y_stride};
    with_bits(shape.bits, [&](auto bits) {
        const auto work = shape.activation_bits == 8 ? run<Kind<bits.value, 1>> : run<Kind<bits.value, 2>>;
        work(call, static_cast<const char*>(activations), rows);
    });
}

}  // namespace tinychat
