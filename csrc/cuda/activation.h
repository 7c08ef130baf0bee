// The activation kernel as its callers see it: pointers of the device, checked in Python.
#pragma once

#include <cstddef>

#include "stream.h"

namespace tinychat::cuda {

enum class ActivationKind { silu, gelu, gelu_tanh, relu };  // see `config.Activation`

struct ActivationArguments {
    const void* up;          // [rows, width], or gate | up, [rows, 2 * width]
    const float* act_scale;  // [width], or null
    void* y;                 // [rows, width]
    int rows;
    int width;
    ActivationKind kind;
    bool gated;
    int first = 0;           // row of a launch; set by `activation`
};

void activation(Dtype type, const ActivationArguments& arguments, Stream stream);

}  // namespace tinychat::cuda
