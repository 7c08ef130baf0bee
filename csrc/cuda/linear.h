// The linears of a packed weight (linear_layout.h). None checks shapes or alignment: the Python that calls does.
#pragma once
#include "linear_layout.h"

namespace tinychat::cuda {

// 1 to 16 rows, waiting for memory. `warps` that share a tile's inputs, a power of two to 16; 0 chooses.
constexpr int kGemvRows = 16;
void gemv(const LinearCall& call, int warps, Stream stream);

// Any number of rows, on tensor cores. `parts` of K whose sums meet in `workspace` (4 rows n bytes each), where nothing
// is kept; 0 chooses as many as pay and as it holds.
void gemm(const LinearCall& call, int parts, float* workspace, int64_t workspace_bytes, Stream stream);

// W [n, k] in `dtype`, rounded once.
void dequantize(const PackedWeight& weight, Dtype dtype, void* values, Stream stream);

}  // namespace tinychat::cuda
