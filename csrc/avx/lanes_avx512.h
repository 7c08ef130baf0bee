// Sixteen floats at a time: the words that csrc/*_lanes.h are written in, for units of this level only.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "avx/exponential_avx512.h"

namespace tinychat {
namespace {

using Vector = __m512;
using Part = __mmask16;  // some lanes from the first on

constexpr int kLanes = 16;
constexpr int kQueries = 6, kWide = 4;  // a block of registers: so many queries by so many vectors, and what they meet
constexpr int kMixed = 16;              // registers for what two or four queries sum of values
constexpr bool kMixPairs = false;       // where those are too few, they sum in memory

inline Part part(int64_t n) { return static_cast<Part>(n >= kLanes ? 0xffff : (1u << (n > 0 ? n : 0)) - 1); }

inline Vector all(float value) { return _mm512_set1_ps(value); }
inline Vector counted() { return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
inline Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
inline Vector larger(Vector a, Vector b) { return _mm512_max_ps(a, b); }
inline Vector smaller(Vector a, Vector b) { return _mm512_min_ps(a, b); }
inline Vector magnitude(Vector a) { return _mm512_abs_ps(a); }
inline float sum_of(Vector a) { return _mm512_reduce_add_ps(a); }
inline float largest_of(Vector a) { return _mm512_reduce_max_ps(a); }

// cap * tanh(x / cap), where tanh(z) = 1 - 2 / (1 + e^(2 z)); within cap * 1e-7
inline Vector capped(Vector x, float cap) { return all(cap) - all(2 * cap) / (all(1) + exponential(x * all(2 / cap))); }

// Lanes [begin, end) of x, either of them anything; the others are `otherwise`.
inline Vector within(Vector x, int64_t begin, int64_t end, float otherwise) {
    return _mm512_mask_mov_ps(all(otherwise), static_cast<Part>(part(end) & ~part(begin)), x);
}

// Lanes beyond a part are 0, and their memory is not touched.
inline Vector load(const float* from) { return _mm512_loadu_ps(from); }
inline Vector load(const float* from, Part some) { return _mm512_maskz_loadu_ps(some, from); }
inline Vector load(const uint16_t* from) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))); }
inline Vector load(const uint16_t* from, Part some) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, from)); }
inline Vector load(const int8_t* from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
inline Vector load(const int8_t* from, Part some) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(some, from)));
}
inline void save(float* to, Vector value) { _mm512_storeu_ps(to, value); }
inline void save(float* to, Part some, Vector value) { _mm512_mask_storeu_ps(to, some, value); }
inline void save(uint16_t* to, Part some, Vector value) {
    _mm256_mask_storeu_epi16(to, some, _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
}
inline void save(int8_t* to, Part some, Vector value) {  // to nearest, ties to even; of values within +-127
    _mm_mask_storeu_epi8(to, some, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(value)));
}

// Of four: in each 128-bit lane, lane i is the sum over that lane of vector i.
inline Vector quarters(Vector a, Vector b, Vector c, Vector d) {
    const Vector ab = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
    const Vector cd = _mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d);
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))) +
           _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
}

// Lane i is the sum over x[i].
inline Vector sums(const Vector (&x)[kLanes]) {
    const Vector a = quarters(x[0], x[1], x[2], x[3]), b = quarters(x[4], x[5], x[6], x[7]);
    const Vector c = quarters(x[8], x[9], x[10], x[11]), d = quarters(x[12], x[13], x[14], x[15]);
    const Vector ab = _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd);
    const Vector cd = _mm512_shuffle_f32x4(c, d, 0x88) + _mm512_shuffle_f32x4(c, d, 0xdd);
    return _mm512_shuffle_f32x4(ab, cd, 0x88) + _mm512_shuffle_f32x4(ab, cd, 0xdd);
}

// Lane i of x[j] changes places with lane j of x[i].
inline void transpose(Vector (&x)[kLanes]) {
    Vector fours[kLanes];  // [4 i + c]: column c of the 4x4 blocks of rows 4 i ..
    for (int i = 0; i < 4; ++i) {
        const __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(x[4 * i], x[4 * i + 1]));
        const __m512d high01 = _mm512_castps_pd(_mm512_unpackhi_ps(x[4 * i], x[4 * i + 1]));
        const __m512d low23 = _mm512_castps_pd(_mm512_unpacklo_ps(x[4 * i + 2], x[4 * i + 3]));
        const __m512d high23 = _mm512_castps_pd(_mm512_unpackhi_ps(x[4 * i + 2], x[4 * i + 3]));
        fours[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(low01, low23));
        fours[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low01, low23));
        fours[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high01, high23));
        fours[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high01, high23));
    }
    for (int c = 0; c < 4; ++c) {
        const Vector even01 = _mm512_shuffle_f32x4(fours[c], fours[4 + c], 0x88);   // blocks 0 and 2 of rows 0 .. 7
        const Vector odd01 = _mm512_shuffle_f32x4(fours[c], fours[4 + c], 0xdd);    // blocks 1 and 3
        const Vector even23 = _mm512_shuffle_f32x4(fours[8 + c], fours[12 + c], 0x88);
        const Vector odd23 = _mm512_shuffle_f32x4(fours[8 + c], fours[12 + c], 0xdd);
        x[c] = _mm512_shuffle_f32x4(even01, even23, 0x88);
        x[4 + c] = _mm512_shuffle_f32x4(odd01, odd23, 0x88);
        x[8 + c] = _mm512_shuffle_f32x4(even01, even23, 0xdd);
        x[12 + c] = _mm512_shuffle_f32x4(odd01, odd23, 0xdd);
    }
}

}  // namespace
}  // namespace tinychat
