// e^x at 4 lanes, for the units of this level only.
#pragma once
#include <arm_neon.h>

namespace tinychat {
namespace {

// e^x: x = n ln 2 + r with |r| <= ln 2 / 2, and e^r by its Taylor polynomial, within 2^-24 of it. Overflows to infinity and
// underflows to 0 as it should.
[[maybe_unused]] float32x4_t exponential(float32x4_t x) {
    // Beyond these bounds the result is the same, and n stays small. fmax and fmin return NaN if one of two is.
    x = vminq_f32(vdupq_n_f32(90.0f), vmaxq_f32(vdupq_n_f32(-105.0f), x));
    const float32x4_t n = vrndnq_f32(x * 1.44269504f);
    float32x4_t r = vfmsq_f32(x, n, vdupq_n_f32(0x1.62e4p-1f));  // ln 2 in two parts, the first short
    r = vfmsq_f32(r, n, vdupq_n_f32(0x1.7f7d1cp-20f));
    float32x4_t p = vdupq_n_f32(1.0f / 5040);
    p = vfmaq_f32(vdupq_n_f32(1.0f / 720), p, r);
    p = vfmaq_f32(vdupq_n_f32(1.0f / 120), p, r);
    p = vfmaq_f32(vdupq_n_f32(1.0f / 24), p, r);
    p = vfmaq_f32(vdupq_n_f32(1.0f / 6), p, r);
    p = vfmaq_f32(vdupq_n_f32(0.5f), p, r);
    p = vfmaq_f32(vdupq_n_f32(1.0f), p, r);
    p = vfmaq_f32(vdupq_n_f32(1.0f), p, r);
    // 2^n in two factors: n may be beyond the exponents of a float.
    const int32x4_t all = vcvtq_s32_f32(n), part = vshrq_n_s32(all, 1), bias = vdupq_n_s32(127);
    const int32x4_t low = vshlq_n_s32(part + bias, 23), high = vshlq_n_s32(all - part + bias, 23);
    return p * vreinterpretq_f32_s32(low) * vreinterpretq_f32_s32(high);
}

}  // namespace
}  // namespace tinychat
