// RMSNorm and LayerNorm of rows, with the residual sum that comes before them: the stream is read once and written once.
//
//   s = x + scale * a + scale * b                               in the activations' type; a and b may be absent
//   y = (s - mean) / sqrt(mean((s - mean)^2) + eps) * weight + bias           of RMSNorm the mean is taken as 0
//
// One block a row. Each thread keeps its part of the row in registers, so that LayerNorm takes the mean away before it
// squares (no cancellation) without reading again:
//
//   thread  0        1        2      ...  T-1      0          ...        vectors of 8 numbers where rows are aligned to
//   row    [8 of s | 8 of s | 8 of s ... | 8 of s | 8 of s | ...]        16 bytes, else single numbers
//
// Decoding, one row of 4096: 24 KB move, so it is latency that counts, about 2 us; prefill runs at memory speed.

#include "norm.h"

#include "launch.h"
#include "vector.h"

namespace tinychat::cuda {
namespace {

constexpr int kThreads = 512;  // at most
constexpr int kItems = kWidestNorm / kThreads;  // numbers that a thread keeps at most

// The sum of `value` over the block, in every thread. `scratch` is 33 floats that nobody else uses meanwhile.
__device__ float block_sum(float value, float* scratch) {
    for (int step = 16; step; step >>= 1) value += __shfl_xor_sync(kAllLanes, value, step);
    const int warp = threadIdx.x / 32, n_warps = (blockDim.x + 31) / 32;
    if (threadIdx.x % 32 == 0) scratch[warp] = value;
    __syncthreads();
    if (warp == 0) {
        float sum = static_cast<int>(threadIdx.x) < n_warps ? scratch[threadIdx.x] : 0.0f;
        for (int step = 16; step; step >>= 1) sum += __shfl_xor_sync(kAllLanes, sum, step);
        if (threadIdx.x == 0) scratch[32] = sum;
    }
    __syncthreads();
    return scratch[32];
}

template <class T, int N, int ITEMS>
__global__ void __launch_bounds__(kThreads, 1) norm_kernel(NormArguments a) {
    float(*scratch)[33] = dynamic_shared<float[33]>();  // of each sum
    // What belongs to the model is asked for before the kernel before has ended.
    constexpr int kKept = ITEMS <= 2 ? ITEMS : 0;
    float weights[larger(kKept, 1)][N], biases[larger(kKept, 1)][N];
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
        const int at = (i * blockDim.x + threadIdx.x) * N;
        if (at >= a.width) continue;
        load_floats<N>(a.weight + at, a.aligned_weights, weights[i]);
        if (a.bias) load_floats<N>(a.bias + at, a.aligned_weights, biases[i]);
    }
    admit_later();
    await_earlier();
    const size_t row = blockIdx.x;
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    float values[ITEMS][N];
    float sum = 0;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        const int at = (i * blockDim.x + threadIdx.x) * N;
        for (int j = 0; j < N; ++j) values[i][j] = 0;
        if (at >= a.width) continue;
        float more[2][N];  // all is asked for before any of it is waited for
        load<N>(x + at, values[i]);
#pragma unroll
        for (int part = 0; part < 2; ++part) {
            load<N>(a.added[part] ? static_cast<const T*>(a.added[part]) + row * a.width + at : x + at, more[part]);
        }
#pragma unroll
        for (int part = 0; part < 2; ++part) {
            for (int j = 0; j < N; ++j) values[i][j] += a.added[part] ? a.scale * more[part][j] : 0.0f;
        }
        if (a.sum) {
            store<N>(static_cast<T*>(a.sum) + row * a.width + at, values[i]);
            for (int j = 0; j < N; ++j) values[i][j] = to_float(from_float<T>(values[i][j]));  // as it was stored
        }
        for (int j = 0; j < N; ++j) sum += a.layer ? values[i][j] : values[i][j] * values[i][j];
    }
    float total = block_sum(sum, scratch[0]), mean = 0;
    if (a.layer) {
        mean = total / a.width;
        sum = 0;
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            if ((i * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * N >= a.width) continue;
            for (int j = 0; j < N; ++j) sum += (values[i][j] - mean) * (values[i][j] - mean);
        }
        total = block_sum(sum, scratch[1]);
    }
    const float factor = 1.0f / sqrtf(total / a.width + a.eps);
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        const int at = (i * blockDim.x + threadIdx.x) * N;
        if (at >= a.width) continue;
        float(&weight)[N] = weights[i < kKept ? i : 0], (&bias)[N] = biases[i < kKept ? i : 0];
        if (i >= kKept) load_floats<N>(a.weight + at, a.aligned_weights, weight);
        if (i >= kKept && a.bias) load_floats<N>(a.bias + at, a.aligned_weights, bias);
        for (int j = 0; j < N; ++j) {
            values[i][j] = (values[i][j] - mean) * factor * weight[j] + (a.bias ? bias[j] : 0.0f);
        }
        store<N>(static_cast<T*>(a.y) + row * a.width + at, values[i]);
    }
}

template <class T>
void launch_norm(NormArguments a, Stream stream) {
    a.aligned_weights = aligned(a.weight, a.bias);
    const bool vectors = a.width % 8 == 0 && a.x_stride % 8 == 0 && aligned(a.x, a.added[0], a.added[1], a.sum, a.y);
    const int at_once = vectors ? 8 : 1, needed = divide_up(a.width, at_once);
    const int threads = needed < kThreads ? divide_up(needed, kWarp) * kWarp : kThreads;
    const auto run = [&](auto* kernel) { launch("norm", kernel, {dim3(a.rows), dim3(threads), 2 * sizeof(float[33])}, stream, a); };
    if (vectors) {
        if (needed <= kThreads) return run(norm_kernel<T, 8, 1>);
        if (needed <= 2 * kThreads) return run(norm_kernel<T, 8, 2>);
        return run(norm_kernel<T, 8, kItems / 8>);
    }
    needed <= kThreads ? run(norm_kernel<T, 1, 1>) : run(norm_kernel<T, 1, kItems>);
}

}  // namespace

void norm(Dtype type, const NormArguments& arguments, Stream stream) {
    if (!arguments.rows) return;
    type == Dtype::bf16 ? launch_norm<BFloat>(arguments, stream) : launch_norm<Half>(arguments, stream);
}

}  // namespace tinychat::cuda
