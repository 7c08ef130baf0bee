// Random quantized weights, and the forms that checkpoints store them in. Vectors are made of their size, not grown: a
// sanitizer sees what is read beyond the last of their numbers.
#pragma once
#include <algorithm>
#include <cmath>

#include "check.h"
#include "half.h"
#include "kernels.h"

namespace tinychat::test {

struct Quantized {
    LinearShape shape;
    int64_t groups;
    std::vector<uint8_t> codes, zeros;
    std::vector<uint16_t> scales;

    Quantized(int64_t n, int64_t k, int64_t group, int32_t bits, int32_t activation_bits)
        : shape{WeightType::quantized, n, k, group, false, bits, activation_bits}, groups((k + group - 1) / group),
          codes(static_cast<size_t>(n * k)), zeros(static_cast<size_t>(n * groups)), scales(zeros.size()) {}
    Quantized(int64_t n, int64_t k, int64_t group, int32_t bits, int32_t activation_bits, Random& random)
        : Quantized(n, k, group, bits, activation_bits) {
        for (uint8_t& code : codes) code = static_cast<uint8_t>(random.below(1 << bits));
        for (size_t i = 0; i < zeros.size(); i++) {
            zeros[i] = static_cast<uint8_t>(bits == 8 ? 128 : random.below(1 << bits));
            scales[i] = to_half(static_cast<float>(0.01 + 0.01 * random.uniform()));
        }
    }
    WeightData data() { return {codes.data(), scales.data(), zeros.data(), Source::codes}; }
    double weight(int64_t row, int64_t k) const {
        const auto at = static_cast<size_t>(row * groups + k / shape.group);
        return (codes[static_cast<size_t>(row * shape.k + k)] - zeros[at]) * static_cast<double>(from_half(scales[at]));
    }
};

// Codes of 4 bits, scales and zeros as AWQ's "gemm" files have them; n is a multiple of 8.
struct AwqWords {
    std::vector<uint32_t> codes, zeros;  // [k, n / 8], [groups, n / 8]
    std::vector<uint16_t> scales;        // [groups, n]

    explicit AwqWords(const Quantized& of)
        : codes(of.codes.size() / 8), zeros(of.zeros.size() / 8), scales(of.scales.size()) {
        constexpr int64_t kOutput[8] = {0, 2, 4, 6, 1, 3, 5, 7};  // of a word's nibbles
        const int64_t n = of.shape.n, k = of.shape.k;
        for (int64_t word = 0; word < n / 8; word++) {
            for (int64_t nibble = 0; nibble < 8; nibble++) {
                const int64_t row = word * 8 + kOutput[nibble];
                for (int64_t i = 0; i < k; i++) {
                    const uint32_t code = of.codes[static_cast<size_t>(row * k + i)];
                    codes[static_cast<size_t>(i * (n / 8) + word)] |= code << 4 * nibble;
                }
                for (int64_t g = 0; g < of.groups; g++) {
                    const auto from = static_cast<size_t>(row * of.groups + g);
                    zeros[static_cast<size_t>(g * (n / 8) + word)] |= static_cast<uint32_t>(of.zeros[from]) << 4 * nibble;
                    scales[static_cast<size_t>(g * n + row)] = of.scales[from];
                }
            }
        }
    }
    WeightData data() { return {codes.data(), scales.data(), zeros.data(), Source::awq}; }
};

// Codes as a stream of bits in words of a row or of a column; column j's at permutation[j], or at j.
struct Stream {
    int64_t row_stride, word_stride;
    const std::vector<int32_t> permutation;
    std::vector<uint32_t> words;

    Stream(const Quantized& of, bool by_rows, std::vector<int32_t> order = {}) : permutation(std::move(order)) {
        const int64_t n = of.shape.n, k = of.shape.k, bits = of.shape.bits, row_words = (k * bits + 31) / 32;
        row_stride = by_rows ? row_words : 1;
        word_stride = by_rows ? 1 : n;
        words.assign(static_cast<size_t>(n * row_words), 0);
        for (int64_t row = 0; row < n; row++) {
            for (int64_t i = 0; i < k * bits; i++) {
                const uint32_t bit = of.codes[static_cast<size_t>(row * k + i / bits)] >> i % bits & 1u;
                const int64_t at = permutation.empty() ? i : permutation[static_cast<size_t>(i / bits)] * bits + i % bits;
                words[static_cast<size_t>(row * row_stride + at / 32 * word_stride)] |= bit << at % 32;
            }
        }
    }
    WeightData data(Quantized& of) {
        return {words.data(), of.scales.data(), of.zeros.data(), Source::stream, row_stride, word_stride,
                permutation.empty() ? nullptr : permutation.data()};
    }
};

// Values [n, k] rounded as those of Source::f32, f16 and bf16 are (csrc/pack_rounded.cpp): to `of`, or where `wide` with the
// scales in fp32, which it returns.
inline std::vector<float> round_symmetric(const std::vector<float>& values, bool wide, Quantized& of) {
    const float most = static_cast<float>((1 << (of.shape.bits - 1)) - 1);
    std::vector<float> scales(of.scales.size());
    for (size_t i = 0; i < scales.size(); i++) {
        const auto groups = static_cast<size_t>(of.groups), k = static_cast<size_t>(of.shape.k);
        const auto group = static_cast<size_t>(of.shape.group), from = i % groups * group, row = i / groups * k;
        float size = 0;
        for (size_t j = from; j < std::min(from + group, k); j++) size = std::max(size, std::abs(values[row + j]));
        scales[i] = size / most;
        of.scales[i] = to_half(std::min(scales[i], 65504.0f));
        while (from_half(of.scales[i]) < std::min(scales[i], 65504.0f)) ++of.scales[i];
        of.zeros[i] = static_cast<uint8_t>(most + 1);
        const float scale = wide ? scales[i] : from_half(of.scales[i]);
        for (size_t j = from; j < std::min(from + group, k); j++) {
            const float code = scale > 0 ? std::nearbyint(values[row + j] / scale) : 0;
            of.codes[row + j] = static_cast<uint8_t>(std::clamp(code, -most, most) + most + 1);
        }
    }
    return scales;
}

}  // namespace tinychat::test
