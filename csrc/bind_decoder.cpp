// The lowered decoder for Python: raw addresses in, checked by tinychat/backends/cpu.py.
#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <functional>
#include <initializer_list>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "decoder.h"
#include "draw.h"

namespace py = pybind11;
using namespace tinychat;

namespace {

using Address = uintptr_t;
using SegmentArgs =  // shape, source, values, scales, zeros, permutation or 0, strides of a row and of a word
    std::tuple<LinearShape, Source, Address, Address, Address, Address, int64_t, int64_t>;
using LinearArgs = std::pair<std::vector<SegmentArgs>, Address>;                 // segments, bias or 0

using NormArgs = std::pair<Address, Address>;  // weight, bias or 0

template <class T = void>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

NormData norm_data(const NormArgs& args) { return {pointer<const float>(args.first), pointer<const float>(args.second)}; }

LinearData linear_data(const LinearArgs& args) {
    LinearData data{{}, pointer<const float>(args.second)};
    for (const auto& [shape, source, values, scales, zeros, permutation, row, word] : args.first) {
        data.segments.push_back({shape, {pointer(values), pointer(scales), pointer(zeros), source, row, word,
                                         pointer<const int32_t>(permutation)}});
    }
    return data;
}

// Runs `work` while other Python threads run. Not a py::gil_scoped_release: where the interpreter has ended meanwhile,
// Python ends this thread by unwinding it, which out of a destructor ends the process with an abort.
template <class Work>
void without_interpreter(const Work& work) {
    PyThreadState* state = PyEval_SaveThread();
    std::exception_ptr error;
    try {
        work();
    } catch (...) {
        error = std::current_exception();
    }
    PyEval_RestoreThread(state);
    if (error) std::rethrow_exception(error);
}

struct Half {
    uint16_t bits;
};

template <class T>
bool holds(const py::array& array) {
    if constexpr (std::is_same_v<T, Half>) {
        return array.itemsize() == 2 && array.dtype().kind() == 'f';
    } else {
        return py::isinstance<py::array_t<T>>(array);
    }
}

// The numbers of a contiguous array of the given shape; ValueError where it is anything else.
template <class T>
T* numbers(const py::array& array, std::initializer_list<int64_t> shape, const char* name) {
    const bool fits = holds<T>(array) && (array.flags() & py::array::c_style) &&
                      std::equal(array.shape(), array.shape() + array.ndim(), shape.begin(), shape.end());
    if (!fits) {
        std::string expected;
        for (int64_t n : shape) expected += (expected.empty() ? "" : ", ") + std::to_string(n);
        throw std::invalid_argument(std::string(name) + ": " + py::str(array.dtype()).cast<std::string>() + " " +
                                    py::str(array.attr("shape")).cast<std::string>() +
                                    " do not fit the step; expected contiguous numbers of " + std::to_string(sizeof(T)) +
                                    " bytes [" + expected + "]");
    }
    return static_cast<T*>(const_cast<void*>(array.data()));
}

// The arrays of a cache, as tinychat/cache.py has them.
struct Cache {
    py::array keys, values;
    std::optional<py::array> key_scales, value_scales;

    // A step of nothing yet, on them.
    Step step(const DecoderShape& shape) const {
        if (keys.ndim() != 5) throw std::invalid_argument("the cache has " + std::to_string(keys.ndim()) + " axes, not 5");
        const int64_t n_slots = keys.shape(1), capacity = keys.shape(3);
        const int64_t n_layers = static_cast<int64_t>(shape.windows.size());
        Step made{};
        made.n_slots = n_slots;
        made.capacity = capacity;
        made.cache_type = keys.itemsize() == 4 ? CacheType::f32 : keys.itemsize() == 2 ? CacheType::f16 : CacheType::q8;
        const auto entries = [&](const py::array& array, const char* name) -> void* {
            const std::initializer_list<int64_t> sizes{n_layers, n_slots, shape.n_kv_heads, capacity, shape.head_dim};
            if (made.cache_type == CacheType::f32) return numbers<float>(array, sizes, name);
            if (made.cache_type == CacheType::q8) return numbers<int8_t>(array, sizes, name);
            return numbers<Half>(array, sizes, name);
        };
        const auto scales = [&](const std::optional<py::array>& array, const char* name) -> float* {
            if (made.cache_type != CacheType::q8) return nullptr;
            if (!array) throw std::invalid_argument(std::string(name) + " of an int8 cache are missing");
            return numbers<float>(*array, {n_layers, n_slots, shape.n_kv_heads, capacity}, name);
        };
        made.keys = entries(keys, "keys");
        made.values = entries(values, "values");
        made.key_scales = scales(key_scales, "key scales");
        made.value_scales = scales(value_scales, "value scales");
        return made;
    }
};

void step(Decoder& decoder, const std::optional<py::array>& tokens, const std::optional<py::array>& embeddings,
          const py::array& positions, const py::array& slots, const py::array& wanted, const py::array& cos,
          const py::array& sin, const py::array& keys, const py::array& values,
          const std::optional<py::array>& key_scales, const std::optional<py::array>& value_scales, const py::array& logits) {
    const DecoderShape& shape = decoder.shape();
    const int64_t n = positions.size(), half = shape.rope_dim / 2, n_ropes = shape.n_ropes();
    Step step = Cache{keys, values, key_scales, value_scales}.step(shape);
    step.rows = n;
    step.tokens = tokens && !embeddings ? numbers<int32_t>(*tokens, {n}, "tokens") : nullptr;
    step.embeddings = embeddings ? numbers<float>(*embeddings, {n, shape.hidden_size}, "embeddings") : nullptr;
    step.positions = numbers<int32_t>(positions, {n}, "positions");
    step.slots = numbers<int32_t>(slots, {n}, "slots");
    step.cos = numbers<float>(cos, {n_ropes, n, half}, "cos");
    step.sin = numbers<float>(sin, {n_ropes, n, half}, "sin");
    step.n_wanted = wanted.size();
    step.wanted = numbers<int32_t>(wanted, {step.n_wanted}, "wanted");
    step.logits = numbers<float>(logits, {step.n_wanted, shape.vocab_size}, "logits");
    without_interpreter([&] { decoder.step(step); });
}

void check(int64_t top_k, int64_t n_logits) {
    if (n_logits < 1 || top_k < 0 || top_k >= n_logits) {
        throw std::invalid_argument("top_k must be 0 or below the number of logits");
    }
}

// One slot's answer, token by token: what is the same for all of them is looked at once.
class Follower {
  public:
    Follower(py::object decoder, int32_t slot, py::array lengths, Cache cache, DrawParams how, py::function turn,
             py::object random)
        : owner_(std::move(decoder)), decoder_(owner_.cast<Decoder&>()), lengths_(std::move(lengths)),
          cache_(std::move(cache)), how_(how), turn_(std::move(turn)), random_(std::move(random)), slot_(slot),
          logits_(static_cast<size_t>(decoder_.shape().vocab_size)),
          peaks_(logits_.size() / kPeak + 1), step_(cache_.step(decoder_.shape())) {
        if (slot < 0 || slot >= step_.n_slots) throw std::invalid_argument("a slot is not in the cache");
        check(how_.top_k, decoder_.shape().vocab_size);
        length_ = numbers<int32_t>(lengths_, {step_.n_slots}, "lengths") + slot;
        step_.rows = step_.n_wanted = 1;
        step_.tokens = &token_;
        step_.positions = &position_;
        step_.slots = &slot_;
        step_.wanted = &wanted_;
        step_.logits = logits_.data();
        step_.peaks = peaks_.data();
    }
    Follower(const Follower&) = delete;
    Follower& operator=(const Follower&) = delete;

    int64_t operator()(int32_t token) {
        token_ = token;
        position_ = *length_;
        if (position_ >= step_.capacity) {
            throw std::invalid_argument(std::to_string(position_ + 1) + " positions in a cache of " +
                                        std::to_string(step_.capacity));
        }
        if (position_ < first_ || position_ >= first_ + turned_) turn();
        const int64_t at = (position_ - first_) * decoder_.shape().n_ropes() * (decoder_.shape().rope_dim / 2);
        step_.cos = static_cast<const float*>(cos_.data()) + at;
        step_.sin = static_cast<const float*>(sin_.data()) + at;
        const double number = random_.is_none() ? 0 : next_number();
        int64_t drawn = -1;
        without_interpreter([&] {
            decoder_.step(step_);
            drawn = draw(decoder_.kernels().block, step_.logits, step_.peaks, decoder_.shape().vocab_size, how_, number);
        });
        *length_ = position_ + 1;
        return drawn;
    }

  private:
    double next_number() {
        if (n_used_ == n_numbers_) {
            const py::array more = random_();
            const int64_t n = more.size();
            numbers<double>(more, {n}, "random numbers");
            if (n < 1) throw std::invalid_argument("no random numbers");
            numbers_ = more;
            n_numbers_ = n;
            n_used_ = 0;
        }
        return static_cast<const double*>(numbers_.data())[n_used_++];
    }

    // The angles of the positions from this one on.
    void turn() {
        const auto [cos, sin] = turn_(position_).cast<std::pair<py::array, py::array>>();
        const int64_t n_ropes = decoder_.shape().n_ropes(), half = decoder_.shape().rope_dim / 2;
        const int64_t n = cos.ndim() ? cos.shape(0) : 0;
        if (n < 1) throw std::invalid_argument("no angles for a position");
        numbers<float>(cos, {n, n_ropes, half}, "cos");
        numbers<float>(sin, {n, n_ropes, half}, "sin");
        cos_ = cos;
        sin_ = sin;
        first_ = position_;
        turned_ = n;
    }

    const py::object owner_;
    Decoder& decoder_;
    const py::array lengths_;
    const Cache cache_;
    const DrawParams how_;
    const py::function turn_;
    const py::object random_;
    int32_t token_ = 0, position_ = 0, slot_, wanted_ = 0;
    int32_t* length_ = nullptr;
    int64_t first_ = 0, turned_ = 0;
    py::array cos_, sin_;
    py::array numbers_;
    int64_t n_numbers_ = 0, n_used_ = 0;
    std::vector<float> logits_, peaks_;
    Step step_;
};

}  // namespace

void bind_decoder(py::module_& m) {
    using release = py::call_guard<py::gil_scoped_release>;
    py::enum_<NormType>(m, "NormType").value("rms", NormType::rms).value("layer", NormType::layer);
    py::enum_<Activation>(m, "Activation").value("silu", Activation::silu).value("gelu", Activation::gelu).value(
        "gelu_tanh", Activation::gelu_tanh).value("relu", Activation::relu);
    py::enum_<BlockType>(m, "BlockType")
        .value("sequential", BlockType::sequential)
        .value("parallel", BlockType::parallel)
        .value("post_norm", BlockType::post_norm);
    py::enum_<CacheType>(m, "CacheType").value("f16", CacheType::f16).value("f32", CacheType::f32).value(
        "q8", CacheType::q8);

    py::class_<ExpertsShape>(m, "ExpertsShape")
        .def(py::init([](int64_t n_experts, int64_t n_used, int64_t intermediate_size, int64_t shared_size, bool normalized) {
                 return ExpertsShape{n_experts, n_used, intermediate_size, shared_size, normalized};
             }),
             py::arg("n_experts"), py::arg("n_used"), py::arg("intermediate_size"), py::arg("shared_size"),
             py::arg("normalized"));
    py::class_<DecoderShape>(m, "DecoderShape", "Whoever makes one sets every field.")
        .def(py::init<>())
        .def_readwrite("vocab_size", &DecoderShape::vocab_size)
        .def_readwrite("hidden_size", &DecoderShape::hidden_size)
        .def_readwrite("n_heads", &DecoderShape::n_heads)
        .def_readwrite("n_kv_heads", &DecoderShape::n_kv_heads)
        .def_readwrite("head_dim", &DecoderShape::head_dim)
        .def_readwrite("intermediate_size", &DecoderShape::intermediate_size)
        .def_readwrite("rope_dim", &DecoderShape::rope_dim)
        .def_readwrite("rope_interleaved", &DecoderShape::rope_interleaved)
        .def_readwrite("norm_eps", &DecoderShape::norm_eps)
        .def_readwrite("norm_type", &DecoderShape::norm_type)
        .def_readwrite("activation", &DecoderShape::activation)
        .def_readwrite("gated", &DecoderShape::gated)
        .def_readwrite("block", &DecoderShape::block)
        .def_readwrite("whole_qk_norm", &DecoderShape::whole_qk_norm)
        .def_readwrite("clip_qkv", &DecoderShape::clip_qkv)
        .def_readwrite("attention_scale", &DecoderShape::attention_scale)
        .def_readwrite("attention_cap", &DecoderShape::attention_cap)
        .def_readwrite("residual_scale", &DecoderShape::residual_scale)
        .def_readwrite("embed_size", &DecoderShape::embed_size)
        .def_readwrite("embed_scale", &DecoderShape::embed_scale)
        .def_readwrite("logit_cap", &DecoderShape::logit_cap)
        .def_readwrite("windows", &DecoderShape::windows)
        .def_readwrite("ropes", &DecoderShape::ropes)
        .def_readwrite("slopes", &DecoderShape::slopes)
        .def_readwrite("experts", &DecoderShape::experts);

    py::enum_<Reading>(m, "Reading", "How a decoder reads what no cache holds; see csrc/decoder.h.")
        .value("far", Reading::far)
        .value("near", Reading::near)
        .value("none", Reading::none)
        .value("two", Reading::two);
    py::class_<Decoder>(m, "Decoder", "A packed model and its step; see csrc/decoder.h. Not checked: the addresses.")
        .def(py::init([](const std::string& isa, int n_threads, int granted, const DecoderShape& shape) {
                 return std::make_unique<Decoder>(shape, kernels(isa.c_str()), n_threads, granted);
             }),
             py::kw_only(), py::arg("isa"), py::arg("n_threads"), py::arg("granted"), py::arg("shape"),
             "Of n_threads, `granted` run at the same moment at the most, whatever the cores.")
        .def(
            "set_embed", [](Decoder& decoder, WeightType type, Address table) { decoder.set_embed(type, pointer(table)); },
            release())
        .def(
            "set_embed", [](Decoder& decoder, const LinearArgs& table) { decoder.set_embed(linear_data(table)); }, release())
        .def(
            "set_ends",
            [](Decoder& decoder, WeightType type, Address positions, int64_t n_positions, const NormArgs& norm,
               const LinearArgs& project_in, const LinearArgs& project_out) {
                decoder.set_ends({type, pointer(positions), n_positions, norm_data(norm), linear_data(project_in),
                                  linear_data(project_out)});
            },
            py::kw_only(), py::arg("positions_type"), py::arg("positions"), py::arg("n_positions"), py::arg("norm"),
            py::arg("project_in"), py::arg("project_out"), release())
        .def(
            "add_layer",
            [](Decoder& decoder, const NormArgs& norm1, const NormArgs& norm2, const NormArgs& out_norm,
               const NormArgs& down_norm, Address q_norm, Address k_norm, const LinearArgs& qkv, const LinearArgs& out,
               const LinearArgs& up, const LinearArgs& down, Address act_scale, bool experts,
               const std::optional<LinearArgs>& shared_down) {
                LayerData data{norm_data(norm1), norm_data(norm2), norm_data(out_norm), norm_data(down_norm),
                               pointer<const float>(q_norm), pointer<const float>(k_norm), linear_data(qkv),
                               linear_data(out), linear_data(up), linear_data(down), pointer<const float>(act_scale)};
                data.experts = experts;
                if (shared_down) data.shared_down = linear_data(*shared_down);
                decoder.add_layer(data);
            },
            py::kw_only(), py::arg("norm1"), py::arg("norm2"), py::arg("out_norm"), py::arg("down_norm"),
            py::arg("q_norm"), py::arg("k_norm"), py::arg("qkv"), py::arg("out"), py::arg("up"), py::arg("down"),
            py::arg("act_scale") = 0, py::arg("experts") = false, py::arg("shared_down") = std::nullopt, release())
        .def(
            "finish",
            [](Decoder& decoder, const NormArgs& norm, const LinearArgs& head, std::optional<Reading> reading,
               std::function<void(size_t)> ready) {
                LinearData data = linear_data(head);
                data.ready = std::move(ready);
                decoder.finish(norm_data(norm), data, reading);
            },
            py::arg("norm"), py::arg("head"), py::arg("reading"), py::arg("ready") = std::function<void(size_t)>(), release())
        .def_property_readonly("weight_bytes", &Decoder::weight_bytes)
        .def_property_readonly("readings",
                               [](const Decoder& decoder) {
                                   py::dict readings;
                                   for (const auto& [linear, reading] : decoder.readings()) readings[linear.c_str()] = reading;
                                   return readings;
                               })
        .def("profile", [](Decoder& decoder, bool on) { decoder.profile(on); }, "Begin anew, or stop.")
        .def("profiled",
             [](const Decoder& decoder) {
                 const Decoder::Profile p = decoder.profile();
                 return std::make_tuple(p.steps, p.steps_ns, p.busy_ns, p.n_threads);
             },
             "(steps, nanoseconds inside them, nanoseconds of all threads inside their work, threads)")
        .def("step", &step, py::arg("tokens"), py::arg("embeddings"), py::arg("positions"), py::arg("slots"),
             py::arg("wanted"), py::arg("cos"), py::arg("sin"), py::arg("keys"), py::arg("values"),
             py::arg("key_scales"), py::arg("value_scales"), py::arg("logits"));

    m.def(
        "follower",
        [](const py::object& decoder, int32_t slot, const py::array& lengths, const py::array& keys, const py::array& values,
           const std::optional<py::array>& key_scales, const std::optional<py::array>& value_scales, int64_t top_k,
           float temperature, double top_p, float min_p, const py::function& turn, const py::object& random) {
            const auto follower = std::make_shared<Follower>(decoder, slot, lengths, Cache{keys, values, key_scales, value_scales},
                                                             DrawParams{top_k, temperature, top_p, min_p}, turn, random);
            return py::cpp_function([follower](int32_t token) { return (*follower)(token); });
        },
        "A function that runs a token where `slot` ends, lengthens it, and draws the next token: -1 where a logit is not "
        "finite. turn(position) gives cos and sin [n, n_ropes, rope_dim / 2] of positions from there on; random() gives "
        "numbers [n] of [0, 1), used one by one, or is None where nothing is to be drawn.",
        py::kw_only(), py::arg("decoder"), py::arg("slot"), py::arg("lengths"), py::arg("keys"), py::arg("values"),
        py::arg("key_scales"), py::arg("value_scales"), py::arg("top_k"), py::arg("temperature"), py::arg("top_p"),
        py::arg("min_p"), py::arg("turn"), py::arg("random"));
    m.def(
        "draw",
        [](Address logits, int64_t n, int64_t top_k, float temperature, double top_p, float min_p, double number) {
            check(top_k, n);
            const BlockKernels& block = kernels().block;
            std::vector<float> peaks(static_cast<size_t>(n / kPeak + 1));
            block.peaks(pointer<const float>(logits), n, peaks.data());
            return draw(block, pointer<const float>(logits), peaks.data(), n, {top_k, temperature, top_p, min_p}, number);
        },
        "The next token, or -1 where a logit is not finite; see csrc/draw.h. Not checked: the address.", py::arg("logits"),
        py::arg("n"), py::arg("top_k"), py::arg("temperature"), py::arg("top_p"), py::arg("min_p"),
        py::arg("number"));

    // The block kernels one by one, for tests.
    m.def("rms_norm", [](const char* isa, Address x, Address weight, float eps, int64_t n, Address y) {
        kernels(isa).block.rms_norm(pointer<const float>(x), pointer<const float>(weight), eps, n, pointer<float>(y));
    });
    m.def("soft_cap", [](const char* isa, Address x, float cap, int64_t n) {
        kernels(isa).block.soft_cap(pointer<float>(x), cap, n);
    });
    m.def("add", [](const char* isa, Address x, Address y, float factor, int64_t n) {
        kernels(isa).block.add(pointer<float>(x), pointer<const float>(y), factor, n);
    });
    m.def("moments", [](const char* isa, NormType type, Address x, int64_t n) {
        const Moments moments = kernels(isa).block.moments(type, pointer<const float>(x), n);
        return std::make_pair(moments.mean, moments.variance);
    });
    m.def("normalize", [](const char* isa, Address x, float mean, float factor, Address weight, Address bias, int64_t n,
                          Address y) {
        kernels(isa).block.normalize(pointer<const float>(x), mean, factor, pointer<const float>(weight),
                                     pointer<const float>(bias), n, pointer<float>(y));
    });
    m.def("activate", [](const char* isa, Activation activation, Address gate, Address up, int64_t n, Address y) {
        kernels(isa).block.activate(activation, pointer<const float>(gate), pointer<const float>(up), n, pointer<float>(y));
    });
    // The attention kernels. An address of 0 is a null pointer.
    py::class_<CacheView>(m, "CacheView")
        .def(py::init([](CacheType type, Address keys, Address values, Address key_scales, Address value_scales) {
                 return CacheView{type, pointer(keys), pointer(values), pointer<float>(key_scales),
                                  pointer<float>(value_scales)};
             }),
             py::arg("type"), py::arg("keys"), py::arg("values"), py::arg("key_scales") = 0, py::arg("value_scales") = 0);
    m.def("rotate", [](const char* isa, Address head, Address cos, Address sin, int64_t half) {
        kernels(isa).attention.rotate(pointer<float>(head), pointer<const float>(cos), pointer<const float>(sin), half);
    });
    m.def("store", [](const char* isa, const CacheView& cache, Address key, Address value, int64_t dim, int64_t position) {
        kernels(isa).attention.store(cache, pointer<const float>(key), pointer<const float>(value), dim, position);
    });
    m.def(
        "attend",
        [](const char* isa, const CacheView& cache, int64_t dim, int64_t heads, float scale, Address slopes, float cap, Address q,
           int64_t q_stride, int64_t rows, int64_t position, int64_t window, int64_t begin, int64_t end, Address out,
           int64_t out_stride, Address maximum, Address sum, Fetch fetch) {
            const AttentionKernels& attention = kernels(isa).attention;
            const QueryGroup group{dim, heads, scale, pointer<const float>(slopes), cap, fetch};
            const Buffer scratch(attention.scratch(group, rows, end - begin) * static_cast<int64_t>(sizeof(float)));
            attention.attend(cache, group, {pointer<const float>(q), q_stride, rows, position, window}, begin, end,
                             scratch.floats(),
                             {pointer<float>(out), out_stride, pointer<float>(maximum), pointer<float>(sum)});
        },
        py::arg("isa"), py::arg("cache"), py::kw_only(), py::arg("dim"), py::arg("heads"), py::arg("scale"),
        py::arg("slopes") = 0, py::arg("cap") = 0.0f, py::arg("q"), py::arg("q_stride"), py::arg("rows"), py::arg("position"),
        py::arg("window") = 0, py::arg("begin"), py::arg("end"), py::arg("out"), py::arg("out_stride"),
        py::arg("maximum"), py::arg("sum"), py::arg("fetch") = Fetch::far);
}
