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
// A product of 2048 multiply-adds takes a quarter of a multiprocessor some 6 cycles (H100, mma.sync); with all that belongs
// to it, scales, reads, unpacking and copies, it is 5 instructions at 64 rows (in sm_90's code, of groups from 64 on), so
// that the cores can lead; at 32 rows 7.
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

// kWhole: a chunk lies in one group, so that its products are one sum before they are scaled.
template <class T, int kBits, int kRows, bool kWhole>
__global__ void __launch_bounds__(kWarps* kWarp) gemm_kernel(LinearCall call, float* sums_of_parts) {
    using Of = Codes<T, kBits>;
    using In = Stage<kBits, kRows>;
    constexpr int kOfWarp = kTiles * In::kParts * kWarp * 16, kGroupBytes = kGroupPieces * 16;
    const PackedWeight& weight = call.weight;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;
    const int first_row = blockIdx.x * kRows, first_output = (blockIdx.y * kWarps + warp) * kTiles * kTileOutputs;
    const int begin = weight.chunks * blockIdx.z / gridDim.z, end = weight.chunks * (blockIdx.z + 1) / gridDim.z;
    const SharedAt shared = shared_at(dynamic_shared<char>());

    // What a thread copies of a stage: codes of its warp's tiles, a piece of x in every 16th row, for some a piece of scales
    // or zeros. Tiles beyond the last are computed as the last, and not stored.
    const int last_tile = divide_up(weight.n, kTileOutputs) - 1, row_pieces = call.x_stride / 8;
    const auto tile = [&](int i) { return smaller(first_output / kTileOutputs + i, last_tile); };
    int codes[kTiles];  // offsets are counted in 16 bytes, so that 32 bits hold them
#pragma unroll
    for (int i = 0; i < kTiles; i++) codes[i] = (tile(i) * weight.chunks + begin) * In::kParts * kWarp + lane;
    const int m = threadIdx.x / kPieces, piece = threadIdx.x % kPieces;
    int inputs = (first_row + m) * row_pieces + begin * kPieces + piece;
    const int of = lane / kGroupPieces, group_piece = lane % kGroupPieces;  // of: tile and half
    const bool of_zeros = group_piece == kGroupPieces - 1;
    const bool of_groups = of < kTiles * 2 && (of_zeros || group_piece < (weight.wide ? 4 : 2));
    const uint32_t group_bytes = of_zeros ? 16 : weight.wide ? 64 : 32;
    const char* groups = of_zeros ? reinterpret_cast<const char*>(weight.zeros)
                                  : static_cast<const char*>(weight.scales) + 16 * group_piece;
    groups += static_cast<int64_t>(tile(of / 2)) * weight.groups * group_bytes;
    const SharedAt codes_at = shared + warp * kOfWarp + lane * 16;
    const SharedAt inputs_at = shared + In::kCodes * 16 + (m * kPieces + (piece ^ (m & 1) << 2)) * 16;
    const SharedAt groups_at = shared + (In::kCodes + In::kInputs) * 16 + warp * kTiles * 2 * kGroupBytes;

    // Starts the copies of `chunk`, one after the other, to a stage's place in shared memory.
    const auto fill_weights = [&](int place, int chunk) {
#pragma unroll
        for (int i = 0; i < kTiles * In::kParts; i++) {
            const int at = codes[i / In::kParts] + i % In::kParts * kWarp;
            copy_async(codes_at + place + i * kWarp * 16, static_cast<const uint4*>(weight.codes) + at);
        }
#pragma unroll
        for (int i = 0; i < kTiles; i++) codes[i] += In::kParts * kWarp;
        if (!of_groups) return;
        const uint32_t group = (2 * chunk + of % 2) >> weight.group_shift;
        copy_async(groups_at + place + lane * 16, groups + static_cast<uint64_t>(group) * group_bytes);
    };
    const auto fill_inputs = [&](int place, int chunk) {
        constexpr int kEvery = kWarps * kWarp / kPieces;
        const bool inside = chunk * kPieces + piece < row_pieces;
#pragma unroll
        for (int i = 0; i < In::kInputs / (kWarps * kWarp); i++) {
            const bool there = inside && first_row + m + i * kEvery < call.rows;
            const uint4* from = static_cast<const uint4*>(call.x) + inputs + i * kEvery * row_pieces;
            copy_async(inputs_at + place + i * kEvery * kPieces * 16, from, there ? 16 : 0);
        }
        inputs += kPieces;
    };

    float sums[kTiles][kRows / 8][4] = {};
    const SharedAt own_inputs = shared + In::kCodes * 16 + (g * kPieces + (t ^ (g & 1) << 2)) * 16;
    const SharedAt other_half = own_inputs + (g % 2 ? -64 : 64);  // 4 pieces before or after
    const SharedAt own_groups = groups_at + g * (weight.wide ? 8 : 4), own_zeros = groups_at + kGroupBytes - 16 + g * 2;
    const auto multiply_stage = [&](int place) {
        constexpr int kSpan = kWhole ? 2 : 1;  // halves that are summed before they are scaled
#pragma unroll
        for (int half = 0; half < 2; half += kSpan) {
            uint32_t weights[kTiles][2 * kSpan][4];
            float2 scales[kTiles];
#pragma unroll
            for (int i = 0; i < kTiles; i++) {
                uint32_t words[kSpan * 2 * Of::kParts];  // of these halves alone
                const SharedAt from = codes_at + place + i * Of::kParts * kWarp * 16;
                if constexpr (kSpan * Of::kParts == 1) {
                    const uint2 two = load_shared<uint2>(from + half * 8);
                    words[0] = two.x;
                    words[1] = two.y;
                } else {
                    uint4 parts[kSpan * Of::kParts / 2];
#pragma unroll
                    for (int p = 0; p < kSpan * Of::kParts / 2; p++) parts[p] = load_shared<uint4>(from + (half + p) * kWarp * 16);
                    spread(parts, words);
                }
                const int of_group = place + (i * 2 + half) * kGroupBytes;
                const uint32_t zeros = load_shared<uint16_t>(own_zeros + of_group);
                const uint32_t scale = load_shared<uint32_t>(own_groups + of_group);
                const float second = weight.wide ? as_float(load_shared<uint32_t>(own_groups + of_group + 4)) : 0;
                scales[i].x = weight.wide ? as_float(scale) : low_of<Half>(scale);
                scales[i].y = weight.wide ? second : high_of<Half>(scale);
                const uint32_t upper = Of::upper(zeros), lower = Of::lower(zeros);
#pragma unroll
                for (int step = 0; step < 2 * kSpan; step++) Of::fragment(words, step, upper, lower, weights[i][step]);
            }
#pragma unroll
            for (int j = 0; j < kRows / 8; j++) {
                uint4 x[kSpan];
#pragma unroll
                for (int part = 0; part < kSpan; part++) {
                    x[part] = load_shared<uint4>((half + part ? other_half : own_inputs) + place + j * 8 * kPieces * 16);
                }
#pragma unroll
                for (int i = 0; i < kTiles; i++) {
                    float products[4];
                    product<T>(products, weights[i][0], x[0].x, x[0].y);
                    multiply<T>(products, weights[i][1], x[0].z, x[0].w);
                    if (kWhole) multiply<T>(products, weights[i][2 * kSpan - 2], x[kSpan - 1].x, x[kSpan - 1].y);
                    if (kWhole) multiply<T>(products, weights[i][2 * kSpan - 1], x[kSpan - 1].z, x[kSpan - 1].w);
                    sums[i][j][0] += scales[i].x * products[0];
                    sums[i][j][1] += scales[i].x * products[1];
                    sums[i][j][2] += scales[i].y * products[2];
                    sums[i][j][3] += scales[i].y * products[3];
                }
            }
        }
    };

    // The first stages' weights, which no kernel writes, while the kernel before still runs.
    constexpr int kPlace = In::kSize * 16, kPlaces = In::kCount * kPlace;
#pragma unroll
    for (int i = 0; i < In::kCount - 1; i++) {
        if (begin + i < end) fill_weights(i * kPlace, begin + i);
    }
    admit_later();
    await_earlier();
#pragma unroll
    for (int i = 0; i < In::kCount - 1; i++) {
        if (begin + i < end) fill_inputs(i * kPlace, begin + i);
        copies_end();
    }
    int place = 0, free = kPlaces - kPlace;  // of this stage, and of the one to be filled next
    for (int chunk = begin; chunk < end; chunk++) {
        copies_arrived<In::kCount - 2>();
        __syncthreads();  // the stage of `chunk` is there for all, and nobody reads the one before any more
        if (chunk + In::kCount - 1 < end) {
            fill_weights(free, chunk + In::kCount - 1);
            fill_inputs(free, chunk + In::kCount - 1);
        }
        copies_end();
        multiply_stage(place);
        free = place;
        place = place + kPlace == kPlaces ? 0 : place + kPlace;
    }
    __syncthreads();

    // Through shared memory, so that a warp writes 32 neighbouring outputs of a row.
    float* turned = dynamic_shared<float>() + warp * 8 * kSumStride;
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
    const bool whole = call.weight.group_shift > 0;
    launch("gemm", whole ? gemm_kernel<T, kBits, kRows, true> : gemm_kernel<T, kBits, kRows, false>, grid, stream, call,
           workspace);
    if (parts == 1) return;
    const auto combine = [&](auto* kernel, int at_once) {
        const dim3 blocks(call.rows, divide_up(call.weight.n, kCombined * at_once));
        launch("combine", kernel, {blocks, dim3(kCombined)}, stream, call, workspace, parts);
    };
    call.weight.n % 4 ? combine(combine_kernel<T, 1>, 1) : combine(combine_kernel<T, 4>, 4);
}

template <class T, int kBits>
void start(const LinearCall& call, int parts, float* workspace, int64_t workspace_bytes, Stream stream) {
    // Not 128: registers would be full, and no room to sum a chunk's products before they are scaled.
    const auto sized = call.rows <= 32 ? start<T, kBits, 32> : start<T, kBits, 64>;
    sized(call, parts, workspace, workspace_bytes, stream);
}

}  // namespace

void gemm(const LinearCall& call, int parts, float* workspace, int64_t workspace_bytes, Stream stream) {
    const auto of = call.dtype == Dtype::f16 ? (call.weight.bits == 4 ? start<Half, 4> : start<Half, 8>)
                                             : (call.weight.bits == 4 ? start<BFloat, 4> : start<BFloat, 8>);
    of(call, parts, workspace, workspace_bytes, stream);
}

}  // namespace tinychat::cuda
