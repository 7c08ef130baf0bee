// Packing from the forms that checkpoints have: as the canonical form packs, which unpacking gives back, whatever tiles are
// packed together. Every byte is written, and none beyond a source is read.
#include "weights.h"

namespace tinychat::test {
namespace {

void packs(const std::string& isa, const LinearShape& shape, const WeightData& source, const WeightData& canonical,
           const std::string& what) {
    const LinearKernels& kernels = tinychat::kernels(isa.c_str()).linear;
    const int64_t tiles = (shape.n + kernels.tile - 1) / kernels.tile, groups = (shape.k + shape.group - 1) / shape.group;
    const auto size = [](int64_t bytes) { return static_cast<size_t>(bytes); };
    const size_t bytes = size(kernels.packed_bytes(shape));
    const Memory expected(kernels.packed_bytes(shape)), packed(kernels.packed_bytes(shape));
    kernels.pack(shape, canonical, expected.data(), 0, tiles);
    const std::string where = what + " [" + std::to_string(shape.n) + ", " + std::to_string(shape.k) + "] group " +
                              std::to_string(shape.group) + ", " + std::to_string(shape.bits) + " bits, " + isa;
    for (int64_t together : {int64_t{1}, int64_t{3}, int64_t{8}, tiles}) {
        std::memset(packed.data(), 0xa5, bytes);
        for (int64_t tile = 0; tile < tiles; tile += together) {
            kernels.pack(shape, source, packed.data(), tile, std::min(tile + together, tiles));
        }
        check(std::memcmp(packed.data(), expected.data(), bytes) == 0, "packs as its canonical form: " + where);
    }
    std::vector<char> codes(size(shape.n * shape.k)), zeros(size(shape.n * groups));
    std::vector<char> scales(zeros.size() * (shape.wide_scales ? 4 : 2));
    kernels.unpack(shape, packed.data(), {codes.data(), scales.data(), zeros.data()});
    const auto same = [](const std::vector<char>& found, const void* given) {
        return std::memcmp(found.data(), given, found.size()) == 0;
    };
    check(same(codes, canonical.values) && same(scales, canonical.scales) && same(zeros, canonical.zeros),
          "unpacking undoes packing: " + where);
}

// Codes in the blocks of GGUF files (csrc/pack_codes.cpp draws them); the scales there are not read.
std::vector<uint8_t> blocks(const Quantized& weight, Source source) {
    const size_t length = source == Source::q6_k ? 256 : 32, count = weight.codes.size() / length;
    const size_t bytes = source == Source::q4_0 ? 18 : source == Source::q8_0 ? 34 : 210;
    std::vector<uint8_t> stored(count * bytes);
    for (size_t i = 0; i < weight.codes.size(); i++) {
        uint8_t* block = stored.data() + i / length * bytes;
        const size_t at = i % length, half = at / 128, j = at % 128;
        const uint8_t code = weight.codes[i];
        if (source == Source::q4_0) {
            block[2 + at % 16] |= static_cast<uint8_t>(code << at / 16 * 4);
        } else if (source == Source::q8_0) {
            block[2 + at] = code ^ 128;
        } else {
            block[half * 64 + j % 64] |= static_cast<uint8_t>((code & 15) << j / 64 * 4);
            block[128 + half * 32 + j % 32] |= static_cast<uint8_t>(code >> 4 << j / 32 * 2);
        }
    }
    return stored;
}

void from_gguf(const std::string& isa, const char* what, Source source, int64_t n, int64_t k, Random& random) {
    const bool k_quant = source == Source::q6_k;
    Quantized weight(n, k, k_quant ? 16 : 32, source == Source::q4_0 ? 4 : 8, 16, random);
    if (k_quant) {
        for (uint8_t& code : weight.codes) code &= 63;
        std::fill(weight.zeros.begin(), weight.zeros.end(), uint8_t{32});
    }
    std::vector<uint8_t> stored = blocks(weight, source);
    packs(isa, weight.shape, {stored.data(), weight.scales.data(), weight.zeros.data(), source}, weight.data(), what);
}

// Normal values, but for rows of zeros, of ties, of values whose scales are subnormal as fp16, and of some beyond fp16.
void rounded(const std::string& isa, Source source, int32_t bits, bool wide, int64_t n, int64_t k, int64_t group) {
    Random random(static_cast<uint64_t>(n));
    std::vector<float> values = random.normals(n * k);
    std::vector<uint16_t> halves(source == Source::f32 ? 0 : values.size());
    const float most = static_cast<float>((1 << (bits - 1)) - 1);
    for (size_t i = 0; i < values.size(); i++) {
        const size_t row = i / static_cast<size_t>(k);
        if (row == 1) values[i] = 0;
        if (row == 2) values[i] = i % static_cast<size_t>(k) % static_cast<size_t>(group) ? std::floor(values[i]) + 0.5f : most;
        if (row == 3) values[i] *= source == Source::f16 ? 0x1p-10f : 0x1p-15f;
        if (row == 4 && source != Source::f16) values[i] *= 1e7f;
        if (source == Source::f32) continue;
        uint32_t word;
        std::memcpy(&word, &values[i], 4);
        halves[i] = source == Source::f16 ? to_half(values[i]) : static_cast<uint16_t>(word >> 16);
        values[i] = source == Source::f16 ? from_half(halves[i]) : from_bf16(halves[i]);
    }
    Quantized weight(n, k, group, bits, 16);
    std::vector<float> scales = round_symmetric(values, wide, weight);
    weight.shape.wide_scales = wide;
    WeightData canonical = weight.data(), stored{halves.data(), nullptr, nullptr, source};
    if (wide) canonical.scales = scales.data();
    if (source == Source::f32) stored.values = values.data();
    packs(isa, weight.shape, stored, canonical, wide ? "values rounded, fp32 scales" : "values rounded");
}

}  // namespace

void test_packing() {
    constexpr int64_t kAwq[][3] = {{8, 8, 8}, {24, 100, 100}, {40, 192, 64}, {16, 300, 100}, {136, 172, 32}, {264, 300, 256}};
    constexpr int64_t kRounded[][3] = {{1, 1, 1}, {5, 100, 100}, {17, 172, 32}, {35, 300, 128}, {16, 260, 260}};
    for (const std::string& isa : isas()) {
        Random random(11);
        for (const auto& [n, k, group] : kAwq) {
            Quantized weight(n, k, group, 4, 16, random);
            AwqWords words(weight);
            packs(isa, weight.shape, words.data(), weight.data(), "AWQ words");
        }
        for (int64_t n : {1, 16, 19, 131}) {
            for (int64_t k : {32, 96, 256}) from_gguf(isa, "Q4_0", Source::q4_0, n, k, random);
            for (int64_t k : {32, 96, 256}) from_gguf(isa, "Q8_0", Source::q8_0, n, k, random);
            for (int64_t k : {256, 512}) from_gguf(isa, "Q6_K", Source::q6_k, n, k, random);
        }
        for (const Source source : {Source::f32, Source::f16, Source::bf16}) {
            for (const auto& [n, k, group] : kRounded) {
                for (const bool wide : {false, true}) {
                    for (int32_t bits : {8, 4}) rounded(isa, source, bits, wide, n, k, group);
                }
            }
        }
    }
}

}  // namespace tinychat::test
