// The next token drawn where the logits are: the common cases of tinychat/sampling.py, which is the specification.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace tinychat {

struct DrawParams {
    int64_t top_k;  // tokens to draw from, at least 1 and below n; 0: the likeliest is taken, nothing is drawn
    float temperature;
    double top_p;
    float min_p;
};

// The next token after logits [n], n > 0: the one at `number`, of [0, 1), along the weights of those that pass the filters,
// from the likeliest down. -1 where a logit is not finite. Of equals the lower id comes first. `peaks` are those of the
// logits (BlockKernels), found of all or of parts that begin at multiples of kPeak.
int64_t draw(const BlockKernels& kernels, const float* logits, const float* peaks, int64_t n, const DrawParams& params,
             double number);

}  // namespace tinychat
