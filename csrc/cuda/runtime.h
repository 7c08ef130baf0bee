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

// Of the current device; remembered.
int multiprocessors();
int capability();  // 80 for 8.0

// Whether kernels that can may begin while the one before them ends, where the device does that (sm_90): their first
// reads then hide its end and the launch. Off unless asked for.
inline bool overlap = false;

}  // namespace tinychat::cuda
