// Linears for Python; checked by tinychat/backends/cuda_linear.py.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "linear.h"

namespace py = pybind11;
using namespace tinychat::cuda;

namespace {

template <class T = void>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

LinearCall call_of(const PackedWeight& weight, uintptr_t x, uintptr_t bias, uintptr_t y, int rows, int x_stride,
                   int y_stride, Dtype dtype, bool wide_output) {
    return {weight, pointer(x), pointer<const float>(bias), pointer(y), rows, x_stride, y_stride, dtype, wide_output};
}

}  // namespace

void bind_linear(py::module_& m) {
    py::enum_<Dtype>(m, "Dtype").value("f32", Dtype::f32).value("f16", Dtype::f16).value("bf16", Dtype::bf16);
    py::class_<PackedWeight>(m, "PackedWeight", "A weight in the layout of csrc/cuda/linear_layout.h, by its addresses.")
        .def(py::init([](uintptr_t codes, uintptr_t scales, uintptr_t zeros, int n, int k, int chunks, int groups,
                         int group_shift, int bits, bool wide) {
                 return PackedWeight{pointer(codes), pointer(scales), pointer<const uint8_t>(zeros), n, k, chunks, groups,
                                     group_shift, bits, wide};
             }),
             py::kw_only(), py::arg("codes"), py::arg("scales"), py::arg("zeros"), py::arg("n"), py::arg("k"),
             py::arg("chunks"), py::arg("groups"), py::arg("group_shift"), py::arg("bits"), py::arg("wide"));
    m.attr("GEMV_ROWS") = kGemvRows;
    m.def(
        "gemv",
        [](const PackedWeight& weight, uintptr_t x, uintptr_t bias, uintptr_t y, int rows, int x_stride, int y_stride,
           Dtype dtype, bool wide_output, uintptr_t stream, int warps) {
            gemv(call_of(weight, x, bias, y, rows, x_stride, y_stride, dtype, wide_output), warps, pointer(stream));
        },
        py::arg("weight"), py::arg("x"), py::arg("bias"), py::arg("y"), py::arg("rows"), py::arg("x_stride"),
        py::arg("y_stride"), py::arg("dtype"), py::arg("wide_output"), py::arg("stream"), py::arg("warps") = 0,
        "y = x W^T + bias for 1 .. GEMV_ROWS rows; see csrc/cuda/linear.h, as for all here.");
    m.def(
        "gemm",
        [](const PackedWeight& weight, uintptr_t x, uintptr_t bias, uintptr_t y, int rows, int x_stride, int y_stride,
           Dtype dtype, bool wide_output, uintptr_t stream, uintptr_t workspace, int64_t workspace_bytes,
           int parts) {
            gemm(call_of(weight, x, bias, y, rows, x_stride, y_stride, dtype, wide_output), parts,
                 pointer<float>(workspace), workspace_bytes, pointer(stream));
        },
        py::arg("weight"), py::arg("x"), py::arg("bias"), py::arg("y"), py::arg("rows"), py::arg("x_stride"),
        py::arg("y_stride"), py::arg("dtype"), py::arg("wide_output"), py::arg("stream"), py::arg("workspace") = 0,
        py::arg("workspace_bytes") = 0, py::arg("parts") = 0, "The same for any number of rows.");
    m.def(
        "dequantize",
        [](const PackedWeight& weight, Dtype dtype, uintptr_t values, uintptr_t stream) {
            dequantize(weight, dtype, pointer(values), pointer(stream));
        },
        py::arg("weight"), py::arg("dtype"), py::arg("values"), py::arg("stream"), "W [n, k] in `dtype`.");
}
