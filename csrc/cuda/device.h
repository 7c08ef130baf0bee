// What device code may use, for nvcc and for the host build alike: number types, wide loads, warp reductions.
//
// The same .cu file is compiled by nvcc for a GPU and by the host's compiler for tests/test_cuda_*.py (see host/shim.h,
// which brings CUDA's own words: __global__, threadIdx, __syncthreads, __shfl_xor_sync ...). Every instruction that is
// written as PTX has its twin in plain C++ beside it. Shared memory is taken through `dynamic_shared`, which the host
// build bounds exactly and fills with NaNs for every block, so that a read before a write is seen.
//
// fp16 and bf16 are bits with conversions, not cuda_fp16.h's classes: a few PTX instructions are all that is needed,
// they compile in a tenth of the time, and the host build needs no CUDA toolkit. Arithmetic is in fp32, in the tensor
// cores (tensor.h), or exact in 16 bits (codes.h).
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "host/shim.h"
#endif

namespace tinychat::cuda {

struct Half {
    uint16_t bits;
};
struct BFloat {
    uint16_t bits;
};

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

template <class A, class B>
__host__ __device__ constexpr A divide_up(A a, B b) {
    return static_cast<A>((a + b - 1) / b);
}

template <class T>
__host__ __device__ constexpr T smaller(T a, T b) {
    return a < b ? a : b;
}

template <class T>
__host__ __device__ constexpr T larger(T a, T b) {
    return a > b ? a : b;
}

// ---- numbers

__device__ __forceinline__ float as_float(uint32_t bits) {
#ifdef __CUDACC__
    return __uint_as_float(bits);
#else
    return host::cast<float>(bits);
#endif
}

__device__ __forceinline__ uint32_t as_bits(float value) {
#ifdef __CUDACC__
    return __float_as_uint(value);
#else
    return host::cast<uint32_t>(value);
#endif
}

__device__ __forceinline__ float to_float(float value) { return value; }

__device__ __forceinline__ float to_float(Half half) {
#ifdef __CUDACC__
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half.bits));
    return value;
#else
    return host::from_half(half.bits);
#endif
}

__device__ __forceinline__ float to_float(BFloat value) { return as_float(static_cast<uint32_t>(value.bits) << 16); }

// from_float<T>(value) rounds to nearest even; what is beyond fp16 becomes infinite, a NaN stays one.
template <class T>
__device__ __forceinline__ T from_float(float value);

template <>
__device__ __forceinline__ float from_float<float>(float value) {
    return value;
}

template <>
__device__ __forceinline__ Half from_float<Half>(float value) {
    Half half;
#ifdef __CUDACC__
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half.bits) : "f"(value));
#else
    half.bits = host::to_half(value);
#endif
    return half;
}

template <>
__device__ __forceinline__ BFloat from_float<BFloat>(float value) {
    const uint32_t bits = as_bits(value);  // in integers: sm_75 has no instruction for it
    const uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
    return {static_cast<uint16_t>((value != value ? bits | 0x400000 : rounded) >> 16)};
}

// Two 16-bit numbers in one register, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t pair(float low, float high) {
    return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

// The numbers of such a register.
template <class T>
__device__ __forceinline__ float low_of(uint32_t both) {
    return to_float(T{static_cast<uint16_t>(both)});
}

template <class T>
__device__ __forceinline__ float high_of(uint32_t both) {
    return to_float(T{static_cast<uint16_t>(both >> 16)});
}

// ---- memory

// Shared memory of the size that the launch names, aligned to 16 bytes.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
#ifdef __CUDACC__
    extern __shared__ uint4 dynamic_shared_memory[];
    return reinterpret_cast<T*>(dynamic_shared_memory);
#else
    return reinterpret_cast<T*>(host::dynamic_memory());
#endif
}

// An address of shared memory: a number of 32 bits, which the compiler keeps; of a pointer it would make a new one from
// the window's base at each use.
#ifdef __CUDACC__
using SharedAt = uint32_t;
#else
using SharedAt = char*;
#endif

__device__ __forceinline__ SharedAt shared_at(void* pointer) {
#ifdef __CUDACC__
    SharedAt at;
    asm volatile("mov.u32 %0, %1;" : "=r"(at) : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(pointer))));
    return at;
#else
    return static_cast<char*>(pointer);
#endif
}

// A number there; plain loads, which barriers and waits order.
template <class T>
__device__ __forceinline__ T load_shared(SharedAt at) {
#ifdef __CUDACC__
    return *static_cast<const T*>(__cvta_shared_to_generic(at));
#else
    return *static_cast<const T*>(host::aligned(at, sizeof(T)));
#endif
}

// 16 bytes of a weight: read once, so they shall not displace activations and scales from the L1 cache.
__device__ __forceinline__ uint4 load_once(const uint4* at) {
#ifdef __CUDACC__
    uint4 value;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(at));
    return value;
#else
    return *static_cast<const uint4*>(host::aligned(at, 16));
#endif
}

// ---- who one is

// threadIdx.x and blockIdx.x, asked anew: what a kernel keeps from its beginning to its end costs its loops registers.
__device__ __forceinline__ int thread_anew() {
#ifdef __CUDACC__
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
#else
    return static_cast<int>(threadIdx.x);
#endif
}

__device__ __forceinline__ int block_anew() {
#ifdef __CUDACC__
    int block;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
    return block;
#else
    return static_cast<int>(blockIdx.x);
#endif
}

// ---- kernels one after another, from sm_90 on

// Waits until the kernel before has ended and its writes are seen: in a kernel that may begin early (launch.h), before
// it reads what others write and before it writes anything. Elsewhere it has ended already.
__device__ __forceinline__ void await_earlier() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The kernel after this one, if it may begin early, finds its place once all blocks have said so or ended.
__device__ __forceinline__ void admit_later() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- warps

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int offset = kWarp / 2; offset; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
    return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
    for (int offset = kWarp / 2; offset; offset /= 2) value = larger(value, __shfl_xor_sync(kAllLanes, value, offset));
    return value;
}

}  // namespace tinychat::cuda
