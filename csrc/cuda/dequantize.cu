// W = (q - z) s in 16 bits, row-major [N, K]: for many rows at once, which cuBLAS multiplies faster than gemm.cu, and
// once for all of them. The product is in fp32 and rounded once.
//
// A warp turns one chunk of a tile: 512 bytes of codes into 16 outputs of 128 bytes, written as 16 bytes a lane, 64 next
// to each other. Bound by what it writes, four times what it reads.
#include "codes.h"
#include "launch.h"
#include "linear.h"

namespace tinychat::cuda {
namespace {

constexpr int kWarps = 8;

// Pairs (q - z) of four registers times `scale`, as 8 neighbours of a row of W beginning at input k.
template <class T>
__device__ __forceinline__ void store(T* row, int k, int end, bool vectors, const uint32_t (&pairs)[4], float scale) {
    if (vectors) {
        if (k >= end) return;
        uint32_t out[4];
#pragma unroll
        for (int i = 0; i < 4; i++) out[i] = pair<T>(low_of<T>(pairs[i]) * scale, high_of<T>(pairs[i]) * scale);
        *reinterpret_cast<uint4*>(row + k) = make_uint4(out[0], out[1], out[2], out[3]);
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float difference = i % 2 ? high_of<T>(pairs[i / 2]) : low_of<T>(pairs[i / 2]);
        if (k + i < end) row[k + i] = from_float<T>(difference * scale);
    }
}

template <class T, int kBits>
__global__ void __launch_bounds__(kWarps* kWarp) dequantize_kernel(PackedWeight weight, T* values) {
    using Of = Codes<T, kBits>;
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    const int tile = blockIdx.y, chunk = blockIdx.x * kWarps + threadIdx.x / kWarp;
    const uint4* codes = static_cast<const uint4*>(weight.codes) +
                         (static_cast<int64_t>(tile) * weight.chunks + chunk) * Of::kParts * kWarp + lane;
    uint4 parts[Of::kParts] = {};
#pragma unroll
    for (int p = 0; p < Of::kParts && chunk < weight.chunks; p++) parts[p] = load_once(codes + p * kWarp);
    admit_later();
    await_earlier();
    if (chunk >= weight.chunks) return;
    uint32_t words[4 * Of::kParts];
    spread(parts, words);
    const bool vectors = weight.k % 8 == 0;
    const int output = tile * kTileOutputs + g;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        uint32_t first[4], second[4];
        float2 scales;
        const auto unpack = [&](const auto& group) {
            const uint32_t upper = Of::upper(group.zeros), lower = Of::lower(group.zeros);
            scales = make_float2(group.upper_scale(), group.lower_scale());
            Of::fragment(words, 2 * half, upper, lower, first);
            Of::fragment(words, 2 * half + 1, upper, lower, second);
        };
        const int at = group_pair(weight, tile, (2 * chunk + half) >> weight.group_shift, g);
        weight.wide ? unpack(Group<true>::read(weight.scales, weight.zeros, at))
                    : unpack(Group<false>::read(weight.scales, weight.zeros, at));
        const int k = chunk * kChunk + half * 32 + t * 8;
        const uint32_t upper[4] = {first[0], first[2], second[0], second[2]};
        const uint32_t lower[4] = {first[1], first[3], second[1], second[3]};
        T* row = values + static_cast<int64_t>(output) * weight.k;
        if (output < weight.n) store(row, k, weight.k, vectors, upper, scales.x);
        if (output + 8 < weight.n) store(row + 8ll * weight.k, k, weight.k, vectors, lower, scales.y);
    }
}

template <class T>
void start(const PackedWeight& weight, void* values, Stream stream) {
    const Grid grid{dim3(divide_up(weight.chunks, kWarps), divide_up(weight.n, kTileOutputs)), dim3(kWarps * kWarp)};
    launch("dequantize", weight.bits == 4 ? dequantize_kernel<T, 4> : dequantize_kernel<T, 8>, grid, stream, weight,
           static_cast<T*>(values));
}

}  // namespace

void dequantize(const PackedWeight& weight, Dtype dtype, void* values, Stream stream) {
    dtype == Dtype::f16 ? start<Half>(weight, values, stream) : start<BFloat>(weight, values, stream);
}

}  // namespace tinychat::cuda
