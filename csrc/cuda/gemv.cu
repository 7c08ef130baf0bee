// y = x W^T + bias for 1 to 8 rows, and to 16: decoding, where every weight is read once for few products.
//
//   y[m, n] = bias[n] + sum over half-chunks of s[n, group] * (sum over its 32 inputs of (q - z)[n, k] x[m, k])
//
// The inner sums are tensor-core products of exact numbers (codes.h) with fp32 sums, so nothing is rounded but those
// sums and, once, y. The cores also make eight rows cost what one does: a lane spends 2.4 instructions on a weight
// (at 4 bits and one group a step, counted in sm_90's code), where multiply-adds alone would be 8, and an H100 that reads
// at its full rate has 4.6 to spend, an H200 3.2.
//
//   block    one tile of 16 outputs, its inputs in `warps` equal runs of steps (1 to 16 warps)
//   step     1 KiB of codes: two chunks at 4 bits, one at 8, with the scales and zeros of their groups
//   warp     a run: two coalesced copies of 512 bytes a step, 8 products, 4 multiply-adds of scales
//   end      the warps' sums meet in shared memory and are added in order: the same bits at every call
//
//   ring of a warp, in shared memory:   | codes 1 KiB | scales, zeros |  kSteps times; kSteps - 1 are on their way
//
// In flight: 2 KiB a warp, by asynchronous copies: loads into registers the compiler gathers at the end of the loop,
// where nothing is in flight while a warp computes. By Little's law an H100 (3.35 TB/s, some 700 ns under load) wants
// 18 KiB in flight per multiprocessor, an H200 25 KiB: 9 and 13 warps. At 64 registers 32 are resident. `choose_warps`
// aims at 24 per multiprocessor with as few warps per tile as give that, since each block begins and ends without copies
// in flight. Blocks do not come in full waves (4096 outputs: 256 blocks on 132), but the memory is shared: the blocks
// that are left run faster.
//
// The first copies are of weights alone, so that they may begin while the kernel before still runs (launch.h, `overlap`).
//
// Activations are read through L1, which the weights do not enter: 8 KiB a row at K = 4096, 16 bytes a lane.
#include "codes.h"
#include "launch.h"
#include "linear.h"
#include "runtime.h"
#include "tensor.h"

namespace tinychat::cuda {
namespace {

constexpr int kMaxWarps = 16;
constexpr int kSumStride = 20;  // of a row of 16 sums: no two lanes in one bank

// How scales are read: once for a step that lies in one group, or for each half-chunk, in fp16 or in fp32.
enum class Scales { whole, half, wide };

// A warp's ring, in bytes.
template <int kBits, Scales kScales>
struct Ring {
    static constexpr int kParts = kBits / 4;      // 16-byte loads of a lane's codes of a chunk
    static constexpr int kChunks = 2 / kParts;    // of a step
    static constexpr int kGroups = kScales == Scales::whole ? 1 : 2 * kChunks;
    static constexpr int kPieces = kScales == Scales::wide ? 5 : 3;  // of a group: scales, and one of zeros
    static constexpr int kCodes = 1024, kStep = kCodes + kGroups * kPieces * 16;
    static constexpr int kSteps = 3, kSize = kSteps * kStep;
};

// kRowTiles: 8 rows each.
template <class T, int kBits, Scales kScales, int kRowTiles>
__global__ void __launch_bounds__(kMaxWarps* kWarp, kScales == Scales::whole && kRowTiles == 1 ? 2 : 1)
    gemv_kernel(LinearCall call) {
    using Of = Codes<T, kBits>;
    using In = Ring<kBits, kScales>;
    using GroupOf = Group<kScales == Scales::wide>;
    constexpr int kHalves = 2 * In::kChunks;
    const PackedWeight& weight = call.weight;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    const int g = lane / 4, t = lane % 4, tile = blockIdx.x, steps = divide_up(weight.chunks, In::kChunks);
    const int begin = steps * warp / warps, end = steps * (warp + 1) / warps;
    const SharedAt ring = shared_at(dynamic_shared<char>() + warp * In::kSize), ring_of_lane = ring + lane * 16;
    const SharedAt ring_of_scales = ring + In::kCodes + g * (kScales == Scales::wide ? 8 : 4);
    const SharedAt ring_of_zeros = ring + In::kCodes + 16 * (In::kPieces - 1) + g * 2;

    const uint4* codes = static_cast<const uint4*>(weight.codes) +
                         (static_cast<int64_t>(tile) * weight.chunks + begin * In::kChunks) * In::kParts * kWarp + lane;
    // The piece of each group that a lane copies: of scales, or the last, of zeros.
    const int piece = lane % In::kPieces;
    const bool of_zeros = piece == In::kPieces - 1;
    const uint32_t group_bytes = of_zeros ? 16 : 16 * (In::kPieces - 1);
    const char* groups = of_zeros ? reinterpret_cast<const char*>(weight.zeros)
                                  : static_cast<const char*>(weight.scales) + 16 * piece;
    groups += static_cast<int64_t>(tile) * weight.groups * group_bytes;
    // Starts the copies of the step after the one that came last, to a place of the ring.
    const auto fill = [&](int place, int step) {
        const SharedAt to = ring_of_lane + place;
        copy_async(to, codes);
        if (In::kChunks == 1 || step * 2 + 1 < weight.chunks) copy_async(to + 512, codes + kWarp);
        codes += 2 * kWarp;
        if (lane < In::kGroups * In::kPieces) {
            int group = step * In::kChunks * 2 + (In::kGroups == 1 ? 0 : lane / In::kPieces);
            group >>= weight.group_shift;
            if (In::kGroups > 1) group = smaller(group, weight.groups - 1);  // of a chunk that is not there
            copy_async(to + In::kCodes, groups + static_cast<uint64_t>(static_cast<uint32_t>(group)) * group_bytes);
        }
    };
#pragma unroll
    for (int i = 0; i < In::kSteps - 1; i++) {
        if (begin + i < end) fill(i * In::kStep, begin + i);
        copies_end();
    }
    admit_later();
    await_earlier();  // what is copied so far no kernel writes

    // Rows beyond the last are read as the last: their sums are thrown away, and no lane has anything to ask.
    const uint16_t* inputs[kRowTiles];
#pragma unroll
    for (int j = 0; j < kRowTiles; j++) {
        const int row = smaller(j * 8 + g, call.rows - 1);
        inputs[j] = static_cast<const uint16_t*>(call.x) + static_cast<int64_t>(row) * call.x_stride +
                    begin * In::kChunks * kChunk + t * 8;
    }
    float sums[kRowTiles][4] = {};
    int place = 0, free = (In::kSteps - 1) * In::kStep;  // in the ring: of this step, and to be filled next
    for (int step = begin; step < end; step++) {
        copies_arrived<In::kSteps - 2>();
        __syncwarp();  // the step is there for all lanes, and none reads the one before any more
        if (step + In::kSteps - 1 < end) fill(free, step + In::kSteps - 1);
        copies_end();
        uint4 x[kHalves][kRowTiles];
        const int left = call.x_stride - step * In::kChunks * kChunk;  // inputs that there are
        if (left >= In::kChunks * kChunk) {
#pragma unroll
            for (int i = 0; i < kHalves * kRowTiles; i++) {
                x[i / kRowTiles][i % kRowTiles] =
                    *reinterpret_cast<const uint4*>(inputs[i % kRowTiles] + i / kRowTiles * 32);
            }
        } else {
#pragma unroll
            for (int i = 0; i < kHalves * kRowTiles; i++) {
                x[i / kRowTiles][i % kRowTiles] = make_uint4(0, 0, 0, 0);
                if (i / kRowTiles * 32 + t * 8 >= left) continue;
                x[i / kRowTiles][i % kRowTiles] =
                    *reinterpret_cast<const uint4*>(inputs[i % kRowTiles] + i / kRowTiles * 32);
            }
        }
        const uint4 parts[2] = {load_shared<uint4>(ring_of_lane + place), load_shared<uint4>(ring_of_lane + place + 512)};
        uint32_t words[8];
        spread(parts, words);
        float products[kRowTiles][4];
#pragma unroll
        for (int half = 0; half < kHalves; half++) {
            const int of = place + (In::kGroups == 1 ? 0 : half * In::kPieces * 16);
            const GroupOf group = GroupOf::read_shared(ring_of_scales + of, ring_of_zeros + of);
            const uint32_t upper = Of::upper(group.zeros), lower = Of::lower(group.zeros);
            uint32_t first[4], second[4];
            Of::fragment(words + half * 2 * In::kParts, 0, upper, lower, first);
            Of::fragment(words + half * 2 * In::kParts, 1, upper, lower, second);
#pragma unroll
            for (int j = 0; j < kRowTiles; j++) {
                if (In::kGroups > 1 || half == 0) {
                    product<T>(products[j], first, x[half][j].x, x[half][j].y);
                } else {  // of one group products go on
                    multiply<T>(products[j], first, x[half][j].x, x[half][j].y);
                }
                multiply<T>(products[j], second, x[half][j].z, x[half][j].w);
                if (In::kGroups == 1 && half < kHalves - 1) continue;
                sums[j][0] += group.upper_scale() * products[j][0];
                sums[j][1] += group.upper_scale() * products[j][1];
                sums[j][2] += group.lower_scale() * products[j][2];
                sums[j][3] += group.lower_scale() * products[j][3];
            }
        }
        free = place;
        place = place + In::kStep == In::kSize ? 0 : place + In::kStep;
#pragma unroll
        for (int j = 0; j < kRowTiles; j++) inputs[j] += In::kChunks * kChunk;
    }

    // A warp's sums, where its ring was: [rows][kSumStride].
    __syncwarp();
    const int thread = thread_anew(), first_output = block_anew() * kTileOutputs;
    const float* shared = dynamic_shared<float>();
    constexpr int kSums = In::kSize / 4;
    static_assert(kRowTiles * 8 * kSumStride <= kSums, "they fit");
#pragma unroll
    for (int j = 0; j < kRowTiles; j++) {
        float* mine = dynamic_shared<float>() + thread / kWarp * kSums + (j * 8 + thread % 4 * 2) * kSumStride +
                      thread % kWarp / 4;
        mine[0] = sums[j][0];
        mine[kSumStride] = sums[j][1];
        mine[8] = sums[j][2];
        mine[kSumStride + 8] = sums[j][3];
    }
    __syncthreads();
    for (int i = thread; i < call.rows * kTileOutputs; i += blockDim.x) {
        const int row = i / kTileOutputs, output = first_output + i % kTileOutputs;
        if (output >= weight.n) continue;
        const float* of = shared + row * kSumStride + i % kTileOutputs;
        float sum = 0;
        for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; w++) sum += of[w * kSums];
        store_output<T>(call, row, output, sum);
    }
}

int choose_warps(int tiles, int chunks) {
    int warps = 4;
    while (warps < kMaxWarps && tiles * warps < 24 * multiprocessors() && chunks >= 2 * warps * 4) warps *= 2;
    while (warps > chunks) warps /= 2;
    return warps;
}

template <class T, int kBits, Scales kScales, int kRowTiles>
void start(const LinearCall& call, int warps, Stream stream) {
    const int tiles = divide_up(call.weight.n, kTileOutputs);
    if (!warps) warps = choose_warps(tiles, call.weight.chunks);
    const size_t shared = warps * Ring<kBits, kScales>::kSize;
    launch("gemv", gemv_kernel<T, kBits, kScales, kRowTiles>, {dim3(tiles), dim3(warps * kWarp), shared}, stream, call);
}

template <class T, int kBits, int kRowTiles>
void start(const LinearCall& call, int warps, Stream stream) {
    const bool whole = 32 << smaller(call.weight.group_shift, 20) >= Ring<kBits, Scales::whole>::kChunks * kChunk;
    if (call.weight.wide) {
        start<T, kBits, Scales::wide, kRowTiles>(call, warps, stream);
    } else if (whole) {
        start<T, kBits, Scales::whole, kRowTiles>(call, warps, stream);
    } else {
        start<T, kBits, Scales::half, kRowTiles>(call, warps, stream);
    }
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
