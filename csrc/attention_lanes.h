// The attention kernels of a level with lanes (lanes_*.h, included first), compiled anew in each level's unit: how heads
// are rotated and stored, and which of two ways they attend. Ends that do not fill a register are parts of one; nothing
// beyond them is touched.
#pragma once
#include "attention_stream.h"
#include "attention_tiles.h"

namespace tinychat {
namespace {

constexpr int64_t kTiled = 16;  // queries at once from which transposing keys pays

void rotate(float* head, const float* cos, const float* sin, int64_t half) {
    for (int64_t j = 0; j < half; j += kLanes) {
        const Part some = part(half - j);
        const Vector first = load(head + j, some), second = load(head + half + j, some);
        const Vector c = load(cos + j, some), s = load(sin + j, some);
        save(head + j, some, first * c - second * s);
        save(head + half + j, some, second * c + first * s);
    }
}

template <class Entry>
void store_plain(const float* x, int64_t dim, Entry* entry) {
    for (int64_t d = 0; d < dim; d += kLanes) save(entry + d, part(dim - d), load(x + d, part(dim - d)));
}

void store_codes(const float* x, int64_t dim, int8_t* codes, float* scale) {
    Vector largest = all(0), spoilt = all(0);  // the second is NaN where a value is, or is infinite
    for (int64_t d = 0; d < dim; d += kLanes) {
        const Vector value = load(x + d, part(dim - d));
        largest = larger(largest, magnitude(value));
        spoilt = fma(value, all(0), spoilt);
    }
    *scale = largest_of(largest) / 127 + sum_of(spoilt);
    // A scale that underflowed to 0 stands for zeros; one that lost digits to it must not lead beyond 127.
    const Vector divisor = all(*scale == 0 ? kInfinity : *scale);
    for (int64_t d = 0; d < dim; d += kLanes) {
        const Vector code = load(x + d, part(dim - d)) / divisor;
        save(codes + d, part(dim - d), all(0) - larger(all(-127), all(0) - larger(all(-127), code)));
    }
}

void store(const CacheView& cache, const float* key, const float* value, int64_t dim, int64_t position) {
    const int64_t at = position * dim;
    switch (cache.type) {
        case CacheType::f32:
            store_plain(key, dim, static_cast<float*>(cache.keys) + at);
            store_plain(value, dim, static_cast<float*>(cache.values) + at);
            return;
        case CacheType::f16:
            store_plain(key, dim, static_cast<uint16_t*>(cache.keys) + at);
            store_plain(value, dim, static_cast<uint16_t*>(cache.values) + at);
            return;
        case CacheType::q8:
            store_codes(key, dim, static_cast<int8_t*>(cache.keys) + at, cache.key_scales + position);
            store_codes(value, dim, static_cast<int8_t*>(cache.values) + at, cache.value_scales + position);
    }
}

int64_t scratch(const QueryGroup& group, int64_t rows, int64_t entries) {
    const int64_t queries = rows * group.heads;
    return queries < kTiled ? stream_scratch(queries, entries) : tiles_scratch(queries, group.dim);
}

void attend(const CacheView& cache, const QueryGroup& group, const QueryRows& rows, int64_t begin, int64_t end, float* scratch,
            const Partial& partial) {
    const auto of = [&](auto entry) {
        using Entry = decltype(entry);
        if (rows.rows * group.heads < kTiled) {
            stream<Entry>(cache, group, rows, begin, end, scratch, partial);
        } else {
            tiles<Entry>(cache, group, rows, begin, end, scratch, partial);
        }
    };
    switch (cache.type) {
        case CacheType::f32: return of(float{});
        case CacheType::f16: return of(uint16_t{});
        case CacheType::q8: return of(int8_t{});
    }
}

}  // namespace
}  // namespace tinychat
