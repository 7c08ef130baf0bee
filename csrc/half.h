// fp16 and bf16 to fp32 in portable code. The vector levels have instructions for it.
//
// Every function here has internal linkage, as in linear_layout.h.
#pragma once
#include <cstdint>
#include <cstring>

namespace tinychat {
namespace {

inline float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline float from_bf16(uint16_t bf16) { return from_bits(static_cast<uint32_t>(bf16) << 16); }

inline float from_half(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, rest = half & 0x7fff;
    if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);  // infinite or not a number
    const float value = static_cast<float>(rest & 0x3ff) * 0x1p-24f;                 // subnormal
    return rest < 0x400 ? (sign ? -value : value) : from_bits(sign | ((rest << 13) + (112u << 23)));
}

}  // namespace
}  // namespace tinychat
