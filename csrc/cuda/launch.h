// Launching a kernel: thin, without synchronization, and with the error as an exception. Included by .cu files alone.
#pragma once
#include <stdexcept>
#include <string>

#include "device.h"
#include "runtime.h"
#include "stream.h"

namespace tinychat::cuda {

struct Grid {
    dim3 blocks;
    dim3 threads;
    size_t shared = 0;   // bytes of dynamic_shared
};

#ifdef __CUDACC__

inline void check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    throw std::runtime_error(std::string("CUDA, ") + what + ": " + cudaGetErrorString(error));
}

// Runs kernel(arguments...) on `stream`. What fails at launch is thrown here; what fails while running, at the next
// synchronization, which is the caller's.
//
// The kernel may begin before the one before it has ended (runtime.h, `overlap`), so that launches and first reads are
// hidden. Each therefore calls `await_earlier` (device.h) in every thread, before it reads anything but weights and
// before it writes: then whatever came before has ended, for that kernel has waited likewise.
template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), const Grid& grid, Stream stream, A... arguments) {
    constexpr size_t granted = 48 << 10;  // without asking
    if (grid.shared > granted) {
        check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(grid.shared)),
              name);
    }
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid.blocks;
    config.blockDim = grid.threads;
    config.dynamicSmemBytes = grid.shared;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = overlap && overlaps();
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...);
    if (error != cudaSuccess && config.numAttrs) check(error, (std::string(name) + ", where TINYCHAT_CUDA_OVERLAP=0 may help").c_str());
    check(error, name);
}

#else

template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), const Grid& grid, Stream, A... arguments) {
    host::run(name, grid.blocks, grid.threads, grid.shared, [=] { kernel(arguments...); });
}

#endif

}  // namespace tinychat::cuda
