// Eight floats at a time: the words that csrc/*_lanes.h are written in, for units of this level only.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "avx/exponential_avx2.h"

namespace tinychat {
namespace {

using Vector = __m256;
struct Part {  // some lanes from the first on
    int n;
    __m256i mask;
};

constexpr int kLanes = 8;
constexpr int kQueries = 6, kWide = 2;  // a block of registers: so many queries by so many vectors, and what they meet
constexpr int kMixed = 8;               // registers for what two or four queries sum of values
constexpr bool kMixPairs = true;        // where those are too few, they sum in memory (Zen 3: 1.4 times as fast, of 128 values)

inline Part part(int64_t n) {
    const int lanes = static_cast<int>(n > kLanes ? kLanes : n < 0 ? 0 : n);
    return {lanes, _mm256_cmpgt_epi32(_mm256_set1_epi32(lanes), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7))};
}

inline Vector all(float value) { return _mm256_set1_ps(value); }
inline Vector counted() { return _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7); }
inline Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
inline Vector larger(Vector a, Vector b) { return _mm256_max_ps(a, b); }
inline Vector smaller(Vector a, Vector b) { return _mm256_min_ps(a, b); }
inline Vector magnitude(Vector a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline float sum_of(Vector a) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
inline float largest_of(Vector a) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

inline __m256 widened(__m128i halves) { return _mm256_cvtph_ps(halves); }
inline __m256 of_codes(__m128i codes) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)); }

// cap * tanh(x / cap), where tanh(z) = 1 - 2 / (1 + e^(2 z)); within cap * 1e-7
inline Vector capped(Vector x, float cap) { return all(cap) - all(2 * cap) / (all(1) + exponential(x * all(2 / cap))); }

// Lanes [begin, end) of x, either of them anything; the others are `otherwise`.
inline Vector within(Vector x, int64_t begin, int64_t end, float otherwise) {
    const __m256i mask = _mm256_andnot_si256(part(begin).mask, part(end).mask);
    return _mm256_blendv_ps(all(otherwise), x, _mm256_castsi256_ps(mask));
}

// Lanes beyond a part are 0, and their memory is not touched.
inline Vector load(const float* from) { return _mm256_loadu_ps(from); }
inline Vector load(const float* from, Part some) { return _mm256_maskload_ps(from, some.mask); }
inline Vector load(const uint16_t* from) { return widened(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))); }
inline Vector load(const uint16_t* from, Part some) {
    if (some.n == kLanes) return load(from);
    alignas(16) uint16_t halves[kLanes] = {};
    for (int i = 0; i < some.n; ++i) halves[i] = from[i];
    return widened(_mm_load_si128(reinterpret_cast<const __m128i*>(halves)));
}
inline Vector load(const int8_t* from) { return of_codes(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))); }
inline Vector load(const int8_t* from, Part some) {
    if (some.n == kLanes) return load(from);
    alignas(16) int8_t codes[16] = {};
    for (int i = 0; i < some.n; ++i) codes[i] = from[i];
    return of_codes(_mm_load_si128(reinterpret_cast<const __m128i*>(codes)));
}
inline void save(float* to, Vector value) { _mm256_storeu_ps(to, value); }
inline void save(float* to, Part some, Vector value) { _mm256_maskstore_ps(to, some.mask, value); }
inline void save(uint16_t* to, Part some, Vector value) {
    alignas(16) uint16_t halves[kLanes];
    _mm_store_si128(reinterpret_cast<__m128i*>(halves), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
    for (int i = 0; i < some.n; ++i) to[i] = halves[i];
}
inline void save(int8_t* to, Part some, Vector value) {  // to nearest, ties to even; of values within +-127
    alignas(32) int32_t codes[kLanes];
    _mm256_store_si256(reinterpret_cast<__m256i*>(codes), _mm256_cvtps_epi32(value));
    for (int i = 0; i < some.n; ++i) to[i] = static_cast<int8_t>(codes[i]);
}

// Of four: in each 128-bit lane, lane i is the sum over that lane of vector i.
inline Vector quarters(Vector a, Vector b, Vector c, Vector d) {
    const Vector ab = _mm256_unpacklo_ps(a, b) + _mm256_unpackhi_ps(a, b);
    const Vector cd = _mm256_unpacklo_ps(c, d) + _mm256_unpackhi_ps(c, d);
    return _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(ab), _mm256_castps_pd(cd))) +
           _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(ab), _mm256_castps_pd(cd)));
}

// Lane i is the sum over x[i].
inline Vector sums(const Vector (&x)[kLanes]) {
    const Vector a = quarters(x[0], x[1], x[2], x[3]), b = quarters(x[4], x[5], x[6], x[7]);
    return _mm256_permute2f128_ps(a, b, 0x20) + _mm256_permute2f128_ps(a, b, 0x31);
}

// Lane i of x[j] changes places with lane j of x[i].
inline void transpose(Vector (&x)[kLanes]) {
    Vector fours[kLanes];  // [4 i + c]: column c of the 4x4 blocks of rows 4 i ..
    for (int i = 0; i < 2; ++i) {
        const __m256d low01 = _mm256_castps_pd(_mm256_unpacklo_ps(x[4 * i], x[4 * i + 1]));
        const __m256d high01 = _mm256_castps_pd(_mm256_unpackhi_ps(x[4 * i], x[4 * i + 1]));
        const __m256d low23 = _mm256_castps_pd(_mm256_unpacklo_ps(x[4 * i + 2], x[4 * i + 3]));
        const __m256d high23 = _mm256_castps_pd(_mm256_unpackhi_ps(x[4 * i + 2], x[4 * i + 3]));
        fours[4 * i] = _mm256_castpd_ps(_mm256_unpacklo_pd(low01, low23));
        fours[4 * i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low01, low23));
        fours[4 * i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(high01, high23));
        fours[4 * i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(high01, high23));
    }
    for (int c = 0; c < 4; ++c) {
        x[c] = _mm256_permute2f128_ps(fours[c], fours[4 + c], 0x20);
        x[4 + c] = _mm256_permute2f128_ps(fours[c], fours[4 + c], 0x31);
    }
}

}  // namespace
}  // namespace tinychat
