// The lowered decoder for Python: raw addresses in, checked by tinychat/backends/cpu.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <exception>
#include <string>
#include <tuple>
#include <vector>

#include "decoder.h"

namespace py = pybind11;
using namespace tinychat;

namespace {

using Address = uintptr_t;
using SegmentArgs = std::tuple<LinearShape, Source, Address, Address, Address>;  // shape, source, values, scales, zeros
using LinearArgs = std::pair<std::vector<SegmentArgs>, Address>;                 // segments, bias or 0

template <class T = void>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

LinearData linear_data(const LinearArgs& args) {
    LinearData data{{}, pointer<const float>(args.second)};
    for (const auto& [shape, source, values, scales, zeros] : args.first) {
        data.segments.push_back({shape, {pointer(values), pointer(scales), pointer(zeros), source}});
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
    py::enum_<CacheType>(m, "CacheType").value("f16", CacheType::f16).value("f32", CacheType::f32);

    py::class_<Decoder>(m, "Decoder", "A packed model and its step; see csrc/decoder.h. Not checked: the addresses.")
        .def(py::init([](const std::string& isa, int n_threads, int64_t vocab_size, int64_t hidden_size, int64_t n_heads,
                         int64_t n_kv_heads, int64_t head_dim, int64_t intermediate_size, int64_t rope_dim, float norm_eps,
                         std::vector<int64_t> windows) {
                 const DecoderShape shape{vocab_size,        hidden_size, n_heads,  n_kv_heads,        head_dim,
                                          intermediate_size, rope_dim,    norm_eps, std::move(windows)};
                 return std::make_unique<Decoder>(shape, kernels(isa.c_str()), n_threads);
             }),
             py::kw_only(), py::arg("isa"), py::arg("n_threads"), py::arg("vocab_size"), py::arg("hidden_size"),
             py::arg("n_heads"), py::arg("n_kv_heads"), py::arg("head_dim"), py::arg("intermediate_size"),
             py::arg("rope_dim"), py::arg("norm_eps"), py::arg("windows"))
        .def(
            "set_embed", [](Decoder& decoder, WeightType type, Address table) { decoder.set_embed(type, pointer(table)); },
            release())
        .def(
            "add_layer",
            [](Decoder& decoder, Address norm1, Address norm2, Address q_norm, Address k_norm, const LinearArgs& qkv,
               const LinearArgs& out, const LinearArgs& up, const LinearArgs& down) {
                decoder.add_layer({pointer<const float>(norm1), pointer<const float>(norm2), pointer<const float>(q_norm),
                                   pointer<const float>(k_norm), linear_data(qkv), linear_data(out), linear_data(up),
                                   linear_data(down)});
            },
            py::kw_only(), py::arg("norm1"), py::arg("norm2"), py::arg("q_norm"), py::arg("k_norm"), py::arg("qkv"),
            py::arg("out"), py::arg("up"), py::arg("down"), release())
        .def(
            "finish",
            [](Decoder& decoder, Address norm, const LinearArgs& head) {
                decoder.finish(pointer<const float>(norm), linear_data(head));
            },
            release())
        .def_property_readonly("weight_bytes", &Decoder::weight_bytes)
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
    m.def("silu_multiply", [](const char* isa, Address gate, Address up, int64_t n, Address y) {
        kernels(isa).block.silu_multiply(pointer<const float>(gate), pointer<const float>(up), n, pointer<float>(y));
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
