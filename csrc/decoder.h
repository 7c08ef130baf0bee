// The lowered decoder: a model's weights in packed form, and the whole step as one call. The graph is in decoder.cpp.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "attention_plan.h"
#include "buffer.h"
#include "kernels.h"
#include "packed_linear.h"
#include "routing.h"
#include "threads.h"

namespace tinychat {

// What the norms 1 and 2 of a block are of: what attention and MLP read, one after the other or the same x; or the sums.
enum class BlockType : int32_t { sequential = 0, parallel = 1, post_norm = 2 };

// The numbers of a ModelConfig.
struct DecoderShape {
    int64_t vocab_size, hidden_size, n_heads, n_kv_heads, head_dim, intermediate_size;
    int64_t rope_dim;              // rotated dimensions of each head
    bool rope_interleaved;         // dimension 2j pairs with 2j + 1, else j with j + rope_dim / 2
    float norm_eps;
    NormType norm_type;
    Activation activation;
    bool gated;                    // the MLP is down(act(gate) * up), else down(act(up))
    BlockType block;
    bool whole_qk_norm;            // norms of q and k are over all heads together, else over each
    float clip_qkv;                // q, k and v are held within +-clip_qkv; 0: they are not
    float attention_scale;         // of q . k
    float attention_cap;           // scores become cap * tanh(score / cap); 0: they do not
    float residual_scale;          // of what attention and MLP add
    int64_t embed_size;            // columns of embedding and head
    float embed_scale;             // of a token's embedding
    float logit_cap;               // as attention_cap
    std::vector<int64_t> windows;  // [n_layers]: positions that a token sees, itself included; 0: all
    std::vector<int64_t> ropes;    // [n_layers]: which of a step's tables of angles turn q and k; -1: none
    std::vector<float> slopes;     // [n_heads] of ALiBi, or nothing
    ExpertsShape experts;          // in place of the MLP of some layers

    int64_t group() const { return n_heads / n_kv_heads; }
    int64_t q_size() const { return n_heads * head_dim; }
    int64_t kv_size() const { return n_kv_heads * head_dim; }
    int64_t qkv_size() const { return q_size() + 2 * kv_size(); }
    int64_t n_ropes() const { return ropes.empty() ? 0 : *std::max_element(ropes.begin(), ropes.end()) + 1; }
    int64_t up_size() const { return (gated ? 2 : 1) * intermediate_size; }
};

struct NormData {
    const float* weight;  // [hidden_size]
    const float* bias;    // [hidden_size], or null
};

// A norm whose weight is null is not applied; where norm2 is none of a parallel block, norm1 serves.
struct LayerData {
    NormData norm1, norm2;
    NormData out_norm;    // of what attention adds
    NormData down_norm;   // of what the MLP adds
    const float* q_norm;  // [head_dim], or of all heads, or null
    const float* k_norm;  // likewise
    LinearData qkv, out, up, down;
    const float* act_scale;  // [intermediate_size], or null: what `down` reads is divided by it
    // Of a layer with experts `up` is router | the shared expert's up | up of each expert, all of which read the same rows,
    // and `down` is that of each expert.
    bool experts = false;
    LinearData shared_down{};
};

// What stands before the first block and after the last, beside embedding, final norm and head.
struct EndsData {
    WeightType positions_type;
    const void* positions;  // [n_positions, hidden_size] of a type other than quantized, or null; read in place
    int64_t n_positions;
    NormData norm;          // of the embedding with its position, or null
    LinearData project_in;  // [hidden_size, embed_size], where those differ
    LinearData project_out;
};

// One step of T rows (tinychat/cache.py states the contract).
struct Step {
    int64_t rows;             // T
    const int32_t* tokens;    // [T], or null
    const float* embeddings;  // [T, hidden_size] where tokens is null
    const int32_t* positions;  // [T]
    const int32_t* slots;      // [T]
    const float* cos;          // [n_ropes, T, rope_dim / 2]
    const float* sin;          // [n_ropes, T, rope_dim / 2]
    int64_t n_wanted;          // R
    const int32_t* wanted;     // [R]
    CacheType cache_type;
    int64_t n_slots, capacity;
    void* keys;     // [n_layers, n_slots, n_kv_heads, capacity, head_dim]
    void* values;   // likewise
    float* key_scales;    // [n_layers, n_slots, n_kv_heads, capacity], of q8 only
    float* value_scales;  // likewise
    float* logits;  // [R, vocab_size]
    float* peaks = nullptr;  // [ceil(vocab_size / kPeak)], of the logits of the first wanted row (BlockKernels); null: not asked
};

// How a decoder reads what no cache holds: as Fetch has it, or asking for nothing and two tiles at once.
enum class Reading : int32_t { far = 0, near = 1, none = 2, two = 3 };
constexpr Fetch fetch_of(Reading reading) {
    return reading == Reading::two ? Fetch::none : static_cast<Fetch>(reading);
}

class Decoder {
  public:
    Decoder(const DecoderShape& shape, const Kernels& kernels, int n_threads, int granted);
    ~Decoder();

    // Weights come in once, layers in order; these calls pack what they are given. Throw std::invalid_argument where
    // sizes do not fit the shape.
    void add_layer(const LayerData& layer);
    void set_ends(const EndsData& ends);
    // reading: of weights and cache; nothing: what is fastest for each linear is found out here, in a tenth of a second.
    void finish(const NormData& norm, const LinearData& head, std::optional<Reading> reading);
    // The embedding, where the head's rows do not serve (tied): [vocab_size, embed_size] of a type other than quantized.
    // Not packed and not copied: rows are read there as long as the decoder lives.
    void set_embed(WeightType type, const void* table);
    // The same of a table of codes, which is packed.
    void set_embed(const LinearData& table);

    const DecoderShape& shape() const { return shape_; }
    const Kernels& kernels() const { return kernels_; }
    int64_t weight_bytes() const { return weight_bytes_; }
    // What the linears of all layers that do the same are called, and how they are read.
    const std::vector<std::pair<std::string, Reading>>& readings() const { return readings_; }

    // Throws std::invalid_argument where an index is out of its range, std::runtime_error where the decoder is not
    // finished or another thread is inside step().
    void step(const Step& step);

    // From when it is switched on: time inside steps, and the time of all threads inside the work of their phases. What
    // is left of n_threads * steps_ns is waiting and handing over.
    struct Profile {
        int64_t steps, steps_ns, busy_ns;
        int n_threads;
    };
    void profile(bool on);
    Profile profile() const { return profile_; }

  private:
    struct Norm {
        Buffer weight;  // [hidden_size]
        Buffer bias;    // [hidden_size], or nothing
    };
    struct Reader {  // what reads x next, normed; linear null: nothing yet
        const Norm* norm;
        const PackedLinear* linear;
    };
    struct Layer {
        Norm norm1, norm2, out_norm, down_norm;  // see LayerData
        Buffer q_norm, k_norm;
        Buffer inverse_scale;   // [intermediate_size], 1 / act_scale, or nothing
        PackedLinear qkv, out, up, down;
        PackedLinear shared_down;
        std::vector<size_t> expert_up, expert_down;  // [n_experts + 1] segments at which experts begin; empty: no experts
        size_t router_end = 0;                       // segments
    };

    struct Input {  // what a linear reads
        const float* values;  // [rows, size]; null: x
        int64_t size;
        const Norm* norm = nullptr;       // of x
        const int32_t* wanted = nullptr;  // which rows of x; null: all
        const Layer* mlp = nullptr;       // values are its gate | up, or its up: what is read is their activation
    };

    PackedLinear pack(const LinearData& data, int64_t n, int64_t k);
    Buffer keep(const float* values, int64_t n);
    Norm keep(const NormData& norm);
    void check(const Step& step) const;
    void reserve(int64_t rows);
    void forward(const Step& step);
    void enter(const Step& step, const Reader& reader);
    void embed(const Step& step, int64_t row, float* x) const;
    void normalize(const Norm& norm, float* row) const;
    void add(const Step& step, const Norm& added, float* y, const Norm& sum, const Reader& reader);
    void settled(const Step& step, int64_t row, const Reader& reader, int thread);
    Moments* moments() { return reinterpret_cast<Moments*>(moments_.data()); }
    const float* input(const Input& input, const Moments& moments, int64_t row, Range part, float* piece) const;
    void prepare_row(const PackedLinear& linear, const Input& input, const Moments& moments, int64_t row, int64_t rows,
                     int thread, char* activations) const;
    void prepare(const PackedLinear& linear, int64_t rows, const Input& input);
    void prepare_rest(const Reader& reader, int64_t rows);
    const char* prepared(const PackedLinear& linear, const Input& input, uint64_t phase, int thread);
    // One phase: work(row, thread) for each row.
    template <class Work>
    void each(int64_t rows, const Work& work) {
        team_->run(rows, [&](Range part, int thread) {
            for (int64_t t = part.begin; t < part.end; ++t) work(t, thread);
        });
    }
    int64_t piece(const PackedLinear& linear) const;
    void apply(const PackedLinear& linear, int64_t rows, float* y, int64_t y_stride);
    template <class Then>
    void apply(const PackedLinear& linear, int64_t rows, float* y, int64_t y_stride, const Then& then);
    void apply_and_add(const PackedLinear& linear, float* y, const float* before, const Reader& reader);
    void plan(const Step& step);
    void attend(const Step& step, size_t layer);
    bool takes_heads(size_t layer) const;
    void attend_by_heads(const Step& step, size_t layer);
    void attend_piece(const Step& step, size_t layer, const Piece& piece, int64_t head, float* scratch);
    Partial partial_of(const Piece& piece, int64_t head, int64_t index) const;
    void merge(const Piece& piece, int64_t head, float* mixed) const;
    float* queries(int64_t row, int64_t head) const;
    void turn_queries(const Step& step, size_t layer, int64_t row, float* q) const;
    void turn(const Step& step, size_t layer, const Buffer& norm, int64_t row, float* head) const;
    void clip(float* values) const;
    void norm_whole(const Step& step, size_t layer);
    void append(const Step& step, size_t layer, int64_t row, int64_t head) const;
    QueryGroup query_group(int64_t head) const;
    CacheView entries(const Step& step, size_t layer, int64_t row, int64_t head) const;
    struct Alike;
    std::vector<Alike> alike();
    void choose_readings();
    void read_as(Reading reading);
    void settle(const Alike& linears, Reading reading);
    void add_experts(const LayerData& data, Layer& layer);
    void reserve_experts(int64_t rows);
    void mix(const Layer& layer, int64_t rows);
    Team& team(int64_t process = this_process());

    const DecoderShape shape_;
    const Kernels kernels_;
    const int n_threads_, granted_;
    std::unique_ptr<Team> team_;
    Arena weights_;  // of the linears
    // The process that is in a step, perhaps one that this was forked from in its step: all of a step but the growth of
    // buffers, of its plan too, may be begun anew.
    std::atomic<int64_t> stepping_{0};
    int64_t weight_bytes_ = 0;

    WeightType table_type_ = WeightType::f32;
    const void* table_ = nullptr;  // [vocab_size, embed_size]; null: rows of packed_table_, if any, or of the head serve
    PackedLinear packed_table_;
    std::vector<Layer> layers_;
    WeightType positions_type_ = WeightType::f32;
    const void* positions_ = nullptr;  // [n_positions_, hidden_size]
    int64_t n_positions_ = 0;
    Norm embed_norm_, norm_;
    PackedLinear project_in_, project_out_, head_;
    std::vector<std::pair<std::string, Reading>> readings_;
    Fetch cache_fetch_ = Fetch::far;  // as the first layer's qkv
    bool finished_ = false;

    // Scratch, for as many rows as any step so far had.
    Buffer x_;            // [T, hidden_size], the residual stream
    Buffer y_;            // [T, hidden_size], what attention adds to it
    Buffer z_;            // [T, hidden_size], what the MLP adds to it
    Buffer moments_;      // [T], Moments of the rows of x_
    Buffer narrow_;       // [T, embed_size], where that is not hidden_size
    Buffer qkv_;          // [T, q_size + 2 * kv_size]
    Buffer mixed_;        // [T, q_size], the values that attention mixed
    Buffer gate_up_;      // [T, up_size]
    Buffer pieces_;       // [n_threads, piece_], parts of rows on their way into activations_
    Buffer whole_;        // [T, whole_size_], rows that a permuted linear gathers its inputs from
    Buffer activations_;  // [T, activation_bytes] for each preparation of a linear; or a row for each thread
    int64_t activation_bytes_ = 0;  // of one row, the most that any linear needs
    int64_t piece_ = 0;             // values, likewise
    int64_t whole_size_ = 0;        // the most inputs that a permuted linear has
    Profile profile_{};
    bool profiling_ = false;

    // In a plain step of one row each thread prepares what it reads for itself: see prepare().
    struct alignas(64) Prepared {
        uint64_t phase = 0;  // the last one that the thread has prepared its input of
    };
    bool plain_ = true;        // no linear is permuted, no layer has experts
    bool single_row_ = false;  // plain_, and the step has one row, wanted or not
    std::optional<Input> input_;  // of the next linear; nothing: it is prepared
    uint64_t phase_ = 0;          // linears so far, of all steps
    std::vector<Prepared> prepared_;  // [n_threads]

    // Of layers with experts (decoder_experts.cpp).
    Routing routing_;
    std::vector<PackedLinear::Part> parts_;
    Buffer router_;    // [T, router_size]
    Buffer gathered_;  // prepared rows of `up`, one for each pair
    Buffer outputs_;   // [T * n_used + T, hidden_size]: of each pair, then of the shared expert
    int64_t pair_bytes_ = 0, shared_bytes_ = 0, gathered_bytes_ = 0;  // prepared for down, shared_down, up; the most

    AttentionPlan plan_;
    Buffer scratch_;            // [n_threads, scratch_size_]: of attention
    int64_t scratch_size_ = 0;  // floats
    Buffer partials_;           // see partial_of()
    std::unique_ptr<std::atomic<int64_t>[]> finished_pieces_;  // [n_kv_heads, plan_.runs()]: pieces done in a layer
    int64_t n_counters_ = 0;
};

}  // namespace tinychat
