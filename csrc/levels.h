// The tables of each instruction-set level, filled in scalar/, avx/ and neon/ and chosen from in isa.cpp. A level that adds
// nothing to one part takes that part from the level below.
#pragma once
#include "kernels.h"

namespace tinychat {

// Each reads a 64-byte aligned buffer once and returns the sum of its 8-byte words (a tail below 512 bytes may be left
// out): what `read_probe` times.
uint64_t read_scalar(const void* data, int64_t bytes);
#if defined(__x86_64__)
uint64_t read_avx2(const void* data, int64_t bytes);
uint64_t read_ahead_avx2(const void* data, int64_t bytes);  // with prefetches
uint64_t read_avx512(const void* data, int64_t bytes);
uint64_t read_ahead_avx512(const void* data, int64_t bytes);
#elif defined(__aarch64__)
uint64_t read_neon(const void* data, int64_t bytes);
#endif

const LinearKernels& linear_scalar();
const BlockKernels& block_scalar();
const AttentionKernels& attention_scalar();
#if defined(__x86_64__)
const LinearKernels& linear_avx2();
const LinearKernels& linear_avxvnni();
const LinearKernels& linear_avx512();
const LinearKernels& linear_avx512vnni();
const LinearKernels& linear_amx();
const BlockKernels& block_avx2();
const BlockKernels& block_avx512();
const AttentionKernels& attention_avx2();
const AttentionKernels& attention_avx512();
const ClipKernels& clip_avx2();
const ClipKernels& clip_avx512();
// Multiplies bytes in registers and does nothing else; returns how many products it added.
int64_t dot_peak_avx2(int64_t rounds);
int64_t dot_peak_avxvnni(int64_t rounds);
int64_t dot_peak_avx512vnni(int64_t rounds);
// LinearKernels::linear of weights that are not quantized, for the levels that have these instructions and more.
void linear_float_avx2(const LinearShape& shape, const void* packed, const void* activations, int64_t rows,
                       int64_t tile_begin, int64_t tile_end, float* y, int64_t y_stride);
// The same of quantized weights for many rows, where activations have 16 bits or codes 8.
void linear_rows_avx2(const LinearShape& shape, const void* packed, const void* activations, int64_t rows,
                      int64_t tile_begin, int64_t tile_end, float* y, int64_t y_stride);
// The same of quantized weights for many rows.
void linear_rows_avx512vnni(const LinearShape& shape, const void* packed, const void* activations, int64_t rows,
                            int64_t tile_begin, int64_t tile_end, float* y, int64_t y_stride);
void linear_float_avx512(const LinearShape& shape, const void* packed, const void* activations, int64_t rows,
                         int64_t tile_begin, int64_t tile_end, float* y, int64_t y_stride);
#elif defined(__aarch64__)
const LinearKernels& linear_neon();
const LinearKernels& linear_dotprod();
const LinearKernels& linear_i8mm();
const BlockKernels& block_neon();
const AttentionKernels& attention_neon();
const ClipKernels& clip_neon();
void linear_float_neon(const LinearShape& shape, const void* packed, const void* activations, int64_t rows,
                       int64_t tile_begin, int64_t tile_end, float* y, int64_t y_stride);
#endif

}  // namespace tinychat
