// csrc/neon/linear_dotprod.cpp with the naive order of codes.
#pragma GCC target("arch=armv8.2-a+dotprod")
#include "naive.h"
//
#define linear_dotprod naive_dotprod
namespace tinychat {
const LinearKernels& naive_dotprod();
}
#include "neon/linear_dotprod.cpp"
