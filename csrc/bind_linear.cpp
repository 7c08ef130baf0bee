// Packing and the per-op path for Python: raw addresses in, checked by tinychat/backends/cpu_linear.py.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <utility>

#include "kernels.h"
#include "levels.h"
#include "linear_layout.h"
#include "read_probe.h"

namespace py = pybind11;
using namespace tinychat;

namespace {

template <class T = void>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// Products of bytes that this CPU's vector instructions added in `rounds` rounds of nothing else; 0 where there is no such probe.
int64_t dot_peak(int64_t rounds) {
#if defined(__x86_64__)
    const std::string levels = supported_isas();
    if (levels.find("avx512") != std::string::npos && levels.find("avx512vnni") == std::string::npos) return 0;
    for (const auto& [level, peak] : {std::pair{"avx512vnni", dot_peak_avx512vnni}, {"avxvnni", dot_peak_avxvnni},
                                      {"avx2", dot_peak_avx2}}) {
        if (levels.find(level) != std::string::npos) return peak(rounds);
    }
#endif
    static_cast<void>(rounds);
    return 0;
}

}  // namespace

void bind_linear(py::module_& m) {
    using release = py::call_guard<py::gil_scoped_release>;
    py::enum_<WeightType>(m, "WeightType")
        .value("quantized", WeightType::quantized)
        .value("f32", WeightType::f32)
        .value("f16", WeightType::f16)
        .value("bf16", WeightType::bf16);
    py::enum_<Fetch>(m, "Fetch", "How kernels ask for weights ahead of their turn; see csrc/kernels.h.")
        .value("far", Fetch::far)
        .value("near", Fetch::near)
        .value("none", Fetch::none);
    py::class_<LinearShape>(m, "LinearShape", "Type and size of a weight [n, k]; see csrc/kernels.h.")
        .def(py::init([](WeightType type, int64_t n, int64_t k, int64_t group, bool wide_scales, int32_t bits,
                         int32_t activation_bits, Fetch fetch) {
                 return LinearShape{type, n, k, group, wide_scales, bits, activation_bits, fetch};
             }),
             py::arg("type"), py::arg("n"), py::arg("k"), py::arg("group") = 0, py::arg("wide_scales") = false,
             py::arg("bits") = 4, py::arg("activation_bits") = 16, py::arg("fetch") = Fetch::far)
        .def_readonly("type", &LinearShape::type)
        .def_readonly("n", &LinearShape::n)
        .def_readonly("k", &LinearShape::k)
        .def_readonly("group", &LinearShape::group)
        .def_readonly("wide_scales", &LinearShape::wide_scales)
        .def_readonly("bits", &LinearShape::bits)
        .def_readonly("activation_bits", &LinearShape::activation_bits)
        .def_readwrite("fetch", &LinearShape::fetch)
        .def_readwrite("two_tiles", &LinearShape::two_tiles);
    py::enum_<Source>(m, "Source")
        .value("codes", Source::codes)
        .value("awq", Source::awq)
        .value("f32", Source::f32)
        .value("f16", Source::f16)
        .value("bf16", Source::bf16)
        .value("stream", Source::stream)
        .value("q4_0", Source::q4_0)
        .value("q8_0", Source::q8_0)
        .value("q6_k", Source::q6_k);

    m.def("isa", [] { return kernels().isa; }, "The level in use: the best here, or what TINYCHAT_ISA names.");
    m.def("supported_isas", &supported_isas, "The levels that run here, best first, separated by spaces.");
    m.def("tile", [](const char* isa) { return kernels(isa).linear.tile; });
    m.def("asks", [](const char* isa) { return kernels(isa).linear.asks; }, "Whether this level obeys LinearShape.fetch.");
    m.def("packed_bytes", [](const char* isa, const LinearShape& shape) { return kernels(isa).linear.packed_bytes(shape); });
    m.def("stored_bytes", &stored_bytes, "What `pack` reads of a row of k codes, of sources that have rows.");
    m.def("activation_bytes",
          [](const char* isa, const LinearShape& shape) { return kernels(isa).linear.activation_bytes(shape); });
    m.def(
        "pack",
        [](const char* isa, const LinearShape& shape, uintptr_t values, uintptr_t scales, uintptr_t zeros, uintptr_t packed,
           int64_t tile_begin, int64_t tile_end, Source source, int64_t row_stride, int64_t word_stride,
           uintptr_t permutation) {
            const WeightData data{pointer(values), pointer(scales), pointer(zeros), source, row_stride, word_stride,
                                  pointer<const int32_t>(permutation)};
            kernels(isa).linear.pack(shape, data, pointer(packed), tile_begin, tile_end);
        },
        py::arg("isa"), py::arg("shape"), py::arg("values"), py::arg("scales"), py::arg("zeros"), py::arg("packed"),
        py::arg("tile_begin"), py::arg("tile_end"), py::arg("source") = Source::codes, py::arg("row_stride") = 0,
        py::arg("word_stride") = 0, py::arg("permutation") = 0, release());
    m.def(
        "unpack",
        [](const char* isa, const LinearShape& shape, uintptr_t packed, uintptr_t values, uintptr_t scales, uintptr_t zeros) {
            kernels(isa).linear.unpack(shape, pointer(packed), {pointer(values), pointer(scales), pointer(zeros)});
        },
        release());
    m.def(
        "prepare",
        [](const char* isa, const LinearShape& shape, uintptr_t x, uintptr_t activations, int64_t rows, int64_t begin,
           int64_t end) {
            const LinearKernels& linear = kernels(isa).linear;
            const int64_t bytes = linear.activation_bytes(shape);
            for (int64_t t = 0; t < rows; t++) {
                linear.prepare(shape, pointer<const float>(x) + t * shape.k + begin, pointer<char>(activations) + t * bytes,
                               begin, end < 0 ? shape.k : end);
            }
        },
        release(), py::arg("isa"), py::arg("shape"), py::arg("x"), py::arg("activations"), py::arg("rows"),
        py::arg("begin") = 0, py::arg("end") = -1, "Columns begin .. end (k, where negative) of x fp32 [rows, k].");
    m.def("prepare_step", [](const char* isa, const LinearShape& shape) { return kernels(isa).linear.prepare_step(shape); });
    m.def(
        "linear",
        [](const char* isa, const LinearShape& shape, uintptr_t packed, uintptr_t activations, int64_t rows,
           int64_t tile_begin, int64_t tile_end, uintptr_t y, int64_t y_stride) {
            kernels(isa).linear.linear(shape, pointer(packed), pointer(activations), rows, tile_begin, tile_end,
                                       pointer<float>(y), y_stride);
        },
        release());
    m.def(
        "read_probe",
        [](uintptr_t address, int64_t bytes, int threads) { return read_probe(pointer(address), bytes, threads); }, release(),
        py::arg("address"), py::arg("bytes"), py::arg("threads") = 1,
        "Seconds in which `threads` threads read a 64-byte aligned buffer, each its part; see csrc/read_probe.h.");
    m.def("dot_peak", &dot_peak, release(), py::arg("rounds"),
          "Multiplies bytes in registers and returns how many products it added; 0 where there is no such probe.");
}
