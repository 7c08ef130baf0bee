// The norm kernel as its callers see it: pointers of the device, checked in Python.
#pragma once

#include <cstddef>

#include "stream.h"

namespace tinychat::cuda {

constexpr int kWidestNorm = 32768;

struct NormArguments {
    const void* x;         // [rows, width], rows x_stride numbers apart
    size_t x_stride;
    const void* added[2];  // [rows, width], or null
    float scale;           // of what is added
    void* sum;             // [rows, width], or null: not kept
    const float* weight;   // [width]
    const float* bias;     // [width], or null
    void* y;               // [rows, width]
    int rows;
    int width;
    float eps;
    bool layer;            // LayerNorm
    bool aligned_weights = false;  // to 16 bytes; set by `norm`
};

void norm(Dtype type, const NormArguments& arguments, Stream stream);

}  // namespace tinychat::cuda
