// See runtime.h; the host build has host/runtime.cpp in its place.
#include "runtime.h"

#include <atomic>

#include "launch.h"

namespace tinychat::cuda {
namespace {

int attribute(cudaDeviceAttr which, int index) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, index), "device attribute");
    return value;
}

// Compiled as all kernels are.
__global__ void nothing() {}

// Devices beyond these are asked anew at each call.
constexpr int kRemembered = 64;

// Of the current device; 0 is "not asked yet".
template <class Ask>
int remembered(std::atomic<int>* values, Ask ask) {
    const int index = current_device();
    if (index >= kRemembered) return ask(index);
    int value = values[index].load(std::memory_order_relaxed);
    if (!value) values[index].store(value = ask(index), std::memory_order_relaxed);
    return value;
}

}  // namespace

int device_count() {
    int count = 0;
    return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;  // no driver is an error there, no device here
}

Device device(int index) {
    cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, index), "device properties");
    return {properties.name,
            properties.major,
            properties.minor,
            properties.multiProcessorCount,
            static_cast<int>(properties.sharedMemPerBlockOptin),
            properties.integrated != 0};
}

int current_device() {
    int index = 0;
    check(cudaGetDevice(&index), "current device");
    return index;
}

bool compiled() {
    cudaFuncAttributes attributes;
    if (cudaFuncGetAttributes(&attributes, nothing) == cudaSuccess) return true;
    cudaGetLastError();  // or the next launch would be blamed for it
    return false;
}

int multiprocessors() {
    static std::atomic<int> values[kRemembered];
    return remembered(values, [](int index) { return attribute(cudaDevAttrMultiProcessorCount, index); });
}

int capability() {
    static std::atomic<int> values[kRemembered];
    return remembered(values, [](int index) {
        return 10 * attribute(cudaDevAttrComputeCapabilityMajor, index) + attribute(cudaDevAttrComputeCapabilityMinor, index);
    });
}

bool overlaps() {
    static std::atomic<int> values[kRemembered];
    return remembered(values, [](int) {
               cudaFuncAttributes attributes;
               check(cudaFuncGetAttributes(&attributes, nothing), "attributes of a kernel");
               return capability() >= 90 && attributes.ptxVersion >= 90 ? 2 : 1;
           }) == 2;
}

}  // namespace tinychat::cuda
