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
#include <cstring>
#include <stdexcept>
#include <string>
#include <system_error>

#include "half.h"

namespace tinychat {
namespace {

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

// n of the values of a table, from index `from`, as fp32.
void widen(WeightType type, const void* table, int64_t from, int64_t n, float* out) {
    if (type == WeightType::f32) {
        std::memcpy(out, static_cast<const float*>(table) + from, static_cast<size_t>(n) * sizeof(float));
        return;
    }
    const uint16_t* values = static_cast<const uint16_t*>(table) + from;
    const auto convert = type == WeightType::f16 ? from_half : from_bf16;
    for (int64_t i = 0; i < n; ++i) out[i] = convert(values[i]);
}

void add(float* x, const float* y, int64_t n) {
    for (int64_t i = 0; i < n; ++i) x[i] += y[i];
}

}  // namespace

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

// The packed form of a linear [n, k].
PackedLinear Decoder::pack(const LinearData& data, int64_t n, int64_t k) {
    PackedLinear linear(data, n, k, kernels_.linear, team());
    weight_bytes_ += linear.nbytes();
    activation_bytes_ = std::max(activation_bytes_, linear.activation_bytes());
    return linear;
}

Buffer Decoder::keep(const float* values, int64_t n) {
    if (!values) refuse("a weight is missing");
    Buffer copy(n * static_cast<int64_t>(sizeof(float)));
    std::memcpy(copy.data(), values, static_cast<size_t>(copy.bytes()));
    weight_bytes_ += copy.bytes();
    return copy;
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

void Decoder::finish(const float* norm, const LinearData& head) {
    if (layers_.size() != shape_.windows.size()) refuse("a layer is missing");
    norm_ = keep(norm, shape_.hidden_size);
    head_ = pack(head, shape_.vocab_size, shape_.hidden_size);
    finished_ = true;
}

void Decoder::set_embed(WeightType type, const void* table) {
    if (!table || type == WeightType::quantized) refuse("an embedding table is missing or quantized");
    table_type_ = type;
    table_ = table;
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

    each_row(T, [&](int64_t t, int) { embed(step, t); });

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
    each_row(step.n_wanted, [&](int64_t r, int) {
        const int64_t t = step.wanted[r];
        float* last = normed + r * hidden;
        std::memcpy(last, x + t * hidden, static_cast<size_t>(hidden) * sizeof(float));
        if (!layers_.empty()) add(last, y + t * hidden, hidden);
        block.rms_norm(last, norm_.floats(), shape_.norm_eps, hidden, last);
        prepare(head_, last, r, step.n_wanted);
    });
    if (step.n_wanted) apply(head_, step.n_wanted, step.logits, shape_.vocab_size);
}

// x[row] = the embedding of its token, or the one that came with the step.
void Decoder::embed(const Step& step, int64_t row) {
    const int64_t hidden = shape_.hidden_size;
    float* x = x_.floats() + row * hidden;
    if (step.tokens && table_) {
        widen(table_type_, table_, step.tokens[row] * hidden, hidden, x);
    } else if (step.tokens) {
        head_.unpack_row(kernels_.linear, step.tokens[row], x);
    } else {
        std::memcpy(x, step.embeddings + row * hidden, static_cast<size_t>(hidden) * sizeof(float));
    }
}

void Decoder::prepare(const PackedLinear& linear, const float* x, int64_t row, int64_t rows) {
    linear.prepare(kernels_.linear, x, row, rows, activations_.data());
}

void Decoder::apply(const PackedLinear& linear, int64_t rows, float* y, int64_t y_stride) {
    linear.apply(kernels_.linear, activations_.data(), rows, y, y_stride, team());
}

}  // namespace tinychat
