// Norm and activation at 8 lanes: csrc/block_lanes.h in the words of this level.
#include "avx/lanes_avx2.h"
//
#include "block_lanes.h"
#include "levels.h"

namespace tinychat {

const BlockKernels& block_avx2() {
    static const BlockKernels table{add, moments, normalize, activate, rms_norm, soft_cap, peaks};
    return table;
}

}  // namespace tinychat
