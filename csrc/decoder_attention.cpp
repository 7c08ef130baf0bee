// The attention phases of the lowered decoder: queries and keys normed and rotated, the cache extended, values mixed.
#include <algorithm>
#include <cmath>

#include "decoder.h"

namespace tinychat {
namespace {

// Dimension j turns with j + half.
void rotate_head(float* head, const float* cos, const float* sin, int64_t half) {
    for (int64_t j = 0; j < half; ++j) {
        const float first = head[j], second = head[j + half];
        head[j] = first * cos[j] - second * sin[j];
        head[j + half] = second * cos[j] + first * sin[j];
    }
}

}  // namespace

// For each row and key-value head: norm and rotate its queries and its key, append key and value.
void Decoder::append(const Step& step, size_t layer) {
    const BlockKernels& block = kernels_.block;
    const float *q_norm = layers_[layer].q_norm.floats(), *k_norm = layers_[layer].k_norm.floats();  // [head_dim] or null
    const int64_t heads = shape_.n_kv_heads, dim = shape_.head_dim, group = shape_.group(), half = shape_.rope_dim / 2;
    const auto append_head = [&](int64_t t, int64_t h) {
        float* row = qkv_.floats() + t * shape_.qkv_size();  // q | k | v
        const auto turn = [&](float* head, const float* norm) {
            if (norm) block.rms_norm(head, norm, shape_.norm_eps, dim, head);
            rotate_head(head, step.cos + t * half, step.sin + t * half, half);
        };
        for (int64_t g = 0; g < group; ++g) turn(row + (h * group + g) * dim, q_norm);
        float* k = row + shape_.q_size() + h * dim;
        turn(k, k_norm);
        kernels_.attention.store(step.cache_type, k, dim, entries(step, step.keys, layer, t, h, step.positions[t]));
        kernels_.attention.store(step.cache_type, k + shape_.kv_size(), dim,
                                 entries(step, step.values, layer, t, h, step.positions[t]));
    };
    team().run(step.rows * heads, [&](Range items, int) {
        for (int64_t item = items.begin; item < items.end; ++item) append_head(item / heads, item % heads);
    });
}

// For each row and key-value head: mixed[row, the heads that share it].
void Decoder::attend(const Step& step, size_t layer) {
    const int64_t heads = shape_.n_kv_heads, dim = shape_.head_dim, group = shape_.group();
    const int64_t window = shape_.windows[layer];
    const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
    const int64_t scores_size = scores_.bytes() / static_cast<int64_t>(sizeof(float)) / n_threads_;
    const auto attend_head = [&](int64_t t, int64_t h, float* scores) {
        const int64_t end = step.positions[t] + 1, begin = window ? std::max<int64_t>(end - window, 0) : 0;
        const float* q = qkv_.floats() + t * shape_.qkv_size() + h * group * dim;
        float* mixed = mixed_.floats() + t * shape_.q_size() + h * group * dim;
        kernels_.attention.attend(step.cache_type, q, dim, entries(step, step.keys, layer, t, h, 0),
                                  entries(step, step.values, layer, t, h, 0), begin, end, group, dim, scale, scores,
                                  mixed, dim);
    };
    team().run(step.rows * heads, [&](Range items, int thread) {
        float* scores = scores_.floats() + thread * scores_size;  // [group, end - begin]
        for (int64_t item = items.begin; item < items.end; ++item) attend_head(item / heads, item % heads, scores);
    });
}

// Where keys or values of `head` for the slot of row `t` lie, from `position` on: [.., head_dim].
void* Decoder::entries(const Step& step, void* cache, size_t layer, int64_t t, int64_t head, int64_t position) const {
    const int64_t slot = static_cast<int64_t>(layer) * step.n_slots + step.slots[t];
    const int64_t entry = (slot * shape_.n_kv_heads + head) * step.capacity + position;
    return static_cast<char*>(cache) + entry * shape_.head_dim * (step.cache_type == CacheType::f32 ? 4 : 2);
}

}  // namespace tinychat
