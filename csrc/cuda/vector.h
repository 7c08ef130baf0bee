// Numbers of rows, N at a time, as floats: one load or store of 16 bytes where N is 8, and of one number where N is 1.
#pragma once
#include "device.h"

namespace tinychat::cuda {

template <int N, class T>
__device__ __forceinline__ void load(const T* at, float (&x)[N]) {
    static_assert(N == 1 || (N == 8 && sizeof(T) == 2));
    if constexpr (N == 1) {
        x[0] = to_float(*at);
    } else {
        const uint4 words = *reinterpret_cast<const uint4*>(at);
        const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            x[2 * i] = low_of<T>(pairs[i]);
            x[2 * i + 1] = high_of<T>(pairs[i]);
        }
    }
}

// The same of fp32, by 16 bytes where `aligned`.
template <int N>
__device__ __forceinline__ void load_floats(const float* at, bool aligned, float (&x)[N]) {
    static_assert(N == 1 || N == 8);
    if (N == 8 && aligned) {
        const float4 low = reinterpret_cast<const float4*>(at)[0], high = reinterpret_cast<const float4*>(at)[1];
        const float both[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int i = 0; i < N; i++) x[i] = both[i];
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) x[i] = at[i];
    }
}

template <int N, class T>
__device__ __forceinline__ void store(T* at, const float (&x)[N]) {
    static_assert(N == 1 || (N == 8 && sizeof(T) == 2));
    if constexpr (N == 1) {
        *at = from_float<T>(x[0]);
    } else {
        *reinterpret_cast<uint4*>(at) =
            make_uint4(pair<T>(x[0], x[1]), pair<T>(x[2], x[3]), pair<T>(x[4], x[5]), pair<T>(x[6], x[7]));
    }
}

// Whether all these addresses, but for null, may be read 16 bytes at a time.
template <class... P>
bool aligned(const P*... addresses) {
    return ((reinterpret_cast<uintptr_t>(addresses) % 16 == 0) && ...);
}

// What another block of the same launch has written: not from this multiprocessor's L1 cache.
__device__ __forceinline__ float read_anew(const float* at) {
#ifdef __CUDACC__
    return __ldcg(at);
#else
    return *at;
#endif
}

// Asks the L2 cache for a line.
__device__ __forceinline__ void prefetch(const void* at) {
#ifdef __CUDACC__
    asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
#else
    static_cast<void>(at);
#endif
}

// 2^x, to 2 units in the last place; subnormal results are 0.
__device__ __forceinline__ float power_of_two(float x) {
#ifdef __CUDACC__
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);
#endif
}

}  // namespace tinychat::cuda
