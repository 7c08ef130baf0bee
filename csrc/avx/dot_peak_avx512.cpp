// What the multipliers of AVX-512 VNNI can do, for benchmarks: the speed that no kernel of bytes exceeds.
#include <immintrin.h>

#include "levels.h"

namespace tinychat {

int64_t dot_peak_avx512vnni(int64_t rounds) {
    constexpr int kSums = 12;  // more than latency times throughput
    const __m512i codes = _mm512_set1_epi8(3), x = _mm512_set1_epi8(-5);
    __m512i sums[kSums];
    for (auto& sum : sums) sum = _mm512_setzero_si512();
    for (int64_t i = 0; i < rounds; i++) {
#pragma GCC unroll 12
        for (auto& sum : sums) __asm__ volatile("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(x));
    }
    return rounds * kSums * 64;
}

}  // namespace tinychat
