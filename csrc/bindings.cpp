// The Python module tinychat._cpu: raw pointers in, no libtorch linked.
#include <pybind11/pybind11.h>

namespace py = pybind11;

void bind_linear(py::module_&);   // bind_linear.cpp: packing and the per-op test path
void bind_decoder(py::module_&);  // bind_decoder.cpp: the lowered decoder
void bind_clip(py::module_&);     // bind_clip.cpp: the quantizer's rounding and search

PYBIND11_MODULE(_cpu, m) {
    bind_linear(m);
    bind_decoder(m);
    bind_clip(m);
}
