// Attention at 8 lanes: csrc/attention_lanes.h in the words of this level.
#include "avx/lanes_avx2.h"
//
#include "attention_lanes.h"
#include "levels.h"

namespace tinychat {

const AttentionKernels& attention_avx2() {
    static const AttentionKernels table{rotate, store, scratch, attend};
    return table;
}

}  // namespace tinychat
