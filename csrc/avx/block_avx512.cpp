// Norm and activation at 16 lanes: csrc/block_lanes.h in the words of this level.
#include "avx/lanes_avx512.h"
//
#include "block_lanes.h"
#include "levels.h"

namespace tinychat {

const BlockKernels& block_avx512() {
    static const BlockKernels table{add, moments, normalize, activate, rms_norm, soft_cap, peaks};
    return table;
}

}  // namespace tinychat
