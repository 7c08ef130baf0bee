// One call of a linear between two marks, for an emulator that logs which instructions it runs.
//
//     count LEVEL BITS ACTIVATION_BITS ROWS N K      LEVEL may be naive-neon or naive-dotprod: see naive.h
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <vector>

#include "kernels.h"

extern "C" __attribute__((noinline)) void count_mark() { __asm__ volatile("" ::: "memory"); }

namespace tinychat {
const LinearKernels& naive_neon();
const LinearKernels& naive_dotprod();

namespace {

uint64_t state = 88172645463325252u;
uint64_t next() {  // xorshift64
    state ^= state << 13;
    state ^= state >> 7;
    return state ^= state << 17;
}

char* aligned(int64_t bytes) { return static_cast<char*>(::operator new(static_cast<size_t>(bytes), std::align_val_t{64})); }

const LinearKernels& named(const std::string& level) {
    if (level == "naive-neon") return naive_neon();
    if (level == "naive-dotprod") return naive_dotprod();
    return kernels(level.c_str()).linear;
}

}  // namespace
}  // namespace tinychat

int main(int argc, char** argv) {
    using namespace tinychat;
    if (argc != 7) return 2;
    const LinearKernels& linear = named(argv[1]);
    const int64_t rows = std::atoll(argv[4]), n = std::atoll(argv[5]), k = std::atoll(argv[6]);
    const LinearShape shape{WeightType::quantized, n, k, 128, false, std::atoi(argv[2]), std::atoi(argv[3])};
    const int64_t bytes = linear.packed_bytes(shape), row_bytes = linear.activation_bytes(shape);
    char* packed = aligned(bytes);  // any bytes: what is computed depends on them, what is run does not
    for (int64_t i = 0; i + 8 <= bytes; i += 8) {
        const uint64_t word = next();
        std::memcpy(packed + i, &word, 8);
    }
    char* activations = aligned(row_bytes * rows);
    std::vector<float> x(static_cast<size_t>(k)), y(static_cast<size_t>(rows * n));
    for (int64_t t = 0; t < rows; t++) {
        for (float& value : x) value = static_cast<float>(static_cast<int64_t>(next() >> 40) - (1 << 23));
        linear.prepare(shape, x.data(), activations + t * row_bytes, 0, k);
    }
    const int64_t tiles = (n + linear.tile - 1) / linear.tile;
    count_mark();
    linear.linear(shape, packed, activations, rows, 0, tiles, y.data(), n);
    count_mark();
    return 0;
}
