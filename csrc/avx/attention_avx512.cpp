// Attention at 16 lanes: csrc/attention_lanes.h in the words of this level.
#include "avx/lanes_avx512.h"
//
#include "attention_lanes.h"
#include "levels.h"

namespace tinychat {

const AttentionKernels& attention_avx512() {
    static const AttentionKernels table{rotate, store, scratch, attend};
    return table;
}

}  // namespace tinychat
