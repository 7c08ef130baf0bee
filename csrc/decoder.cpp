// The graph of a decoder, lowered once: one call runs a whole step on one team of threads.
//
//   x = embed[token]
//   for each layer:
//       q, k, v = qkv(rms_norm(x, norm1))               RMSNorm over each head of q and k where the model has it
//       rotate q and k; append k and v to the slot's cache
//       for each row and head: mixed = softmax(q . keys / sqrt(head_dim)) values, over the positions it sees
//       x += out(mixed)
//       gate, up = up(rms_norm(x, norm2))
//       x += down(silu(gate) * up)
//   logits = head(rms_norm(x, norm))                    for the wanted rows only
//
// All T rows go through a phase together, so each weight is read once per step. A phase divides what it computes among
// the threads (rows, tiles of output rows, or heads of rows) and each result is computed whole by one thread, so that no
// result depends on how many there are or on who computes what. A phase begins when the one before it is done.
//
// The sum x + y of a residual is left to the thread that next norms the row, so adding costs no phase of its own.
#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <system_error>

#include "half.h"

namespace tinychat {
namespace {

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

int64_t cache_line(int64_t bytes) { return (bytes + 63) / 64 * 64; }

int64_t bytes_of(WeightType type) { return type == WeightType::f32 ? 4 : 2; }

void widen(WeightType type, const void* values, int64_t n, float* out) {
    if (type == WeightType::f32) {
        std::memcpy(out, values, static_cast<size_t>(n) * sizeof(float));
        return;
    }
    const auto* words = static_cast<const uint16_t*>(values);
    for (int64_t i = 0; i < n; ++i) {
        out[i] = type == WeightType::f16 ? from_half(words[i]) : from_bf16(words[i]);
    }
}

void add(float* x, const float* y, int64_t n) {
    for (int64_t i = 0; i < n; ++i) x[i] += y[i];
}

// Dimension j turns with j + half.
void rotate_head(float* head, const float* cos, const float* sin, int64_t half) {
    for (int64_t j = 0; j < half; ++j) {
        const float first = head[j], second = head[j + half];
        head[j] = first * cos[j] - second * sin[j];
        head[j + half] = second * cos[j] + first * sin[j];
    }
}

}  // namespace

struct Decoder::Linear {
    struct Segment {
        WeightShape shape;
        int64_t offset;       // of its packed weight in `packed`
        int64_t first_row;    // of the whole linear
        int64_t first_tile;   // of the whole linear
        int64_t tiles;
        size_t preparation;   // of the activations it reads
    };
    // Segments that differ in type or group may want their activations prepared differently.
    struct Preparation {
        WeightShape shape;
        int64_t offset;  // bytes before it, for one row
        int64_t bytes;   // of one row
    };
    std::vector<Segment> segments;
    std::vector<Preparation> preparations;
    Buffer packed;
    Buffer bias;  // [n], or nothing
    int64_t tiles = 0;
    int64_t activation_bytes = 0;  // of one row, all preparations

    void add_segment(const WeightShape& shape, const LinearKernels& kernels);

    // work(segment, tiles of its own) for each segment that reaches into the tiles `part` of the whole.
    template <class Work>
    void each_segment(Range part, const Work& work) const {
        const auto ends_by = [&](const Segment& segment) { return segment.first_tile + segment.tiles <= part.begin; };
        auto segment = std::partition_point(segments.begin(), segments.end(), ends_by);
        for (; segment != segments.end() && segment->first_tile < part.end; ++segment) {
            work(*segment, Range{std::max<int64_t>(part.begin - segment->first_tile, 0),
                                 std::min(part.end - segment->first_tile, segment->tiles)});
        }
    }
};

struct Decoder::Layer {
    Buffer norm1, norm2;    // [hidden_size]
    Buffer q_norm, k_norm;  // [head_dim], or nothing
    Linear qkv, out, up, down;
};

// ---- loading ---------------------------------------------------------------------------------------------------------

Decoder::Decoder(const DecoderShape& shape, const Kernels& kernels, int n_threads)
    : shape_(shape), kernels_(kernels), n_threads_(n_threads) {
    const DecoderShape& s = shape_;
    for (int64_t size : {s.vocab_size, s.hidden_size, s.n_heads, s.n_kv_heads, s.head_dim, s.intermediate_size}) {
        if (size < 1) refuse("a size of the decoder is not positive");
    }
    if (s.n_heads % s.n_kv_heads) refuse("n_heads is not a multiple of n_kv_heads");
    if (s.rope_dim < 0 || s.rope_dim % 2 || s.rope_dim > s.head_dim) refuse("rope_dim is odd or above head_dim");
    if (n_threads < 1) refuse("fewer than one thread");
    layers_.reserve(shape_.windows.size());
}

Decoder::~Decoder() {
    if (team_ && !team_->alive()) team_.release();  // its threads are another process's: there is nothing to join
}

Team& Decoder::team() {
    if (team_ && !team_->alive()) team_.release();
    if (team_) return *team_;
    try {
        team_ = std::make_unique<Team>(n_threads_);
    } catch (const std::system_error& error) {
        throw std::runtime_error(std::to_string(n_threads_) + " threads cannot be started: " + error.what());
    }
    return *team_;
}

void Decoder::Linear::add_segment(const WeightShape& shape, const LinearKernels& kernels) {
    const auto same = [&](const Preparation& p) {
        return p.shape.type == shape.type && p.shape.k == shape.k && p.shape.group == shape.group;
    };
    auto preparation = std::find_if(preparations.begin(), preparations.end(), same);
    if (preparation == preparations.end()) {
        const int64_t bytes = kernels.activation_bytes(shape);
        preparation = preparations.insert(preparation, {shape, activation_bytes, bytes});
        activation_bytes += bytes;
    }
    Segment segment{shape, 0, 0, tiles, (shape.n + kernels.tile - 1) / kernels.tile,
                    static_cast<size_t>(preparation - preparations.begin())};
    if (!segments.empty()) {
        const Segment& last = segments.back();
        segment.offset = last.offset + cache_line(kernels.packed_bytes(last.shape));
        segment.first_row = last.first_row + last.shape.n;
    }
    segments.push_back(segment);
    tiles += segment.tiles;
}

// The packed form of a linear [n, k].
Decoder::Linear Decoder::pack(const LinearData& data, int64_t n, int64_t k) {
    const LinearKernels& kernels = kernels_.linear;
    Linear linear;
    int64_t bytes = 0, rows = 0;
    for (const SegmentData& segment : data.segments) {
        const WeightShape& shape = segment.shape;
        if (shape.n < 1 || shape.k != k) refuse("a segment of a linear has the wrong shape");
        if (shape.type == WeightType::q4 && shape.group < 1) refuse("a group of less than one weight");
        if (!segment.data.values) refuse("a segment of a linear has no values");
        linear.add_segment(shape, kernels);
        bytes += cache_line(kernels.packed_bytes(shape));
        rows += shape.n;
    }
    if (rows != n) refuse("the segments of a linear have " + std::to_string(rows) + " rows, not " + std::to_string(n));
    linear.packed.reserve(bytes);
    team().run(linear.tiles, [&](Range tiles, int) {
        linear.each_segment(tiles, [&](const Linear::Segment& segment, Range part) {
            const WeightData& weight = data.segments[static_cast<size_t>(&segment - linear.segments.data())].data;
            kernels.pack(segment.shape, weight, linear.packed.data() + segment.offset, part.begin, part.end);
        });
    });
    weight_bytes_ += bytes;
    if (data.bias) linear.bias = keep(data.bias, n);
    activation_bytes_ = std::max(activation_bytes_, linear.activation_bytes);
    return linear;
}

Buffer Decoder::keep(const float* values, int64_t n) {
    if (!values) refuse("a weight is missing");
    Buffer copy(n * static_cast<int64_t>(sizeof(float)));
    std::memcpy(copy.data(), values, static_cast<size_t>(copy.bytes()));
    weight_bytes_ += copy.bytes();
    return copy;
}

// The table is packed like a head, each tile a weight of its own: a token's row is read by unpacking its tile, and where
// the head is tied the same bytes serve it, so that the table is held once.
void Decoder::set_embed(WeightType type, void* table) {
    if (!table || type == WeightType::q4) refuse("an embedding table is missing or quantized");
    const int64_t tile = kernels_.linear.tile, row_bytes = shape_.hidden_size * bytes_of(type);
    LinearData data{{}, nullptr};
    for (int64_t row = 0; row < shape_.vocab_size; row += tile) {
        const WeightShape shape{type, std::min(tile, shape_.vocab_size - row), shape_.hidden_size, shape_.hidden_size,
                                false};
        data.segments.push_back({shape, {static_cast<char*>(table) + row * row_bytes, nullptr, nullptr}});
    }
    table_ = std::make_unique<Linear>(pack(data, shape_.vocab_size, shape_.hidden_size));
}

void Decoder::add_layer(const LayerData& data) {
    if (layers_.size() == shape_.windows.size()) refuse("more layers than the decoder has");
    if (!data.q_norm != !data.k_norm) refuse("a norm for one of q and k only");
    Layer layer;
    layer.norm1 = keep(data.norm1, shape_.hidden_size);
    layer.norm2 = keep(data.norm2, shape_.hidden_size);
    if (data.q_norm) layer.q_norm = keep(data.q_norm, shape_.head_dim);
    if (data.k_norm) layer.k_norm = keep(data.k_norm, shape_.head_dim);
    layer.qkv = pack(data.qkv, shape_.qkv_size(), shape_.hidden_size);
    layer.out = pack(data.out, shape_.hidden_size, shape_.q_size());
    layer.up = pack(data.up, 2 * shape_.intermediate_size, shape_.hidden_size);
    layer.down = pack(data.down, shape_.hidden_size, shape_.intermediate_size);
    layers_.push_back(std::move(layer));
}

void Decoder::finish(const float* norm, const LinearData* head) {
    if (!table_ || layers_.size() != shape_.windows.size()) refuse("the table or a layer is missing");
    norm_ = keep(norm, shape_.hidden_size);
    if (head) head_ = std::make_unique<Linear>(pack(*head, shape_.vocab_size, shape_.hidden_size));
    finished_ = true;
}

// ---- a step ----------------------------------------------------------------------------------------------------------

void Decoder::step(const Step& step) {
    if (!finished_) throw std::runtime_error("a step of a decoder whose weights are not complete");
    check(step);
    if (busy_.exchange(true)) throw std::runtime_error("two steps of one decoder at the same time");
    struct Leave {
        std::atomic<bool>& busy;
        ~Leave() { busy = false; }
    } leave{busy_};
    if (step.rows == 0) return;
    int64_t length = 0;
    for (int64_t t = 0; t < step.rows; ++t) length = std::max<int64_t>(length, step.positions[t] + 1);
    reserve(std::max(step.rows, step.n_wanted), length);
    forward(step);
}

void Decoder::check(const Step& step) const {
    const auto inside = [](const int32_t* values, int64_t n, int64_t below) {
        return std::all_of(values, values + n, [&](int32_t value) { return value >= 0 && value < below; });
    };
    if (!step.tokens && !step.embeddings) refuse("rows have neither tokens nor embeddings");
    if (step.tokens && !inside(step.tokens, step.rows, shape_.vocab_size)) refuse("a token is not in the vocabulary");
    if (!inside(step.positions, step.rows, step.capacity)) refuse("a position is beyond the cache");
    if (!inside(step.slots, step.rows, step.n_slots)) refuse("a slot is not in the cache");
    if (!inside(step.wanted, step.n_wanted, step.rows)) refuse("a wanted row is not in the step");
}

void Decoder::reserve(int64_t rows, int64_t length) {
    const auto floats = [](Buffer& buffer, int64_t n) { buffer.reserve(n * static_cast<int64_t>(sizeof(float))); };
    floats(x_, rows * shape_.hidden_size);
    floats(y_, rows * shape_.hidden_size);
    floats(normed_, rows * shape_.hidden_size);
    floats(qkv_, rows * shape_.qkv_size());
    floats(mixed_, rows * shape_.q_size());
    floats(gate_up_, rows * 2 * shape_.intermediate_size);
    activations_.reserve(rows * activation_bytes_);
    // Rounded up, or a growing context would allocate at every step.
    floats(scores_, n_threads_ * shape_.group() * ((length + 1023) / 1024 * 1024));
    floats(unpacked_, n_threads_ * kernels_.linear.tile * shape_.hidden_size);
}

void Decoder::forward(const Step& step) {
    const BlockKernels& block = kernels_.block;
    const int64_t T = step.rows, hidden = shape_.hidden_size, inter = shape_.intermediate_size;
    float* x = x_.floats();              // [T, hidden_size]
    float* y = y_.floats();              // [T, hidden_size]
    float* normed = normed_.floats();    // [T, hidden_size]
    float* qkv = qkv_.floats();          // [T, qkv_size]
    float* mixed = mixed_.floats();      // [T, q_size]
    float* gate_up = gate_up_.floats();  // [T, 2 * intermediate_size]
    const auto each_row = [&](int64_t rows, const auto& work) {
        team().run(rows, [&](Range part, int thread) {
            for (int64_t t = part.begin; t < part.end; ++t) work(t, thread);
        });
    };

    each_row(T, [&](int64_t t, int thread) { embed(step, t, thread); });

    for (size_t l = 0; l < layers_.size(); ++l) {
        const Layer& layer = layers_[l];

        each_row(T, [&](int64_t t, int) {
            if (l > 0) add(x + t * hidden, y + t * hidden, hidden);
            block.rms_norm(x + t * hidden, layer.norm1.floats(), shape_.norm_eps, hidden, normed + t * hidden);
            prepare(layer.qkv, normed + t * hidden, t, T);
        });
        apply(layer.qkv, T, qkv, shape_.qkv_size());
        append(step, l);
        attend(step, l);
        each_row(T, [&](int64_t t, int) { prepare(layer.out, mixed + t * shape_.q_size(), t, T); });
        apply(layer.out, T, y, hidden);

        each_row(T, [&](int64_t t, int) {
            add(x + t * hidden, y + t * hidden, hidden);
            block.rms_norm(x + t * hidden, layer.norm2.floats(), shape_.norm_eps, hidden, normed + t * hidden);
            prepare(layer.up, normed + t * hidden, t, T);
        });
        apply(layer.up, T, gate_up, 2 * inter);
        each_row(T, [&](int64_t t, int) {
            float* gate = gate_up + t * 2 * inter;
            block.silu_multiply(gate, gate + inter, inter, gate);
            prepare(layer.down, gate, t, T);
        });
        apply(layer.down, T, y, hidden);
    }

    // Row t of x stays without its last y: a row may be wanted twice.
    const Linear& head = head_ ? *head_ : *table_;
    each_row(step.n_wanted, [&](int64_t r, int) {
        const int64_t t = step.wanted[r];
        float* last = normed + r * hidden;
        std::memcpy(last, x + t * hidden, static_cast<size_t>(hidden) * sizeof(float));
        if (!layers_.empty()) add(last, y + t * hidden, hidden);
        block.rms_norm(last, norm_.floats(), shape_.norm_eps, hidden, last);
        prepare(head, last, r, step.n_wanted);
    });
    if (step.n_wanted) apply(head, step.n_wanted, step.logits, shape_.vocab_size);
}

// x[row] = the embedding of its token, or the one that came with the step.
void Decoder::embed(const Step& step, int64_t row, int thread) {
    const int64_t hidden = shape_.hidden_size, tile = kernels_.linear.tile;
    float* x = x_.floats() + row * hidden;
    if (!step.tokens) {
        std::memcpy(x, step.embeddings + row * hidden, static_cast<size_t>(hidden) * sizeof(float));
        return;
    }
    const int64_t token = step.tokens[row];
    const Linear::Segment& segment = table_->segments[static_cast<size_t>(token / tile)];
    char* unpacked = unpacked_.data() + thread * tile * hidden * static_cast<int64_t>(sizeof(float));
    kernels_.linear.unpack(segment.shape, table_->packed.data() + segment.offset, {unpacked, nullptr, nullptr});
    const WeightType type = segment.shape.type;
    widen(type, unpacked + token % tile * hidden * bytes_of(type), hidden, x);
}

// One row of a linear's inputs in the forms that its segments read.
void Decoder::prepare(const Linear& linear, const float* x, int64_t row, int64_t rows) {
    for (const Linear::Preparation& preparation : linear.preparations) {
        char* all = activations_.data() + preparation.offset * rows;  // [rows, bytes]
        kernels_.linear.prepare(preparation.shape, x, all + row * preparation.bytes);
    }
}

// y[rows, n] = linear(the prepared rows)
void Decoder::apply(const Linear& linear, int64_t rows, float* y, int64_t y_stride) {
    const int64_t tile = kernels_.linear.tile;
    const auto apply_tiles = [&](const Linear::Segment& segment, Range tiles) {
        const char* activations = activations_.data() + linear.preparations[segment.preparation].offset * rows;
        float* first = y + segment.first_row;
        kernels_.linear.linear(segment.shape, linear.packed.data() + segment.offset, activations, rows, tiles.begin,
                               tiles.end, first, y_stride);
        if (!linear.bias) return;
        const int64_t begin = tiles.begin * tile, n = std::min(tiles.end * tile, segment.shape.n) - begin;
        const float* bias = linear.bias.floats() + segment.first_row;
        for (int64_t t = 0; t < rows; ++t) add(first + t * y_stride + begin, bias + begin, n);
    };
    team().run(linear.tiles, [&](Range tiles, int) { linear.each_segment(tiles, apply_tiles); });
}

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
        block.store(step.cache_type, k, dim, entries(step, step.keys, layer, t, h, step.positions[t]));
        block.store(step.cache_type, k + shape_.kv_size(), dim,
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
        kernels_.block.attend(step.cache_type, q, dim, entries(step, step.keys, layer, t, h, 0),
                              entries(step, step.values, layer, t, h, 0), begin, end, group, dim, scale, scores, mixed,
                              dim);
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
