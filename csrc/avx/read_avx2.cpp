// Reading memory with 32-byte loads: one linear stream, as the kernels read packed weights. Intel's cores fetch ahead within
// a page only, and are faster when told of what follows; Zen 3 needs no telling, which costs it a fifth of the bandwidth.
#include <immintrin.h>

#include "levels.h"

namespace tinychat {
namespace {

template <bool ahead>
uint64_t read(const void* data, int64_t bytes) {
    const char* at = static_cast<const char*>(data);
    __m256i sums[8];
    for (__m256i& sum : sums) sum = _mm256_setzero_si256();
    for (int64_t i = 0; i + 256 <= bytes; i += 256) {
        for (int j = 0; j < 8; j++) {
            // Fetching past the end of the buffer is no fault.
            if (ahead && j % 2 == 0) _mm_prefetch(at + i + 32 * j + 4096, _MM_HINT_T1);
            sums[j] = _mm256_add_epi64(sums[j], _mm256_load_si256(reinterpret_cast<const __m256i*>(at + i + 32 * j)));
        }
    }
    for (int j = 1; j < 8; j++) sums[0] = _mm256_add_epi64(sums[0], sums[j]);
    alignas(32) uint64_t words[4];
    _mm256_store_si256(reinterpret_cast<__m256i*>(words), sums[0]);
    return words[0] + words[1] + words[2] + words[3];
}

}  // namespace

uint64_t read_avx2(const void* data, int64_t bytes) { return read<false>(data, bytes); }
uint64_t read_ahead_avx2(const void* data, int64_t bytes) { return read<true>(data, bytes); }

}  // namespace tinychat
