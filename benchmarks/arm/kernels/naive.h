// The naive order of 4-bit codes, to measure what the order of linear_layout.h is worth: neighbours k, k+1 share a byte, as
// numbers are written down, so that the halves of a register must be interleaved before they are in order.
//
// Included before a kernel's source, whose reading of codes it replaces; other widths are nonsense here.
#pragma once
#include <arm_neon.h>

#include <cstdint>

namespace tinychat {
namespace {

template <int bits>
__attribute__((always_inline)) inline uint8x16_t naive_codes(const char* at, int h) {
    const uint8x16_t pairs = vld1q_u8(reinterpret_cast<const uint8_t*>(at));
    const uint8x16_t even = vandq_u8(pairs, vdupq_n_u8(15)), odd = vshrq_n_u8(pairs, 4);
    return h % 2 == 0 ? vzip1q_u8(even, odd) : vzip2q_u8(even, odd);
}

}  // namespace
}  // namespace tinychat

#define four_codes shipped_codes
#include "neon/linear_tiles.h"
#undef four_codes
#define four_codes naive_codes
