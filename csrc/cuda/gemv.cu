// y = x W^T + bias for 1 to 8 rows, and to 16: decoding, where every weight is read once for few products.
//
//   y[m, n] = bias[n] + sum over half-chunks of s[n, group] * (sum over its 32 inputs of (q - z)[n, k] x[m, k])
//
// The inner sums are tensor-core products of exact numbers (codes.h) with fp32 sums, so nothing is rounded but those
// sums and, once, y. The cores also make eight rows cost what one does: a lane spends about 1.4 instructions on a
// weight, where multiply-adds alone would be 8, and an H100 that reads at its full rate has 4.4 to spend, an H200 3.1.
//
//   block    one tile of 16 outputs, its inputs in `warps` equal runs of chunks (4, 8 or 16 warps)
//   warp     a run: per chunk one coalesced read of 512 bytes (4 bits), then 4 products and 8 multiply-adds of scales
//   end      the warps' sums meet in shared memory and are added in order: the same bits at every call
//
// In flight: kDepth chunks per warp, each slot refilled as soon as it is used, 2 KiB. By Little's law an H100 (3.35 TB/s,
// some 700 ns under load) wants 18 KiB in flight per multiprocessor, an H200 25 KiB: 9 and 13 warps. At about 60
// registers 32 warps and more are resident. `choose_warps` aims at 24 per multiprocessor with as few warps per tile as
// give that, since each block begins and ends without loads in flight. Blocks do not come in full waves (4096 outputs:
// 256 blocks on 132), but the memory is shared: the blocks that are left run faster.
//
// The first reads are of weights alone, so that they may begin while the kernel before still runs (launch.h, `overlap`).
//
// Activations are read through L1, which the weights do not enter: 8 KiB a row at K = 4096, 16 bytes a lane, and only
// by lanes whose row exists.
#include "codes.h"
#include "launch.h"
#include "linear.h"
#include "runtime.h"
#include "tensor.h"

namespace tinychat::cuda {
namespace {

constexpr int kMaxWarps = 16;
constexpr int kSumStride = 20;  // of a row of 16 sums: no two lanes in one bank

// How scales are read: once for a chunk that lies in one group, or for each half, in fp16 or in fp32.
enum class Scales { one, two, wide };

// A lane's share of one chunk.
template <int kParts, Scales kScales>
struct Chunk {
    using GroupOf = Group<kScales == Scales::wide>;
    static constexpr int kGroups = kScales == Scales::one ? 1 : 2;
    uint4 codes[kParts];
    GroupOf groups[kGroups];
};

// kRowTiles: 8 rows each.
template <class T, int kBits, Scales kScales, int kRowTiles>
__global__ void __launch_bounds__(kMaxWarps* kWarp, kScales == Scales::one && kRowTiles == 1 ? 2 : 1)
    gemv_kernel(LinearCall call) {
    using Of = Codes<T, kBits>;
    using Share = Chunk<Of::kParts, kScales>;
    constexpr int kDepth = 4 / Of::kParts;
    const PackedWeight& weight = call.weight;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    const int g = lane / 4, t = lane % 4, tile = blockIdx.x;
    const int begin = weight.chunks * warp / warps, end = weight.chunks * (warp + 1) / warps;

    const uint4* codes = static_cast<const uint4*>(weight.codes) +
                         static_cast<int64_t>(tile) * weight.chunks * Of::kParts * kWarp + lane;
    const auto load = [&](Share& into, int chunk) {
#pragma unroll
        for (int p = 0; p < Of::kParts; p++) into.codes[p] = load_once(codes + (chunk * Of::kParts + p) * kWarp);
#pragma unroll
        for (int i = 0; i < Share::kGroups; i++) {
            const int at = group_pair(weight, tile, (2 * chunk + i) >> weight.group_shift, g);
            into.groups[i] = Share::GroupOf::read(weight.scales, weight.zeros, at);
        }
    };
    Share slots[kDepth];
#pragma unroll
    for (int i = 0; i < kDepth; i++) {
        if (begin + i < end) load(slots[i], begin + i);
    }
    admit_later();
    await_earlier();  // what was loaded so far no kernel writes

    const uint16_t* inputs = static_cast<const uint16_t*>(call.x) + static_cast<int64_t>(g) * call.x_stride + t * 8;
    float sums[kRowTiles][4] = {};
    const auto multiply_chunk = [&](const Share& slot, int chunk) {
        uint32_t words[4 * Of::kParts];
        spread(slot.codes, words);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const typename Share::GroupOf& group = slot.groups[half % Share::kGroups];
            const uint32_t upper = Of::upper(group.upper_zero()), lower = Of::lower(group.lower_zero());
            const float upper_scale = group.upper_scale(), lower_scale = group.lower_scale();
            const int k = chunk * kChunk + half * 32;
            uint32_t first[4], second[4];
            Of::fragment(words, 2 * half, upper, lower, first);
            Of::fragment(words, 2 * half + 1, upper, lower, second);
#pragma unroll
            for (int j = 0; j < kRowTiles; j++) {
                uint4 x = make_uint4(0, 0, 0, 0);
                if (j * 8 + g < call.rows && k + t * 8 < call.x_stride) {
                    x = *reinterpret_cast<const uint4*>(inputs + static_cast<int64_t>(j) * 8 * call.x_stride + k);
                }
                float products[4];
                product<T>(products, first, x.x, x.y);
                multiply<T>(products, second, x.z, x.w);
                sums[j][0] += upper_scale * products[0];
                sums[j][1] += upper_scale * products[1];
                sums[j][2] += lower_scale * products[2];
                sums[j][3] += lower_scale * products[3];
            }
        }
    };
    for (int chunk = begin; chunk < end; chunk += kDepth) {
#pragma unroll
        for (int i = 0; i < kDepth; i++) {
            if (chunk + i < end) {
                multiply_chunk(slots[i], chunk + i);
                if (chunk + i + kDepth < end) load(slots[i], chunk + i + kDepth);
            }
        }
    }

    constexpr int kSums = kRowTiles * 8 * kSumStride;
    float* shared = dynamic_shared<float>();  // [warps][rows][kSumStride]
#pragma unroll
    for (int j = 0; j < kRowTiles; j++) {
        float* mine = shared + warp * kSums + (j * 8 + 2 * t) * kSumStride + g;
        mine[0] = sums[j][0];
        mine[kSumStride] = sums[j][1];
        mine[8] = sums[j][2];
        mine[kSumStride + 8] = sums[j][3];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < call.rows * kTileOutputs; i += blockDim.x) {
        const int row = i / kTileOutputs, of_tile = i % kTileOutputs, output = tile * kTileOutputs + of_tile;
        if (output >= weight.n) continue;
        float sum = 0;
        for (int w = 0; w < warps; w++) sum += shared[w * kSums + row * kSumStride + of_tile];
        store_output<T>(call, row, output, sum);
    }
}

int choose_warps(int tiles, int chunks) {
    int warps = 4;
    while (warps < kMaxWarps && tiles * warps < 24 * multiprocessors() && chunks >= 2 * warps * 4) warps *= 2;
    while (warps > chunks) warps /= 2;
    return warps;
}

template <class T, int kBits, int kRowTiles>
void start(const LinearCall& call, int warps, Stream stream) {
    const int tiles = divide_up(call.weight.n, kTileOutputs);
    if (!warps) warps = choose_warps(tiles, call.weight.chunks);
    const Grid grid{dim3(tiles), dim3(warps * kWarp), warps * kRowTiles * 8 * kSumStride * sizeof(float), true};
    const auto kernel = call.weight.wide          ? gemv_kernel<T, kBits, Scales::wide, kRowTiles>
                        : call.weight.group_shift ? gemv_kernel<T, kBits, Scales::one, kRowTiles>
                                                  : gemv_kernel<T, kBits, Scales::two, kRowTiles>;
    launch("gemv", kernel, grid, stream, call);
}

template <class T, int kBits>
void start(const LinearCall& call, int warps, Stream stream) {
    call.rows <= 8 ? start<T, kBits, 1>(call, warps, stream) : start<T, kBits, 2>(call, warps, stream);
}

}  // namespace

void gemv(const LinearCall& call, int warps, Stream stream) {
    if (call.dtype == Dtype::f16) {
        call.weight.bits == 4 ? start<Half, 4>(call, warps, stream) : start<Half, 8>(call, warps, stream);
    } else {
        call.weight.bits == 4 ? start<BFloat, 4>(call, warps, stream) : start<BFloat, 8>(call, warps, stream);
    }
}

}  // namespace tinychat::cuda
