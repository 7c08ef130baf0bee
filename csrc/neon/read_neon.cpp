// Reading memory with 16-byte loads: one linear stream, as the kernels read packed weights.
#include <arm_neon.h>

#include "levels.h"

namespace tinychat {

uint64_t read_neon(const void* data, int64_t bytes) {
    const auto* at = static_cast<const uint64_t*>(data);
    uint64x2_t sums[8];
    for (uint64x2_t& sum : sums) sum = vdupq_n_u64(0);
    for (int64_t i = 0; i + 128 <= bytes; i += 128, at += 16) {
        // The hardware fetches ahead within a page only. Fetching past the end of the buffer is no fault.
        __builtin_prefetch(at + 256, 0, 2);
        __builtin_prefetch(at + 264, 0, 2);
        for (int j = 0; j < 8; j++) sums[j] = vaddq_u64(sums[j], vld1q_u64(at + 2 * j));
    }
    for (int j = 1; j < 8; j++) sums[0] = vaddq_u64(sums[0], sums[j]);
    return vaddvq_u64(sums[0]);
}

}  // namespace tinychat
