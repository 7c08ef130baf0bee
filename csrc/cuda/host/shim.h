// CUDA's words for a host compiler, so that kernels run on the CPU in tests: every thread of a block is a fiber.
//
// Blocks run one after another; within one, threads run until they wait for each other. What is seen here: wrong
// indices (with the address sanitizer, at the line), misaligned vector accesses, barriers that not all threads reach,
// shared memory read before it is written, asynchronous copies used before they are waited for, and, by running threads
// and blocks in the opposite order (`reverse`), results that depend on the order. What is not: memory ordering between
// running blocks, bank conflicts, registers, the rounding of tensor cores (here: fp32, in order).
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#include "half.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the thread that runs

namespace tinychat::cuda::host {

// Runs body() in every thread of every block. Throws std::runtime_error with `name` where threads wait in vain.
void run(const char* name, dim3 blocks, dim3 threads, size_t shared, const std::function<void()>& body);

// Threads and blocks from the last to the first, or in order.
extern bool reverse;

void* dynamic_memory();

void block_barrier();

// One operation of all lanes of a warp, named `what`: each gives the address of its part; when the last one comes,
// `operate` sees them all by lane (null beyond the end of the block) and may write to them.
void together(const char* what, void* part, void (*operate)(void* const* parts));

void copy_later(void* shared, const void* global, int bytes);
void end_copies();
void await_copies(int may_run);

// `at`, after a check that it is a multiple of `bytes`.
const void* aligned(const void* at, size_t bytes);

template <class To, class From>
inline To cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "of one size");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

inline float from_half(uint16_t bits) { return tinychat::from_half(bits); }
uint16_t to_half(float value);

template <class T>
T shuffle(T value, int source) {
    struct Part {
        T value, result;
        int source;
    } part{value, value, source};
    together("shuffle", &part, [](void* const* parts) {
        for (int lane = 0; lane < 32; lane++) {
            auto* mine = static_cast<Part*>(parts[lane]);
            if (!mine || mine->source < 0 || mine->source > 31 || !parts[mine->source]) continue;
            mine->result = static_cast<Part*>(parts[mine->source])->value;
        }
    });
    return part.result;
}

inline int thread_number() {
    return static_cast<int>(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z));
}
inline int lane() { return thread_number() % 32; }

bool any(bool mine);  // of the warp

}  // namespace tinychat::cuda::host

inline void __syncthreads() { tinychat::cuda::host::block_barrier(); }
inline void __syncwarp(unsigned = ~0u) {
    tinychat::cuda::host::together("__syncwarp", nullptr, [](void* const*) {});
}
template <class T>
T __shfl_sync(unsigned, T value, int source) {
    return tinychat::cuda::host::shuffle(value, source);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return tinychat::cuda::host::shuffle(value, tinychat::cuda::host::lane() ^ mask);
}
template <class T>
T __shfl_up_sync(unsigned, T value, int by) {
    return tinychat::cuda::host::shuffle(value, tinychat::cuda::host::lane() - by);
}
template <class T>
T __shfl_down_sync(unsigned, T value, int by) {
    return tinychat::cuda::host::shuffle(value, tinychat::cuda::host::lane() + by);
}
inline int __any_sync(unsigned, int mine) { return tinychat::cuda::host::any(mine); }
inline int __all_sync(unsigned, int mine) { return !tinychat::cuda::host::any(!mine); }

inline void __threadfence() {}
template <class T>
T atomicAdd(T* at, T value) {
    const T before = *at;
    *at = before + value;
    return before;
}
template <class T>
T __ldg(const T* at) {
    return *at;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
