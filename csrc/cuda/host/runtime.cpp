// The device that the host build pretends to be: an Ampere of four multiprocessors in the host's own memory.
#include "runtime.h"

namespace tinychat::cuda {

int device_count() { return 1; }
Device device(int) { return {"host", 8, 0, multiprocessors(), 227 << 10, true}; }
int current_device() { return 0; }
bool compiled() { return true; }
int multiprocessors() { return 4; }
int capability() { return 80; }
bool overlaps() { return false; }

}  // namespace tinychat::cuda
