// The experts of a layer of the lowered decoder, on the normed rows that are prepared for `up`.
//
//   logits = router(rows)
//   for each row and each expert of its n_used highest logits, a pair:
//       output = share * down(act(gate) * up)            gate, up = the expert's up(row)
//   z = sum of a row's outputs, by expert + sigmoid(its last logit) * the shared expert's
//
// Only the weights of experts that some row goes to are read, and each once: an expert's rows go through it together. With
// one row, the chosen experts' weights are read as those of one linear would be: all in one phase, in shares of equal size.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "decoder.h"

namespace tinychat {

void Decoder::add_experts(const LayerData& data, Layer& layer) {
    const ExpertsShape& s = shape_.experts;
    const int64_t hidden = shape_.hidden_size, factor = shape_.gated ? 2 : 1;
    if (s.n_used < 1 || s.n_experts < s.n_used || s.intermediate_size < 1) {
        throw std::invalid_argument("experts of a decoder that has none, or fewer than are used");
    }
    const int64_t before = s.router_size() + factor * s.shared_size, each = factor * s.intermediate_size;
    layer.up = pack(data.up, before + s.n_experts * each, hidden);
    layer.down = pack(data.down, s.n_experts * hidden, s.intermediate_size);
    if (s.shared_size) layer.shared_down = pack(data.shared_down, hidden, s.shared_size);
    layer.router_end = layer.up.segment_at(s.router_size());
    for (int64_t expert = 0; expert <= s.n_experts; ++expert) {
        layer.expert_up.push_back(layer.up.segment_at(before + expert * each));
        layer.expert_down.push_back(layer.down.segment_at(expert * hidden));
    }
    gathered_bytes_ = std::max(gathered_bytes_, layer.up.activation_bytes());
    pair_bytes_ = std::max(pair_bytes_, layer.down.activation_bytes());
    shared_bytes_ = std::max(shared_bytes_, layer.shared_down.activation_bytes());
}

void Decoder::reserve_experts(int64_t rows) {
    const ExpertsShape& s = shape_.experts;
    if (!s.n_experts) return;
    const auto floats = [](Buffer& buffer, int64_t n) { buffer.reserve(n * static_cast<int64_t>(sizeof(float))); };
    const int64_t pairs = rows * s.n_used, factor = shape_.gated ? 2 : 1;
    floats(router_, rows * s.router_size());
    floats(gate_up_, factor * (pairs * s.intermediate_size + rows * s.shared_size));
    floats(outputs_, (pairs + rows) * shape_.hidden_size);
    if (rows > 1) gathered_.reserve(pairs * gathered_bytes_);
    activations_.reserve(pairs * pair_bytes_ + rows * shared_bytes_);
}

void Decoder::mix(const Layer& layer, int64_t T) {
    const ExpertsShape& s = shape_.experts;
    const int64_t hidden = shape_.hidden_size, factor = shape_.gated ? 2 : 1, pairs = T * s.n_used;
    const int64_t inter = s.intermediate_size, up_size = factor * inter, shared_up_size = factor * s.shared_size;
    const auto size = [](int64_t n) { return static_cast<size_t>(n); };
    char* activations = activations_.data();  // of T rows
    const float* logits = router_.floats();

    parts_.assign({{&layer.up, 0, layer.router_end, activations, T, router_.floats(), s.router_size()}});
    PackedLinear::apply(kernels_.linear, parts_, *team_);
    routing_.route(s, logits, T, *team_);

    const size_t first = layer.expert_up.front(), end = layer.expert_up.back();
    const int64_t row_bytes = layer.up.activation_bytes();
    if (T > 1) {
        team_->run(pairs, [&](Range part, int) {
            for (int64_t i = part.begin; i < part.end; ++i) {
                const Routing::Pair& pair = routing_.pairs()[size(i)];
                const Routing::Group& group = routing_.groups()[size(pair.group)];
                layer.up.copy_row(first, end, activations, pair.row, T, gathered_.data() + group.first * row_bytes,
                                  i - group.first, group.rows);
            }
        });
    }
    float* shared_up = gate_up_.floats() + pairs * up_size;
    parts_.clear();
    if (s.shared_size) parts_.push_back({&layer.up, layer.router_end, first, activations, T, shared_up, shared_up_size});
    for (const Routing::Group& group : routing_.groups()) {
        const auto at = layer.expert_up.begin() + group.expert;
        const char* rows = T > 1 ? gathered_.data() + group.first * row_bytes : activations;
        parts_.push_back({&layer.up, at[0], at[1], rows, group.rows, gate_up_.floats() + group.first * up_size, up_size});
    }
    PackedLinear::apply(kernels_.linear, parts_, *team_);

    // What goes into `down`, piece by piece, for pairs and then for rows of the shared expert.
    const int64_t pair_bytes = layer.down.activation_bytes();
    char* shared_activations = activations + pairs * pair_bytes;
    const int64_t length = piece(layer.down), pieces = (inter + length - 1) / length;
    const int64_t shared_length = s.shared_size ? piece(layer.shared_down) : 1;
    const int64_t shared_pieces = (s.shared_size + shared_length - 1) / shared_length;
    const auto activate = [&](const float* gate, int64_t n, Range part, int thread) {
        float* out = pieces_.floats() + thread * piece_;
        kernels_.block.activate(shape_.activation, gate + part.begin, shape_.gated ? gate + n + part.begin : nullptr,
                                part.end - part.begin, out);
        return out;
    };
    team_->run(pairs * pieces + T * shared_pieces, [&](Range items, int thread) {
        for (int64_t item = items.begin; item < items.end; ++item) {
            if (item < pairs * pieces) {
                const int64_t pair = item / pieces, begin = item % pieces * length;
                const Routing::Group& group = routing_.groups()[size(routing_.pairs()[size(pair)].group)];
                const Range part{begin, std::min(begin + length, inter)};
                layer.down.prepare(kernels_.linear, activate(gate_up_.floats() + pair * up_size, inter, part, thread), part,
                                   pair - group.first, group.rows, activations + group.first * pair_bytes);
            } else {
                const int64_t rest = item - pairs * pieces, t = rest / shared_pieces;
                const int64_t begin = rest % shared_pieces * shared_length;
                const Range part{begin, std::min(begin + shared_length, s.shared_size)};
                const float* values = activate(shared_up + t * shared_up_size, s.shared_size, part, thread);
                layer.shared_down.prepare(kernels_.linear, values, part, t, T, shared_activations);
            }
        }
    });

    float* shared_output = outputs_.floats() + pairs * hidden;
    parts_.clear();
    if (s.shared_size) {
        const size_t all = layer.shared_down.segment_at(hidden);
        parts_.push_back({&layer.shared_down, 0, all, shared_activations, T, shared_output, hidden});
    }
    for (const Routing::Group& group : routing_.groups()) {
        const auto at = layer.expert_down.begin() + group.expert;
        parts_.push_back({&layer.down, at[0], at[1], activations + group.first * pair_bytes, group.rows,
                          outputs_.floats() + group.first * hidden, hidden});
    }
    PackedLinear::apply(kernels_.linear, parts_, *team_);

    team_->run(T, [&](Range rows, int) {
        for (int64_t t = rows.begin; t < rows.end; ++t) {
            float* z = z_.floats() + t * hidden;
            std::fill(z, z + hidden, 0.0f);
            const auto add = [&](const float* output, float share) {
                for (int64_t i = 0; i < hidden; ++i) z[i] += share * output[i];
            };
            for (int64_t i = 0; i < s.n_used; ++i) {
                add(outputs_.floats() + routing_.pairs_of(t)[i] * hidden, routing_.shares_of(t)[i]);
            }
            if (s.shared_size) {
                add(shared_output + t * hidden, 1 / (1 + std::exp(-logits[t * s.router_size() + s.n_experts])));
            }
        }
    });
}

}  // namespace tinychat
