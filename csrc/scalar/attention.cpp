// Attention in portable code: the specification of the other levels.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "half.h"
#include "levels.h"

namespace tinychat {
namespace {

// fp32 to fp16, to nearest, ties to even.
uint16_t narrow(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    uint32_t half;
    if (bits > 0x7f800000) {
        half = 0x7e00;  // not a number
    } else if (bits >= 0x477ff000) {
        half = 0x7c00;  // 65520 and above
    } else if (bits < 0x38800000) {
        // Subnormal: beside 0.5, the last bit of a float is worth 2^-24, and the addition rounds to it.
        const float aligned = from_bits(bits) + 0.5f;
        std::memcpy(&half, &aligned, sizeof half);
        half -= 0x3f000000;
    } else {
        half = (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
    }
    return static_cast<uint16_t>(sign | half);
}

void rotate(float* head, const float* cos, const float* sin, int64_t half) {
    for (int64_t j = 0; j < half; ++j) {
        const float first = head[j], second = head[j + half];
        head[j] = first * cos[j] - second * sin[j];
        head[j + half] = second * cos[j] + first * sin[j];
    }
}

void store_codes(const float* x, int64_t dim, int8_t* codes, float* scale) {
    float largest = 0, spoilt = 0;  // the second is NaN where a value is, or is infinite
    for (int64_t d = 0; d < dim; ++d) {
        largest = std::max(largest, std::abs(x[d]));
        spoilt += x[d] * 0;
    }
    *scale = largest / 127 + spoilt;
    for (int64_t d = 0; d < dim; ++d) {
        // A scale that underflowed to 0 stands for zeros; one that lost digits to it must not lead beyond 127.
        const float code = *scale > 0 ? std::nearbyint(x[d] / *scale) : 0;
        codes[d] = static_cast<int8_t>(std::min(std::max(code, -127.0f), 127.0f));
    }
}

void store_entry(CacheType type, const float* x, int64_t dim, int64_t position, void* entries, float* scales) {
    const int64_t at = position * dim;
    if (type == CacheType::f32) {
        std::memcpy(static_cast<float*>(entries) + at, x, static_cast<size_t>(dim) * sizeof(float));
    } else if (type == CacheType::f16) {
        for (int64_t d = 0; d < dim; ++d) static_cast<uint16_t*>(entries)[at + d] = narrow(x[d]);
    } else {
        store_codes(x, dim, static_cast<int8_t*>(entries) + at, scales + position);
    }
}

void store(const CacheView& cache, const float* key, const float* value, int64_t dim, int64_t position) {
    store_entry(cache.type, key, dim, position, cache.keys, cache.key_scales);
    store_entry(cache.type, value, dim, position, cache.values, cache.value_scales);
}

// Value d of an entry.
float entry_value(CacheType type, const void* entries, const float* scales, int64_t dim, int64_t position, int64_t d) {
    const int64_t at = position * dim + d;
    if (type == CacheType::f32) return static_cast<const float*>(entries)[at];
    if (type == CacheType::f16) return from_half(static_cast<const uint16_t*>(entries)[at]);
    return static_cast<float>(static_cast<const int8_t*>(entries)[at]) * scales[position];
}

int64_t scratch(const QueryGroup&, int64_t, int64_t entries) { return entries; }

void attend(const CacheView& cache, const QueryGroup& group, const QueryRows& rows, int64_t begin, int64_t end, float* scores,
            const Partial& partial) {
    for (int64_t query = 0; query < rows.rows * group.heads; ++query) {
        const int64_t i = query / group.heads, h = query % group.heads, dim = group.dim, position = rows.position + i;
        const int64_t first = rows.window ? std::max(begin, position + 1 - rows.window) : begin;
        const int64_t after = std::min(end, position + 1);
        const float* q = rows.q + i * rows.stride + h * dim;
        float* out = partial.out + i * partial.stride + h * dim;
        float largest = -INFINITY;
        for (int64_t j = first; j < after; ++j) {
            float dot = 0;
            for (int64_t d = 0; d < dim; ++d) {
                dot += q[d] * entry_value(cache.type, cache.keys, cache.key_scales, dim, j, d);
            }
            scores[j - begin] = dot * group.scale;
            if (group.cap != 0) scores[j - begin] = group.cap * std::tanh(scores[j - begin] / group.cap);
            if (group.slopes) scores[j - begin] += group.slopes[h] * static_cast<float>(j - position);
            largest = std::max(largest, scores[j - begin]);
        }
        float sum = 0;
        std::fill(out, out + dim, 0.0f);
        for (int64_t j = first; j < after; ++j) {
            const float weight = std::exp(scores[j - begin] - largest);
            sum += weight;
            for (int64_t d = 0; d < dim; ++d) {
                out[d] += weight * entry_value(cache.type, cache.values, cache.value_scales, dim, j, d);
            }
        }
        partial.maximum[query] = largest;
        partial.sum[query] = sum;
    }
}

}  // namespace

const AttentionKernels& attention_scalar() {
    static const AttentionKernels table{rotate, store, scratch, attend};
    return table;
}

}  // namespace tinychat
