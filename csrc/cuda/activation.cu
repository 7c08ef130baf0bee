// What an MLP applies between its linears: act(gate) * up of rows gate | up, or act(up), over the per-channel scales that
// AWQ leaves behind a GELU.
//
//   y[t][j] = act(up[t][j]) * up[t][width + j] / act_scale[j]
//
// One thread a vector of 8 numbers of one row (or a number, where rows are not aligned to 16 bytes), computed in fp32.

#include "activation.h"

#include "launch.h"
#include "vector.h"

namespace tinychat::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 65535;  // of a launch: the most blocks that a grid has along y

__device__ float activated(float x, ActivationKind kind) {
    switch (kind) {
        case ActivationKind::silu:
            return x / (1.0f + expf(-x));
        case ActivationKind::gelu:
            return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
        case ActivationKind::gelu_tanh:
            return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
        default:
            return x > 0.0f || x != x ? x : 0.0f;
    }
}

template <class T, int N>
__global__ void activation_kernel(ActivationArguments a) {
    admit_later();
    await_earlier();
    const int at = (blockIdx.x * blockDim.x + threadIdx.x) * N;
    if (at >= a.width) return;
    const size_t row = a.first + blockIdx.y;
    const T* x = static_cast<const T*>(a.up) + row * a.width * (a.gated ? 2 : 1) + at;
    float y[N];
    load<N>(x, y);
    for (int j = 0; j < N; ++j) y[j] = activated(y[j], a.kind);
    if (a.gated) {
        float up[N];
        load<N>(x + a.width, up);
        for (int j = 0; j < N; ++j) y[j] *= up[j];
    }
    if (a.act_scale) {
        for (int j = 0; j < N; ++j) y[j] /= a.act_scale[at + j];
    }
    store<N>(static_cast<T*>(a.y) + row * a.width + at, y);
}

template <class T>
void launch_activation(ActivationArguments a, Stream stream) {
    const bool vectors = a.width % 8 == 0 && aligned(a.up, a.y);
    const int per_block = kThreads * (vectors ? 8 : 1);
    for (a.first = 0; a.first < a.rows; a.first += kRows) {
        const int rows = a.rows - a.first < kRows ? a.rows - a.first : kRows;
        const dim3 grid((a.width + per_block - 1) / per_block, rows);
        if (vectors) {
            launch("activation", activation_kernel<T, 8>, {grid, dim3(kThreads)}, stream, a);
        } else {
            launch("activation", activation_kernel<T, 1>, {grid, dim3(kThreads)}, stream, a);
        }
    }
}

}  // namespace

void activation(Dtype type, const ActivationArguments& arguments, Stream stream) {
    type == Dtype::bf16 ? launch_activation<BFloat>(arguments, stream) : launch_activation<Half>(arguments, stream);
}

}  // namespace tinychat::cuda
