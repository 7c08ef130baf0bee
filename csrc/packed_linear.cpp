#include "packed_linear.h"

#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>

namespace tinychat {
namespace {

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

constexpr int64_t kRowsOfReading = 8;  // to read a tile takes about as long as to compute with it for so many rows
constexpr int64_t kTilesTogether = 8;  // packed by one thread: what a line of some sources holds parts of

int64_t cache_line(int64_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

PackedLinear::PackedLinear(const LinearData& data, int64_t n, int64_t k, const LinearKernels& kernels, Team& team,
                           Arena& weights) {
    int64_t rows = 0;
    for (const SegmentData& segment : data.segments) {
        const LinearShape& shape = segment.shape;
        if (shape.n < 1 || shape.k != k) refuse("a segment of a linear has the wrong shape");
        if (shape.type == WeightType::quantized && shape.group < 1) refuse("a group of less than one weight");
        if (shape.type == WeightType::quantized && shape.bits != 2 && shape.bits != 3 && shape.bits != 4 && shape.bits != 8) {
            refuse("codes of " + std::to_string(shape.bits) + " bits, which no kernel has");
        }
        if (!segment.data.values) refuse("a segment of a linear has no values");
        add_segment(segment, kernels);
        packed_bytes_ += cache_line(kernels.packed_bytes(shape));
        rows += shape.n;
    }
    if (rows != n) refuse("the segments of a linear have " + std::to_string(rows) + " rows, not " + std::to_string(n));
    packed_ = weights.take(packed_bytes_);
    for (size_t i = 0; i < segments_.size(); ++i) {
        const Segment& segment = segments_[i];
        if (data.ready) data.ready(i);
        team.run((segment.tiles + kTilesTogether - 1) / kTilesTogether, [&](Range part, int) {
            kernels.pack(segment.shape, data.segments[i].data, packed_ + segment.offset, part.begin * kTilesTogether,
                         std::min(part.end * kTilesTogether, segment.tiles));
        });
    }
    if (data.bias) {
        bias_.reserve(n * static_cast<int64_t>(sizeof(float)));
        std::memcpy(bias_.data(), data.bias, static_cast<size_t>(bias_.bytes()));
    }
}

int64_t PackedLinear::nbytes() const {
    int64_t bytes = packed_bytes_ + bias_.bytes();
    for (const Preparation& p : preparations_) bytes += static_cast<int64_t>(p.permutation.size() * sizeof(int32_t));
    return bytes;
}

void PackedLinear::add_segment(const SegmentData& data, const LinearKernels& kernels) {
    const LinearShape& shape = data.shape;
    const int32_t* order = data.data.permutation;
    const std::vector<int32_t> permutation(order, order ? order + shape.k : nullptr);
    const auto inside = [&](int32_t input) { return input >= 0 && input < shape.k; };
    if (!std::all_of(permutation.begin(), permutation.end(), inside)) refuse("a permutation beyond the inputs");
    const auto same = [&](const Preparation& p) {
        return p.shape.type == shape.type && p.shape.k == shape.k && p.shape.group == shape.group &&
               p.shape.activation_bits == shape.activation_bits && p.permutation == permutation;
    };
    auto preparation = std::find_if(preparations_.begin(), preparations_.end(), same);
    if (preparation == preparations_.end()) {
        const int64_t bytes = kernels.activation_bytes(shape);
        preparation = preparations_.insert(preparation, {shape, activation_bytes_, bytes, permutation});
        permuted_ = permuted_ || !permutation.empty();
        activation_bytes_ += bytes;
        prepare_step_ = std::lcm(prepare_step_, kernels.prepare_step(shape));
    }
    Segment segment{shape, 0, 0, tiles_, (shape.n + kernels.tile - 1) / kernels.tile,
                    static_cast<size_t>(preparation - preparations_.begin())};
    if (!segments_.empty()) {
        const Segment& last = segments_.back();
        segment.offset = last.offset + cache_line(kernels.packed_bytes(last.shape));
        segment.first_row = last.first_row + last.shape.n;
        even_ = even_ && segment.first_row == segment.first_tile * kernels.tile;
    }
    segments_.push_back(segment);
    tiles_ += segment.tiles;
}

void PackedLinear::prepare(const LinearKernels& kernels, const float* x, Range part, int64_t row, int64_t rows,
                           char* activations) const {
    for (const Preparation& preparation : preparations_) {
        char* all = activations + preparation.offset * rows;  // [rows, bytes]
        kernels.prepare(preparation.shape, x, all + row * preparation.bytes, part.begin, part.end);
    }
}

void PackedLinear::gather(const LinearKernels& kernels, const float* x, Range part, int64_t row, int64_t rows,
                          float* scratch, char* activations) const {
    for (const Preparation& preparation : preparations_) {
        const float* values = x + part.begin;
        if (!preparation.permutation.empty()) {
            for (int64_t i = part.begin; i < part.end; ++i) scratch[i - part.begin] = x[preparation.permutation[i]];
            values = scratch;
        }
        char* all = activations + preparation.offset * rows;  // [rows, bytes]
        kernels.prepare(preparation.shape, values, all + row * preparation.bytes, part.begin, part.end);
    }
}

void PackedLinear::apply_tiles(const LinearKernels& kernels, const Segment& segment, Range tiles,
                               const char* activations, int64_t rows, float* y, int64_t y_stride) const {
    const char* prepared = activations + preparations_[segment.preparation].offset * rows;
    kernels.linear(segment.shape, packed_ + segment.offset, prepared, rows, tiles.begin, tiles.end, y, y_stride);
    if (!bias_) return;
    const int64_t begin = tiles.begin * kernels.tile;
    const int64_t end = std::min(tiles.end * kernels.tile, segment.shape.n);
    const float* bias = bias_.floats() + segment.first_row;
    for (int64_t t = 0; t < rows; ++t) {
        for (int64_t r = begin; r < end; ++r) y[t * y_stride + r] += bias[r];
    }
}

void PackedLinear::ask(Fetch fetch, bool two_tiles) {
    for (Segment& segment : segments_) {
        segment.shape.fetch = fetch;
        segment.shape.two_tiles = two_tiles;
    }
}

bool PackedLinear::pairs(const LinearKernels& kernels) const {
    const auto obeyed = [&](const Segment& segment) { return kernels.pairs(segment.shape); };
    return kernels.pairs && std::any_of(segments_.begin(), segments_.end(), obeyed);
}

Range PackedLinear::apply(const LinearKernels& kernels, const char* activations, int64_t rows, Range tiles, float* y,
                          int64_t y_stride) const {
    Range outputs{-1, 0};
    each_segment(tiles, [&](const Segment& segment, Range its_tiles) {
        apply_tiles(kernels, segment, its_tiles, activations, rows, y + segment.first_row, y_stride);
        if (outputs.begin < 0) outputs.begin = segment.first_row + its_tiles.begin * kernels.tile;
        outputs.end = segment.first_row + std::min(its_tiles.end * kernels.tile, segment.shape.n);
    });
    return outputs;
}

void PackedLinear::apply(const LinearKernels& kernels, std::vector<Part>& parts, Team& team) {
    const auto first_tile = [](const Part& part) { return part.linear->segments_[part.begin].first_tile; };
    const auto cost = [](const Part& part) { return part.rows + kRowsOfReading; };  // of each tile
    int64_t total = 0;
    for (Part& part : parts) {
        part.before = total;
        const Segment& last = part.linear->segments_[part.end - 1];
        total += (last.first_tile + last.tiles - first_tile(part)) * cost(part);
    }
    // A thread's share of the costs is the tiles whose costs begin within it.
    team.run(total, [&](Range costs, int) {
        const auto ends_by = [&](const Part& part) { return part.before <= costs.begin; };
        auto part = std::partition_point(parts.begin(), parts.end(), ends_by) - 1;
        for (; part != parts.end() && part->before < costs.end; ++part) {
            const PackedLinear& linear = *part->linear;
            const Segment &first = linear.segments_[part->begin], &last = linear.segments_[part->end - 1];
            const auto tile_at = [&](int64_t at) {
                const int64_t tile = (std::max<int64_t>(at - part->before, 0) + cost(*part) - 1) / cost(*part);
                return std::min(first.first_tile + tile, last.first_tile + last.tiles);
            };
            const Range share{tile_at(costs.begin), tile_at(costs.end)};
            if (share.begin == share.end) continue;
            linear.each_segment(share, [&](const Segment& segment, Range tiles) {
                float* y = part->y + segment.first_row - first.first_row;
                linear.apply_tiles(kernels, segment, tiles, part->activations, part->rows, y, part->y_stride);
            });
        }
    });
}

size_t PackedLinear::segment_at(int64_t row) const {
    for (size_t i = 0; i < segments_.size(); ++i) {
        if (segments_[i].first_row == row) return i;
    }
    const bool at_end = !segments_.empty() && segments_.back().first_row + segments_.back().shape.n == row;
    if (!at_end) refuse("a segment of stacked linears reaches over the end of one");
    return segments_.size();
}

void PackedLinear::copy_row(size_t begin, size_t end, const char* activations, int64_t from, int64_t rows,
                            char* to_activations, int64_t to, int64_t to_rows) const {
    for (size_t i = 0; i < preparations_.size(); ++i) {
        const Preparation& p = preparations_[i];
        const auto reads = [&](const Segment& segment) { return segment.preparation == i; };
        const auto first = segments_.begin();
        if (std::none_of(first + static_cast<ptrdiff_t>(begin), first + static_cast<ptrdiff_t>(end), reads)) continue;
        std::memcpy(to_activations + p.offset * to_rows + to * p.bytes, activations + p.offset * rows + from * p.bytes,
                    static_cast<size_t>(p.bytes));
    }
}

void PackedLinear::unpack_row(const LinearKernels& kernels, int64_t row, float* values) const {
    const auto begins_by = [&](const Segment& segment) { return segment.first_row <= row; };
    const Segment& segment = *(std::partition_point(segments_.begin(), segments_.end(), begins_by) - 1);
    kernels.unpack_row(segment.shape, packed_ + segment.offset, row - segment.first_row, values);
}

}  // namespace tinychat
