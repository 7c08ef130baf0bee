// What a header that needs no CUDA says of CUDA: a stream is an address, a dtype a number.
#pragma once

namespace tinychat::cuda {

using Stream = void*;  // cudaStream_t; null is the default stream

enum class Dtype : int { f32, f16, bf16 };

}  // namespace tinychat::cuda
