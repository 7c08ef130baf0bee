// The attention kernels as their callers see them: pointers of the device, checked in Python.
//
// Rows are tokens of a step. One lies at positions[row] of the cache's slot slots[row]; both are read on the device, so
// that a captured launch serves every later token.
#pragma once

#include <cstddef>

#include "stream.h"

namespace tinychat::cuda {

using Index = long long;  // as torch has its indices

constexpr int kWidestHead = 256;
constexpr int kMostSplits = 64;  // of a row's positions among blocks

// Queries, keys and values as the linear made them: before norms and rotation.
struct Heads {
    const void* q;  // [rows, n_heads, head_dim], rows q_stride numbers apart
    const void* k;  // [rows, n_kv_heads, head_dim], likewise
    const void* v;
    size_t q_stride;
    size_t k_stride;
    size_t v_stride;
    int rows;
    int n_heads;
    int n_kv_heads;
    int head_dim;
    bool bf16;             // q, k, v and what attention returns; else they are fp16
    const float* q_norm;   // [head_dim], or null: no norms
    const float* k_norm;
    float eps;
    const float* cos;      // [angles, rope_dim / 2]
    const float* sin;
    const Index* angles;   // [rows]: the row of cos and sin
    int rope_dim;          // 0: no rotation
    bool interleaved;      // dimension 2j turns with 2j + 1, else j with j + rope_dim / 2
    const Index* positions;
    const Index* slots;
};

// Keys and values of one layer: [n_slots, n_kv_heads, capacity, padded], padded a multiple of 8 and zero past head_dim.
struct Cache {
    void* keys;           // fp16, or codes of int8
    void* values;
    float* key_scales;    // of int8: [n_slots, n_kv_heads, capacity]; else null
    float* value_scales;
    int capacity;
    int padded;
};

struct AttentionArguments {
    Heads heads;
    Cache cache;
    void* out;            // [rows, n_heads * head_dim]
    float scale;          // of q . k
    float cap;            // scores become cap * tanh(score / cap); 0: they stay
    const float* slopes;  // [n_heads] of ALiBi, or null
    int window;           // positions that a row sees, its own included; 0: all
    // Rows not yet in the cache, one a slot: the kernel turns k, appends k and v, and turns q itself. Else k and v are in
    // the cache already and heads.q is what `prepare` made.
    bool append;
    int splits;           // blocks among which a row's positions are shared, at most kMostSplits
    float* partial;       // [rows, n_heads, splits, padded + 2] where splits > 1
    int* arrived;         // [rows, n_heads] zeros, and zeros again afterwards
};

// softmax(q . k) v of every row over the positions of its slot up to its own.
void attention(const AttentionArguments& arguments, Stream stream);

// Norm and rotation of q into `q`, fp16 [rows, n_heads, padded], zero past head_dim; those of k, and v, into the cache.
void prepare(const Heads& heads, const Cache& cache, void* q, Stream stream);

}  // namespace tinychat::cuda
