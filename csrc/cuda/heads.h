// Heads on their way from the linear to attention: norm, rotation, and the place that keys and values have in the cache.
// One warp takes a head, in fp32, through shared memory.
#pragma once

#include "attention.h"
#include "vector.h"

namespace tinychat::cuda {
namespace {

enum class Part { q, k, v };

__device__ inline float warp_sum(float value) {
    for (int step = 16; step; step >>= 1) value += __shfl_xor_sync(kAllLanes, value, step);
    return value;
}

__device__ inline float warp_max(float value) {
    for (int step = 16; step; step >>= 1) value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, step));
    return value;
}

// Head `head` of `part` of row `row` into x [padded], normed and turned, zero past head_dim.
__device__ inline void take_head(const Heads& a, Part part, int row, int head, int padded, float* x) {
    const int lane = threadIdx.x % 32;
    const void* source = part == Part::q ? a.q : part == Part::k ? a.k : a.v;
    const size_t stride = part == Part::q ? a.q_stride : part == Part::k ? a.k_stride : a.v_stride;
    const size_t at = row * stride + static_cast<size_t>(head) * a.head_dim;
    const float* weight = part == Part::q ? a.q_norm : part == Part::k ? a.k_norm : nullptr;
    float squares = 0;
    for (int j = lane; j < padded; j += 32) {
        float value = 0;
        if (j < a.head_dim) {
            value = a.bf16 ? to_float(static_cast<const BFloat*>(source)[at + j])
                                          : to_float(static_cast<const Half*>(source)[at + j]);
        }
        x[j] = value;
        squares += value * value;
    }
    if (weight) {
        const float factor = 1.0f / sqrtf(warp_sum(squares) / a.head_dim + a.eps);
        for (int j = lane; j < a.head_dim; j += 32) x[j] *= factor * weight[j];
    }
    __syncwarp();
    if (part == Part::v || !a.rope_dim) return;
    const int half = a.rope_dim / 2, near = a.interleaved ? 2 : 1, far = a.interleaved ? 1 : half;
    const size_t angle = static_cast<size_t>(a.angles[row]) * half;
    for (int j = lane; j < half; j += 32) {
        float &first = x[near * j], &second = x[near * j + far];
        const float cosine = a.cos[angle + j], sine = a.sin[angle + j];
        const float turned = first * cosine - second * sine;
        second = second * cosine + first * sine;
        first = turned;
    }
    __syncwarp();
}

// Keep x [padded], a key or a value, as entry `entry` (slot, head and position in one number), and make x what is read
// from there later; without `write` only the latter. Of int8: scale = max |x| / 127, code = x / scale to nearest (see `cache.quantize_entries`); a NaN or
// an infinity makes the scale NaN.
__device__ inline void keep_head(const Cache& cache, Part part, size_t entry, float* x, bool write) {
    const int lane = threadIdx.x % 32;
    void* entries = part == Part::k ? cache.keys : cache.values;
    float* scales = part == Part::k ? cache.key_scales : cache.value_scales;
    if (!scales) {
        Half* target = static_cast<Half*>(entries) + entry * cache.padded;
        for (int j = lane; j < cache.padded; j += 32) {
            const Half kept = from_float<Half>(x[j]);
            if (write) target[j] = kept;
            x[j] = to_float(kept);
        }
        __syncwarp();
        return;
    }
    float largest = 0, nothing = 0;
    for (int j = lane; j < cache.padded; j += 32) {
        largest = fmaxf(largest, fabsf(x[j]));
        nothing += 0.0f * x[j];
    }
    const float scale = warp_max(largest) / 127.0f + warp_sum(nothing);
    signed char* target = static_cast<signed char*>(entries) + entry * cache.padded;
    for (int j = lane; j < cache.padded; j += 32) {
        const float code = scale > 0.0f ? fminf(fmaxf(rintf(x[j] / scale), -127.0f), 127.0f) : 0.0f;
        if (write) target[j] = static_cast<signed char>(code);
        x[j] = code * scale;
    }
    if (write && lane == 0) scales[entry] = scale;
    __syncwarp();
}

// The entry of position `position` of a slot's head.
__device__ inline size_t entry_of(const Cache& cache, const Heads& a, Index slot, int head, Index position) {
    return (static_cast<size_t>(slot) * a.n_kv_heads + head) * cache.capacity + position;
}

}  // namespace
}  // namespace tinychat::cuda
