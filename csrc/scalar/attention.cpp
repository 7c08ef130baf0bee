// Attention in portable code: the specification of the other levels.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "half.h"
#include "levels.h"

namespace tinychat {
namespace {

float widen(float value) { return value; }

float widen(uint16_t half) { return from_half(half); }

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

void store(CacheType type, const float* x, int64_t n, void* entry) {
    if (type == CacheType::f32) {
        std::memcpy(entry, x, static_cast<size_t>(n) * sizeof(float));
        return;
    }
    auto* halves = static_cast<uint16_t*>(entry);
    for (int64_t i = 0; i < n; ++i) halves[i] = narrow(x[i]);
}

template <class Entry>
void attend_head(const float* q, const Entry* keys, const Entry* values, int64_t begin, int64_t end, int64_t dim,
                 float scale, float* scores, float* out) {
    float largest = -INFINITY;
    for (int64_t j = begin; j < end; ++j) {
        float dot = 0;
        for (int64_t d = 0; d < dim; ++d) dot += q[d] * widen(keys[j * dim + d]);
        scores[j - begin] = dot * scale;
        largest = std::max(largest, scores[j - begin]);
    }
    float sum = 0;
    std::fill(out, out + dim, 0.0f);
    for (int64_t j = begin; j < end; ++j) {
        const float weight = std::exp(scores[j - begin] - largest);
        sum += weight;
        for (int64_t d = 0; d < dim; ++d) out[d] += weight * widen(values[j * dim + d]);
    }
    for (int64_t d = 0; d < dim; ++d) out[d] /= sum;
}

void attend(CacheType type, const float* q, int64_t q_stride, const void* keys, const void* values, int64_t begin,
            int64_t end, int64_t heads, int64_t dim, float scale, float* scores, float* out, int64_t out_stride) {
    for (int64_t h = 0; h < heads; ++h) {
        const float* q_head = q + h * q_stride;
        float* out_head = out + h * out_stride;
        if (type == CacheType::f16) {
            attend_head(q_head, static_cast<const uint16_t*>(keys), static_cast<const uint16_t*>(values), begin, end, dim,
                        scale, scores, out_head);
        } else {
            attend_head(q_head, static_cast<const float*>(keys), static_cast<const float*>(values), begin, end, dim, scale,
                        scores, out_head);
        }
    }
}

}  // namespace

const AttentionKernels& attention_scalar() {
    static const AttentionKernels table{store, attend};
    return table;
}

}  // namespace tinychat
