// Reading memory with 64-byte loads: one linear stream, as the kernels read packed weights. Intel's cores fetch ahead within
// a page only, and are faster when told of what follows; Zen 4 needs no telling, which costs it a fifth of the bandwidth.
#include <immintrin.h>

#include "levels.h"

namespace tinychat {
namespace {

template <bool ahead>
uint64_t read(const void* data, int64_t bytes) {
    const char* at = static_cast<const char*>(data);
    __m512i sums[8];
    for (__m512i& sum : sums) sum = _mm512_setzero_si512();
    for (int64_t i = 0; i + 512 <= bytes; i += 512) {
        for (int j = 0; j < 8; j++) {
            // Fetching past the end of the buffer is no fault.
            if (ahead) _mm_prefetch(at + i + 64 * j + 4096, _MM_HINT_T1);
            sums[j] = _mm512_add_epi64(sums[j], _mm512_load_si512(at + i + 64 * j));
        }
    }
    for (int j = 1; j < 8; j++) sums[0] = _mm512_add_epi64(sums[0], sums[j]);
    return _mm512_reduce_add_epi64(sums[0]);
}

}  // namespace

uint64_t read_avx512(const void* data, int64_t bytes) { return read<false>(data, bytes); }
uint64_t read_ahead_avx512(const void* data, int64_t bytes) { return read<true>(data, bytes); }

}  // namespace tinychat
