// What prefill does to queries, keys and values before attention: norms of heads, rotation, and the KV cache extended.
// One warp a head; the q that it returns is padded as the cache is, so that both meet in vectors of 16 bytes.

#include "heads.h"
#include "launch.h"

namespace tinychat::cuda {
namespace {

constexpr int kWarps = 4;

__global__ void prepare_kernel(Heads a, Cache cache, Half* q) {
    admit_later();
    await_earlier();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = blockIdx.x;
    const int head = blockIdx.y * kWarps + warp;
    float* x = dynamic_shared<float>() + warp * cache.padded;
    if (head < a.n_heads) {
        take_head(a, Part::q, row, head, cache.padded, x);
        const size_t at = (static_cast<size_t>(row) * a.n_heads + head) * cache.padded;
        for (int j = lane; j < cache.padded; j += 32) q[at + j] = from_float<Half>(x[j]);
    } else if (head < a.n_heads + 2 * a.n_kv_heads) {
        const int other = head - a.n_heads;
        const Part part = other < a.n_kv_heads ? Part::k : Part::v;
        const int kv_head = other % a.n_kv_heads;
        take_head(a, part, row, kv_head, cache.padded, x);
        keep_head(cache, part, entry_of(cache, a, a.slots[row], kv_head, a.positions[row]), x, true);
    }
}

}  // namespace

void prepare(const Heads& heads, const Cache& cache, void* q, Stream stream) {
    if (!heads.rows) return;
    const int n = heads.n_heads + 2 * heads.n_kv_heads;
    const Grid grid{dim3(heads.rows, divide_up(n, kWarps)), dim3(kWarp * kWarps), kWarps * cache.padded * sizeof(float)};
    launch("prepare", prepare_kernel, grid, stream, heads, cache, static_cast<Half*>(q));
}

}  // namespace tinychat::cuda
