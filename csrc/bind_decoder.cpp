// The lowered decoder for Python: raw addresses in, checked by tinychat/backends/cpu.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <exception>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "decoder.h"

namespace py = pybind11;
using namespace tinychat;

namespace {

using Address = uintptr_t;
using SegmentArgs = std::tuple<LinearShape, Address, Address, Address>;  // shape, values, scales, zeros
using LinearArgs = std::pair<std::vector<SegmentArgs>, Address>;         // segments, bias or 0

using NormArgs = std::pair<Address, Address>;  // weight, bias or 0

template <class T = void>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

NormData norm_data(const NormArgs& args) { return {pointer<const float>(args.first), pointer<const float>(args.second)}; }

LinearData linear_data(const LinearArgs& args) {
    LinearData data{{}, pointer<const float>(args.second)};
    for (const auto& [shape, values, scales, zeros] : args.first) {
        data.segments.push_back({shape, {pointer(values), pointer(scales), pointer(zeros)}});
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

}  // namespace

void bind_decoder(py::module_& m) {
    using release = py::call_guard<py::gil_scoped_release>;
    py::enum_<NormType>(m, "NormType").value("rms", NormType::rms).value("layer", NormType::layer);
    py::enum_<Activation>(m, "Activation").value("silu", Activation::silu).value("gelu", Activation::gelu);
    py::enum_<CacheType>(m, "CacheType").value("f16", CacheType::f16).value("f32", CacheType::f32);

    py::class_<Decoder>(m, "Decoder", "A packed model and its step; see csrc/decoder.h. Not checked: the addresses.")
        .def(py::init([](const std::string& isa, int n_threads, int64_t vocab_size, int64_t hidden_size, int64_t n_heads,
                         int64_t n_kv_heads, int64_t head_dim, int64_t intermediate_size, int64_t rope_dim, float norm_eps,
                         NormType norm_type, Activation activation, bool gated, bool parallel,
                         std::vector<int64_t> windows) {
                 const DecoderShape shape{vocab_size,        hidden_size, n_heads,   n_kv_heads, head_dim,
                                          intermediate_size, rope_dim,    norm_eps,  norm_type,  activation,
                                          gated,             parallel,    std::move(windows)};
                 return std::make_unique<Decoder>(shape, kernels(isa.c_str()), n_threads);
             }),
             py::kw_only(), py::arg("isa"), py::arg("n_threads"), py::arg("vocab_size"), py::arg("hidden_size"),
             py::arg("n_heads"), py::arg("n_kv_heads"), py::arg("head_dim"), py::arg("intermediate_size"),
             py::arg("rope_dim"), py::arg("norm_eps"), py::arg("norm_type"), py::arg("activation"), py::arg("gated"),
             py::arg("parallel"), py::arg("windows"))
        .def(
            "set_embed", [](Decoder& decoder, WeightType type, Address table) { decoder.set_embed(type, pointer(table)); },
            release())
        .def(
            "add_layer",
            [](Decoder& decoder, const NormArgs& norm1, const NormArgs& norm2, Address q_norm, Address k_norm, const LinearArgs& qkv,
               const LinearArgs& out, const LinearArgs& up, const LinearArgs& down) {
                decoder.add_layer({norm_data(norm1), norm_data(norm2), pointer<const float>(q_norm), pointer<const float>(k_norm), linear_data(qkv), linear_data(out), linear_data(up),
                                   linear_data(down)});
            },
            py::kw_only(), py::arg("norm1"), py::arg("norm2"), py::arg("q_norm"), py::arg("k_norm"), py::arg("qkv"),
            py::arg("out"), py::arg("up"), py::arg("down"), release())
        .def(
            "finish",
            [](Decoder& decoder, const NormArgs& norm, const std::optional<LinearArgs>& head) {
                const LinearData data = head ? linear_data(*head) : LinearData{};
                decoder.finish(norm_data(norm), head ? &data : nullptr);
            },
            release())
        .def_property_readonly("weight_bytes", &Decoder::weight_bytes)
        .def("profile", [](Decoder& decoder, bool on) { decoder.profile(on); }, "Begin anew, or stop.")
        .def("profiled",
             [](const Decoder& decoder) {
                 const Decoder::Profile p = decoder.profile();
                 return std::make_tuple(p.steps, p.steps_ns, p.busy_ns, p.n_threads);
             },
             "(steps, nanoseconds inside them, nanoseconds of all threads inside their work, threads)")
        .def(
            "step",
            [](Decoder& decoder, int64_t rows, Address tokens, Address embeddings, Address positions, Address slots,
               Address cos, Address sin, int64_t n_wanted, Address wanted, CacheType cache_type, int64_t n_slots,
               int64_t capacity, Address keys, Address values, Address logits) {
                const Step step{rows, pointer<const int32_t>(tokens), pointer<const float>(embeddings),
                                pointer<const int32_t>(positions), pointer<const int32_t>(slots), pointer<const float>(cos),
                                pointer<const float>(sin), n_wanted, pointer<const int32_t>(wanted), cache_type, n_slots,
                                capacity, pointer(keys), pointer(values), pointer<float>(logits)};
                without_interpreter([&] { decoder.step(step); });
            },
            py::kw_only(), py::arg("rows"), py::arg("tokens"), py::arg("embeddings"), py::arg("positions"),
            py::arg("slots"), py::arg("cos"), py::arg("sin"), py::arg("n_wanted"), py::arg("wanted"),
            py::arg("cache_type"), py::arg("n_slots"), py::arg("capacity"), py::arg("keys"), py::arg("values"),
            py::arg("logits"));

    // The block kernels one by one, for tests.
    m.def("rms_norm", [](const char* isa, Address x, Address weight, float eps, int64_t n, Address y) {
        kernels(isa).block.rms_norm(pointer<const float>(x), pointer<const float>(weight), eps, n, pointer<float>(y));
    });
    m.def("add", [](const char* isa, Address x, Address y, int64_t n) {
        kernels(isa).block.add(pointer<float>(x), pointer<const float>(y), n);
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
    m.def("store", [](const char* isa, CacheType type, Address x, int64_t n, Address entry) {
        kernels(isa).attention.store(type, pointer<const float>(x), n, pointer(entry));
    });
    m.def("attend", [](const char* isa, CacheType type, Address q, int64_t q_stride, Address keys, Address values,
                       int64_t begin, int64_t end, int64_t heads, int64_t dim, float scale, Address scores, Address out,
                       int64_t out_stride) {
        kernels(isa).attention.attend(type, pointer<const float>(q), q_stride, pointer(keys), pointer(values), begin, end,
                                      heads, dim, scale, pointer<float>(scores), pointer<float>(out), out_stride);
    });
}
