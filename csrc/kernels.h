// The contract between the kernels and those who call them: plain structs and function pointers, no templates.
//
// A kernel computes a slice; it knows nothing of threads, Python or models. Each instruction-set level fills one table
// (scalar/, avx/, neon/); isa.cpp picks one at run time. Files compiled with ISA flags include this header, levels.h,
// linear_layout.h, what is made of it alone, and intrinsics only, and keep every helper in an anonymous namespace: an inline
// function shared between two levels may be merged by the linker into the one that an older CPU cannot run.
#pragma once
#include <cstdint>

namespace tinychat {

// ---- linear: y[T, n] = x[T, k] W^T -----------------------------------------------------------------------------------

enum class WeightType : int32_t { quantized = 0, f32 = 1, f16 = 2, bf16 = 3 };

// How one row's kernel asks ahead for what it reads once and no cache holds: far ahead, as on Intel, whose cores by themselves
// fetch within a page only; near, into the first cache; or not at all, as on Zen 4, where asking costs two fifths of the speed.
// Kernels of several rows are free to ask as they like. No result depends on it.
enum class Fetch : int32_t { far = 0, near = 1, none = 2 };

// A weight [n, k] and the precision of the activations that it meets.
//   quantized: codes of `bits` (2, 3, 4 or 8); groups of `group` along k share a scale and a zero (the last may be shorter;
//              group >= k is one group per row); scales are kept as fp16, or as fp32 where `wide_scales` (checkpoints with
//              bf16 or fp32 scales); activations are rounded to integers of `activation_bits` (16 or 8)
//   else:      activations stay fp32, and group, wide_scales and the bits say nothing
struct LinearShape {
    WeightType type;
    int64_t n, k;
    int64_t group;
    bool wide_scales;
    int32_t bits;
    int32_t activation_bits;
    Fetch fetch = Fetch::far;
    bool two_tiles = false;  // of one row, two tiles at once, far apart, where a level can and nothing is asked for ahead
};

// What pack() reads for a quantized weight.
enum class Source : int32_t {
    codes = 0,  // the canonical form: codes uint8 [n, k], scales [n, groups] fp16 or fp32 (see wide_scales), zeros uint8
    awq = 1,    // 4 bits as AWQ "gemm" files hold them: words int32 [k, n/8], scales fp16 [groups, n], zero words [groups, n/8]
    f32 = 2,    // values [n, k] to be rounded to nearest, symmetric: scale = largest |w| of the group / (2^(bits-1) - 1),
    f16 = 3,    // rounded up to the scales' type, zero = 2^(bits-1), codes w / scale + zero (pack_rounded.cpp)
    bf16 = 4,
    stream = 5, // codes as a stream of bits in words (pack_stream.cpp), as wide as they are kept; the rest canonical
    q4_0 = 6,   // codes in the blocks of GGUF files (pack_codes.cpp), kept in 4, 8 and 8 bits; the rest canonical
    q8_0 = 7,
    q6_k = 8,
};

// A weight in memory. unpack() writes the canonical form: of a type other than quantized `values` [n, k] alone.
struct WeightData {
    void* values;
    void* scales;
    void* zeros;
    Source source = Source::codes;
    int64_t row_stride = 0, word_stride = 0;  // of a stream, in words: from a row's to the next row's, from word to word
    const int32_t* permutation = nullptr;     // [k]: column j multiplies input permutation[j]; a stream has its code at that
                                              // number, codes have it at j
};

// Packed weights are split in tiles of output rows; work is divided between threads in whole tiles.
// Activations are prepared once per row and used by every tile: for a quantized weight as integers with a scale per block.
struct LinearKernels {
    int64_t tile;                                          // output rows per tile, all types
    int64_t (*packed_bytes)(const LinearShape&);           // whole weight; 64-byte aligned buffers throughout
    void (*pack)(const LinearShape&, const WeightData&, void* packed, int64_t tile_begin, int64_t tile_end);
    void (*unpack)(const LinearShape&, const void* packed, const WeightData&);  // exact inverse of pack
    // The values of output row `row`, as fp32 [k]: of an embedding table that is also the head.
    void (*unpack_row)(const LinearShape&, const void* packed, int64_t row, float* values);
    int64_t (*activation_bytes)(const LinearShape&);       // one row; a multiple of 64; depends on type, k, group and bits
    // Part of one row: x holds the values begin .. end of its k. `begin` is a multiple of prepare_step(shape), `end` too
    // or k, so that a caller may norm and prepare a row piece by piece, or several threads share a row.
    int64_t (*prepare_step)(const LinearShape&);
    void (*prepare)(const LinearShape&, const float* x, void* activation, int64_t begin, int64_t end);
    // y[t * y_stride + r] for r in the rows of tiles [tile_begin, tile_end), r < n, t < rows;
    // activation t lies at t * activation_bytes. Rows beyond n are never written.
    void (*linear)(const LinearShape&, const void* packed, const void* activations, int64_t rows, int64_t tile_begin,
                   int64_t tile_end, float* y, int64_t y_stride);
    bool asks = false;         // whether it obeys LinearShape::fetch
    bool (*pairs)(const LinearShape&) = nullptr;  // whether it obeys LinearShape::two_tiles of such a weight; null: of none
    int64_t panel_rows = 12;   // from how many rows on it may first copy activations to a panel, for all tiles of a call,
    int64_t panel_tiles = 8;   // which then should be so many at least
};

// ---- the rest of a decoder block -------------------------------------------------------------------------------------

// Of a norm: RMSNorm divides by the root of the mean square; LayerNorm takes the mean away first.
enum class NormType : int32_t { rms = 0, layer = 1 };
// y = act(gate) * up: silu(x) = x / (1 + e^-x); gelu(x) = x (1 + erf(x / sqrt 2)) / 2; gelu_tanh puts
// tanh(sqrt(2 / pi) (x + 0.044715 x^3)) for the erf; relu(x) = the larger of x and 0
enum class Activation : int32_t { silu = 0, gelu = 1, gelu_tanh = 2, relu = 3 };

struct Moments {
    float mean;      // 0 for RMSNorm
    float variance;  // mean of (x - mean)^2
};

constexpr int64_t kPeak = 16;  // values of which peaks() tells the largest

struct BlockKernels {
    // x += factor * y, n values
    void (*add)(float* x, const float* y, float factor, int64_t n);
    Moments (*moments)(NormType, const float* x, int64_t n);
    // y = (x - mean) * factor * weight + bias, n values; bias may be null; y may be x
    void (*normalize)(const float* x, float mean, float factor, const float* weight, const float* bias, int64_t n, float* y);
    // y = act(gate) * up, n values; up null: y = act(gate); y may be gate
    void (*activate)(Activation, const float* gate, const float* up, int64_t n, float* y);
    // y = x / sqrt(mean(x^2) + eps) * weight, n values; y may be x
    void (*rms_norm)(const float* x, const float* weight, float eps, int64_t n, float* y);
    // x = cap * tanh(x / cap), n values
    void (*soft_cap)(float* x, float cap, int64_t n);
    // y = the largest of each kPeak of n values, n > 0, the last perhaps of fewer; the first is NaN where a value is not finite
    void (*peaks)(const float* x, int64_t n, float* y);
};

// ---- attention -------------------------------------------------------------------------------------------------------

// q8: an entry is int8 codes with one fp32 scale, x = code * scale: scale = largest |x| / 127, codes to nearest, ties to even.
enum class CacheType : int32_t { f16 = 0, f32 = 1, q8 = 2 };

// The entries of one slot and key-value head in a layer: entry j is position j.
struct CacheView {
    CacheType type;
    void *keys, *values;               // [.., dim]
    float *key_scales, *value_scales;  // [..], of q8 only
};

// The query heads that share a key-value head.
struct QueryGroup {
    int64_t dim, heads;
    float scale;          // of q . key
    const float* slopes;  // [heads], or null: slope * (j - position) is added to the score (ALiBi, arXiv 2108.12409)
    float cap;            // the score before that becomes cap * tanh(score / cap); 0: it does not
    Fetch fetch = Fetch::far;  // of entries, where rows are few
};

// Consecutive positions of one slot: row i, at position + i, sees itself and the window - 1 entries before it (0: all).
struct QueryRows {
    const float* q;  // of row i [heads, dim] at i * stride, rotated
    int64_t stride;
    int64_t rows, position, window;
};

// What a row takes from some of the entries it sees. Partials of the same row are merged by scaling each to the larger
// maximum; out / sum is what attention gives. Of a row that sees none of them the maximum is -infinity, the rest 0.
struct Partial {
    float* out;      // of row i [heads, dim] at i * stride: sum over entries j of e^(score j - maximum) * value j
    int64_t stride;
    float* maximum;  // [rows, heads], of the scores
    float* sum;      // [rows, heads], of e^(score - maximum)
};

struct AttentionKernels {
    // Rotary embedding: dimension j of a head turns with j + half, by cos and sin [half]
    void (*rotate)(float* head, const float* cos, const float* sin, int64_t half);
    // Entry `position` = key and value [dim]; of q8, one with NaN or infinity gets the scale NaN
    void (*store)(const CacheView&, const float* key, const float* value, int64_t dim, int64_t position);
    // Floats of scratch, on a 64-byte boundary, that attend() needs for so many rows and entries
    int64_t (*scratch)(const QueryGroup&, int64_t rows, int64_t entries);
    // Attention of a few rows over entries [begin, end), 0 <= begin < end; those a row does not see do not count for it.
    // One row takes memory's time. Many share the arithmetic: the work per query falls up to about 128 queries (rows x heads).
    void (*attend)(const CacheView&, const QueryGroup&, const QueryRows&, int64_t begin, int64_t end, float* scratch,
                   const Partial&);
};

// ---- the quantizer's rounding, and its search of limits --------------------------------------------------------------

// Some rows of a weight in groups of `width` along k, each rounded to the grid of its limits: tinychat/quantize/grid.py has
// the terms, and the same in PyTorch.
struct Rounding {
    int64_t rows, k, width;
    const float* weights;   // [rows, k]
    const float* limits;    // (low, high) [rows, groups]; null: the range that the weights of a group have
    float top;              // the largest code
    bool symmetric;
    const float* divisors;  // [k], of what is rounded; null: 1
    float* rounded;         // [rows, k]
};

// One group of some rows of a weight: tinychat/quantize/clip.py has the terms. A change d of a row's rounded weights adds
// d (gram d + pull) to its loss. For each of `moves` in turn the limits become own * shrink, in those ends that it moves (1:
// low, 2: high, 3: both), for the one of `shrinks` that takes most away, if any does.
struct Clipping {
    int64_t rows, width;
    const float* weights;  // [rows, width]
    const float* gram;     // [width, width], symmetric
    const float* pull;     // [rows, width]
    const float* rounded;  // [rows, width]: the weights with the limits as they are
    const float* own;      // (low, high) of row r at r * stride
    float* limits;         // likewise
    int64_t stride;
    float top;             // the largest code
    bool symmetric;
    const float* shrinks;
    int64_t n_shrinks;
    const int32_t* moves;
    int64_t n_moves;
    float* change;         // [rows, width], of the rounded weights
};

struct ClipKernels {
    bool (*round)(const Rounding&);     // false where a weight is not finite, or fp16 does not hold a scale
    int64_t (*scratch)(int64_t width);  // floats that clip() needs
    bool (*clip)(const Clipping&, float* scratch);  // whether any limit has changed
};

struct Kernels {
    const char* isa;
    LinearKernels linear;
    BlockKernels block;
    AttentionKernels attention;
    const ClipKernels* clip;  // null: there is none, and PyTorch searches
};

// The table in use: the best that this CPU and operating system run, or the one that TINYCHAT_ISA names.
// Throws std::runtime_error, naming what is supported, where TINYCHAT_ISA names another.
const Kernels& kernels();
const Kernels& kernels(const char* isa);
// Names of the levels that run here, best first, separated by spaces; "scalar" is always the last.
const char* supported_isas();

}  // namespace tinychat
