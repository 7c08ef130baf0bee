// One call of another engine's kernel between two marks, beside kernels/count.cpp: llama.cpp's products of Q4_0 weights with
// Q8_0 activations, declared here as its headers declare them and linked from its own sources.
//
//     llama_count ROWS N K
//
// Compiled with INTERLEAVED=4x4 or 4x8: four outputs interleaved, as its loader repacks them, for one row or four; without,
// a dot product for each output.
#include <cstdint>
#include <cstdlib>
#include <vector>

#define JOIN(a, b, c) a##b##c
#define NAMED(a, b, c) JOIN(a, b, c)

extern "C" {
#ifdef INTERLEAVED
using Product = void(int n, float* s, size_t bs, const void* x, const void* y, int rows, int columns);
Product NAMED(ggml_gemv_q4_0_, INTERLEAVED, _q8_0), NAMED(ggml_gemm_q4_0_, INTERLEAVED, _q8_0);
#else
void ggml_vec_dot_q4_0_q8_0(int n, float* s, size_t bs, const void* x, size_t bx, const void* y, size_t by, int rows);
#endif

__attribute__((noinline)) void count_mark() { __asm__ volatile("" ::: "memory"); }
}

int main(int argc, char** argv) {
    if (argc != 4) return 2;
    const int rows = std::atoi(argv[1]), n = std::atoi(argv[2]), k = std::atoi(argv[3]);
    constexpr size_t kBlock = 32, kWeightBytes = 2 + kBlock / 2, kValueBytes = 2 + kBlock;  // an fp16 scale and codes
    const size_t blocks = static_cast<size_t>(k) / kBlock, outputs = static_cast<size_t>(n), all = static_cast<size_t>(rows);
    std::vector<char> weights(blocks * kWeightBytes * outputs, 1), values(blocks * kValueBytes * all, 1);
    std::vector<float> y(outputs * all);
    count_mark();
#ifdef INTERLEAVED
    (rows == 1 ? NAMED(ggml_gemv_q4_0_, INTERLEAVED, _q8_0) : NAMED(ggml_gemm_q4_0_, INTERLEAVED, _q8_0))(
        k, y.data(), outputs, weights.data(), values.data(), rows, n);
#else
    for (size_t t = 0; t < all; t++) {
        for (size_t r = 0; r < outputs; r++) {
            ggml_vec_dot_q4_0_q8_0(k, &y[t * outputs + r], 0, &weights[r * blocks * kWeightBytes], 0,
                                   &values[t * blocks * kValueBytes], 0, 1);
        }
    }
#endif
    count_mark();
    return 0;
}
