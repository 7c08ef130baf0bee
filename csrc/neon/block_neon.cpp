// Norm and activation at 4 lanes: csrc/block_lanes.h in the words of this level.
#include "neon/lanes_neon.h"
//
#include "block_lanes.h"
#include "levels.h"

namespace tinychat {

const BlockKernels& block_neon() {
    static const BlockKernels table{add, moments, normalize, activate, rms_norm, soft_cap, peaks};
    return table;
}

}  // namespace tinychat
