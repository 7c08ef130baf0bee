// Tensor cores and copies that run beside arithmetic: PTX where there is a GPU, the same effect in C++ where not.
#pragma once
#include "device.h"

namespace tinychat::cuda {

// D = A B + D for one warp: A [16, 16] and B [16, 8] of T (fp16 or bf16), D [16, 8] in fp32, exact products. With
// g = lane / 4 and t = lane % 4, a lane holds, as pairs of neighbours in a register, and of D as numbers:
//
//   a[0] = A[g    ][2t, 2t+1]     a[2] = A[g    ][2t+8, 2t+9]     b[0] = B[2t,   2t+1][g]     d[0], d[1] = D[g    ][2t, 2t+1]
//   a[1] = A[g + 8][2t, 2t+1]     a[3] = A[g + 8][2t+8, 2t+9]     b[1] = B[2t+8, 2t+9][g]     d[2], d[3] = D[g + 8][2t, 2t+1]
//
// sm_75 multiplies fp16 in two steps of 8, and bf16 not at all: there the caller refuses it (`multiplies`).
template <class T>
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

// D = A B.
template <class T>
__device__ __forceinline__ void product(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    d[0] = d[1] = d[2] = d[3] = 0;
    multiply<T>(d, a, b0, b1);
}

#ifdef __CUDACC__

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800

#define TINYCHAT_MMA(type)                                                                                           \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, " \
        "{%0, %1, %2, %3};"                                                                                          \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                             \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

template <>
__device__ __forceinline__ void multiply<Half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    TINYCHAT_MMA("f16");
}
template <>
__device__ __forceinline__ void multiply<BFloat>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    TINYCHAT_MMA("bf16");
}
#undef TINYCHAT_MMA

#else

template <>
__device__ __forceinline__ void multiply<Half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const uint32_t b[2] = {b0, b1};
#pragma unroll
    for (int i = 0; i < 2; i++) {
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[2 * i]), "r"(a[2 * i + 1]), "r"(b[i]));
    }
}
template <>
__device__ __forceinline__ void multiply<BFloat>(float (&)[4], const uint32_t (&)[4], uint32_t, uint32_t) {
    __trap();
}

#endif

// 16 bytes from global to shared memory, both aligned to 16, past the registers and L1; or of `bytes` 0 zeros, and nothing
// is read. They are there after `copies_arrived`, for the thread that asked; for others after a barrier beyond it. sm_75
// copies at once.
__device__ __forceinline__ void copy_async(SharedAt shared, const void* global, int bytes = 16) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    const uint4 value = bytes == 16 ? *static_cast<const uint4*>(global) : make_uint4(0, 0, 0, 0);
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(value.x), "r"(value.y), "r"(value.z),
                 "r"(value.w)
                 : "memory");
#else
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
#endif
}

// Ends a group of copies, perhaps an empty one.
__device__ __forceinline__ void copies_end() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until all groups but the last `kMayRun` have arrived.
template <int kMayRun>
__device__ __forceinline__ void copies_arrived() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(kMayRun) : "memory");
#endif
}

#else  // the host build

template <class T>
inline void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct Lane {
        uint32_t a[4], b[2];
        float d[4];
    };
    Lane mine{{a[0], a[1], a[2], a[3]}, {b0, b1}, {d[0], d[1], d[2], d[3]}};
    host::together("mma", &mine, [](void* const* slots) {
        float wide_a[16][16], wide_b[16][8];
        for (int lane = 0; lane < kWarp; lane++) {
            const Lane& of = *static_cast<Lane*>(slots[lane]);
            const int g = lane / 4, t = lane % 4;
            for (int i = 0; i < 4; i++) {
                float* at = &wide_a[g + 8 * (i % 2)][2 * t + 8 * (i / 2)];
                at[0] = low_of<T>(of.a[i]);
                at[1] = high_of<T>(of.a[i]);
            }
            for (int i = 0; i < 2; i++) {
                wide_b[2 * t + 8 * i][g] = low_of<T>(of.b[i]);
                wide_b[2 * t + 8 * i + 1][g] = high_of<T>(of.b[i]);
            }
        }
        for (int lane = 0; lane < kWarp; lane++) {
            Lane& of = *static_cast<Lane*>(slots[lane]);
            for (int i = 0; i < 4; i++) {
                const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
                for (int k = 0; k < 16; k++) of.d[i] += wide_a[row][k] * wide_b[k][column];
            }
        }
    });
    for (int i = 0; i < 4; i++) d[i] = mine.d[i];
}

// The copy is made when it is waited for, and until then its target holds NaNs.
inline void copy_async(SharedAt shared, const void* global, int bytes = 16) { host::copy_later(shared, global, bytes); }
inline void copies_end() { host::end_copies(); }
template <int kMayRun>
inline void copies_arrived() {
    host::await_copies(kMayRun);
}

#endif

}  // namespace tinychat::cuda
