// The graph of a decoder, lowered once: one call runs a whole step on one team of threads.
//
//   x = embed[token]                                     perhaps projected, with a position added, normed
//   for each layer:
//       q, k, v = qkv(norm1(x))                          perhaps clipped; RMSNorm over q and k where the model has it
//       rotate q and k where the layer has rotary positions; append k and v to the slot's cache
//       for each row and head: mixed = softmax(scale q . keys - slope * distance) values, over what it sees
//       y = out(mixed)
//       x += y                                           parallel blocks: not yet, the MLP reads the same x
//       gate, up = up(norm2(x))
//       z = down(act(gate) * up)                         plain MLPs: down(act(up)); AWQ may divide what down reads
//       x += z                                           parallel blocks: x += y + z
//   logits = head(norm(x))                               for the wanted rows only
//
// A norm that a model does not have is left out; y and z may have norms of their own, and in post-norm blocks norms 1 and
// 2 are of x after y and z are added.
//
// All T rows go through a phase together, so each weight is read once per step. A phase divides what it computes among
// the threads (rows, pieces of rows, tiles of output rows, or heads of rows) and each result is computed whole by one
// thread, so that no result depends on how many there are or on who computes what. A phase begins when the one before it
// is done.
//
// What goes into a linear is normed, or gated, piece by piece in the fastest cache and prepared there: a whole
// row of it is never written. What reads a row of x is prepared in the phase that completes the row.
//
// Of one row, as when decoding, each thread prepares what it reads for itself, in the phase that reads it, and who computes
// outputs adds them to x: sooner done twice than handed over.
#include "decoder.h"

#include <algorithm>
#include <chrono>
#include <cmath>
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

// x += n of the values of a table, from index `from`.
void add_values(WeightType type, const void* table, int64_t from, int64_t n, float* x) {
    for (int64_t i = 0; i < n; ++i) {
        float value;
        widen(type, table, from + i, 1, &value);
        x[i] += value;
    }
}

}  // namespace

// ---- loading ---------------------------------------------------------------------------------------------------------

Decoder::Decoder(const DecoderShape& shape, const Kernels& kernels, int n_threads, int granted)
    : shape_(shape), kernels_(kernels), n_threads_(n_threads), granted_(granted) {
    const DecoderShape& s = shape_;
    for (int64_t size : {s.vocab_size, s.hidden_size, s.n_heads, s.n_kv_heads, s.head_dim, s.intermediate_size}) {
        if (size < 1) refuse("a size of the decoder is not positive");
    }
    if (s.n_heads % s.n_kv_heads) refuse("n_heads is not a multiple of n_kv_heads");
    if (s.embed_size < 1) refuse("a size of the decoder is not positive");
    if (s.ropes.size() != s.windows.size()) refuse("other layers have rotary positions than there are");
    if (s.rope_dim < 0 || s.rope_dim % 2 || s.rope_dim > s.head_dim) refuse("rope_dim is odd or above head_dim");
    if (!s.slopes.empty() && static_cast<int64_t>(s.slopes.size()) != s.n_heads) refuse("slopes for other than n_heads");
    if (n_threads < 1) refuse("fewer than one thread");
    plan_ = AttentionPlan(s.group(), s.n_kv_heads, s.windows);
    plain_ = !s.experts.n_experts;
    prepared_.resize(static_cast<size_t>(n_threads));
    layers_.reserve(shape_.windows.size());
}

Decoder::~Decoder() {
    if (team_ && !team_->alive(this_process())) team_.release();  // its threads are another process's: there is nothing to join
}

// The team, made anew in a process that was forked from the one that had it.
Team& Decoder::team(int64_t process) {
    if (team_ && !team_->alive(process)) team_.release();
    if (team_) return *team_;
    try {
        team_ = std::make_unique<Team>(n_threads_, granted_);
    } catch (const std::system_error& error) {
        throw std::runtime_error(std::to_string(n_threads_) + " threads cannot be started: " + error.what());
    }
    return *team_;
}

// The packed form of a linear [n, k].
PackedLinear Decoder::pack(const LinearData& data, int64_t n, int64_t k) {
    PackedLinear linear(data, n, k, kernels_.linear, team(), weights_);
    weight_bytes_ += linear.nbytes();
    activation_bytes_ = std::max(activation_bytes_, linear.activation_bytes());
    piece_ = std::max(piece_, std::min(piece(linear), k));
    if (linear.permuted()) whole_size_ = std::max(whole_size_, k);
    plain_ = plain_ && !linear.permuted();
    return linear;
}

Buffer Decoder::keep(const float* values, int64_t n) {
    if (!values) refuse("a weight is missing");
    Buffer copy(n * static_cast<int64_t>(sizeof(float)));
    std::memcpy(copy.data(), values, static_cast<size_t>(copy.bytes()));
    weight_bytes_ += copy.bytes();
    return copy;
}

Decoder::Norm Decoder::keep(const NormData& data) {
    Norm norm;
    if (!data.weight) return norm;
    norm.weight = keep(data.weight, shape_.hidden_size);
    if (data.bias) norm.bias = keep(data.bias, shape_.hidden_size);
    return norm;
}

void Decoder::add_layer(const LayerData& data) {
    if (layers_.size() == shape_.windows.size()) refuse("more layers than the decoder has");
    if (!data.q_norm != !data.k_norm) refuse("a norm for one of q and k only");
    Layer layer;
    layer.norm1 = keep(data.norm1);
    layer.norm2 = keep(data.norm2);
    layer.out_norm = keep(data.out_norm);
    layer.down_norm = keep(data.down_norm);
    const bool whole = shape_.whole_qk_norm;
    if (data.q_norm) layer.q_norm = keep(data.q_norm, whole ? shape_.q_size() : shape_.head_dim);
    if (data.k_norm) layer.k_norm = keep(data.k_norm, whole ? shape_.kv_size() : shape_.head_dim);
    layer.qkv = pack(data.qkv, shape_.qkv_size(), shape_.hidden_size);
    layer.out = pack(data.out, shape_.hidden_size, shape_.q_size());
    if (data.experts) {
        add_experts(data, layer);
    } else {
        layer.up = pack(data.up, shape_.up_size(), shape_.hidden_size);
        layer.down = pack(data.down, shape_.hidden_size, shape_.intermediate_size);
    }
    if (data.act_scale) {
        layer.inverse_scale = keep(data.act_scale, shape_.intermediate_size);
        float* scale = layer.inverse_scale.floats();
        for (int64_t i = 0; i < shape_.intermediate_size; ++i) scale[i] = 1 / scale[i];
    }
    layers_.push_back(std::move(layer));
}

void Decoder::finish(const NormData& norm, const LinearData& head, std::optional<Reading> reading) {
    if (layers_.size() != shape_.windows.size()) refuse("a layer is missing");
    norm_ = keep(norm);
    if (shape_.embed_size != shape_.hidden_size && project_in_.nbytes() == 0) refuse("the projections are missing");
    head_ = pack(head, shape_.vocab_size, shape_.embed_size);
    if (!layers_.empty() && reading) {
        read_as(*reading);
    } else if (!layers_.empty() && kernels_.linear.asks) {
        choose_readings();
    }
    finished_ = true;
}

void Decoder::set_ends(const EndsData& ends) {
    if (ends.positions && ends.positions_type == WeightType::quantized) refuse("learned positions are quantized");
    positions_type_ = ends.positions_type;
    positions_ = ends.positions;
    n_positions_ = ends.n_positions;
    embed_norm_ = keep(ends.norm);
    if (shape_.embed_size == shape_.hidden_size) return;
    project_in_ = pack(ends.project_in, shape_.hidden_size, shape_.embed_size);
    project_out_ = pack(ends.project_out, shape_.embed_size, shape_.hidden_size);
}

void Decoder::set_embed(WeightType type, const void* table) {
    if (!table || type == WeightType::quantized) refuse("an embedding table is missing or quantized");
    table_type_ = type;
    table_ = table;
}

void Decoder::set_embed(const LinearData& table) { packed_table_ = pack(table, shape_.vocab_size, shape_.embed_size); }

// ---- a step ----------------------------------------------------------------------------------------------------------

void Decoder::step(const Step& step) {
    if (!finished_) throw std::runtime_error("a step of a decoder whose weights are not complete");
    check(step);
    const int64_t process = this_process();
    if (stepping_.exchange(process) == process) throw std::runtime_error("two steps of one decoder at the same time");
    struct Leave {
        std::atomic<int64_t>& stepping;
        ~Leave() { stepping = 0; }
    } leave{stepping_};
    if (step.rows == 0) return;
    const Team::Awake awake(team(process));
    reserve(std::max(step.rows, step.n_wanted));
    single_row_ = plain_ && step.rows == 1 && step.n_wanted <= 1;
    input_.reset();
    plan(step);
    if (!profiling_) return forward(step);
    team_->profile(true);
    const auto begin = std::chrono::steady_clock::now();
    const uint64_t begin_ticks = ticks(), busy = team_->busy_ticks();
    forward(step);
    const auto step_ticks = static_cast<double>(ticks() - begin_ticks);
    const int64_t step_ns = std::chrono::nanoseconds(std::chrono::steady_clock::now() - begin).count();
    const auto busy_ticks = static_cast<double>(team_->busy_ticks() - busy);
    ++profile_.steps;
    profile_.steps_ns += step_ns;
    profile_.busy_ns += static_cast<int64_t>(busy_ticks / step_ticks * static_cast<double>(step_ns));
    team_->profile(false);
}

void Decoder::profile(bool on) {
    if (on) profile_ = {0, 0, 0, n_threads_};
    profiling_ = on;
}

void Decoder::check(const Step& step) const {
    const auto inside = [](const int32_t* values, int64_t n, int64_t below) {
        return std::all_of(values, values + n, [&](int32_t value) { return value >= 0 && value < below; });
    };
    if (!step.tokens && !step.embeddings) refuse("rows have neither tokens nor embeddings");
    if (step.tokens && !inside(step.tokens, step.rows, shape_.vocab_size)) {
        refuse("token ids must lie in 0.." + std::to_string(shape_.vocab_size - 1));
    }
    if (!inside(step.positions, step.rows, step.capacity)) refuse("a position is beyond the cache");
    if (positions_ && !inside(step.positions, step.rows, n_positions_)) refuse("a position that was never learned");
    if (!inside(step.slots, step.rows, step.n_slots)) refuse("a slot is not in the cache");
    if (!inside(step.wanted, step.n_wanted, step.rows)) refuse("wanted rows must be rows of the step");
}

void Decoder::reserve(int64_t rows) {
    const auto floats = [](Buffer& buffer, int64_t n) { buffer.reserve(n * static_cast<int64_t>(sizeof(float))); };
    floats(x_, rows * shape_.hidden_size);
    floats(y_, rows * shape_.hidden_size);
    floats(z_, rows * shape_.hidden_size);
    moments_.reserve(rows * static_cast<int64_t>(sizeof(Moments)));
    if (shape_.embed_size != shape_.hidden_size) floats(narrow_, rows * shape_.embed_size);
    floats(qkv_, rows * shape_.qkv_size());
    floats(mixed_, rows * shape_.q_size());
    floats(gate_up_, rows * shape_.up_size());
    floats(pieces_, n_threads_ * piece_);
    floats(whole_, rows * whole_size_);
    activations_.reserve(std::max<int64_t>(rows, n_threads_) * activation_bytes_);
    reserve_experts(rows);
}

void Decoder::forward(const Step& step) {
    const int64_t T = step.rows, hidden = shape_.hidden_size;
    const bool parallel = shape_.block == BlockType::parallel, post = shape_.block == BlockType::post_norm;
    static const Norm none;  // what is handed out refers to it: nothing on the stack, which an error might leave first
    float* y = y_.floats();  // [T, hidden_size]
    float* z = z_.floats();  // [T, hidden_size]

    const auto read_by = [&](size_t l) {  // x, at the beginning of layer l; after the last, only wanted rows are read
        return l < layers_.size() ? Reader{post ? &none : &layers_[l].norm1, &layers_[l].qkv} : Reader{};
    };
    enter(step, read_by(0));

    for (size_t l = 0; l < layers_.size(); ++l) {
        const Layer& layer = layers_[l];
        const Reader mlp{post ? &none : parallel && !layer.norm2.weight ? &layer.norm1 : &layer.norm2, &layer.up};

        if (takes_heads(l)) {
            attend_by_heads(step, l);
        } else {
            apply(layer.qkv, T, qkv_.floats(), shape_.qkv_size());
            attend(step, l);
        }
        prepare(layer.out, T, {mixed_.floats(), shape_.q_size()});
        const bool sums = single_row_ && !post && !layer.out_norm.weight && !layer.down_norm.weight;  // of linears, with no norms
        if (sums && !parallel) {
            apply_and_add(layer.out, y, nullptr, mlp);
        } else {
            apply(layer.out, T, y, hidden);
            if (parallel) prepare(layer.up, T, {nullptr, hidden, mlp.norm});
            else add(step, layer.out_norm, y, post ? layer.norm1 : none, mlp);
        }

        if (layer.expert_up.empty()) {
            apply(layer.up, T, gate_up_.floats(), shape_.up_size());
            prepare(layer.down, T, {gate_up_.floats(), shape_.intermediate_size, nullptr, nullptr, &layer});
            if (sums) {
                apply_and_add(layer.down, z, parallel ? y : nullptr, read_by(l + 1));
                continue;
            }
            apply(layer.down, T, z, hidden);
        } else {
            mix(layer, T);
        }
        if (parallel) add(step, layer.out_norm, y, none, {});
        add(step, layer.down_norm, z, post ? layer.norm2 : none, read_by(l + 1));
    }

    if (!step.n_wanted) return team_->wait();
    if (shape_.embed_size == hidden) {
        prepare(head_, step.n_wanted, {nullptr, hidden, &norm_, step.wanted});
    } else {
        prepare(project_out_, step.n_wanted, {nullptr, hidden, &norm_, step.wanted});
        apply(project_out_, step.n_wanted, narrow_.floats(), shape_.embed_size);
        prepare(head_, step.n_wanted, {narrow_.floats(), shape_.embed_size});
    }
    apply(head_, step.n_wanted, step.logits, shape_.vocab_size, [=, step = &step](Range outputs) {
        const int64_t first = outputs.begin, n = outputs.end - first;
        if (shape_.logit_cap != 0) {
            for (int64_t r = 0; r < step->n_wanted; ++r) {
                kernels_.block.soft_cap(step->logits + r * shape_.vocab_size + first, shape_.logit_cap, n);
            }
        }
        if (step->peaks && head_.even()) kernels_.block.peaks(step->logits + first, n, step->peaks + first / kPeak);
    });
    team_->wait();
    if (step.peaks && !head_.even()) kernels_.block.peaks(step.logits, shape_.vocab_size, step.peaks);
}

// x = what the first block reads, which `reader` does.
void Decoder::enter(const Step& step, const Reader& reader) {
    const int64_t hidden = shape_.hidden_size, width = shape_.embed_size;
    float* x = x_.floats();
    const auto settle = [&](int64_t t, int thread) {
        float* row = x + t * hidden;
        if (positions_) add_values(positions_type_, positions_, step.positions[t] * hidden, hidden, row);
        if (embed_norm_.weight) normalize(embed_norm_, row);
        settled(step, t, reader, thread);
    };
    if (!step.tokens || width == hidden) {
        each(step.rows, [&](int64_t t, int thread) {
            if (step.tokens) {
                embed(step, t, x + t * hidden);
            } else {
                std::memcpy(x + t * hidden, step.embeddings + t * hidden, static_cast<size_t>(hidden) * sizeof(float));
            }
            settle(t, thread);
        });
        return prepare_rest(reader, step.rows);
    }
    each(step.rows, [&](int64_t t, int) { embed(step, t, narrow_.floats() + t * width); });
    prepare(project_in_, step.rows, {narrow_.floats(), width});
    apply(project_in_, step.rows, x, hidden);
    each(step.rows, [&](int64_t t, int thread) { settle(t, thread); });
    prepare_rest(reader, step.rows);
}

// x += y, of which there may be a norm, as there may be of the sum; what `reader` reads, if anything does yet.
void Decoder::add(const Step& step, const Norm& added, float* y, const Norm& sum, const Reader& reader) {
    const int64_t hidden = shape_.hidden_size;
    each(step.rows, [&](int64_t t, int thread) {
        float *to = x_.floats() + t * hidden, *row = y + t * hidden;
        if (added.weight) normalize(added, row);
        kernels_.block.add(to, row, shape_.residual_scale, hidden);
        if (sum.weight) normalize(sum, to);
        settled(step, t, reader, thread);
    });
    prepare_rest(reader, step.rows);
}

// A row of hidden_size values, in place.
void Decoder::normalize(const Norm& norm, float* row) const {
    const int64_t hidden = shape_.hidden_size;
    const Moments moments = kernels_.block.moments(shape_.norm_type, row, hidden);
    const float factor = 1 / std::sqrt(moments.variance + shape_.norm_eps);
    kernels_.block.normalize(row, moments.mean, factor, norm.weight.floats(), norm.bias.floats(), hidden, row);
}

// x = the embedding of a row's token.
void Decoder::embed(const Step& step, int64_t row, float* x) const {
    const int64_t width = shape_.embed_size;
    if (table_) {
        widen(table_type_, table_, step.tokens[row] * width, width, x);
    } else {
        const PackedLinear& rows = packed_table_.nbytes() ? packed_table_ : head_;
        rows.unpack_row(kernels_.linear, step.tokens[row], x);
    }
    if (shape_.embed_scale != 1) {
        for (int64_t i = 0; i < width; ++i) x[i] *= shape_.embed_scale;
    }
}

// One phase: y = the linear of what is prepared for it.
void Decoder::apply(const PackedLinear& linear, int64_t rows, float* y, int64_t y_stride) {
    apply(linear, rows, y, y_stride, [](Range) {});
}

// The same of one row, and x += y; before that x += before, where that is not null. What `reader` reads comes next.
void Decoder::apply_and_add(const PackedLinear& linear, float* y, const float* before, const Reader& reader) {
    apply(linear, 1, y, 0, [=](Range outputs) {
        const auto add = [&](const float* values) {
            kernels_.block.add(x_.floats() + outputs.begin, values + outputs.begin, shape_.residual_scale,
                               outputs.end - outputs.begin);
        };
        if (before) add(before);
        add(y);
    });
    prepare_rest(reader, 1);
}

template <class Then>
void Decoder::apply(const PackedLinear& linear, int64_t rows, float* y, int64_t y_stride, const Then& then) {
    const uint64_t phase = ++phase_;
    const auto work = [=, what = std::exchange(input_, std::nullopt), linear = &linear](Range tiles, int thread) {
        const char* activations = what ? prepared(*linear, *what, phase, thread) : activations_.data();
        then(linear->apply(kernels_.linear, activations, rows, tiles, y, y_stride));
    };
    team_->then(linear.tiles(), work, linear.least_tiles(kernels_.linear, rows));
}

}  // namespace tinychat
