// The Python modules tinychat._cuda and, of the same kernels run by threads of the host in tests, tinychat._cuda_host.
//
// Conventions: addresses are integers (tensor.data_ptr()), `stream` is torch.cuda.current_stream().cuda_stream, the
// current device is the tensors'. Nothing synchronizes; what CUDA refuses at launch is a RuntimeError. Shapes, dtypes
// and alignment are checked by the Python that calls.
#include <pybind11/pybind11.h>

#include "runtime.h"
#ifdef TINYCHAT_CUDA_HOST
#include "host/shim.h"
#endif

namespace py = pybind11;
using namespace tinychat::cuda;

void bind_linear(py::module_&);  // bind_linear.cpp
void bind_ops(py::module_&);     // bind_ops.cpp

PYBIND11_MODULE(TINYCHAT_CUDA_MODULE, m) {
    m.def("device_count", &device_count, "Devices that the driver shows; 0 without one.");
    m.def(
        "device",
        [](int index) {
            const Device found = device(index);
            py::dict properties;
            properties["name"] = found.name;
            properties["capability"] = py::make_tuple(found.major, found.minor);
            properties["multiprocessors"] = found.multiprocessors;
            properties["shared_per_block"] = found.shared_per_block;
            properties["integrated"] = found.integrated;
            return properties;
        },
        py::arg("index"), "What device `index` is; `integrated`: its memory is the host's.");
    m.def("current_device", &current_device, "The index of the calling thread's device.");
    m.def("compiled", &compiled, "Whether the kernels were compiled for the current device.");
    m.def("overlap", [](bool on) { overlap = on; }, py::arg("on"),
          "Whether kernels may begin while the one before them ends, where the device does that; on at first.");
#ifdef TINYCHAT_CUDA_HOST
    m.def("reverse", [](bool on) { host::reverse = on; }, py::arg("on"), "Run threads and blocks from the last to the first.");
#endif
    bind_linear(m);
    bind_ops(m);
}
