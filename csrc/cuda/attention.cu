// Attention of single rows: a decoded token on each slot, with rotation and the cache's extension inside; and, where
// torch's attention has no mask that fits, the rows of a prompt.
//
// A block takes HEADS query heads that share a key-value head, and a share of the positions that the row sees. LANES
// lanes hold a head's vectors, 8 numbers each, so that a warp reads 32 / LANES whole entries at once, 16 bytes a lane:
//
//   warp   lanes 0 .. LANES-1   lanes LANES .. 2 LANES-1  ...        LANES = 8, 16, 32 of heads up to 64, 128, 256
//          entry p              entry p + 1                          then entries further on by all groups of the block
//
// Each such group of lanes keeps a softmax of its own (largest score, sum, weighted values), UNROLL entries at a time;
// the block joins them in shared memory, and where several blocks share a row, the last of them to arrive joins theirs.
//
//   scores in bits: s = log2(e) * (cap * tanh(scale * q . k / cap) - slope * distance), so that a weight is exp2(s - m)
//
// Decoding waits for memory: every key and value is read once per HEADS query heads. Expected: above half of the copy
// rate from 4k positions on, about 4 us below 512.

#include "heads.h"
#include "launch.h"

namespace tinychat::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kLeast = 64;  // positions worth a block of their own
constexpr float kLowest = -1e30f;  // below every score: what a softmax of nothing has as its largest
constexpr float kBits = 1.44269504088896341f;

struct Codes {
    signed char code;
};

template <class T>
__device__ inline void load_entry(const T* at, float (&x)[8]) {
    load<8>(at, x);
}

template <>
__device__ inline void load_entry<Codes>(const Codes* at, float (&x)[8]) {
    const uint2 words = *reinterpret_cast<const uint2*>(at);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        x[j] = static_cast<float>(static_cast<signed char>(words.x >> 8 * j));
        x[4 + j] = static_cast<float>(static_cast<signed char>(words.y >> 8 * j));
    }
}

// A softmax over some positions, for a lane's part of HEADS heads.
template <int HEADS>
struct Running {
    float largest[HEADS];
    float sum[HEADS];
    float mixed[HEADS][8];
};

__device__ inline float score(const AttentionArguments& a, float dot, float slope, Index distance) {
    // tanh(x) = 1 - 2 / (1 + e^2x): what cancels is of the order of cap * 1e-7, and a call would be inlined often
    if (a.cap > 0.0f) dot = a.cap - __fdividef(2 * a.cap, 1 + power_of_two(2 * kBits * dot / a.cap));
    return kBits * (dot - slope * distance);
}

// Take N entries with these scores in.
template <int HEADS, int N>
__device__ inline void take_in(Running<HEADS>& run, const float (&scores)[N][HEADS], const float (&factors)[N],
                                                              const float (&values)[N][8]) {
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
        float largest = run.largest[h];
#pragma unroll
        for (int u = 0; u < N; ++u) largest = fmaxf(largest, scores[u][h]);
        const float before = power_of_two(run.largest[h] - largest);
        run.largest[h] = largest;
        run.sum[h] *= before;
#pragma unroll
        for (int j = 0; j < 8; ++j) run.mixed[h][j] *= before;
#pragma unroll
        for (int u = 0; u < N; ++u) {
            const float weight = power_of_two(scores[u][h] - largest);
            run.sum[h] += weight;
#pragma unroll
            for (int j = 0; j < 8; ++j) run.mixed[h][j] += weight * factors[u] * values[u][j];
        }
    }
}

__device__ inline void put(const AttentionArguments& a, size_t at, float value) {
    if (a.heads.bf16) {
        static_cast<BFloat*>(a.out)[at] = from_float<BFloat>(value);
    } else {
        static_cast<Half*>(a.out)[at] = from_float<Half>(value);
    }
}

template <class E, int LANES, int HEADS>
__global__ void __launch_bounds__(kThreads) attention_kernel(AttentionArguments a) {
    constexpr int kGroups = kThreads / LANES, kWidth = LANES * 8;
    constexpr int kUnroll = HEADS > 4 ? 2 : 4;  // as registers allow
    __shared__ float q[HEADS][kWidth];
    __shared__ float fresh[2][kWidth];  // the row's own key and value
    __shared__ float joined[kGroups][HEADS][kWidth];
    __shared__ float largest[kGroups][HEADS], sums[kGroups][HEADS];
    __shared__ float weights[HEADS][kMostSplits];
    __shared__ bool last;

    const Heads& heads = a.heads;
    const int row = blockIdx.z, group = heads.n_heads / heads.n_kv_heads, tiles = (group + HEADS - 1) / HEADS;
    const int kv_head = blockIdx.y / tiles, tile = blockIdx.y % tiles, first_head = kv_head * group + tile * HEADS;
    const int n_heads = group - tile * HEADS < HEADS ? group - tile * HEADS : HEADS;
    const Index position = heads.positions[row], slot = heads.slots[row];
    const Index first = a.window && position >= a.window ? position + 1 - a.window : 0;
    const Index count = position + 1 - first;
    const int shares = count > static_cast<Index>(kLeast) * a.splits ? a.splits
                                                                                                                                    : static_cast<int>((count + kLeast - 1) / kLeast);
    const int share = blockIdx.x;
    if (share >= shares) return;
    const Index each = (count + shares - 1) / shares, begin = first + share * each;
    const Index end = begin + each < position + 1 ? begin + each : position + 1;
    const bool own = a.append && end == position + 1 && begin < end;

    const int warp = threadIdx.x / 32, lane = threadIdx.x % LANES, lanes = threadIdx.x / LANES;
    const int from = lane * 8;
    const bool active = from < a.cache.padded;
    for (int i = threadIdx.x; i < HEADS * kWidth; i += kThreads) q[i / kWidth][i % kWidth] = 0;
    __syncthreads();
    for (int h = warp; h < n_heads; h += kThreads / 32) {
        if (a.append) {
            take_head(heads, Part::q, row, first_head + h, a.cache.padded, q[h]);
        } else {
            const size_t at = (static_cast<size_t>(row) * heads.n_heads + first_head + h) * a.cache.padded;
            for (int j = threadIdx.x % 32; j < heads.head_dim; j += 32) {
                q[h][j] = to_float(static_cast<const Half*>(heads.q)[at + j]);
            }
        }
    }
    const size_t slot_head = entry_of(a.cache, heads, slot, kv_head, 0);
    if (own && warp < 2) {
        const Part part = warp ? Part::v : Part::k;
        take_head(heads, part, row, kv_head, a.cache.padded, fresh[warp]);
        keep_head(a.cache, part, slot_head + position, fresh[warp], tile == 0);
    }
    __syncthreads();

    float mine[HEADS][8], slopes[HEADS];
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
#pragma unroll
        for (int j = 0; j < 8; ++j) mine[h][j] = a.scale * q[h][from + j];
        slopes[h] = a.slopes && h < n_heads ? a.slopes[first_head + h] : 0.0f;
    }
    Running<HEADS> run;
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
        run.largest[h] = kLowest;
        run.sum[h] = 0;
#pragma unroll
        for (int j = 0; j < 8; ++j) run.mixed[h][j] = 0;
    }

    const E* keys = static_cast<const E*>(a.cache.keys) + slot_head * a.cache.padded + from;
    const E* values = static_cast<const E*>(a.cache.values) + slot_head * a.cache.padded + from;
    const Index stored = own ? end - 1 : end;
    for (Index base = begin; base < stored; base += kGroups * kUnroll) {
        float key[kUnroll][8], value[kUnroll][8], scores[kUnroll][HEADS], factors[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const Index p = base + u * kGroups + lanes;
#pragma unroll
            for (int j = 0; j < 8; ++j) key[u][j] = value[u][j] = 0;
            if (active && p < stored) {
                load_entry(keys + p * a.cache.padded, key[u]);
                load_entry(values + p * a.cache.padded, value[u]);
            }
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const Index p = base + u * kGroups + lanes;
            const bool there = p < stored;
            const float key_factor = a.cache.key_scales && there ? a.cache.key_scales[slot_head + p] : 1.0f;
            factors[u] = a.cache.value_scales && there ? a.cache.value_scales[slot_head + p] : 1.0f;
#pragma unroll
            for (int h = 0; h < HEADS; ++h) {
                float dot = 0;
#pragma unroll
                for (int j = 0; j < 8; ++j) dot += mine[h][j] * key[u][j];
                for (int step = LANES / 2; step; step >>= 1) dot += __shfl_xor_sync(kAllLanes, dot, step);
                scores[u][h] = there ? score(a, dot * key_factor, slopes[h], position - p) : -INFINITY;
            }
        }
        take_in<HEADS, kUnroll>(run, scores, factors, value);
    }
    if (own) {  // by the first group; the other lanes of its warp go along for the sum
        float scores[1][HEADS], factors[1] = {1.0f}, value[1][8];
#pragma unroll
        for (int j = 0; j < 8; ++j) value[0][j] = active ? fresh[1][from + j] : 0.0f;
#pragma unroll
        for (int h = 0; h < HEADS; ++h) {
            float dot = 0;
#pragma unroll
            for (int j = 0; j < 8; ++j) dot += active ? mine[h][j] * fresh[0][from + j] : 0.0f;
            for (int step = LANES / 2; step; step >>= 1) dot += __shfl_xor_sync(kAllLanes, dot, step);
            scores[0][h] = lanes == 0 ? score(a, dot, slopes[h], 0) : -INFINITY;
        }
        take_in<HEADS, 1>(run, scores, factors, value);
    }

#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
#pragma unroll
        for (int j = 0; j < 8; ++j) joined[lanes][h][from + j] = run.mixed[h][j];
        if (lane == 0) {
            largest[lanes][h] = run.largest[h];
            sums[lanes][h] = run.sum[h];
        }
    }
    __syncthreads();
    const int dim = heads.head_dim, stride = a.cache.padded + 2;
    const size_t out = (static_cast<size_t>(row) * heads.n_heads + first_head) * dim;
    const size_t partial = (static_cast<size_t>(row) * heads.n_heads + first_head) * a.splits;
    for (int i = threadIdx.x; i < n_heads * dim; i += kThreads) {
        const int h = i / dim, j = i % dim;
        float most = kLowest, total = 0, mixed = 0;
#pragma unroll
        for (int g = 0; g < kGroups; ++g) most = fmaxf(most, largest[g][h]);
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
            const float weight = power_of_two(largest[g][h] - most);
            total += weight * sums[g][h];
            mixed += weight * joined[g][h][j];
        }
        if (shares == 1) {
            put(a, out + i, mixed / total);
        } else {
            float* mine_of_all = a.partial + (partial + static_cast<size_t>(h) * a.splits + share) * stride;
            mine_of_all[j] = mixed;
            if (j == 0) {
                mine_of_all[a.cache.padded] = most;
                mine_of_all[a.cache.padded + 1] = total;
            }
        }
    }
    if (shares == 1) return;

    // Each block makes what it wrote visible before it is counted, so that the last sees the parts of all.
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        int* arrived = a.arrived + static_cast<size_t>(row) * heads.n_heads + first_head;
        last = atomicAdd(arrived, 1) == shares - 1;
        if (last) *arrived = 0;
    }
    __syncthreads();
    if (!last) return;
    __threadfence();
    for (int h = warp; h < n_heads; h += kThreads / 32) {
        const float* parts = a.partial + (partial + static_cast<size_t>(h) * a.splits) * stride + a.cache.padded;
        float most = kLowest, total = 0;
        for (int s = threadIdx.x % 32; s < shares; s += 32) most = fmaxf(most, read_anew(parts + s * stride));
        most = warp_max(most);
        for (int s = threadIdx.x % 32; s < shares; s += 32) {
            weights[h][s] = power_of_two(read_anew(parts + s * stride) - most);
            total += weights[h][s] * read_anew(parts + s * stride + 1);
        }
        total = warp_sum(total);
        for (int s = threadIdx.x % 32; s < shares; s += 32) weights[h][s] /= total;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < n_heads * dim; i += kThreads) {
        const int h = i / dim, j = i % dim;
        const float* parts = a.partial + (partial + static_cast<size_t>(h) * a.splits) * stride + j;
        float mixed = 0;
        for (int s = 0; s < shares; ++s) mixed += weights[h][s] * read_anew(parts + s * stride);
        put(a, out + i, mixed);
    }
}

template <class E, int LANES>
void launch_heads(const AttentionArguments& a, Stream stream) {
    const int group = a.heads.n_heads / a.heads.n_kv_heads;
    const auto run = [&](auto* kernel, int heads) {
        const dim3 blocks(a.splits, a.heads.n_kv_heads * divide_up(group, heads), a.heads.rows);
        launch("attention", kernel, {blocks, dim3(kThreads)}, stream, a);
    };
    if (group == 1) {
        run(attention_kernel<E, LANES, 1>, 1);
    } else if (group <= 4) {
        run(attention_kernel<E, LANES, 4>, 4);
    } else {
        run(attention_kernel<E, LANES, 8>, 8);
    }
}

template <class E>
void launch_lanes(const AttentionArguments& a, Stream stream) {
    if (a.cache.padded <= 64) {
        launch_heads<E, 8>(a, stream);
    } else if (a.cache.padded <= 128) {
        launch_heads<E, 16>(a, stream);
    } else {
        launch_heads<E, 32>(a, stream);
    }
}

}  // namespace

void attention(const AttentionArguments& arguments, Stream stream) {
    if (!arguments.heads.rows) return;
    arguments.cache.key_scales ? launch_lanes<Codes>(arguments, stream) : launch_lanes<Half>(arguments, stream);
}

}  // namespace tinychat::cuda
