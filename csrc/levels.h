// The tables of each instruction-set level, filled in scalar/ and avx/ and chosen from in isa.cpp. A level that adds
// nothing to one part takes that part from the level below.
#pragma once
#include "kernels.h"

namespace tinychat {

const LinearKernels& linear_scalar();
const BlockKernels& block_scalar();
const AttentionKernels& attention_scalar();
#if defined(__x86_64__)
const LinearKernels& linear_avx2();
const LinearKernels& linear_avx512();
const LinearKernels& linear_avx512vnni();
const BlockKernels& block_avx2();
const BlockKernels& block_avx512();
const AttentionKernels& attention_avx2();
const AttentionKernels& attention_avx512();
#endif

}  // namespace tinychat
