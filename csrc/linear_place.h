// Block by block through a linear of codes: where each lies in a tile, and its integers in a row of activations. For kernels that
// take some blocks for all rows and tiles before the next ones.
#pragma once
#include "linear_layout.h"

namespace tinychat {
namespace {

struct Place {
    int64_t group = 0, begin = 0, length = 0;  // of the group `begin`, of the block `length`
    int64_t header = 0, in_chunk = 0;          // where the chunk begins; the group's number in it
    int64_t codes = 0, integers = 0, index = 0;

    explicit Place(const QuantizedLayout& layout) {
        start_chunk(layout);
        enter(layout);
    }
    const char* scales(const QuantizedLayout& layout, const char* tile) const {
        return tile + header + in_chunk * layout.scale_bytes;
    }
    const char* zeros(const QuantizedLayout& layout, const char* tile) const {
        return tile + header + chunk_groups(layout) * layout.scale_bytes + in_chunk * kTile;
    }

    void enter(const QuantizedLayout& layout) {
        const int64_t left = layout.padded(group) - begin;
        length = smaller(kBlock, left);
    }
    int64_t chunk_groups(const QuantizedLayout& layout) const {
        return smaller(kChunk, layout.groups - (group - in_chunk));
    }
    void next(const QuantizedLayout& layout) {
        codes += layout.code_bytes(length);
        integers += length * layout.integer_bytes;
        index++;
        begin += length;
        if (begin == layout.padded(group)) {
            begin = 0;
            group++;
            if (++in_chunk == kChunk) start_chunk(layout);
        }
        if (group < layout.groups) enter(layout);
    }
    void start_chunk(const QuantizedLayout& layout) {
        in_chunk = 0;
        header = codes;
        codes += layout.header_bytes(chunk_groups(layout));
    }
};

}  // namespace
}  // namespace tinychat
