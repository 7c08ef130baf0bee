// The tables of each instruction-set level, filled in scalar/ and avx/ and chosen from in isa.cpp. A level that adds
// nothing to one half takes that half from the level below.
#pragma once
#include "kernels.h"

namespace tinychat {

const LinearKernels& linear_scalar();
const BlockKernels& block_scalar();
#if defined(__x86_64__)
const LinearKernels& linear_avx2();
const LinearKernels& linear_avxvnni();
const LinearKernels& linear_avx512();
const LinearKernels& linear_avx512vnni();
const LinearKernels& linear_amx();
const BlockKernels& block_avx2();
const BlockKernels& block_avx512();
// LinearKernels::linear of weights that are not quantized, for the levels that have these instructions and more.
void linear_float_avx2(const LinearShape& shape, const void* packed, const void* activations, int64_t rows,
                       int64_t tile_begin, int64_t tile_end, float* y, int64_t y_stride);
void linear_float_avx512(const LinearShape& shape, const void* packed, const void* activations, int64_t rows,
                         int64_t tile_begin, int64_t tile_end, float* y, int64_t y_stride);
#endif

}  // namespace tinychat
