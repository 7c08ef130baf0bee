// What the multipliers of AVX2 and of AVX-VNNI can do, for benchmarks: the speed that no kernel of bytes exceeds. The same
// source, compiled for each. AVX2 adds two products of bytes to a word, which an instruction of its own adds to the sum.
#include <immintrin.h>

#include "levels.h"

namespace tinychat {

#ifdef __AVXVNNI__
int64_t dot_peak_avxvnni(int64_t rounds) {
#else
int64_t dot_peak_avx2(int64_t rounds) {
#endif
    constexpr int kSums = 12;  // more than latency times throughput
    const __m256i codes = _mm256_set1_epi8(3), x = _mm256_set1_epi8(-5);
    __m256i sums[kSums];
    for (auto& sum : sums) sum = _mm256_setzero_si256();
    for (int64_t i = 0; i < rounds; i++) {
#pragma GCC unroll 12
        for (auto& sum : sums) {
#ifdef __AVXVNNI__
            sum = _mm256_dpbusd_avx_epi32(sum, codes, x);
            __asm__ volatile("" : "+x"(sum));
#else
            __m256i product;
            __asm__ volatile(
                "vpmaddubsw %3, %2, %1\n\t"
                "vpaddw %1, %0, %0"
                : "+x"(sum), "=&x"(product)
                : "x"(codes), "x"(x));
#endif
        }
    }
    return rounds * kSums * 32;
}

}  // namespace tinychat
