// Reading memory with whatever registers the compiler takes for 32 sums: one linear stream.
#include <cstring>

#include "levels.h"

namespace tinychat {

uint64_t read_scalar(const void* data, int64_t bytes) {
    const char* at = static_cast<const char*>(data);
    uint64_t sums[32] = {};
    for (int64_t i = 0; i + 256 <= bytes; i += 256) {
        for (int64_t line = 0; line < 256; line += 64) __builtin_prefetch(at + i + line + 4096);
        uint64_t words[32];
        std::memcpy(words, at + i, 256);
        for (int j = 0; j < 32; j++) sums[j] += words[j];
    }
    uint64_t total = 0;
    for (uint64_t sum : sums) total += sum;
    return total;
}

}  // namespace tinychat
