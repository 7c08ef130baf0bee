// The CUDA kernels on the host (csrc/cuda/host) without Python, so that the sanitizers see every byte they touch: packed
// weights, activations and results in memory of exactly their size. And what the host build itself promises to find.
//
//     cmake -S . -B build/native -DTINYCHAT_NATIVE_TESTS=ON [-DTINYCHAT_SANITIZE=address,undefined]
//     cmake --build build/native --target native_cuda_tests && build/native/native_cuda_tests
#include <stdexcept>

#include "check.h"
#include "device.h"
#include "half.h"
#include "launch.h"
#include "linear.h"
#include "tensor.h"

namespace tinychat::test {
namespace {

using namespace tinychat::cuda;

// A random weight, packed by the words of linear_layout.h, one code after another.
struct Weight {
    int n, k, group, bits, tiles, chunks, groups, shift;
    std::vector<int> codes, zeros;
    std::vector<float> scales;  // of fp16 values
    Memory packed_codes, packed_scales, packed_zeros;

    Weight(Random& random, int n, int k, int shift, int bits)
        : n(n), k(k), group(shift > 20 ? k : 32 << shift), bits(bits), tiles((n + 15) / 16), chunks((k + 63) / 64),
          groups(((2 * chunks - 1) >> shift) + 1), shift(shift), packed_codes(tiles * chunks * 128ll * bits),
          packed_scales(tiles * groups * 32ll), packed_zeros(tiles * groups * 16ll) {
        for (int i = 0; i < n * k; i++) codes.push_back(static_cast<int>(random.below(1 << bits)));
        for (int i = 0; i < n * groups; i++) {
            zeros.push_back(static_cast<int>(random.below(1 << bits)));
            scales.push_back(from_half(to_half(static_cast<float>(0.01 + 0.02 * random.uniform()))));
        }
        std::memset(packed_codes.data(), 0, static_cast<size_t>(tiles * chunks * 128 * bits));
        std::memset(packed_scales.data(), 0, static_cast<size_t>(tiles * groups * 32));
        std::memset(packed_zeros.data(), 0, static_cast<size_t>(tiles * groups * 16));
        for (int tile = 0; tile < tiles; tile++) {
            for (int chunk = 0; chunk < chunks; chunk++) {
                for (int i = 0; i < 1024; i++) place(tile, chunk, i);
            }
            for (int i = 0; i < groups * 16; i++) {
                const int output = tile * 16 + i % 2 * 8 + i % 16 / 2, at = tile * groups * 16 + i;
                if (output >= n) continue;
                const uint16_t half = to_half(scales[output * groups + i / 16]);
                std::memcpy(packed_scales.data() + at * 2, &half, 2);
                packed_zeros.data()[at] = static_cast<char>(zeros[output * groups + i / 16]);
            }
        }
    }

    // The code of one of the 1024 places of a chunk: its lane, half, step of the half, h, lower or upper, e.
    void place(int tile, int chunk, int i) {
        const int e = i % 2, lower = i / 2 % 2, h = i / 4 % 2, step = i / 8 % 2, half = i / 16 % 2, lane = i / 32;
        const int output = tile * 16 + lower * 8 + lane / 4;
        const int input = chunk * 64 + 32 * half + 8 * (lane % 4) + 4 * step + 2 * h + e;
        if (output >= n || input >= k) return;
        char* at = packed_codes.data() + (tile * chunks + chunk) * 128ll * bits;
        const int code = codes[output * k + input];
        if (bits == 4) {
            const int nibble = 2 * h + lower + 4 * e;
            at[lane * 16 + (2 * half + step) * 4 + nibble / 2] |= static_cast<char>(code << nibble % 2 * 4);
        } else {
            at[half * 512 + lane * 16 + step * 8 + h * 4 + 2 * lower + e] = static_cast<char>(code);
        }
    }

    double value(int output, int input) const {
        const int g = output * groups + (input / 32 >> shift);
        return (codes[output * k + input] - zeros[g]) * static_cast<double>(scales[g]);
    }

    PackedWeight packed() const {
        const auto* z = reinterpret_cast<const uint8_t*>(packed_zeros.data());
        return {packed_codes.data(), packed_scales.data(), z, n, k, chunks, groups, shift, bits, false};
    }
};

void test_products(Random& random, int n, int k, int shift, int bits, int rows) {
    const Weight weight(random, n, k, shift, bits);
    const int stride = (k + 7) / 8 * 8;
    const Memory x(rows * stride * 2ll), y(rows * n * 4ll), sums(3ll * rows * n * 4), values(n * k * 2ll);
    auto* halves = reinterpret_cast<uint16_t*>(x.data());
    for (int i = 0; i < rows * stride; i++) halves[i] = i % stride < k ? to_half(random.normal()) : 0;
    std::vector<double> expected;
    for (int row = 0; row < rows; row++) {
        for (int output = 0; output < n; output++) {
            double sum = 0;
            for (int i = 0; i < k; i++) sum += weight.value(output, i) * from_half(halves[row * stride + i]);
            expected.push_back(sum);
        }
    }
    const LinearCall call{weight.packed(), x.data(), nullptr, y.data(), rows, stride, n, Dtype::f16, true};
    const std::string what = std::to_string(n) + " x " + std::to_string(k) + ", " + std::to_string(bits) + " bits, " +
                             std::to_string(rows) + " rows";
    const auto* found = reinterpret_cast<const float*>(y.data());
    for (const bool reverse : {false, true}) {
        host::reverse = reverse;
        if (rows <= kGemvRows) {
            gemv(call, 0, nullptr);
            check(nmse(expected, found) < 1e-12, "gemv " + what);
        }
        for (const int parts : {1, 3}) {
            gemm(call, parts, reinterpret_cast<float*>(sums.data()), 0, nullptr);
            check(nmse(expected, found) < 1e-12, "gemm " + what + ", " + std::to_string(parts) + " parts");
        }
    }
    host::reverse = false;
    dequantize(weight.packed(), Dtype::f16, values.data(), nullptr);
    int wrong = 0;
    for (int i = 0; i < n * k; i++) {
        const auto value = static_cast<float>(weight.value(i / k, i % k));
        wrong += reinterpret_cast<const uint16_t*>(values.data())[i] != host::to_half(value);
    }
    check(!wrong, "dequantize " + what + ": " + std::to_string(wrong) + " differ");
}

// ---- kernels that are wrong on purpose

void half_at_a_barrier(float*) {
    if (threadIdx.x < 32) __syncthreads();
    if (threadIdx.x >= 32) __syncwarp();
    if (threadIdx.x == 40) __syncwarp();
}

void two_things_at_once(float*) { threadIdx.x % 2 ? __syncwarp() : static_cast<void>(warp_sum(1)); }

void misaligned(float* out) { out[0] = as_float(load_once(reinterpret_cast<const uint4*>(out + 1)).x); }

// A copy that is used before it is waited for, a race that depends on the order, and the right way.
void copies(float* out) {
    float* shared = dynamic_shared<float>();
    if (threadIdx.x == 0) copy_async(shared_at(shared), out);
    copies_end();
    const float early = shared[0];
    copies_arrived<0>();
    __syncthreads();
    out[4 + threadIdx.x] = threadIdx.x == 0 ? early : shared[threadIdx.x % 4];
}

std::string failure(void (*kernel)(float*), int threads, float* out) {
    try {
        launch("wrong", kernel, {dim3(1), dim3(threads), 16}, nullptr, out);
    } catch (const std::runtime_error& error) {
        return error.what();
    }
    return "";
}

void test_host() {
    const Memory memory(68 * 4);
    auto* out = reinterpret_cast<float*>(memory.data());
    const auto finds = [&](void (*kernel)(float*), const std::string& what) {
        const std::string found = failure(kernel, 64, out);
        check(found.find(what) != std::string::npos, "the host build finds '" + what + "': '" + found + "'");
    };
    finds(half_at_a_barrier, "wait for each other in vain");
    finds(two_things_at_once, "lanes of one warp are at");
    finds(misaligned, "not aligned");
    for (int i = 0; i < 4; i++) out[i] = static_cast<float>(i);
    check(failure(copies, 64, out).empty(), "the host build goes on after failures");
    check(out[4] != out[4], "a copy that is not waited for is not there");
    check(out[5] == 1 && out[67] == 3, "and after it has been, it is");

    int wrong = 0;
    for (uint32_t bits = 0; bits < 1 << 16; bits++) {
        const float value = from_half(static_cast<uint16_t>(bits));
        wrong += value == value && host::to_half(value) != bits;
    }
    check(!wrong, "fp16 to fp32 and back");
    check(host::to_half(65519.996f) == 0x7bff && host::to_half(65520) == 0x7c00, "the largest fp16");
    check(host::to_half(0x1.002p0f) == 0x3c00 && host::to_half(0x1.006p0f) == 0x3c02, "ties go to even");
    check(host::to_half(0x1p-25f) == 0 && host::to_half(0x1.8p-24f) == 2, "and so do subnormals'");
}

}  // namespace
}  // namespace tinychat::test

int main() {
    using namespace tinychat::test;
    test_host();
    Random random(6);
    test_products(random, 40, 200, 1, 4, 3);
    test_products(random, 17, 77, 0, 4, 9);
    test_products(random, 150, 333, 26, 4, 33);
    test_products(random, 33, 129, 0, 8, 16);
    test_products(random, 140, 264, 2, 8, 70);
    test_products(random, 16, 448, 2, 4, 130);
    std::printf("cuda on the host: %d checks, %d failed\n", checks, failures);
    return failures ? 1 : 0;
}
