// A linear as the lowered decoder holds it: row segments that may differ in precision, each in the kernels' packed form.
#pragma once
#include <algorithm>
#include <cstdint>
#include <functional>
#include <vector>

#include "buffer.h"
#include "kernels.h"
#include "threads.h"

namespace tinychat {

// Weights as the caller holds them: read while packing, not kept.
struct SegmentData {
    LinearShape shape;
    WeightData data;
};
struct LinearData {
    std::vector<SegmentData> segments;  // stacked along the outputs
    const float* bias;                  // [sum of n], or null
    std::function<void(size_t)> ready{};  // called before a segment is read, where its values are only then there
};

class PackedLinear {
  public:
    struct Segment {
        LinearShape shape;
        int64_t offset;       // of its packed weight in `packed`
        int64_t first_row;    // of the whole linear
        int64_t first_tile;   // of the whole linear
        int64_t tiles;
        size_t preparation;   // of the activations it reads
    };
    // Segments that differ in type, group or permutation want their activations prepared differently.
    struct Preparation {
        LinearShape shape;
        int64_t offset;  // bytes before it, for one row
        int64_t bytes;   // of one row
        std::vector<int32_t> permutation;  // [k], or nothing
    };

    PackedLinear() = default;
    // Packs `data`, a linear [n, k], on the team, to memory of `weights`, which outlives it. Throws std::invalid_argument where
    // the sizes do not agree.
    PackedLinear(const LinearData& data, int64_t n, int64_t k, const LinearKernels& kernels, Team& team, Arena& weights);

    // Bytes of one row's activations, all preparations.
    int64_t activation_bytes() const { return activation_bytes_; }
    int64_t nbytes() const;

    // Whether some segment's columns are in another order than the inputs: a row is then gathered from all of its inputs.
    bool permuted() const { return permuted_; }

    // A row is prepared in parts of a multiple of this, but for the last.
    int64_t prepare_step() const { return prepare_step_; }
    // The values `part` of row `row` of `rows` rows of inputs, which x holds, in the forms that the segments read, to
    // activations [rows * activation_bytes].
    void prepare(const LinearKernels& kernels, const float* x, Range part, int64_t row, int64_t rows,
                 char* activations) const;
    // The same of a permuted linear, from the whole row x [k]; scratch holds as many values as `part`.
    void gather(const LinearKernels& kernels, const float* x, Range part, int64_t row, int64_t rows, float* scratch,
                char* activations) const;
    // How weights are read from now on; see LinearShape.
    void ask(Fetch fetch, bool two_tiles);
    // Whether two_tiles means anything here.
    bool pairs(const LinearKernels& kernels) const;
    // Some tiles of y[rows, n] = the linear of the prepared rows. Returns which outputs they are.
    Range apply(const LinearKernels& kernels, const char* activations, int64_t rows, Range tiles, float* y,
                int64_t y_stride) const;
    int64_t tiles() const { return tiles_; }
    // Whether output i is in tile i / LinearKernels::tile.
    bool even() const { return even_; }
    // So many tiles at least should be computed at once, with so many rows.
    int64_t least_tiles(const LinearKernels& kernels, int64_t rows) const {
        return rows < kernels.panel_rows ? 1 : kernels.panel_tiles;
    }

    // Some of a linear's outputs, for rows of their own: of stacked experts, one expert and the rows routed to it.
    struct Part {
        const PackedLinear* linear;
        size_t begin, end;        // segments
        const char* activations;  // [rows * activation_bytes], prepared for `linear`
        int64_t rows;
        float* y;                 // [rows, outputs of those segments]
        int64_t y_stride;
        int64_t before = 0;       // set by apply(): the costs of the parts before it
    };
    // All of them in one phase. The parts are the caller's scratch.
    static void apply(const LinearKernels& kernels, std::vector<Part>& parts, Team& team);

    // The segment that begins at output `row`, or their number. Throws std::invalid_argument where none does.
    size_t segment_at(int64_t row) const;
    // What the segments `begin` .. `end` read of row `from` of `rows` prepared ones, as row `to` of `to_rows`.
    void copy_row(size_t begin, size_t end, const char* activations, int64_t from, int64_t rows, char* to_activations,
                  int64_t to, int64_t to_rows) const;
    // Row `row` of the weight as fp32 [k].
    void unpack_row(const LinearKernels& kernels, int64_t row, float* values) const;

  private:
    void add_segment(const SegmentData& data, const LinearKernels& kernels);
    void apply_tiles(const LinearKernels& kernels, const Segment& segment, Range tiles, const char* activations,
                     int64_t rows, float* y, int64_t y_stride) const;

    // work(segment, tiles of its own) for each segment that reaches into the tiles `part` of the whole.
    template <class Work>
    void each_segment(Range part, const Work& work) const {
        const auto ends_by = [&](const Segment& segment) { return segment.first_tile + segment.tiles <= part.begin; };
        auto segment = std::partition_point(segments_.begin(), segments_.end(), ends_by);
        for (; segment != segments_.end() && segment->first_tile < part.end; ++segment) {
            work(*segment, Range{std::max<int64_t>(part.begin - segment->first_tile, 0),
                                 std::min(part.end - segment->first_tile, segment->tiles)});
        }
    }

    std::vector<Segment> segments_;
    std::vector<Preparation> preparations_;
    char* packed_ = nullptr;
    int64_t packed_bytes_ = 0;
    Buffer bias_;  // [n], or nothing
    int64_t tiles_ = 0;
    int64_t activation_bytes_ = 0;
    int64_t prepare_step_ = 1;
    bool permuted_ = false, even_ = true;
};

}  // namespace tinychat
