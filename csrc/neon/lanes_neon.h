// Four floats at a time: the words that csrc/*_lanes.h are written in, for units of this level only.
#pragma once
#include <arm_neon.h>

#include <cstdint>

#include "neon/exponential_neon.h"

namespace tinychat {
namespace {

using Vector = float32x4_t;
struct Part {  // some lanes from the first on
    int n;
};

constexpr int kLanes = 4;
constexpr int kQueries = 6, kWide = 4;  // a block of registers: so many queries by so many vectors, and what they meet
constexpr int kMixed = 16;              // registers for what two or four queries sum of values
constexpr bool kMixPairs = false;       // where those are too few, they sum in memory

inline Part part(int64_t n) { return {static_cast<int>(n > kLanes ? kLanes : n < 0 ? 0 : n)}; }

inline Vector all(float value) { return vdupq_n_f32(value); }
inline Vector counted() { return Vector{0, 1, 2, 3}; }
inline Vector fma(Vector a, Vector b, Vector c) { return vfmaq_f32(c, a, b); }
inline Vector larger(Vector a, Vector b) { return vmaxq_f32(a, b); }
inline Vector smaller(Vector a, Vector b) { return vminq_f32(a, b); }
inline Vector magnitude(Vector a) { return vabsq_f32(a); }
inline float sum_of(Vector a) { return vaddvq_f32(a); }
inline float largest_of(Vector a) { return vmaxvq_f32(a); }

// fcvtl is an instruction of ARMv8.0; arithmetic on fp16 is not.
inline Vector widened(uint16x4_t halves) { return vcvt_f32_f16(vreinterpret_f16_u16(halves)); }
inline Vector of_codes(int8x8_t codes) { return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(codes)))); }

// cap * tanh(x / cap), where tanh(z) = 1 - 2 / (1 + e^(2 z)); within cap * 1e-7
inline Vector capped(Vector x, float cap) { return all(cap) - all(2 * cap) / (all(1) + exponential(x * all(2 / cap))); }

// Lanes [begin, end) of x, either of them anything; the others are `otherwise`.
inline Vector within(Vector x, int64_t begin, int64_t end, float otherwise) {
    const int32x4_t lane = {0, 1, 2, 3};
    const uint32x4_t inside = vandq_u32(vcgeq_s32(lane, vdupq_n_s32(part(begin).n)), vcltq_s32(lane, vdupq_n_s32(part(end).n)));
    return vbslq_f32(inside, x, all(otherwise));
}

// Lanes beyond a part are 0, and their memory is not touched.
inline Vector load(const float* from) { return vld1q_f32(from); }
inline Vector load(const float* from, Part some) {
    if (some.n == kLanes) return load(from);
    float values[kLanes] = {};
    for (int i = 0; i < some.n; ++i) values[i] = from[i];
    return vld1q_f32(values);
}
inline Vector load(const uint16_t* from) { return widened(vld1_u16(from)); }
inline Vector load(const uint16_t* from, Part some) {
    if (some.n == kLanes) return load(from);
    uint16_t halves[kLanes] = {};
    for (int i = 0; i < some.n; ++i) halves[i] = from[i];
    return widened(vld1_u16(halves));
}
inline Vector load(const int8_t* from) {  // four bytes and no more
    int32_t codes;
    __builtin_memcpy(&codes, from, sizeof codes);
    return of_codes(vreinterpret_s8_s32(vdup_n_s32(codes)));
}
inline Vector load(const int8_t* from, Part some) {
    if (some.n == kLanes) return load(from);
    int8_t codes[kLanes] = {};
    for (int i = 0; i < some.n; ++i) codes[i] = from[i];
    return load(codes);
}
inline void save(float* to, Vector value) { vst1q_f32(to, value); }
inline void save(float* to, Part some, Vector value) {
    if (some.n == kLanes) return save(to, value);
    for (int i = 0; i < some.n; ++i) to[i] = value[i];
}
inline void save(uint16_t* to, Part some, Vector value) {
    const uint16x4_t halves = vreinterpret_u16_f16(vcvt_f16_f32(value));
    if (some.n == kLanes) return vst1_u16(to, halves);
    for (int i = 0; i < some.n; ++i) to[i] = halves[i];
}
inline void save(int8_t* to, Part some, Vector value) {  // to nearest, ties to even; of values within +-127
    const int32x4_t codes = vcvtnq_s32_f32(value);
    for (int i = 0; i < some.n; ++i) to[i] = static_cast<int8_t>(codes[i]);
}

// Lane i is the sum over x[i].
inline Vector sums(const Vector (&x)[kLanes]) { return vpaddq_f32(vpaddq_f32(x[0], x[1]), vpaddq_f32(x[2], x[3])); }

// Lane i of x[j] changes places with lane j of x[i].
inline void transpose(Vector (&x)[kLanes]) {
    const float64x2_t a = vreinterpretq_f64_f32(vtrn1q_f32(x[0], x[1])), b = vreinterpretq_f64_f32(vtrn2q_f32(x[0], x[1]));
    const float64x2_t c = vreinterpretq_f64_f32(vtrn1q_f32(x[2], x[3])), d = vreinterpretq_f64_f32(vtrn2q_f32(x[2], x[3]));
    x[0] = vreinterpretq_f32_f64(vtrn1q_f64(a, c));
    x[1] = vreinterpretq_f32_f64(vtrn1q_f64(b, d));
    x[2] = vreinterpretq_f32_f64(vtrn2q_f64(a, c));
    x[3] = vreinterpretq_f32_f64(vtrn2q_f64(b, d));
}

}  // namespace
}  // namespace tinychat
