// The likeliest token of one row of logits. A dozen of torch's operations would do the same, but each takes longer to be
// launched than the logits take to be read: 128 KB of 32000 tokens by one block, about 2 us, 600 KB of 152000 about 6.

#include "draw.h"

#include "launch.h"
#include "vector.h"

namespace tinychat::cuda {
namespace {

constexpr int kThreads = 1024;

// The largest number so far and where it lies; of equals the first. `nothing` is 0, or NaN where a number was not finite.
struct Largest {
    float value = -INFINITY;
    int at = 0x7fffffff;
    float nothing = 0;

    __device__ __forceinline__ void take(float number, int its_at) {
        nothing += 0.0f * number;
        compare(number, its_at);
    }
    __device__ __forceinline__ void compare(float other, int its_at) {
        if (other > value || (other == value && its_at < at)) {
            value = other;
            at = its_at;
        }
    }
    __device__ __forceinline__ void join() {  // of a warp
#pragma unroll
        for (int step = kWarp / 2; step; step /= 2) {
            const float other = __shfl_xor_sync(kAllLanes, value, step);
            const int its_at = __shfl_xor_sync(kAllLanes, at, step);
            nothing += __shfl_xor_sync(kAllLanes, nothing, step);
            compare(other, its_at);
        }
    }
};

__global__ void __launch_bounds__(kThreads) greedy_kernel(GreedyArguments a) {
    admit_later();
    await_earlier();
    const int thread = threadIdx.x, vectors = a.width / 4;
    Largest found;
#pragma unroll 4
    for (int i = thread; i < vectors; i += kThreads) {
        const float4 four = reinterpret_cast<const float4*>(a.logits)[i];
        found.take(four.x, 4 * i);
        found.take(four.y, 4 * i + 1);
        found.take(four.z, 4 * i + 2);
        found.take(four.w, 4 * i + 3);
    }
    if (4 * vectors + thread < a.width) found.take(a.logits[4 * vectors + thread], 4 * vectors + thread);
    found.join();
    auto* of_warps = dynamic_shared<Largest>();
    if (thread % kWarp == 0) of_warps[thread / kWarp] = found;
    __syncthreads();
    if (thread >= kWarp) return;
    found = of_warps[thread];
    found.join();
    if (thread) return;
    const int token = found.at < a.width ? found.at : 0;
    *a.reported = found.nothing == 0.0f ? token : -1;
    *a.token = token;
    *a.position += 1;
}

}  // namespace

void greedy(const GreedyArguments& arguments, Stream stream) {
    launch("greedy", greedy_kernel, {dim3(1), dim3(kThreads), kThreads / kWarp * sizeof(Largest)}, stream, arguments);
}

}  // namespace tinychat::cuda
