// The likeliest token as its callers see it: pointers of the device, checked in Python.
#pragma once

#include "stream.h"

namespace tinychat::cuda {

struct GreedyArguments {
    const float* logits;   // [width], aligned to 16 bytes
    int width;
    long long* reported;   // the token, or -1 where a logit is not finite
    long long* token;      // what the next step reads: the token in any case,
    long long* position;   // and its position, one further on
};

// The first of the largest logits, and the next step told of it.
void greedy(const GreedyArguments& arguments, Stream stream);

}  // namespace tinychat::cuda
