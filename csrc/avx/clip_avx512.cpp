// Rounding and the search of limits at 16 lanes: csrc/clip_lanes.h in the words of this level.
#include "avx/lanes_avx512.h"
//
#include "clip_lanes.h"
#include "levels.h"

namespace tinychat {

const ClipKernels& clip_avx512() {
    static const ClipKernels table{round_rows, clip_scratch, clip};
    return table;
}

}  // namespace tinychat
