// The devices there are and what they can do. None without a driver: asking is harmless.
#pragma once
#include <string>

namespace tinychat::cuda {

struct Device {
    std::string name;
    int major, minor;       // compute capability
    int multiprocessors;
    int shared_per_block;   // bytes that a block may ask for
    bool integrated;        // its memory is the host's
};

int device_count();
Device device(int index);
int current_device();  // of the calling thread

// Whether the kernels were compiled for the current device.
bool compiled();

// Of the current device; remembered.
int multiprocessors();
int capability();  // 80 for 8.0

// Whether the current device begins kernels early (9.0 and later), and these were compiled to wait for each other then:
// what is compiled at run time for an older architecture does not.
bool overlaps();

// Whether kernels may begin while the one before them ends, where the device does that.
inline bool overlap = true;

}  // namespace tinychat::cuda
