// The attention phases of the lowered decoder: queries and keys normed and rotated, the cache extended, values mixed.
//
// Where each row is the only one of its slot, as when decoding, all of it is one phase: an item rotates its own queries, and
// the one with a row's last entries appends its key and value first. Of a single row even the queries, keys and values may be
// computed there: takes_heads(). Otherwise rows see what others append, and appending is a phase of its own.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "decoder.h"

namespace tinychat {
namespace {

// Weights of queries, keys and values of a key-value head, at most, that a thread takes whole: of more it would take long, and
// the others wait where the system has set it aside.
constexpr int64_t kHeadBytes = 128 << 10;

// As kernels_.attention.rotate, of dimensions that lie side by side.
void rotate_pairs(float* head, const float* cos, const float* sin, int64_t half) {
    for (int64_t j = 0; j < half; ++j) {
        const float first = head[2 * j], second = head[2 * j + 1];
        head[2 * j] = first * cos[j] - second * sin[j];
        head[2 * j + 1] = second * cos[j] + first * sin[j];
    }
}

}  // namespace

// How attention goes over the rows of a step, and memory for it. Throws std::invalid_argument where int8 codes lack scales.
void Decoder::plan(const Step& step) {
    if (step.cache_type == CacheType::q8 && (!step.key_scales || !step.value_scales)) {
        throw std::invalid_argument("an int8 cache without scales");
    }
    plan_.set_rows(step.slots, step.positions, step.rows);
    const QueryGroup group = query_group(0);
    for (const AttentionPlan::Cut& cut : plan_.cuts()) {
        for (const Piece& piece : cut.pieces) {
            // of the kernel | queries of a row | maximum and sum of each query
            const int64_t queries = piece.rows * group.heads;
            const int64_t size = kernels_.attention.scratch(group, piece.rows, piece.end - piece.begin) +
                                 group.heads * group.dim + 2 * queries;
            scratch_size_ = std::max(scratch_size_, (size + 15) / 16 * 16);
        }
    }
    scratch_.reserve(n_threads_ * scratch_size_ * static_cast<int64_t>(sizeof(float)));
    partials_.reserve(plan_.partials() * shape_.n_heads * (group.dim + 2) * static_cast<int64_t>(sizeof(float)));
    const int64_t counters = plan_.runs() * shape_.n_kv_heads;
    if (counters > n_counters_) {
        finished_pieces_ = std::make_unique<std::atomic<int64_t>[]>(static_cast<size_t>(counters));
        n_counters_ = counters;
    }
    for (int64_t i = 0; i < counters; ++i) finished_pieces_[static_cast<size_t>(i)].store(0, std::memory_order_relaxed);
}

void Decoder::attend(const Step& step, size_t layer) {
    const int64_t heads = shape_.n_kv_heads;
    if (shape_.whole_qk_norm) norm_whole(step, layer);
    if (!plan_.rows_alone()) {
        team_->run(step.rows * heads, [&](Range items, int) {
            for (int64_t item = items.begin; item < items.end; ++item) {
                const int64_t t = item / heads, head = item % heads;
                turn_queries(step, layer, t, queries(t, head));
                append(step, layer, t, head);
            }
        });
    }
    const std::vector<Piece>& pieces = plan_.pieces(layer);
    const int64_t n = static_cast<int64_t>(pieces.size());
    // The items of a head are neighbours: a thread that takes several finds its entries in its caches.
    team_->then(heads * n, [=, step = &step, pieces = pieces.data()](Range items, int thread) {
        float* scratch = scratch_.floats() + thread * scratch_size_;
        for (int64_t item = items.begin; item < items.end; ++item) {
            attend_piece(*step, layer, pieces[item % n], item / n, scratch);
        }
    });
}

// Whether each thread may compute the queries, keys and values of whole heads and attend with them at once: of one row with few
// entries, where heads divide evenly among the threads and are small.
bool Decoder::takes_heads(size_t layer) const {
    const int64_t heads = shape_.n_kv_heads;
    const PackedLinear& qkv = layers_[layer].qkv;
    return single_row_ && n_threads_ > 1 && heads % n_threads_ == 0 && plan_.pieces(layer).size() == 1 &&
           !shape_.whole_qk_norm && shape_.head_dim % kernels_.linear.tile == 0 && qkv.even() &&
           qkv.nbytes() <= heads * kHeadBytes;
}

// Two phases as one: qkv and attention, by heads.
void Decoder::attend_by_heads(const Step& step, size_t layer) {
    const auto work = [=, step = &step, what = *std::exchange(input_, std::nullopt), phase = ++phase_](Range heads, int thread) {
        const PackedLinear& qkv = layers_[layer].qkv;
        const char* activations = prepared(qkv, what, phase, thread);
        const int64_t tiles = shape_.head_dim / kernels_.linear.tile, group = shape_.group(), n = shape_.n_kv_heads;
        for (int64_t head = heads.begin; head < heads.end; ++head) {
            const Range queries{head * group, (head + 1) * group};
            const int64_t key = n * group + head;
            for (const Range some : {queries, Range{key, key + 1}, Range{key + n, key + n + 1}}) {  // heads of qkv
                qkv.apply(kernels_.linear, activations, 1, {some.begin * tiles, some.end * tiles}, qkv_.floats(), 0);
            }
            attend_piece(*step, layer, plan_.pieces(layer)[0], head, scratch_.floats() + thread * scratch_size_);
        }
    };
    team_->then(shape_.n_kv_heads, work);
}

void Decoder::attend_piece(const Step& step, size_t layer, const Piece& piece, int64_t head, float* scratch) {
    const QueryGroup group = query_group(head);
    const int64_t n = piece.rows * group.heads;
    float* turned = scratch + kernels_.attention.scratch(group, piece.rows, piece.end - piece.begin);
    float* maximum = turned + group.heads * group.dim;
    QueryRows rows{queries(piece.row, head), shape_.qkv_size(), piece.rows, step.positions[piece.row],
                   shape_.windows[layer]};
    if (plan_.rows_alone()) {
        std::memcpy(turned, rows.q, static_cast<size_t>(group.heads * group.dim) * sizeof(float));
        turn_queries(step, layer, piece.row, turned);
        rows.q = turned;
        if (piece.index == piece.count - 1) append(step, layer, piece.row, head);
    }
    float* mixed = mixed_.floats() + piece.row * shape_.q_size() + head * group.heads * group.dim;
    Partial partial{mixed, shape_.q_size(), maximum, maximum + n};
    if (piece.count > 1) partial = partial_of(piece, head, piece.index);
    kernels_.attention.attend(entries(step, layer, piece.row, head), group, rows, piece.begin, piece.end, scratch, partial);
    if (piece.count == 1) {
        for (int64_t query = 0; query < n; ++query) {
            float* out = mixed + query / group.heads * shape_.q_size() + query % group.heads * group.dim;
            for (int64_t d = 0; d < group.dim; ++d) out[d] /= partial.sum[query];
        }
        return;
    }
    std::atomic<int64_t>& finished = finished_pieces_[static_cast<size_t>(head * plan_.runs() + piece.run)];
    if (finished.fetch_add(1) < piece.count - 1) return;
    finished.store(0, std::memory_order_relaxed);  // for the next layer
    merge(piece, head, mixed);
}

// One of the partials of the piece's rows: out [rows, group, head_dim], then maximum and sum [rows, group]. Of the rows of each
// run that is cut there are [n_kv_heads, count] of them, one run after another.
Partial Decoder::partial_of(const Piece& piece, int64_t head, int64_t index) const {
    const int64_t group = shape_.group(), dim = shape_.head_dim;
    const int64_t before = piece.partials * shape_.n_kv_heads + (head * piece.count + index) * piece.rows;
    float* out = partials_.floats() + before * group * (dim + 2);
    float* maximum = out + piece.rows * group * dim;
    return {out, group * dim, maximum, maximum + piece.rows * group};
}

// In the order of the pieces, whoever finished last.
void Decoder::merge(const Piece& piece, int64_t head, float* mixed) const {
    const int64_t group = shape_.group(), dim = shape_.head_dim;
    for (int64_t query = 0; query < piece.rows * group; ++query) {
        float* out = mixed + query / group * shape_.q_size() + query % group * dim;
        float largest = -INFINITY, sum = 0;
        for (int64_t i = 0; i < piece.count; ++i) {
            const float maximum = partial_of(piece, head, i).maximum[query];
            if (!(maximum <= largest)) largest = maximum;
        }
        std::fill(out, out + dim, 0.0f);
        for (int64_t i = 0; i < piece.count; ++i) {
            const Partial partial = partial_of(piece, head, i);
            const float factor = std::exp(partial.maximum[query] - largest);
            const float* from = partial.out + query * dim;
            sum += factor * partial.sum[query];
            for (int64_t d = 0; d < dim; ++d) out[d] += factor * from[d];
        }
        for (int64_t d = 0; d < dim; ++d) out[d] /= sum;
    }
}

// The queries of row t that share a key-value head: [group, head_dim]. A row of qkv_ is q | k | v.
float* Decoder::queries(int64_t t, int64_t head) const {
    return qkv_.floats() + t * shape_.qkv_size() + head * shape_.group() * shape_.head_dim;
}

// Norm and rotate the queries q [group, head_dim] of row t.
void Decoder::turn_queries(const Step& step, size_t layer, int64_t t, float* q) const {
    for (int64_t g = 0; g < shape_.group(); ++g) turn(step, layer, layers_[layer].q_norm, t, q + g * shape_.head_dim);
}

// Clip and norm one head of row t, where the model has that, and rotate it.
void Decoder::turn(const Step& step, size_t layer, const Buffer& norm, int64_t t, float* head) const {
    const int64_t half = shape_.rope_dim / 2, table = shape_.ropes[layer];
    clip(head);
    if (norm && !shape_.whole_qk_norm) {
        kernels_.block.rms_norm(head, norm.floats(), shape_.norm_eps, shape_.head_dim, head);
    }
    if (table < 0) return;
    const int64_t at = (table * step.rows + t) * half;
    if (shape_.rope_interleaved) {
        rotate_pairs(head, step.cos + at, step.sin + at, half);
    } else {
        kernels_.attention.rotate(head, step.cos + at, step.sin + at, half);
    }
}

// The values of one head.
void Decoder::clip(float* values) const {
    if (shape_.clip_qkv == 0) return;
    for (int64_t d = 0; d < shape_.head_dim; ++d) values[d] = std::clamp(values[d], -shape_.clip_qkv, shape_.clip_qkv);
}

// One phase: norms of all queries and of all keys of each row, in place.
void Decoder::norm_whole(const Step& step, size_t layer) {
    const Layer& norms = layers_[layer];
    each(step.rows, [&](int64_t t, int) {
        float* q = qkv_.floats() + t * shape_.qkv_size();
        float* k = q + shape_.q_size();
        kernels_.block.rms_norm(q, norms.q_norm.floats(), shape_.norm_eps, shape_.q_size(), q);
        kernels_.block.rms_norm(k, norms.k_norm.floats(), shape_.norm_eps, shape_.kv_size(), k);
    });
}

// Norm and rotate a key of row t; it and its value become an entry.
void Decoder::append(const Step& step, size_t layer, int64_t t, int64_t head) const {
    float* key = qkv_.floats() + t * shape_.qkv_size() + shape_.q_size() + head * shape_.head_dim;
    turn(step, layer, layers_[layer].k_norm, t, key);
    clip(key + shape_.kv_size());
    kernels_.attention.store(entries(step, layer, t, head), key, key + shape_.kv_size(), shape_.head_dim,
                             step.positions[t]);
}

QueryGroup Decoder::query_group(int64_t head) const {
    const float* slopes = shape_.slopes.empty() ? nullptr : shape_.slopes.data() + head * shape_.group();
    return {shape_.head_dim, shape_.group(), shape_.attention_scale, slopes, shape_.attention_cap, cache_fetch_};
}

// The entries of `head` in the slot of row t.
CacheView Decoder::entries(const Step& step, size_t layer, int64_t t, int64_t head) const {
    const int64_t slot = static_cast<int64_t>(layer) * step.n_slots + step.slots[t];
    const int64_t first = (slot * shape_.n_kv_heads + head) * step.capacity;
    const int64_t size = step.cache_type == CacheType::f32 ? 4 : step.cache_type == CacheType::f16 ? 2 : 1;
    const auto from = [&](void* cache) { return static_cast<char*>(cache) + first * shape_.head_dim * size; };
    const bool scaled = step.cache_type == CacheType::q8;
    return {step.cache_type, from(step.keys), from(step.values), scaled ? step.key_scales + first : nullptr,
            scaled ? step.value_scales + first : nullptr};
}

}  // namespace tinychat
