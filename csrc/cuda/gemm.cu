// y = x W^T + bias for many rows, on tensor cores, from the packed weight as it lies: prefill, and batches beyond gemv.
//
// As in gemv.cu the weights are the left side of a product and x the right, sums and scales are fp32, nothing else is
// rounded:
//
//   block   128 outputs by kRows rows of x, of one part of K where blocks are few (their sums meet in `combine`)
//   warp    2 tiles: 32 outputs by all kRows rows. Every weight is unpacked by one warp only, for kRows / 8 products
//   stage   64 inputs: codes of 128 outputs (4 KiB at 4 bits), x (kRows * 128 bytes), scales and zeros (1.25 KiB)
//
// Stages are filled by asynchronous copies, kStages - 1 ahead, 64 KiB in all at most. A lane copies the codes that it
// will read. x lies in rows of 8 pieces of 16 bytes, piece p of row m at p ^ 4 (m & 1): eight lanes that read one piece
// each, of two rows and four t, meet all 32 banks, and one read serves both products of a half.
//
// A product of 2048 multiply-adds takes a quarter of a multiprocessor some 6 cycles (H100, mma.sync); it comes with 2
// multiply-adds of scales, a quarter of a shared read and, at 64 rows, 2 instructions of unpacking: the cores lead.
#include "codes.h"
#include "launch.h"
#include "linear.h"
#include "runtime.h"
#include "tensor.h"

namespace tinychat::cuda {
namespace {

constexpr int kWarps = 4, kTiles = 2;  // of a block; of a warp
constexpr int kBlockOutputs = kWarps * kTiles * kTileOutputs;
constexpr int kPieces = kChunk * 2 / 16;  // of 16 bytes, of a row of x in a stage
constexpr int kGroupPieces = 5;           // of 8 pairs of scales (4, or 2 in fp16) and of zeros (1)
constexpr int kSharedBytes = 64 << 10;    // what every architecture grants
constexpr int kSumStride = kTiles * kTileOutputs + 4;
constexpr int kCombined = 128;  // threads that add sums of parts of K

// One stage, in pieces of 16 bytes.
template <int kBits, int kRows>
struct Stage {
    static constexpr int kParts = kBits / 4;
    static constexpr int kCodes = kWarps * kTiles * kParts * kWarp, kInputs = kRows * kPieces;
    static constexpr int kGroups = kWarps * kTiles * 2 * kGroupPieces;
    static constexpr int kSize = kCodes + kInputs + kGroups;
    static constexpr int kCount = smaller(6, kSharedBytes / (kSize * 16));
    static_assert(kCount >= 2, "one stage is filled while another is used");
    static_assert(kInputs % (kWarps * kWarp) == 0, "every thread copies as many pieces");
    static constexpr int kBytes = larger(kCount * kSize * 16, kWarps * 8 * kSumStride * 4);
};

template <class T, int kBits, int kRows>
__global__ void __launch_bounds__(kWarps* kWarp) gemm_kernel(LinearCall call, float* sums_of_parts) {
    using Of = Codes<T, kBits>;
    using In = Stage<kBits, kRows>;
    const PackedWeight& weight = call.weight;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;
    const int first_row = blockIdx.x * kRows, first_output = (blockIdx.y * kWarps + warp) * kTiles * kTileOutputs;
    const int begin = weight.chunks * blockIdx.z / gridDim.z, end = weight.chunks * (blockIdx.z + 1) / gridDim.z;
    uint4* shared = dynamic_shared<uint4>();

    // Offsets are counted in 16 bytes, so that 32 bits hold them. Tiles beyond the last are computed as the last, and
    // not stored.
    const int last_tile = divide_up(weight.n, kTileOutputs) - 1, row_pieces = call.x_stride / 8;
    const auto fill_weights = [&](int chunk) {
        uint4* stage = shared + chunk % In::kCount * In::kSize;
        const int first_tile = first_output / kTileOutputs;
#pragma unroll
        for (int i = 0; i < kTiles * In::kParts; i++) {
            const int tile = smaller(first_tile + i / In::kParts, last_tile);
            const int at = ((tile * weight.chunks + chunk) * In::kParts + i % In::kParts) * kWarp + lane;
            copy_async(stage + (warp * kTiles * In::kParts + i) * kWarp + lane, static_cast<const uint4*>(weight.codes) + at);
        }
        stage += In::kCodes + In::kInputs;
        if (lane < kTiles * 2 * kGroupPieces) {
            const int of = lane / kGroupPieces, piece = lane % kGroupPieces;  // of: tile and half
            const int group = (2 * chunk + of % 2) >> weight.group_shift;
            const int at = smaller(first_tile + of / 2, last_tile) * weight.groups + group;
            uint4* to = stage + (warp * kTiles * 2 + of) * kGroupPieces + piece;
            if (piece == kGroupPieces - 1) {
                copy_async(to, reinterpret_cast<const uint4*>(weight.zeros) + at);
            } else if (weight.wide || piece < 2) {
                copy_async(to, static_cast<const uint4*>(weight.scales) + at * (weight.wide ? 4 : 2) + piece);
            }
        }
    };
    const auto fill_inputs = [&](int chunk) {
        uint4* stage = shared + chunk % In::kCount * In::kSize + In::kCodes;
#pragma unroll
        for (int i = 0; i < In::kInputs / (kWarps * kWarp); i++) {
            const int m = i * (kWarps * kWarp / kPieces) + threadIdx.x / kPieces, p = threadIdx.x % kPieces;
            const bool there = first_row + m < call.rows && chunk * kPieces + p < row_pieces;
            const int at = there ? (first_row + m) * row_pieces + chunk * kPieces + p : 0;
            copy_async(stage + m * kPieces + (p ^ (m & 1) << 2), static_cast<const uint4*>(call.x) + at, there ? 16 : 0);
        }
    };

    float sums[kTiles][kRows / 8][4] = {};
    const auto multiply_stage = [&](int chunk) {
        const uint4* stage = shared + chunk % In::kCount * In::kSize;
        uint32_t words[kTiles][4 * Of::kParts];
#pragma unroll
        for (int i = 0; i < kTiles; i++) {
            uint4 parts[Of::kParts];
#pragma unroll
            for (int p = 0; p < Of::kParts; p++) parts[p] = stage[((warp * kTiles + i) * Of::kParts + p) * kWarp + lane];
            spread(parts, words[i]);
        }
        const uint4* inputs = stage + In::kCodes;
        const uint4* groups = inputs + In::kInputs + warp * kTiles * 2 * kGroupPieces;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint32_t weights[kTiles][2][4];
            float2 scales[kTiles];
#pragma unroll
            for (int i = 0; i < kTiles; i++) {
                const uint4* of = groups + (i * 2 + half) * kGroupPieces;
                const auto unpack = [&](const auto& group) {
                    const uint32_t upper = Of::upper(group.zeros), lower = Of::lower(group.zeros);
                    scales[i] = make_float2(group.upper_scale(), group.lower_scale());
                    Of::fragment(words[i], 2 * half, upper, lower, weights[i][0]);
                    Of::fragment(words[i], 2 * half + 1, upper, lower, weights[i][1]);
                };
                weight.wide ? unpack(Group<true>::read(of, of + kGroupPieces - 1, g))
                            : unpack(Group<false>::read(of, of + kGroupPieces - 1, g));
            }
#pragma unroll
            for (int j = 0; j < kRows / 8; j++) {
                const uint4 x = inputs[(j * 8 + g) * kPieces + ((half * 4 + t) ^ (g & 1) << 2)];
#pragma unroll
                for (int i = 0; i < kTiles; i++) {
                    float products[4];
                    product<T>(products, weights[i][0], x.x, x.y);
                    multiply<T>(products, weights[i][1], x.z, x.w);
                    sums[i][j][0] += scales[i].x * products[0];
                    sums[i][j][1] += scales[i].x * products[1];
                    sums[i][j][2] += scales[i].y * products[2];
                    sums[i][j][3] += scales[i].y * products[3];
                }
            }
        }
    };

    // The first stages' weights, which no kernel writes, while the kernel before still runs.
#pragma unroll
    for (int i = 0; i < In::kCount - 1; i++) {
        if (begin + i < end) fill_weights(begin + i);
    }
    admit_later();
    await_earlier();
#pragma unroll
    for (int i = 0; i < In::kCount - 1; i++) {
        if (begin + i < end) fill_inputs(begin + i);
        copies_end();
    }
    for (int chunk = begin; chunk < end; chunk++) {
        copies_arrived<In::kCount - 2>();
        __syncthreads();  // the stage of `chunk` is there for all, and nobody reads the one before any more
        if (chunk + In::kCount - 1 < end) {
            fill_weights(chunk + In::kCount - 1);
            fill_inputs(chunk + In::kCount - 1);
        }
        copies_end();
        multiply_stage(chunk);
    }
    __syncthreads();

    // Through shared memory, so that a warp writes 32 neighbouring outputs of a row.
    float* turned = reinterpret_cast<float*>(shared) + warp * 8 * kSumStride;
    const int output = first_output + lane;
#pragma unroll
    for (int j = 0; j < kRows / 8; j++) {
#pragma unroll
        for (int i = 0; i < kTiles; i++) {
            float* mine = turned + 2 * t * kSumStride + i * kTileOutputs + g;
            mine[0] = sums[i][j][0];
            mine[kSumStride] = sums[i][j][1];
            mine[8] = sums[i][j][2];
            mine[kSumStride + 8] = sums[i][j][3];
        }
        __syncwarp();
#pragma unroll
        for (int m = 0; m < 8; m++) {
            const int row = first_row + j * 8 + m;
            const float sum = turned[m * kSumStride + lane];
            if (row >= call.rows || output >= weight.n) continue;
            if (gridDim.z == 1) {
                store_output<T>(call, row, output, sum);
            } else {
                sums_of_parts[(static_cast<int64_t>(blockIdx.z) * call.rows + row) * weight.n + output] = sum;
            }
        }
        __syncwarp();
    }
}

// y = bias + the sums of the parts of K, in order: the same bits at every call. A thread adds four outputs of a row,
// or one where a row of sums is not of whole vectors.
template <class T, int N>
__global__ void __launch_bounds__(kCombined) combine_kernel(LinearCall call, const float* sums, int parts) {
    admit_later();
    await_earlier();
    const int output = (blockIdx.y * kCombined + threadIdx.x) * N, row = blockIdx.x;
    if (output >= call.weight.n) return;
    const int64_t size = static_cast<int64_t>(call.weight.n) * call.rows;
    const float* of = sums + static_cast<int64_t>(row) * call.weight.n + output;
    float sum[N] = {};
#pragma unroll 4
    for (int part = 0; part < parts; part++) {
        if constexpr (N == 4) {
            const float4 more = *reinterpret_cast<const float4*>(of + part * size);
            sum[0] += more.x;
            sum[1] += more.y;
            sum[2] += more.z;
            sum[3] += more.w;
        } else {
            sum[0] += of[part * size];
        }
    }
#pragma unroll
    for (int i = 0; i < N; i++) store_output<T>(call, row, output + i, sum[i]);
}

// How many parts of K, in units of the time of one stage: what a multiprocessor does, two blocks at a time, then the
// launch of `combine` and the sums it moves (4 bytes there and back, a stage some 0.3 us, L2 some 4 TB/s).
int choose_parts(const LinearCall& call, int blocks, int64_t workspace_bytes) {
    const int chunks = call.weight.chunks, slots = 2 * multiprocessors();
    const double size = static_cast<double>(call.rows) * call.weight.n;
    int best = 1;
    double least = 0;
    for (int parts = 1; parts <= 16; parts++) {
        if (parts > 1 && (chunks / parts < 4 || size * parts * 4 > static_cast<double>(workspace_bytes))) break;
        double cost = static_cast<double>(divide_up(blocks * parts, slots)) * divide_up(chunks, parts);
        if (parts > 1) cost += 6 + parts * size * 6.7e-6;
        if (parts == 1 || cost < least) {
            least = cost;
            best = parts;
        }
    }
    return best;
}

template <class T, int kBits, int kRows>
void start(const LinearCall& call, int parts, float* workspace, int64_t workspace_bytes, Stream stream) {
    const int of_rows = divide_up(call.rows, kRows), of_outputs = divide_up(call.weight.n, kBlockOutputs);
    if (!parts) parts = choose_parts(call, of_rows * of_outputs, workspace_bytes);
    const Grid grid{dim3(of_rows, of_outputs, parts), dim3(kWarps * kWarp), Stage<kBits, kRows>::kBytes};
    launch("gemm", gemm_kernel<T, kBits, kRows>, grid, stream, call, workspace);
    if (parts == 1) return;
    const auto combine = [&](auto* kernel, int at_once) {
        const dim3 blocks(call.rows, divide_up(call.weight.n, kCombined * at_once));
        launch("combine", kernel, {blocks, dim3(kCombined)}, stream, call, workspace, parts);
    };
    call.weight.n % 4 ? combine(combine_kernel<T, 1>, 1) : combine(combine_kernel<T, 4>, 4);
}

// At 8 bits, of few weights, one size serves.
template <class T, int kBits>
void start(const LinearCall& call, int parts, float* workspace, int64_t workspace_bytes, Stream stream) {
    if constexpr (kBits == 8) {
        start<T, kBits, 64>(call, parts, workspace, workspace_bytes, stream);
    } else {
        const auto sized = call.rows <= 32 ? start<T, kBits, 32> : call.rows <= 64 ? start<T, kBits, 64> : start<T, kBits, 128>;
        sized(call, parts, workspace, workspace_bytes, stream);
    }
}

}  // namespace

void gemm(const LinearCall& call, int parts, float* workspace, int64_t workspace_bytes, Stream stream) {
    const auto of = call.dtype == Dtype::f16 ? (call.weight.bits == 4 ? start<Half, 4> : start<Half, 8>)
                                             : (call.weight.bits == 4 ? start<BFloat, 4> : start<BFloat, 8>);
    of(call, parts, workspace, workspace_bytes, stream);
}

}  // namespace tinychat::cuda
