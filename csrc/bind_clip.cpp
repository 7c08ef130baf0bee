// The quantizer's rounding and its search of limits for Python: raw addresses in, checked by
// tinychat/backends/arithmetic.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <vector>

#include "buffer.h"
#include "kernels.h"

namespace py = pybind11;
using namespace tinychat;

namespace {

const float* read(uintptr_t address) { return reinterpret_cast<const float*>(address); }
float* written(uintptr_t address) { return reinterpret_cast<float*>(address); }

}  // namespace

void bind_clip(py::module_& m) {
    m.def("clips", [] { return kernels().clip != nullptr; }, "Whether the level in use has kernels for `round` and `clip`.");
    m.def(
        "round",
        [](int64_t rows, int64_t k, int64_t width, uintptr_t weights, uintptr_t limits, float top, bool symmetric,
           uintptr_t divisors, uintptr_t rounded) {
            return kernels().clip->round(
                {rows, k, width, read(weights), read(limits), top, symmetric, read(divisors), written(rounded)});
        },
        "Rounds rows in groups; see Rounding in csrc/kernels.h. False where a weight is not finite or a scale too large.",
        py::call_guard<py::gil_scoped_release>(), py::arg("rows"), py::arg("k"), py::arg("width"), py::arg("weights"),
        py::arg("limits"), py::arg("top"), py::arg("symmetric"), py::arg("divisors"), py::arg("rounded"));
    m.def(
        "clip",
        [](int64_t rows, int64_t width, uintptr_t weights, uintptr_t gram, uintptr_t pull, uintptr_t rounded, uintptr_t own,
           uintptr_t limits, int64_t stride, float top, bool symmetric, const std::vector<float>& shrinks,
           const std::vector<int32_t>& moves, uintptr_t change) {
            const auto n_shrinks = static_cast<int64_t>(shrinks.size()), n_moves = static_cast<int64_t>(moves.size());
            const Clipping clipping{rows, width, read(weights), read(gram), read(pull), read(rounded), read(own),
                                    written(limits), stride, top, symmetric, shrinks.data(), n_shrinks, moves.data(),
                                    n_moves, written(change)};
            const py::gil_scoped_release release;
            const ClipKernels& kernel = *kernels().clip;
            const Buffer scratch(kernel.scratch(width) * static_cast<int64_t>(sizeof(float)));
            return kernel.clip(clipping, scratch.floats());
        },
        "Moves the limits of one group of some rows to the best of those tried; see Clipping in csrc/kernels.h.",
        py::arg("rows"), py::arg("width"), py::arg("weights"), py::arg("gram"), py::arg("pull"), py::arg("rounded"),
        py::arg("own"), py::arg("limits"), py::arg("stride"), py::arg("top"), py::arg("symmetric"), py::arg("shrinks"),
        py::arg("moves"), py::arg("change"));
}
