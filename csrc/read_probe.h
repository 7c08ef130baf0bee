// How fast this machine's memory can be read: the measure that decoding speed is held against.
#pragma once
#include <cstdint>

namespace tinychat {

// Seconds in which `threads` threads at once, the caller one of them, read `bytes` of 64-byte aligned `data`: each
// its own consecutive part, with the widest loads that this CPU has, whatever TINYCHAT_ISA says. The clock starts when
// all threads are ready. Throws std::system_error where the system has no more threads.
double read_probe(const void* data, int64_t bytes, int threads);

}  // namespace tinychat
