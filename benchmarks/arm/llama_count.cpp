// One call of another engine's kernel between two marks, beside kernels/count.cpp: llama.cpp's product of Q4_0 weights with
// Q8_0 activations, declared here as its headers declare it and linked from its own sources.
//
//     llama_count rows|4x4|4x8 N K
//
// rows: a dot product for each output row; 4x4, 4x8: four rows interleaved, as its loader repacks them.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

extern "C" {
void ggml_vec_dot_q4_0_q8_0(int n, float* s, size_t bs, const void* x, size_t bx, const void* y, size_t by, int rows);
void ggml_gemv_q4_0_4x4_q8_0(int n, float* s, size_t bs, const void* x, const void* y, int rows, int columns);
void ggml_gemv_q4_0_4x8_q8_0(int n, float* s, size_t bs, const void* x, const void* y, int rows, int columns);

__attribute__((noinline)) void count_mark() { __asm__ volatile("" ::: "memory"); }
}

int main(int argc, char** argv) {
    if (argc != 4) return 2;
    const std::string form = argv[1];
    const int n = std::atoi(argv[2]), k = std::atoi(argv[3]);
    constexpr size_t kBlock = 32, kWeightBytes = 2 + kBlock / 2, kValueBytes = 2 + kBlock;  // an fp16 scale and codes
    const size_t row = static_cast<size_t>(k) / kBlock * kWeightBytes;
    std::vector<char> weights(row * static_cast<size_t>(n), 1), values(static_cast<size_t>(k) / kBlock * kValueBytes, 1);
    std::vector<float> y(static_cast<size_t>(n));
    count_mark();
    if (form == "4x4") {
        ggml_gemv_q4_0_4x4_q8_0(k, y.data(), static_cast<size_t>(n), weights.data(), values.data(), 1, n);
    } else if (form == "4x8") {
        ggml_gemv_q4_0_4x8_q8_0(k, y.data(), static_cast<size_t>(n), weights.data(), values.data(), 1, n);
    } else {
        for (int r = 0; r < n; r++) {
            ggml_vec_dot_q4_0_q8_0(k, &y[static_cast<size_t>(r)], 0, weights.data() + static_cast<size_t>(r) * row, 0, values.data(), 0, 1);
        }
    }
    count_mark();
    return 0;
}
