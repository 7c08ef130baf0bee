// Vectors of 16 bytes in the compilers' own notation: SSE2 on every x86-64, NEON on every AArch64.
//
// Every function here has internal linkage, as in linear_layout.h.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace tinychat {
namespace {

typedef uint16_t Lanes16 __attribute__((vector_size(16)));
typedef uint32_t Lanes32 __attribute__((vector_size(16)));
typedef uint64_t Lanes64 __attribute__((vector_size(16)));

template <class Lanes>
inline Lanes load_lanes(const void* from) {
    Lanes lanes;
    std::memcpy(&lanes, from, sizeof lanes);
    return lanes;
}

template <class Lanes>
inline void store_lanes(void* to, Lanes lanes) {
    std::memcpy(to, &lanes, sizeof lanes);
}

// A store beside the caches, to a place that is aligned: what is written is not read soon.
template <class Lanes>
inline void stream_lanes(void* to, Lanes lanes) {
#if defined(__SSE2__)
    _mm_stream_si128(static_cast<__m128i*>(to), (__m128i)lanes);
#else
    store_lanes(to, lanes);
#endif
}

// The first halves of a and b, lane by lane in turn; the second halves.
#if defined(__clang__)
inline Lanes16 low(Lanes16 a, Lanes16 b) { return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
inline Lanes16 high(Lanes16 a, Lanes16 b) { return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
inline Lanes32 low(Lanes32 a, Lanes32 b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
inline Lanes32 high(Lanes32 a, Lanes32 b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
inline Lanes64 low(Lanes64 a, Lanes64 b) { return __builtin_shufflevector(a, b, 0, 2); }
inline Lanes64 high(Lanes64 a, Lanes64 b) { return __builtin_shufflevector(a, b, 1, 3); }
#else
inline Lanes16 low(Lanes16 a, Lanes16 b) { return __builtin_shuffle(a, b, Lanes16{0, 8, 1, 9, 2, 10, 3, 11}); }
inline Lanes16 high(Lanes16 a, Lanes16 b) { return __builtin_shuffle(a, b, Lanes16{4, 12, 5, 13, 6, 14, 7, 15}); }
inline Lanes32 low(Lanes32 a, Lanes32 b) { return __builtin_shuffle(a, b, Lanes32{0, 4, 1, 5}); }
inline Lanes32 high(Lanes32 a, Lanes32 b) { return __builtin_shuffle(a, b, Lanes32{2, 6, 3, 7}); }
inline Lanes64 low(Lanes64 a, Lanes64 b) { return __builtin_shuffle(a, b, Lanes64{0, 2}); }
inline Lanes64 high(Lanes64 a, Lanes64 b) { return __builtin_shuffle(a, b, Lanes64{1, 3}); }
#endif

// Columns of the 4 x 4 matrix whose rows are given.
inline void transpose(Lanes32 a, Lanes32 b, Lanes32 c, Lanes32 d, Lanes32* columns) {
    const auto ab = (Lanes64)low(a, b), cd = (Lanes64)low(c, d);
    const auto ab_high = (Lanes64)high(a, b), cd_high = (Lanes64)high(c, d);
    columns[0] = (Lanes32)low(ab, cd);
    columns[1] = (Lanes32)high(ab, cd);
    columns[2] = (Lanes32)low(ab_high, cd_high);
    columns[3] = (Lanes32)high(ab_high, cd_high);
}

// Of the 8 x 8 matrix whose rows are given.
inline void transpose(const Lanes16* rows, Lanes16* columns) {
    for (int half = 0; half < 2; half++) {
        const auto pair = [&](int i) { return (Lanes32)(half ? high(rows[i], rows[i + 1]) : low(rows[i], rows[i + 1])); };
        Lanes32 out[4];
        transpose(pair(0), pair(2), pair(4), pair(6), out);
        for (int i = 0; i < 4; i++) columns[half * 4 + i] = (Lanes16)out[i];
    }
}

}  // namespace
}  // namespace tinychat
