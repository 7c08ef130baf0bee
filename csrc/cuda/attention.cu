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

// What the threads of a block share.
template <int LANES, int HEADS>
struct Shared {
    static constexpr int kGroups = kThreads / LANES;  // of lanes
    static constexpr int kWidth = LANES * 8;
    float q[HEADS][kWidth];
    float own[2][kWidth];  // the row's own key and value
    float mixed[kGroups][HEADS][kWidth];
    float largest[kGroups][HEADS];
    float sums[kGroups][HEADS];
    float weights[HEADS][kMostSplits];
    int last;
};

// What a block is to do: heads [first_head, first_head + n_heads) of `row`, positions [begin, end) of its slot.
struct Work {
    int row, kv_head, first_head, n_heads;
    int share, shares;  // it is one of so many blocks
    Index position, begin, end;
    size_t entries;  // the first of the slot's head
    bool own;        // it has the row's own position, which is not in the cache yet
    bool first_tile;
};

template <int HEADS>
__device__ inline Work work_of(const AttentionArguments& a) {
    const Heads& heads = a.heads;
    const int group = heads.n_heads / heads.n_kv_heads, tiles = divide_up(group, HEADS), tile = blockIdx.y % tiles;
    Work work;
    work.row = blockIdx.z;
    work.kv_head = blockIdx.y / tiles;
    work.first_head = work.kv_head * group + tile * HEADS;
    work.n_heads = group - tile * HEADS < HEADS ? group - tile * HEADS : HEADS;
    work.first_tile = tile == 0;
    work.position = heads.positions[work.row];
    work.entries = entry_of(a.cache, heads, heads.slots[work.row], work.kv_head, 0);
    const Index first = a.window && work.position >= a.window ? work.position + 1 - a.window : 0;
    const Index count = work.position + 1 - first, worth = divide_up(count, static_cast<Index>(kLeast));
    work.share = blockIdx.x;
    work.shares = worth < a.splits ? static_cast<int>(worth) : a.splits;
    const Index each = divide_up(count, static_cast<Index>(work.shares));
    work.begin = first + work.share * each;
    work.end = work.begin + each < work.position + 1 ? work.begin + each : work.position + 1;
    work.own = a.append && work.end == work.position + 1 && work.begin < work.end;
    return work;
}

// The queries, and where they are needed the row's own key and value, into shared memory; these into the cache as well.
template <int LANES, int HEADS>
__device__ inline void take(const AttentionArguments& a, const Work& work, Shared<LANES, HEADS>& shared) {
    constexpr int kWidth = Shared<LANES, HEADS>::kWidth;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, padded = a.cache.padded;
    for (int i = threadIdx.x; i < HEADS * kWidth; i += kThreads) shared.q[i / kWidth][i % kWidth] = 0;
    __syncthreads();
    const int own = work.n_heads;  // a warp's next task after the queries: the row's own key, then its value
    for (int h = warp; h < own + (work.own ? 2 : 0); h += kThreads / kWarp) {
        if (h >= own) {
            const Part which = h == own ? Part::k : Part::v;
            take_head(a.heads, which, work.row, work.kv_head, padded, shared.own[h - own]);
            keep_head(a.cache, which, work.entries + work.position, shared.own[h - own], work.first_tile);
        } else if (a.append) {
            take_head(a.heads, Part::q, work.row, work.first_head + h, padded, shared.q[h]);
        } else {
            const size_t at = (static_cast<size_t>(work.row) * a.heads.n_heads + work.first_head + h) * padded;
            for (int j = lane; j < a.heads.head_dim; j += kWarp) {
                shared.q[h][j] = to_float(static_cast<const Half*>(a.heads.q)[at + j]);
            }
        }
    }
    __syncthreads();
}

// The sum over the lanes that share a head's vectors.
template <int LANES>
__device__ inline float lanes_sum(float value) {
#pragma unroll
    for (int step = LANES / 2; step; step >>= 1) value += __shfl_xor_sync(kAllLanes, value, step);
    return value;
}

// Each group of lanes over its entries.
template <class E, int LANES, int HEADS>
__device__ inline void attend(const AttentionArguments& a, const Work& work, const Shared<LANES, HEADS>& shared,
                              Running<HEADS>& run) {
    constexpr int kGroups = Shared<LANES, HEADS>::kGroups;
    constexpr int kUnroll = HEADS > 4 ? 2 : 4;  // as registers allow
    const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES, padded = a.cache.padded;
    const bool active = lane * 8 < padded;
    float q[HEADS][8], slopes[HEADS];
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            q[h][j] = a.scale * shared.q[h][lane * 8 + j];
            run.mixed[h][j] = 0;
        }
        slopes[h] = a.slopes && h < work.n_heads ? a.slopes[work.first_head + h] : 0.0f;
        run.largest[h] = kLowest;
        run.sum[h] = 0;
    }
    const E* keys = static_cast<const E*>(a.cache.keys) + work.entries * padded + lane * 8;
    const E* values = static_cast<const E*>(a.cache.values) + work.entries * padded + lane * 8;
    const Index stored = work.own ? work.end - 1 : work.end;
    for (Index base = work.begin; base < stored; base += kGroups * kUnroll) {
        float key[kUnroll][8], value[kUnroll][8], scores[kUnroll][HEADS], factors[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const Index p = base + u * kGroups + group;
#pragma unroll
            for (int j = 0; j < 8; ++j) key[u][j] = value[u][j] = 0;
            if (active && p < stored) {
                load_entry(keys + p * padded, key[u]);
                load_entry(values + p * padded, value[u]);
            }
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const Index p = base + u * kGroups + group;
            const bool there = p < stored;
            const float key_factor = a.cache.key_scales && there ? a.cache.key_scales[work.entries + p] : 1.0f;
            factors[u] = a.cache.value_scales && there ? a.cache.value_scales[work.entries + p] : 1.0f;
#pragma unroll
            for (int h = 0; h < HEADS; ++h) {
                float dot = 0;
#pragma unroll
                for (int j = 0; j < 8; ++j) dot += q[h][j] * key[u][j];
                dot = lanes_sum<LANES>(dot) * key_factor;
                scores[u][h] = there ? score(a, dot, slopes[h], work.position - p) : -INFINITY;
            }
        }
        take_in<HEADS, kUnroll>(run, scores, factors, value);
    }
    if (!work.own) return;
    // The row's own entry is the first group's; the other lanes of its warp go along for the sum.
    float scores[1][HEADS], factors[1] = {1.0f}, value[1][8];
#pragma unroll
    for (int j = 0; j < 8; ++j) value[0][j] = active ? shared.own[1][lane * 8 + j] : 0.0f;
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
        float dot = 0;
#pragma unroll
        for (int j = 0; j < 8; ++j) dot += active ? q[h][j] * shared.own[0][lane * 8 + j] : 0.0f;
        dot = lanes_sum<LANES>(dot);
        scores[0][h] = group == 0 ? score(a, dot, slopes[h], 0) : -INFINITY;
    }
    take_in<HEADS, 1>(run, scores, factors, value);
}

// The groups' softmaxes become one: the row's result, or where several blocks share the row, this block's part of it,
// [padded] weighted values, the largest score and the sum.
template <int LANES, int HEADS>
__device__ inline void join_groups(const AttentionArguments& a, const Work& work, const Running<HEADS>& run,
                                   Shared<LANES, HEADS>& shared) {
    constexpr int kGroups = Shared<LANES, HEADS>::kGroups;
    const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
#pragma unroll
        for (int j = 0; j < 8; ++j) shared.mixed[group][h][lane * 8 + j] = run.mixed[h][j];
        if (lane == 0) {
            shared.largest[group][h] = run.largest[h];
            shared.sums[group][h] = run.sum[h];
        }
    }
    __syncthreads();
    const int dim = a.heads.head_dim, padded = a.cache.padded;
    const size_t head = static_cast<size_t>(work.row) * a.heads.n_heads + work.first_head;
    for (int i = threadIdx.x; i < work.n_heads * dim; i += kThreads) {
        const int h = i / dim, j = i % dim;
        float largest = kLowest, sum = 0, mixed = 0;
#pragma unroll
        for (int g = 0; g < kGroups; ++g) largest = fmaxf(largest, shared.largest[g][h]);
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
            const float weight = power_of_two(shared.largest[g][h] - largest);
            sum += weight * shared.sums[g][h];
            mixed += weight * shared.mixed[g][h][j];
        }
        if (work.shares == 1) {
            put(a, head * dim + i, mixed / sum);
            continue;
        }
        float* mine = a.partial + ((head + h) * a.splits + work.share) * (padded + 2);
        mine[j] = mixed;
        if (j == 0) {
            mine[padded] = largest;
            mine[padded + 1] = sum;
        }
    }
}

// The parts of all blocks become the row's result, in the block that comes last.
template <int LANES, int HEADS>
__device__ inline void join_blocks(const AttentionArguments& a, const Work& work, Shared<LANES, HEADS>& shared) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, padded = a.cache.padded, stride = padded + 2;
    const size_t head = static_cast<size_t>(work.row) * a.heads.n_heads + work.first_head;
    __threadfence();  // what this block wrote is there before it is counted
    __syncthreads();
    if (threadIdx.x == 0) {
        shared.last = atomicAdd(a.arrived + head, 1) == work.shares - 1;
        if (shared.last) a.arrived[head] = 0;
    }
    __syncthreads();
    if (!shared.last) return;
    __threadfence();
    for (int h = warp; h < work.n_heads; h += kThreads / kWarp) {
        const float* ends = a.partial + (head + h) * a.splits * stride + padded;
        float largest = kLowest, sum = 0;
        for (int s = lane; s < work.shares; s += kWarp) largest = fmaxf(largest, read_anew(ends + s * stride));
        largest = warp_max(largest);
        for (int s = lane; s < work.shares; s += kWarp) {
            shared.weights[h][s] = power_of_two(read_anew(ends + s * stride) - largest);
            sum += shared.weights[h][s] * read_anew(ends + s * stride + 1);
        }
        sum = warp_sum(sum);
        for (int s = lane; s < work.shares; s += kWarp) shared.weights[h][s] /= sum;
    }
    __syncthreads();
    const int dim = a.heads.head_dim;
    for (int i = threadIdx.x; i < work.n_heads * dim; i += kThreads) {
        const int h = i / dim;
        const float* parts = a.partial + (head + h) * a.splits * stride + i % dim;
        float mixed = 0;
        for (int s = 0; s < work.shares; ++s) mixed += shared.weights[h][s] * read_anew(parts + s * stride);
        put(a, head * dim + i, mixed);
    }
}

// Asks the L2 cache for the keys and values of a block's share, its first kilobytes, and the row of angles, while the
// kernel before still runs. What is asked for may be stale as yet: nothing of it is looked at. Where rows lie is: the
// step's own kernels do not write that.
template <class E>
__device__ inline void ask_for(const AttentionArguments& a, const Work& work) {
    constexpr int kLine = 128, kMost = 16 << 10;
    const Index bytes = (work.end - work.begin) * a.cache.padded * static_cast<int>(sizeof(E));
    const size_t from = (work.entries + work.begin) * a.cache.padded;
    for (int at = threadIdx.x * kLine; at < (bytes < kMost ? bytes : kMost); at += kThreads * kLine) {
        prefetch(reinterpret_cast<const char*>(static_cast<const E*>(a.cache.keys) + from) + at);
        prefetch(reinterpret_cast<const char*>(static_cast<const E*>(a.cache.values) + from) + at);
    }
    const int half = a.heads.rope_dim / 2, each = kLine / static_cast<int>(sizeof(float));
    if (half && static_cast<int>(threadIdx.x) * each < half) {
        const size_t angle = static_cast<size_t>(a.heads.angles[work.row]) * half + threadIdx.x * each;
        prefetch(a.heads.cos + angle);
        prefetch(a.heads.sin + angle);
    }
}

template <class E, int LANES, int HEADS>
__global__ void __launch_bounds__(kThreads) attention_kernel(AttentionArguments a) {
    auto& shared = *dynamic_shared<Shared<LANES, HEADS>>();
    const Work work = work_of<HEADS>(a);
    admit_later();
    if (work.share < work.shares) ask_for<E>(a, work);
    await_earlier();
    if (work.share >= work.shares) return;
    take(a, work, shared);
    Running<HEADS> run;
    attend<E>(a, work, shared, run);
    join_groups(a, work, run, shared);
    if (work.shares > 1) join_blocks(a, work, shared);
}

template <class E, int LANES>
void launch_heads(const AttentionArguments& a, Stream stream) {
    const int group = a.heads.n_heads / a.heads.n_kv_heads;
    const auto run = [&](auto* kernel, int heads, size_t shared) {
        const dim3 blocks(a.splits, a.heads.n_kv_heads * divide_up(group, heads), a.heads.rows);
        launch("attention", kernel, {blocks, dim3(kThreads), shared}, stream, a);
    };
    if (group == 1) {
        run(attention_kernel<E, LANES, 1>, 1, sizeof(Shared<LANES, 1>));
    } else if (group <= 4) {
        run(attention_kernel<E, LANES, 4>, 4, sizeof(Shared<LANES, 4>));
    } else {
        run(attention_kernel<E, LANES, 8>, 8, sizeof(Shared<LANES, 8>));
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
