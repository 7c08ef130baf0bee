// Attention at 4 lanes: csrc/attention_lanes.h in the words of this level.
#include "neon/lanes_neon.h"
//
#include "attention_lanes.h"
#include "levels.h"

namespace tinychat {

const AttentionKernels& attention_neon() {
    static const AttentionKernels table{rotate, store, scratch, attend};
    return table;
}

}  // namespace tinychat
