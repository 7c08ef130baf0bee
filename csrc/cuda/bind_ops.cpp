// Norm, activation, attention and greedy drawing for Python; checked by tinychat/backends/cuda_ops.py, cuda_sampling.py.
#include <pybind11/pybind11.h>

#include "activation.h"
#include "attention.h"
#include "draw.h"
#include "norm.h"

namespace py = pybind11;
using namespace tinychat::cuda;

namespace {

using Address = uintptr_t;

template <class T = void>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

// What attention and prepare share: the heads of a step, and the layer's part of the cache.
struct Step {
    Heads heads{};
    Cache cache{};
};

Step step(const py::kwargs& a) {
    const auto address = [&](const char* name) { return a[name].cast<Address>(); };
    const auto number = [&](const char* name) { return a[name].cast<int>(); };
    Step made;
    Heads& heads = made.heads;
    heads.q = pointer(address("q"));
    heads.k = pointer(address("k"));
    heads.v = pointer(address("v"));
    heads.q_stride = a["q_stride"].cast<size_t>();
    heads.k_stride = a["k_stride"].cast<size_t>();
    heads.v_stride = a["v_stride"].cast<size_t>();
    heads.rows = number("rows");
    heads.n_heads = number("n_heads");
    heads.n_kv_heads = number("n_kv_heads");
    heads.head_dim = number("head_dim");
    heads.bf16 = a["type"].cast<int>() == static_cast<int>(Dtype::bf16);
    heads.q_norm = pointer<float>(address("q_norm"));
    heads.k_norm = pointer<float>(address("k_norm"));
    heads.eps = a["eps"].cast<float>();
    heads.cos = pointer<float>(address("cos"));
    heads.sin = pointer<float>(address("sin"));
    heads.angles = pointer<Index>(address("angles"));
    heads.rope_dim = number("rope_dim");
    heads.interleaved = a["interleaved"].cast<bool>();
    heads.positions = pointer<Index>(address("positions"));
    heads.slots = pointer<Index>(address("slots"));
    Cache& cache = made.cache;
    cache.keys = pointer(address("keys"));
    cache.values = pointer(address("values"));
    cache.key_scales = pointer<float>(address("key_scales"));
    cache.value_scales = pointer<float>(address("value_scales"));
    cache.capacity = number("capacity");
    cache.padded = number("padded");
    return made;
}

}  // namespace

void bind_ops(py::module_& m) {
    m.attr("WIDEST_NORM") = kWidestNorm;
    m.attr("WIDEST_HEAD") = kWidestHead;
    m.attr("MOST_SPLITS") = kMostSplits;
    m.def(
        "norm",
        [](int type, Address x, size_t x_stride, Address first, Address second, float scale, Address sum, Address weight,
           Address bias, Address y, int rows, int width, float eps, bool layer, Address stream) {
            const NormArguments arguments{pointer(x),
                                          x_stride,
                                          {pointer(first), pointer(second)},
                                          scale,
                                          pointer(sum),
                                          pointer<float>(weight),
                                          pointer<float>(bias),
                                          pointer(y),
                                          rows,
                                          width,
                                          eps,
                                          layer};
            norm(static_cast<Dtype>(type), arguments, pointer(stream));
        },
        py::arg("type"), py::arg("x"), py::arg("x_stride"), py::arg("first"), py::arg("second"), py::arg("scale"),
        py::arg("sum"), py::arg("weight"), py::arg("bias"), py::arg("y"), py::arg("rows"), py::arg("width"),
        py::arg("eps"), py::arg("layer"), py::arg("stream"), "See csrc/cuda/norm.h.");
    m.def(
        "activation",
        [](int type, Address up, Address act_scale, Address y, int rows, int width, int kind, bool gated,
           Address stream) {
            const ActivationArguments arguments{pointer(up), pointer<float>(act_scale),         pointer(y), rows,
                                                width,       static_cast<ActivationKind>(kind), gated,      0};
            activation(static_cast<Dtype>(type), arguments, pointer(stream));
        },
        py::arg("type"), py::arg("up"), py::arg("act_scale"), py::arg("y"), py::arg("rows"), py::arg("width"),
        py::arg("kind"), py::arg("gated"), py::arg("stream"), "See csrc/cuda/activation.h.");
    m.def(
        "greedy",
        [](Address logits, int width, Address reported, Address token, Address position, Address stream) {
            greedy({pointer<float>(logits), width, pointer<Index>(reported), pointer<Index>(token), pointer<Index>(position)},
                   pointer(stream));
        },
        py::arg("logits"), py::arg("width"), py::arg("reported"), py::arg("token"), py::arg("position"), py::arg("stream"),
        "See csrc/cuda/draw.h.");
    m.def(
        "prepare",
        [](Address target, Address stream, const py::kwargs& a) {
            const Step made = step(a);
            prepare(made.heads, made.cache, pointer(target), pointer(stream));
        },
        py::arg("target"), py::arg("stream"), "See csrc/cuda/attention.h.");
    m.def(
        "attention",
        [](Address out, float scale, float cap, Address slopes, int window, bool append, int splits, Address partial,
           Address arrived, Address stream, const py::kwargs& a) {
            const Step made = step(a);
            const AttentionArguments arguments{made.heads,
                                               made.cache,
                                               pointer(out),
                                               scale,
                                               cap,
                                               pointer<float>(slopes),
                                               window,
                                               append,
                                               splits,
                                               pointer<float>(partial),
                                               pointer<int>(arrived)};
            attention(arguments, pointer(stream));
        },
        py::arg("out"), py::arg("scale"), py::arg("cap"), py::arg("slopes"), py::arg("window"), py::arg("append"),
        py::arg("splits"), py::arg("partial"), py::arg("arrived"), py::arg("stream"), "See csrc/cuda/attention.h.");
}
