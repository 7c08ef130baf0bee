// The contract between the kernels and those who call them: plain structs and function pointers, no templates.
//
// A kernel computes a slice; it knows nothing of threads, Python or models. Each instruction-set level fills one table
// (scalar/, avx/); isa.cpp picks one at run time. Files compiled with ISA flags include this header, levels.h,
// linear_layout.h and intrinsics only, and keep every helper in an anonymous namespace: an inline function shared between
// two levels may be merged by the linker into the one that an older CPU cannot run.
#pragma once
#include <cstdint>

namespace tinychat {

// ---- linear: y[T, n] = x[T, k] W^T -----------------------------------------------------------------------------------

enum class WeightType : int32_t { q4 = 0, f32 = 1, f16 = 2, bf16 = 3 };

// A weight [n, k]. For q4, groups of `group` along k share a scale and a zero (the last may be shorter; group >= k is one
// group per row), and scales are kept as fp16, or as fp32 where `wide_scales` (checkpoints with bf16 or fp32 scales).
struct WeightShape {
    WeightType type;
    int64_t n, k;
    int64_t group;
    bool wide_scales;
};

// Canonical form of a weight in memory: what pack() reads and unpack() writes.
//   q4: codes uint8 [n, k], scales fp16 or fp32 [n, ceil(k/group)] (see wide_scales), zeros uint8 likewise
//   else: values [n, k] of the type, the other two null
struct WeightData {
    void* values;
    void* scales;
    void* zeros;
};

// Packed weights are split in tiles of output rows; work is divided between threads in whole tiles.
// Activations are prepared once per row and used by every tile: for q4 the row as integers with a scale per block.
struct LinearKernels {
    int64_t tile;                                          // output rows per tile, all types
    int64_t (*packed_bytes)(const WeightShape&);           // whole weight; 64-byte aligned buffers throughout
    void (*pack)(const WeightShape&, const WeightData&, void* packed, int64_t tile_begin, int64_t tile_end);
    void (*unpack)(const WeightShape&, const void* packed, const WeightData&);  // exact inverse of pack
    int64_t (*activation_bytes)(const WeightShape&);       // one row; a multiple of 64; depends on type, k and group
    void (*prepare)(const WeightShape&, const float* x, void* activation);      // one row of k floats
    // y[t * y_stride + r] for r in the rows of tiles [tile_begin, tile_end), r < n, t < rows;
    // activation t lies at t * activation_bytes. Rows beyond n are never written.
    void (*linear)(const WeightShape&, const void* packed, const void* activations, int64_t rows, int64_t tile_begin,
                   int64_t tile_end, float* y, int64_t y_stride);
};

// ---- the rest of a decoder block -------------------------------------------------------------------------------------

enum class CacheType : int32_t { f16 = 0, f32 = 1 };

struct BlockKernels {
    // y = x / sqrt(mean(x^2) + eps) * weight, n values; y may be x
    void (*rms_norm)(const float* x, const float* weight, float eps, int64_t n, float* y);
    // y = silu(gate) * up, n values; y may be gate
    void (*silu_multiply)(const float* gate, const float* up, int64_t n, float* y);
    // n floats to cache entries
    void (*store)(CacheType, const float* x, int64_t n, void* entry);
    // Attention of `heads` query heads that share one key-value head, for one row: q and out are [heads, dim] with the given
    // strides, keys and values [.., dim] of which entries [begin, end) are seen; scores is scratch of end - begin floats
    // per head. q is already rotated; scale multiplies q . k before the softmax.
    void (*attend)(CacheType, const float* q, int64_t q_stride, const void* keys, const void* values, int64_t begin,
                   int64_t end, int64_t heads, int64_t dim, float scale, float* scores, float* out, int64_t out_stride);
};

struct Kernels {
    const char* isa;
    LinearKernels linear;
    BlockKernels block;
};

// The table in use: the best that this CPU and operating system run, or the one that TINYCHAT_ISA names.
// Throws std::runtime_error, naming what is supported, where TINYCHAT_ISA names another.
const Kernels& kernels();
const Kernels& kernels(const char* isa);
// Names of the levels that run here, best first, separated by spaces; "scalar" is always the last.
const char* supported_isas();

}  // namespace tinychat
