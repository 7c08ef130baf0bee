// The lowered decoder: a model's weights in packed form, and the whole step as one call. The graph is in decoder.cpp.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "buffer.h"
#include "kernels.h"
#include "packed_linear.h"
#include "threads.h"

namespace tinychat {

// The numbers of a ModelConfig.
struct DecoderShape {
    int64_t vocab_size, hidden_size, n_heads, n_kv_heads, head_dim, intermediate_size;
    int64_t rope_dim;              // rotated dimensions of each head
    float norm_eps;
    std::vector<int64_t> windows;  // [n_layers]: positions that a token sees, itself included; 0: all

    int64_t group() const { return n_heads / n_kv_heads; }
    int64_t q_size() const { return n_heads * head_dim; }
    int64_t kv_size() const { return n_kv_heads * head_dim; }
    int64_t qkv_size() const { return q_size() + 2 * kv_size(); }
};

struct LayerData {
    const float* norm1;   // [hidden_size]
    const float* norm2;   // [hidden_size]
    const float* q_norm;  // [head_dim], or null
    const float* k_norm;  // [head_dim], or null
    LinearData qkv, out, up, down;
};

// One step of T rows (tinychat/cache.py states the contract).
struct Step {
    int64_t rows;             // T
    const int32_t* tokens;    // [T], or null
    const float* embeddings;  // [T, hidden_size] where tokens is null
    const int32_t* positions;  // [T]
    const int32_t* slots;      // [T]
    const float* cos;          // [T, rope_dim / 2]
    const float* sin;          // [T, rope_dim / 2]
    int64_t n_wanted;          // R
    const int32_t* wanted;     // [R]
    CacheType cache_type;
    int64_t n_slots, capacity;
    void* keys;     // [n_layers, n_slots, n_kv_heads, capacity, head_dim]
    void* values;   // likewise
    float* logits;  // [R, vocab_size]
};

class Decoder {
  public:
    Decoder(const DecoderShape& shape, const Kernels& kernels, int n_threads);
    ~Decoder();

    // Weights come in once, layers in order; these calls pack what they are given. Throw std::invalid_argument where
    // sizes do not fit the shape.
    void add_layer(const LayerData& layer);
    void finish(const float* norm, const LinearData& head);
    // The embedding, where the head's rows do not serve (tied): [vocab_size, hidden_size] of a type other than quantized.
    // Not packed and not copied: rows are read there as long as the decoder lives.
    void set_embed(WeightType type, const void* table);

    int64_t weight_bytes() const { return weight_bytes_; }

    // Throws std::invalid_argument where an index is out of its range, std::runtime_error where the decoder is not
    // finished or another thread is inside step().
    void step(const Step& step);

  private:
    struct Layer {
        Buffer norm1, norm2;    // [hidden_size]
        Buffer q_norm, k_norm;  // [head_dim], or nothing
        PackedLinear qkv, out, up, down;
    };

    PackedLinear pack(const LinearData& data, int64_t n, int64_t k);
    Buffer keep(const float* values, int64_t n);
    void check(const Step& step) const;
    void reserve(int64_t rows, int64_t length);
    void forward(const Step& step);
    void embed(const Step& step, int64_t row);
    void prepare(const PackedLinear& linear, const float* x, int64_t row, int64_t rows);
    void apply(const PackedLinear& linear, int64_t rows, float* y, int64_t y_stride);
    void append(const Step& step, size_t layer);
    void attend(const Step& step, size_t layer);
    void* entries(const Step& step, void* cache, size_t layer, int64_t row, int64_t head, int64_t position) const;
    Team& team();

    const DecoderShape shape_;
    const Kernels kernels_;
    const int n_threads_;
    std::unique_ptr<Team> team_;
    std::atomic<bool> busy_{false};
    int64_t weight_bytes_ = 0;

    WeightType table_type_ = WeightType::f32;
    const void* table_ = nullptr;  // [vocab_size, hidden_size]; null: rows of the head serve, and are held once
    std::vector<Layer> layers_;
    Buffer norm_;                   // [hidden_size]
    PackedLinear head_;
    bool finished_ = false;

    // Scratch, for as many rows as any step so far had.
    Buffer x_;            // [T, hidden_size], the residual stream
    Buffer y_;            // [T, hidden_size], what the last linear adds to it
    Buffer normed_;       // [T, hidden_size]
    Buffer qkv_;          // [T, q_size + 2 * kv_size]
    Buffer mixed_;        // [T, q_size], the values that attention mixed
    Buffer gate_up_;      // [T, 2 * intermediate_size]
    Buffer activations_;  // [T, activation_bytes] for each preparation of a linear
    Buffer scores_;       // [n_threads, group, longest slot]
    int64_t activation_bytes_ = 0;  // of one row, the most that any linear needs
};

}  // namespace tinychat
