// Codes to numbers: q - z, exactly, in the 16-bit type of the activations, as fragments for the tensor cores.
//
// A small integer becomes a float by being put into the mantissa of a power of two: 0x6400 | q is 1024 + q in fp16, and
// 0x4300 | q is 128 + q in bf16. Subtracting 1024 + z (128 + z) is exact, so nothing is rounded before the products.
#pragma once
#include "device.h"
#include "linear_layout.h"

namespace tinychat::cuda {

// (word & mask) | magic
template <uint32_t mask, uint32_t magic>
__device__ __forceinline__ uint32_t insert(uint32_t word) {
#ifdef __CUDACC__
    uint32_t result;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(word), "n"(mask), "n"(magic));
    return result;
#else
    return (word & mask) | magic;
#endif
}

// Bytes of `low` (0 .. 3) and `high` (4 .. 7), chosen by the nibbles of `selector`.
__device__ __forceinline__ uint32_t choose_bytes(uint32_t low, uint32_t high, uint32_t selector) {
#ifdef __CUDACC__
    return __byte_perm(low, high, selector);
#else
    const uint64_t bytes = low | static_cast<uint64_t>(high) << 32;
    uint32_t result = 0;
    for (int i = 0; i < 4; i++) result |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return result;
#endif
}

// a b + c of pairs, rounded once.
template <class T>
__device__ __forceinline__ uint32_t fused(uint32_t a, uint32_t b, uint32_t c);

template <>
__device__ __forceinline__ uint32_t fused<Half>(uint32_t a, uint32_t b, uint32_t c) {
#ifdef __CUDACC__
    uint32_t result;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
#else
    return pair<Half>(low_of<Half>(a) * low_of<Half>(b) + low_of<Half>(c), high_of<Half>(a) * high_of<Half>(b) + high_of<Half>(c));
#endif
}

// a + b of pairs.
__device__ __forceinline__ uint32_t sum_of_halves(uint32_t a, uint32_t b) {
#ifdef __CUDACC__
    uint32_t result;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
#else
    return pair<Half>(low_of<Half>(a) + low_of<Half>(b), high_of<Half>(a) + high_of<Half>(b));
#endif
}

template <>
__device__ __forceinline__ uint32_t fused<BFloat>(uint32_t a, uint32_t b, uint32_t c) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    __trap();  // bf16 is refused before: see `multiply`
    return 0;
#elif defined(__CUDACC__)
    uint32_t result;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
#else
    return pair<BFloat>(low_of<BFloat>(a) * low_of<BFloat>(b) + low_of<BFloat>(c),
                        high_of<BFloat>(a) * high_of<BFloat>(b) + high_of<BFloat>(c));
#endif
}

// Twice the same 16 bits.
__device__ __forceinline__ constexpr uint32_t twice(uint32_t bits) { return bits * 0x10001u; }

// What a lane makes of a chunk. `upper` and `lower` take the zeros of its two outputs, bytes 0 and 1 of a register, and
// give them in the form that `fragment` adds.
template <class T, int kBits>
struct Codes;

template <>
struct Codes<Half, 4> {
    static constexpr int kParts = 1;  // 16-byte loads
    // The lower output's nibbles stand 4 bits higher: (1024 + 16 q) / 16 is 64 + q.
    static __device__ __forceinline__ uint32_t upper(uint32_t zeros) { return choose_bytes(zeros, 0xe4, 0x4040); }  // -(1024 + z)
    static __device__ __forceinline__ uint32_t lower(uint32_t zeros) {
        return choose_bytes(zeros, 0, 0x4141) * 16 + twice(0xd400);  // -(64 + z)
    }
    static __device__ __forceinline__ void fragment(const uint32_t* words, int step, uint32_t upper, uint32_t lower,
                                                    uint32_t (&a)[4]) {
        constexpr uint32_t sixteenth = twice(0x2c00);
        uint32_t word = words[step];
        a[0] = sum_of_halves(insert<0x000f000f, 0x64006400>(word), upper);
        a[1] = fused<Half>(insert<0x00f000f0, 0x64006400>(word), sixteenth, lower);
        word >>= 8;
        a[2] = sum_of_halves(insert<0x000f000f, 0x64006400>(word), upper);
        a[3] = fused<Half>(insert<0x00f000f0, 0x64006400>(word), sixteenth, lower);
    }
};

template <>
struct Codes<BFloat, 4> {
    static constexpr int kParts = 1;
    static __device__ __forceinline__ uint32_t upper(uint32_t zeros) { return choose_bytes(zeros, 0xc3, 0x4040); }  // -(128 + z)
    static __device__ __forceinline__ uint32_t lower(uint32_t zeros) { return choose_bytes(zeros, 0xc3, 0x4141); }
    static __device__ __forceinline__ void fragment(const uint32_t* words, int step, uint32_t upper, uint32_t lower,
                                                    uint32_t (&a)[4]) {
        constexpr uint32_t one = twice(0x3f80);
        const uint32_t word = words[step];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            a[i] = fused<BFloat>(insert<0x000f000f, 0x43004300>(word >> 4 * i), one, i % 2 ? lower : upper);
        }
    }
};

template <>
struct Codes<Half, 8> {
    static constexpr int kParts = 2;
    static __device__ __forceinline__ uint32_t upper(uint32_t zeros) { return choose_bytes(zeros, 0xe4, 0x4040); }
    static __device__ __forceinline__ uint32_t lower(uint32_t zeros) { return choose_bytes(zeros, 0xe4, 0x4141); }
    static __device__ __forceinline__ void fragment(const uint32_t* words, int step, uint32_t upper, uint32_t lower,
                                                    uint32_t (&a)[4]) {
        constexpr uint32_t magic = 0x64646464;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const uint32_t word = words[2 * step + h];
            a[2 * h] = sum_of_halves(choose_bytes(word, magic, 0x4140), upper);
            a[2 * h + 1] = sum_of_halves(choose_bytes(word, magic, 0x4342), lower);
        }
    }
};

// 0x4b000000 | q is 2^23 + q in fp32; q - z has at most 8 bits, so that the upper half of the fp32 is it in bf16.
template <>
struct Codes<BFloat, 8> {
    static constexpr int kParts = 2;
    static __device__ __forceinline__ uint32_t upper(uint32_t zeros) { return choose_bytes(zeros, 0x4b000000, 0x7440); }
    static __device__ __forceinline__ uint32_t lower(uint32_t zeros) { return choose_bytes(zeros, 0x4b000000, 0x7441); }
    static __device__ __forceinline__ uint32_t difference(uint32_t word, uint32_t byte, uint32_t zero) {
        return as_bits(as_float(choose_bytes(word, 0x4b000000, 0x7440 | byte)) - as_float(zero));
    }
    static __device__ __forceinline__ void fragment(const uint32_t* words, int step, uint32_t upper, uint32_t lower,
                                                    uint32_t (&a)[4]) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t word = words[2 * step + i / 2], zero = i % 2 ? lower : upper, byte = i % 2 * 2;
            a[i] = choose_bytes(difference(word, byte, zero), difference(word, byte + 1, zero), 0x7632);
        }
    }
};

// Scales and zeros of a lane's two outputs in one group, as they lie.
template <bool kWide>
struct Group {
    uint32_t scales[kWide ? 2 : 1];
    uint32_t zeros;

    // Pair `i` of both.
    static __device__ __forceinline__ Group read(const void* scales, const void* zeros, int i) {
        Group group;
        if constexpr (kWide) {
            const uint2 both = static_cast<const uint2*>(scales)[i];
            group.scales[0] = both.x;
            group.scales[1] = both.y;
        } else {
            group.scales[0] = static_cast<const uint32_t*>(scales)[i];
        }
        group.zeros = static_cast<const uint16_t*>(zeros)[i];
        return group;
    }
    // The pairs at these addresses of shared memory.
    static __device__ __forceinline__ Group read_shared(SharedAt scales, SharedAt zeros) {
        Group group;
        if constexpr (kWide) {
            const uint2 both = load_shared<uint2>(scales);
            group.scales[0] = both.x;
            group.scales[1] = both.y;
        } else {
            group.scales[0] = load_shared<uint32_t>(scales);
        }
        group.zeros = load_shared<uint16_t>(zeros);
        return group;
    }
    __device__ __forceinline__ float upper_scale() const { return kWide ? as_float(scales[0]) : low_of<Half>(scales[0]); }
    __device__ __forceinline__ float lower_scale() const {
        return kWide ? as_float(scales[kWide]) : high_of<Half>(scales[0]);
    }
};

// Where pair g of a tile's group lies; 32 bits count the pairs of any weight.
__device__ __forceinline__ int group_pair(const PackedWeight& weight, int tile, int group, int g) {
    return (tile * weight.groups + group) * 8 + g;
}

// The words of a lane's loads, one after another.
template <int kParts>
__device__ __forceinline__ void spread(const uint4 (&parts)[kParts], uint32_t (&words)[4 * kParts]) {
#pragma unroll
    for (int p = 0; p < kParts; p++) {
        words[4 * p] = parts[p].x;
        words[4 * p + 1] = parts[p].y;
        words[4 * p + 2] = parts[p].z;
        words[4 * p + 3] = parts[p].w;
    }
}

// y[row, output] = sum + bias, rounded once.
template <class T>
__device__ __forceinline__ void store_output(const LinearCall& call, int row, int output, float sum) {
    if (call.bias) sum += call.bias[output];
    const int64_t at = static_cast<int64_t>(row) * call.y_stride + output;
    if (call.wide_output) {
        static_cast<float*>(call.y)[at] = sum;
    } else {
        static_cast<T*>(call.y)[at] = from_float<T>(sum);
    }
}

}  // namespace tinychat::cuda
