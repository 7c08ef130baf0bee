// The lowered decoder of every level, as small models of random weights in the forms of checkpoints: against float64, with
// one thread, two and three, all rows of a prompt together and one by one.
#include <functional>
#include <map>
#include <numeric>

#include "decoder.h"
#include "weights.h"

namespace tinychat::test {
namespace {

using Numbers = std::vector<double>;

size_t index(int64_t i) { return static_cast<size_t>(i); }

enum class Form { codes, awq, stream, permuted, f16, rounded };

// Segments of a linear, and the weights that they stand for.
struct Linear {
    int64_t k = 0;
    Numbers weights;  // [n, k]
    LinearData data{{}, nullptr};
    std::vector<float> bias;
    std::vector<std::shared_ptr<void>> kept;

    template <class T>
    T& keep(T value) {
        const auto place = std::make_shared<T>(std::move(value));
        kept.push_back(place);
        return *place;
    }
    void add(Form form, int64_t n, int32_t activation_bits, Random& random) {
        const bool rounded = form == Form::rounded, stream = form == Form::stream, words = form == Form::awq && n % 8 == 0;
        const int64_t group = rounded ? 128 : words ? 24 : stream ? 40 : 32;
        Quantized& weight = keep(Quantized(n, k, group, rounded ? 8 : stream ? 3 : 4, activation_bits, random));
        LinearShape shape = weight.shape;
        WeightData source = weight.data();
        std::vector<int32_t> order(index(k));
        std::iota(order.begin(), order.end(), 0);
        std::vector<float> values;
        if (form == Form::permuted) {
            for (int64_t i = k; i > 1; i--) std::swap(order[index(i - 1)], order[index(random.below(i))]);
            source = keep(Stream(weight, true, order)).data(weight);
        } else if (stream) {
            source = keep(Stream(weight, false)).data(weight);
        } else if (words) {
            source = keep(AwqWords(weight)).data();
        } else if (rounded || form == Form::f16) {
            std::vector<uint16_t>& halves = keep(std::vector<uint16_t>(index(n * k)));
            for (uint16_t& half : halves) values.push_back(from_half(half = to_half(0.1f * random.normal())));
            source = {halves.data(), nullptr, nullptr, Source::f16};
            if (rounded) round_symmetric(values, false, weight);
            else shape = {WeightType::f16, n, k, k, false, 0, 0};
        }
        data.segments.push_back({shape, source});
        const size_t first = weights.size();
        weights.resize(first + index(n * k));
        for (int64_t i = 0; i < n * k; i++) {
            const size_t at = first + index(i / k * k + order[index(i % k)]);
            weights[at] = form == Form::f16 ? values[index(i)] : weight.weight(i / k, i % k);
        }
    }
    // Outputs `begin` .. `end`, or all.
    Numbers operator()(const Numbers& x, int64_t begin = 0, int64_t end = -1) const {
        Numbers y;
        for (int64_t row = begin; row < (end < 0 ? static_cast<int64_t>(weights.size()) / k : end); row++) {
            const double* weight = weights.data() + row * k;
            y.push_back(std::inner_product(x.begin(), x.end(), weight, bias.empty() ? 0.0 : bias[index(row)]));
        }
        return y;
    }
};

struct Norm {
    std::vector<float> weight, bias;

    NormData data() const { return {weight.empty() ? nullptr : weight.data(), bias.empty() ? nullptr : bias.data()}; }
};

struct Layer {
    Norm norm1, norm2, out_norm, down_norm, q_norm, k_norm;
    std::vector<float> act_scale;
    Linear qkv, out, up, down, shared_down;
};

struct Row {
    int32_t slot, position, token;
};

// What a model has beside its shape.
struct Plan {
    std::string name;
    std::vector<Form> forms;
    int32_t prompt = 9, activation_bits = 16;
    bool biases = false, tied = false, embed_norm = false, positions = false;
    bool added_norms = false, qk_norm = false, act_scale = false, table_of_codes = false;
    DecoderShape shape{50, 72, 4, 2, 16, 104, 16, false, 1e-5f, NormType::rms, Activation::silu, true, BlockType::sequential,
                       false, 0, 0.25f, 0, 1, 72, 1, 0, {0, 0}, {0, 0}, {}, {}};
};

class Model {
  public:
    explicit Model(const Plan& plan) : plan_(plan), shape_(plan.shape), random_(19) {
        const DecoderShape& s = shape_;
        const ExpertsShape& e = s.experts;
        const int64_t hidden = s.hidden_size, factor = s.gated ? 2 : 1;
        for (size_t l = 0; l < s.windows.size(); l++) {
            const bool whole = s.whole_qk_norm;
            Layer layer;
            layer.norm1 = norm();
            if (s.block != BlockType::parallel) layer.norm2 = norm();
            if (plan.added_norms) layer.out_norm = norm(), layer.down_norm = norm();
            if (plan.qk_norm) layer.q_norm = {vector(whole ? s.q_size() : s.head_dim), {}};
            if (plan.qk_norm) layer.k_norm = {vector(whole ? s.kv_size() : s.head_dim), {}};
            layer.qkv = linear(hidden, {s.q_size(), s.kv_size(), s.kv_size()});
            layer.out = linear(s.q_size(), {hidden});
            if (plan.act_scale) layer.act_scale = vector(s.intermediate_size);
            if (e.n_experts) {
                std::vector<int64_t> up{e.router_size()};
                if (e.shared_size) up.insert(up.end(), 2, e.shared_size);
                up.insert(up.end(), index(2 * e.n_experts), e.intermediate_size);
                layer.up = linear(hidden, up);
                layer.down = linear(e.intermediate_size, std::vector<int64_t>(index(e.n_experts), hidden));
                if (e.shared_size) layer.shared_down = linear(e.shared_size, {hidden});
            } else {
                layer.up = linear(hidden, std::vector<int64_t>(index(factor), s.intermediate_size));
                layer.down = linear(s.intermediate_size, {hidden});
            }
            layers_.push_back(std::move(layer));
        }
        norm_ = norm();
        if (plan.embed_norm) embed_norm_ = norm();
        if (plan.positions) positions_ = random_.normals((plan.prompt + 2) * hidden);
        if (s.embed_size != hidden) project_in_ = linear(s.embed_size, {hidden});
        if (s.embed_size != hidden) project_out_ = linear(hidden, {s.embed_size});
        head_.k = s.embed_size;
        head_.add(Form::rounded, s.vocab_size, plan.activation_bits, random_);
        coded_table_.k = s.embed_size;
        if (plan.table_of_codes) coded_table_.add(Form::codes, s.vocab_size, plan.activation_bits, random_);
        table_.resize(index(plan.tied || plan.table_of_codes ? 0 : s.vocab_size * s.embed_size));
        for (uint16_t& value : table_) value = to_half(random_.normal());
    }

    std::unique_ptr<Decoder> decoder(const Kernels& kernels, int threads, std::optional<Reading> reading) const {
        auto made = std::make_unique<Decoder>(shape_, kernels, threads, threads);
        const float* positions = positions_.empty() ? nullptr : positions_.data();
        made->set_ends({WeightType::f32, positions, plan_.prompt + 2, embed_norm_.data(), project_in_.data, project_out_.data});
        for (const Layer& l : layers_) {
            made->add_layer({l.norm1.data(), l.norm2.data(), l.out_norm.data(), l.down_norm.data(), l.q_norm.data().weight,
                             l.k_norm.data().weight, l.qkv.data, l.out.data, l.up.data, l.down.data,
                             l.act_scale.empty() ? nullptr : l.act_scale.data(), shape_.experts.n_experts > 0,
                             l.shared_down.data});
        }
        made->finish(norm_.data(), head_.data, reading);
        if (plan_.table_of_codes) made->set_embed(coded_table_.data);
        else if (!plan_.tied) made->set_embed(WeightType::f16, table_.data());
        return made;
    }

    // A prompt in slot 1 and another in slot 0, then a row of each alone, then both in one step.
    std::vector<Row> rows() const {
        std::vector<Row> rows;
        const auto add = [&](int32_t slot, int32_t position) { rows.push_back({slot, position, position * (7 + slot) % 50}); };
        for (int32_t i = 0; i < plan_.prompt; i++) add(1, i);
        for (int32_t i = 0; i < 6; i++) add(0, i);
        for (int32_t i = 0; i < 2; i++) add(1, plan_.prompt + i), add(0, 6 + i);
        return rows;
    }

    // Of the rows, in steps of those sizes, with a cache in which what was never written is NaN.
    std::vector<float> logits(Decoder& decoder, CacheType type, const std::vector<int64_t>& steps) const {
        const DecoderShape& s = shape_;
        const int64_t capacity = plan_.prompt + 2, entries = 2 * static_cast<int64_t>(layers_.size()) * s.n_kv_heads * capacity;
        const int64_t bytes = entries * s.head_dim * (type == CacheType::f32 ? 4 : type == CacheType::f16 ? 2 : 1);
        const Memory keys(bytes), values(bytes), key_scales(entries * 4), value_scales(entries * 4);
        for (const Memory* memory : {&keys, &values}) std::memset(memory->data(), 255, index(bytes));
        for (const Memory* memory : {&key_scales, &value_scales}) std::memset(memory->data(), 255, index(entries * 4));
        const std::vector<Row> rows = this->rows();
        std::vector<float> logits(rows.size() * index(s.vocab_size), NAN);
        size_t first = 0;
        for (int64_t T : steps) {
            std::vector<int32_t> tokens(index(T)), positions(tokens), slots(tokens), wanted(tokens);
            for (size_t t = 0; t < tokens.size(); t++) {
                const Row& row = rows[first + t];
                tokens[t] = row.token, positions[t] = row.position, slots[t] = row.slot, wanted[t] = static_cast<int32_t>(t);
            }
            const int64_t half = s.rope_dim / 2;
            std::vector<float> cos(index(s.n_ropes() * T * half)), sin(cos);
            for (int64_t i = 0; i < s.n_ropes() * T * half; i++) {
                const double turn = angle(i / half / T, positions[index(i / half % T)], i % half);
                cos[index(i)] = static_cast<float>(std::cos(turn)), sin[index(i)] = static_cast<float>(std::sin(turn));
            }
            decoder.step({T, tokens.data(), nullptr, positions.data(), slots.data(), cos.data(), sin.data(), T, wanted.data(),
                          type, 2, capacity, keys.data(), values.data(), reinterpret_cast<float*>(key_scales.data()),
                          reinterpret_cast<float*>(value_scales.data()), logits.data() + first * index(s.vocab_size)});
            first += index(T);
        }
        return logits;
    }

    // The same in float64.
    Numbers expected() const {
        const bool post = shape_.block == BlockType::post_norm, parallel = shape_.block == BlockType::parallel;
        std::map<std::pair<size_t, int32_t>, std::vector<Numbers>> entries;  // of a layer and slot: k | v
        Numbers logits;
        for (const Row& row : rows()) {
            Numbers x = embedded(row);
            const auto add = [&](const Numbers& y) {
                for (size_t i = 0; i < x.size(); i++) x[i] += y[i] * shape_.residual_scale;
            };
            for (size_t l = 0; l < layers_.size(); l++) {
                const Layer& layer = layers_[l];
                const Numbers read = post ? x : normed(layer.norm1, x);
                const Numbers y = normed(layer.out_norm, layer.out(attended(l, row, layer.qkv(read), entries[{l, row.slot}])));
                if (parallel) {
                    const Numbers z = normed(layer.down_norm, mlp(layer, read));
                    add(y), add(z);
                    continue;
                }
                add(y);
                if (post) x = normed(layer.norm1, x);
                add(normed(layer.down_norm, mlp(layer, post ? x : normed(layer.norm2, x))));
                if (post) x = normed(layer.norm2, x);
            }
            x = normed(norm_, x);
            Numbers own = head_(project_out_.k ? project_out_(x) : x);
            for (double& logit : own) logit = capped(logit, shape_.logit_cap);
            logits.insert(logits.end(), own.begin(), own.end());
        }
        return logits;
    }

  private:
    std::vector<float> vector(int64_t n) {
        std::vector<float> values(index(n));
        for (float& value : values) value = static_cast<float>(0.5 + random_.uniform());
        return values;
    }
    Norm norm() {
        const bool layer = shape_.norm_type == NormType::layer;
        return {vector(shape_.hidden_size), layer ? random_.normals(shape_.hidden_size) : std::vector<float>{}};
    }
    Linear linear(int64_t k, const std::vector<int64_t>& segments) {
        Linear made;
        made.k = k;
        for (int64_t n : segments) made.add(plan_.forms[next_++ % plan_.forms.size()], n, plan_.activation_bits, random_);
        if (plan_.biases) made.bias = random_.normals(std::accumulate(segments.begin(), segments.end(), int64_t{0}));
        if (plan_.biases) made.data.bias = made.bias.data();
        return made;
    }

    static double capped(double value, float cap) { return cap != 0 ? cap * std::tanh(value / cap) : value; }
    double angle(int64_t rope, int32_t position, int64_t j) const {
        return position * std::pow(rope ? 100.0 : 10000.0, -2.0 * j / shape_.rope_dim);
    }
    Numbers embedded(const Row& row) const {
        const int64_t width = shape_.embed_size, hidden = shape_.hidden_size;
        const Numbers& coded = (plan_.tied ? head_ : coded_table_).weights;
        Numbers x;
        for (int64_t i = row.token * width; i < (row.token + 1) * width; i++) {
            x.push_back(shape_.embed_scale * (coded.empty() ? from_half(table_[index(i)]) : coded[index(i)]));
        }
        if (project_in_.k) x = project_in_(x);
        if (plan_.positions) {
            for (int64_t i = 0; i < hidden; i++) x[index(i)] += positions_[index(row.position * hidden + i)];
        }
        return normed(embed_norm_, x);
    }
    Numbers normed(const Norm& norm, Numbers x) const {
        rescale(norm, shape_.norm_type, x.data(), x.size());
        return x;
    }
    void rescale(const Norm& norm, NormType type, double* x, size_t n) const {
        if (norm.weight.empty()) return;
        const double count = static_cast<double>(n), mean = type == NormType::rms ? 0 : std::accumulate(x, x + n, 0.0) / count;
        double variance = 0;
        for (size_t i = 0; i < n; i++) variance += (x[i] - mean) * (x[i] - mean) / count;
        for (size_t i = 0; i < n; i++) {
            x[i] = (x[i] - mean) / std::sqrt(variance + shape_.norm_eps) * norm.weight[i];
            if (!norm.bias.empty()) x[i] += norm.bias[i];
        }
    }
    // Of each head, the values that it mixes; the row's key and value become an entry.
    Numbers attended(size_t l, const Row& row, Numbers qkv, std::vector<Numbers>& entries) const {
        const DecoderShape& s = shape_;
        const size_t dim = index(s.head_dim), q_size = index(s.q_size()), kv_size = index(s.kv_size());
        const double clip = s.clip_qkv != 0 ? s.clip_qkv : INFINITY;
        for (double& value : qkv) value = std::clamp(value, -clip, clip);
        const Norm &q_norm = layers_[l].q_norm, &k_norm = layers_[l].k_norm;
        if (s.whole_qk_norm) {
            rescale(q_norm, NormType::rms, qkv.data(), q_size);
            rescale(k_norm, NormType::rms, qkv.data() + q_size, kv_size);
        }
        for (int64_t h = 0; h < s.n_heads + s.n_kv_heads; h++) {
            double* head = qkv.data() + index(h) * dim;
            if (!s.whole_qk_norm) rescale(h < s.n_heads ? q_norm : k_norm, NormType::rms, head, dim);
            for (int64_t j = 0; j < (s.ropes[l] < 0 ? 0 : s.rope_dim / 2); j++) {
                double& a = head[s.rope_interleaved ? 2 * j : j];
                double& b = head[s.rope_interleaved ? 2 * j + 1 : j + s.rope_dim / 2];
                const double turn = angle(s.ropes[l], row.position, j), first = a;
                a = a * std::cos(turn) - b * std::sin(turn);
                b = b * std::cos(turn) + first * std::sin(turn);
            }
        }
        entries.emplace_back(qkv.begin() + s.q_size(), qkv.end());
        const size_t begin = index(s.windows[l] ? std::max<int64_t>(0, row.position + 1 - s.windows[l]) : 0);
        Numbers mixed(q_size, 0);
        for (size_t h = 0; h < index(s.n_heads); h++) {
            const size_t from = h / index(s.group()) * dim;
            double total = 0;
            for (size_t j = begin; j < entries.size(); j++) {
                const double dot = std::inner_product(&qkv[h * dim], &qkv[h * dim] + dim, &entries[j][from], 0.0);
                const double slope = s.slopes.empty() ? 0 : s.slopes[h], distance = static_cast<double>(entries.size() - 1 - j);
                const double weight = std::exp(capped(dot * s.attention_scale, s.attention_cap) - slope * distance);
                total += weight;
                for (size_t d = 0; d < dim; d++) mixed[h * dim + d] += weight * entries[j][kv_size + from + d];
            }
            for (size_t d = 0; d < dim; d++) mixed[h * dim + d] /= total;
        }
        return mixed;
    }
    // What `down` reads of n gates at `at`, which `up` follows.
    Numbers activated(const double* at, int64_t n, const std::vector<float>& act_scale) const {
        Numbers y(at, at + n);
        for (size_t i = 0; i < y.size(); i++) {
            const double x = y[i];
            if (shape_.activation == Activation::silu) y[i] = x / (1 + std::exp(-x));
            if (shape_.activation == Activation::gelu) y[i] = x * std::erfc(-x / std::sqrt(2.0)) / 2;
            if (shape_.activation == Activation::relu) y[i] = std::max(x, 0.0);
            if (shape_.gated) y[i] *= at[index(n) + i];
            if (!act_scale.empty()) y[i] /= act_scale[i];
        }
        return y;
    }
    Numbers mlp(const Layer& layer, const Numbers& x) const {
        const ExpertsShape& e = shape_.experts;
        const int64_t hidden = shape_.hidden_size;
        const Numbers up = layer.up(x);
        if (!e.n_experts) return layer.down(activated(up.data(), shape_.intermediate_size, layer.act_scale));
        std::vector<int64_t> order(index(e.n_experts));
        std::iota(order.begin(), order.end(), 0);
        std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return up[index(a)] > up[index(b)]; });
        double total = 0;
        for (int64_t i = 0; i < (e.normalized ? e.n_used : e.n_experts); i++) total += std::exp(up[index(order[index(i)])]);
        Numbers z(index(hidden), 0);
        const auto add = [&](double share, const Numbers& y) {
            for (size_t i = 0; i < z.size(); i++) z[i] += share * y[i];
        };
        for (int64_t i = 0; i < e.n_used; i++) {
            const int64_t expert = order[index(i)], at = e.router_size() + 2 * (e.shared_size + expert * e.intermediate_size);
            const Numbers inner = activated(up.data() + at, e.intermediate_size, {});
            add(std::exp(up[index(expert)]) / total, layer.down(inner, expert * hidden, (expert + 1) * hidden));
        }
        if (e.shared_size) {
            const Numbers inner = activated(up.data() + e.router_size(), e.shared_size, {});
            add(1 / (1 + std::exp(-up[index(e.n_experts)])), layer.shared_down(inner));
        }
        return z;
    }

    const Plan plan_;
    const DecoderShape shape_;
    Random random_;
    size_t next_ = 0;  // of the forms
    std::vector<Layer> layers_;
    Linear head_, coded_table_, project_in_, project_out_;
    Norm norm_, embed_norm_;
    std::vector<float> positions_;
    std::vector<uint16_t> table_;
};

std::vector<Plan> plans() {
    using Forms = std::vector<Form>;
    const Forms mixed{Form::awq, Form::codes, Form::f16, Form::rounded, Form::stream};
    std::vector<Plan> all;
    const auto add = [&](const char* name, const Forms& forms, const std::function<void(Plan&, DecoderShape&)>& change) {
        Plan plan{name, forms};
        change(plan, plan.shape);
        all.push_back(plan);
    };
    add("like Llama", {Form::awq}, [](Plan&, DecoderShape&) {});
    add("long rows, which threads share", {Form::awq}, [](Plan&, DecoderShape& s) {
        s.intermediate_size = 2120, s.residual_scale = 0.5f, s.logit_cap = 3;
    });
    add("activations of 8 bits", mixed, [](Plan& plan, DecoderShape&) { plan.activation_bits = 8; });
    add("parallel blocks of one norm, a plain MLP, biases", mixed, [](Plan& plan, DecoderShape& s) {
        s.block = BlockType::parallel, s.norm_type = NormType::layer, s.activation = Activation::gelu, s.gated = false;
        s.rope_dim = 8, s.rope_interleaved = true;
        plan.biases = plan.tied = true;
    });
    add("post-norm, learned positions, projections", {Form::stream, Form::f16}, [](Plan& plan, DecoderShape& s) {
        s.block = BlockType::post_norm, s.norm_type = NormType::layer, s.activation = Activation::relu, s.gated = false;
        s.ropes = {-1, -1}, s.embed_size = 40;
        plan.positions = plan.biases = true;
    });
    add("ALiBi over pieces of entries, clipped", {Form::codes}, [](Plan& plan, DecoderShape& s) {
        s.n_kv_heads = 1, s.ropes = {-1, -1}, s.slopes = {0.5f, 0.25f, 0.0625f, 0.0078125f}, s.clip_qkv = 1;
        plan.embed_norm = plan.table_of_codes = true, plan.prompt = 140;
    });
    add("windows, two rotations, norms of all kinds, caps", mixed, [](Plan& plan, DecoderShape& s) {
        s.windows = {3, 0}, s.ropes = {1, 0}, s.attention_cap = 2, s.logit_cap = 3, s.embed_scale = 3, s.residual_scale = 0.5f;
        plan.added_norms = plan.qk_norm = plan.tied = true;
    });
    add("permuted, act_scale, norm of all heads", {Form::permuted, Form::awq}, [](Plan& plan, DecoderShape& s) {
        s.whole_qk_norm = true, s.intermediate_size = 1064;
        plan.act_scale = plan.qk_norm = true;
    });
    add("experts", mixed, [](Plan&, DecoderShape& s) { s.experts = {5, 2, 40, 0, true}; });
    add("experts, a shared one", {Form::f16, Form::awq}, [](Plan&, DecoderShape& s) { s.experts = {6, 2, 40, 56, false}; });
    return all;
}

// NMSE of logits against float64. Rounding is what is left: of activations to 16 bits, at most 1e-8 for each linear
// (csrc/linear_layout.h), of entries to fp16 or 8 bits.
double limit(const Plan& plan, CacheType type) {
    if (plan.activation_bits == 8 || type == CacheType::q8) return 2e-4;
    return type == CacheType::f16 ? 3e-7 : 1e-8;
}

// NMSE between rows together and one by one, whose sums differ in the last bits of fp32: where that takes a value over a
// limit of rounding, an integer or an entry is another one, a step away.
double limit_apart(const Plan& plan, CacheType type) {
    return plan.activation_bits == 8 || type == CacheType::q8 ? 1e-6 : 1e-8;
}

}  // namespace

void test_decoder() {
    for (const Plan& plan : plans()) {
        const Model model(plan);
        const Numbers expected = model.expected();
        const int64_t rows = static_cast<int64_t>(model.rows().size()), together = plan.prompt + 6, long_one = plan.prompt - 9;
        std::vector<int64_t> one_by_one(index(rows - long_one), 1);
        one_by_one.front() += long_one;  // but for the beginning of a long prompt
        for (const std::string& isa : isas()) {
            const Kernels& kernels = tinychat::kernels(isa.c_str());
            const std::unique_ptr<Decoder> one = model.decoder(kernels, 1, Reading::near), three = model.decoder(kernels, 3, {});
            const std::unique_ptr<Decoder> two = model.decoder(kernels, 2, Reading::two);  // of two heads each may take one
            for (const CacheType type : {CacheType::f32, CacheType::f16, CacheType::q8}) {
                const char* cache = type == CacheType::f32 ? "f32" : type == CacheType::f16 ? "f16" : "q8";
                const std::string where = plan.name + ", cache " + cache + ", " + isa;
                const std::vector<float> found = model.logits(*one, type, {together, 1, 1, 2});
                const double error = nmse(expected, found.data());
                check(error <= limit(plan, type), "NMSE " + std::to_string(error * 1e9) + "e-9 of a decoder: " + where);
                const std::vector<float> threaded = model.logits(*three, type, {together, 1, 1, 2});
                check(std::memcmp(found.data(), threaded.data(), found.size() * 4) == 0,
                      "one thread and three compute the same bits: " + where);
                const std::vector<float> alone = model.logits(*one, type, one_by_one);
                const double apart = nmse(Numbers(found.begin(), found.end()), alone.data());
                check(apart <= limit_apart(plan, type),
                      "NMSE " + std::to_string(apart * 1e9) + "e-9 of rows one by one: " + where);
                for (Decoder* threads : {two.get(), three.get()}) {
                    const std::vector<float> some = model.logits(*threads, type, one_by_one);
                    check(std::memcmp(alone.data(), some.data(), some.size() * 4) == 0, "row by row, of any threads: " + where);
                }
            }
        }
    }
}

}  // namespace tinychat::test
