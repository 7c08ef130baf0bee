// What the linears of the lowered decoder read: a norm of x, values as they are, or the activation of an MLP, in the form that
// the kernels want. With several rows the threads share this, in the phase that completes a row of x or in one of its own; a
// single row each of them prepares for itself, when it first reads it.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "decoder.h"

namespace tinychat {
namespace {

// Values of a row that are prepared at a time, where the linear's groups allow.
constexpr int64_t kPiece = 512;
// Of one row, so many values that are no norm of x each thread prepares for itself; more are shared among them.
constexpr int64_t kOwn = 2048;

}  // namespace

// Row t of x is as it will be read: its moments, which norms need, and what reads it prepared, which takes the same phase.
void Decoder::settled(const Step& step, int64_t t, const Reader& reader, int thread) {
    if (single_row_) return;
    moments()[t] = kernels_.block.moments(shape_.norm_type, x_.floats() + t * shape_.hidden_size, shape_.hidden_size);
    if (!reader.linear || reader.linear->permuted()) return;
    prepare_row(*reader.linear, {nullptr, shape_.hidden_size, reader.norm}, moments()[t], t, step.rows, thread,
                activations_.data());
}

// What settled() leaves to be prepared.
void Decoder::prepare_rest(const Reader& reader, int64_t rows) {
    if (reader.linear && (single_row_ || reader.linear->permuted())) {
        prepare(*reader.linear, rows, {nullptr, shape_.hidden_size, reader.norm});
    }
}

// The values `part` of a row of an input, in `piece` or where they are. `moments` are those of a row of x.
const float* Decoder::input(const Input& input, const Moments& moments, int64_t row, Range part, float* piece) const {
    const int64_t n = part.end - part.begin;
    if (input.mlp) {  // act(gate) * up, or act(up), over act_scale where there is one: of a plain MLP it stands where up would
        const float* gate = input.values + row * shape_.up_size() + part.begin;
        const float* inverse = input.mlp->inverse_scale.floats();
        const float* scale = inverse ? inverse + part.begin : nullptr;
        kernels_.block.activate(shape_.activation, gate, shape_.gated ? gate + input.size : scale, n, piece);
        if (shape_.gated && scale) {
            for (int64_t i = 0; i < n; ++i) piece[i] *= scale[i];
        }
        return piece;
    }
    if (input.values) return input.values + row * input.size + part.begin;
    const float* values = x_.floats() + row * shape_.hidden_size + part.begin;
    const float *weight = input.norm->weight.floats(), *bias = input.norm->bias.floats();
    if (!weight) return values;
    const float factor = 1 / std::sqrt(moments.variance + shape_.norm_eps);
    kernels_.block.normalize(values, moments.mean, factor, weight + part.begin, bias ? bias + part.begin : nullptr, n, piece);
    return piece;
}

// A whole row in the form that a linear reads, as row `row` of `rows`.
void Decoder::prepare_row(const PackedLinear& linear, const Input& what, const Moments& moments, int64_t row, int64_t rows,
                          int thread, char* activations) const {
    const int64_t length = piece(linear);
    float* place = pieces_.floats() + thread * piece_;
    for (int64_t begin = 0; begin < what.size; begin += length) {
        const Range part{begin, std::min(begin + length, what.size)};
        linear.prepare(kernels_.linear, input(what, moments, row, part, place), part, row, rows, activations);
    }
}

// The inputs of a linear in the form that it reads: one phase, or two of a permuted linear, which gathers from whole rows. A
// single row that is short, or a norm of x, is left to the phase that reads it.
void Decoder::prepare(const PackedLinear& linear, int64_t rows, const Input& what) {
    if (single_row_ && (!what.values || what.size <= kOwn)) {
        input_ = what;
        return;
    }
    const int64_t k = what.size, length = piece(linear), pieces = (k + length - 1) / length;
    const auto each_piece = [&](const auto& work) {
        each(rows * pieces, [&](int64_t item, int thread) {
            const int64_t row = item / pieces, begin = item % pieces * length;
            work(row, Range{begin, std::min(begin + length, k)}, pieces_.floats() + thread * piece_);
        });
    };
    const auto values = [&](int64_t row, Range part, float* piece) {
        const int64_t t = what.wanted ? what.wanted[row] : row;
        return input(what, what.values ? Moments{} : moments()[t], t, part, piece);
    };
    if (!linear.permuted()) {
        return each_piece([&](int64_t row, Range part, float* piece) {
            linear.prepare(kernels_.linear, values(row, part, piece), part, row, rows, activations_.data());
        });
    }
    const auto whole = [&](int64_t row) { return whole_.floats() + row * k; };
    each_piece([&](int64_t row, Range part, float*) {
        float* place = whole(row) + part.begin;
        const float* found = values(row, part, place);
        if (found != place) std::memcpy(place, found, static_cast<size_t>(part.end - part.begin) * sizeof(float));
    });
    each_piece([&](int64_t row, Range part, float* piece) {
        linear.gather(kernels_.linear, whole(row), part, row, rows, piece, activations_.data());
    });
}

// The one row as `thread` reads it in this phase.
const char* Decoder::prepared(const PackedLinear& linear, const Input& what, uint64_t phase, int thread) {
    char* activations = activations_.data() + thread * activation_bytes_;
    uint64_t& last = prepared_[static_cast<size_t>(thread)].phase;
    if (last == phase) return activations;
    last = phase;
    const bool normed = !what.values && what.norm->weight;
    const Moments moments = normed ? kernels_.block.moments(shape_.norm_type, x_.floats(), what.size) : Moments{};
    prepare_row(linear, what, moments, 0, 1, thread, activations);
    return activations;
}

int64_t Decoder::piece(const PackedLinear& linear) const {
    const int64_t step = linear.prepare_step();
    return (kPiece + step - 1) / step * step;
}

}  // namespace tinychat
