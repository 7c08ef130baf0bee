// One call of another engine's kernel between two marks, beside kernels/count.cpp: llama.cpp's products of Q4_0 weights with
// Q8_0 activations, declared here as its headers declare them and linked from its own sources.
//
//     llama_count FORM ROWS N K
//
// dot: a dot product for each output; 4x4, 4x8: four outputs interleaved, as its loader repacks them, one row or four.
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

extern "C" {
using Product = void(int n, float* s, size_t bs, const void* x, const void* y, int rows, int columns);
// Weak: at the base level only the first is linked.
void ggml_vec_dot_q4_0_q8_0(int n, float* s, size_t bs, const void* x, size_t bx, const void* y, size_t by, int rows);
__attribute__((weak)) Product ggml_gemv_q4_0_4x4_q8_0, ggml_gemv_q4_0_4x8_q8_0, ggml_gemm_q4_0_4x4_q8_0, ggml_gemm_q4_0_4x8_q8_0;

__attribute__((noinline)) void count_mark() { __asm__ volatile("" ::: "memory"); }
}

int main(int argc, char** argv) {
    if (argc != 5) return 2;
    const std::string form = argv[1];
    const int rows = std::atoi(argv[2]), n = std::atoi(argv[3]), k = std::atoi(argv[4]);
    constexpr size_t kBlock = 32, kWeightBytes = 2 + kBlock / 2, kValueBytes = 2 + kBlock;  // an fp16 scale and codes
    const size_t blocks = static_cast<size_t>(k) / kBlock, outputs = static_cast<size_t>(n), all = static_cast<size_t>(rows);
    std::vector<char> weights(blocks * kWeightBytes * outputs, 1), values(blocks * kValueBytes * all, 1);
    std::vector<float> y(outputs * all);
    Product* const one = form == "4x4" ? ggml_gemv_q4_0_4x4_q8_0 : form == "4x8" ? ggml_gemv_q4_0_4x8_q8_0 : nullptr;
    Product* const four = form == "4x4" ? ggml_gemm_q4_0_4x4_q8_0 : form == "4x8" ? ggml_gemm_q4_0_4x8_q8_0 : nullptr;
    Product* const product = rows == 1 ? one : four;
    if (form != "dot" && !product) return 3;
    count_mark();
    if (product) {
        product(k, y.data(), outputs, weights.data(), values.data(), rows, n);
    } else {
        for (size_t t = 0; t < all; t++) {
            for (size_t r = 0; r < outputs; r++) {
                ggml_vec_dot_q4_0_q8_0(k, &y[t * outputs + r], 0, &weights[r * blocks * kWeightBytes], 0,
                                       &values[t * blocks * kValueBytes], 0, 1);
            }
        }
    }
    count_mark();
    return 0;
}
