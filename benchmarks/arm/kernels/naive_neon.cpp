// csrc/neon/linear_neon.cpp with the naive order of codes.
#include "naive.h"
//
#define linear_neon naive_neon
namespace tinychat {
const LinearKernels& naive_neon();
}
#include "neon/linear_neon.cpp"
