// How this machine wants to be asked for weights ahead of their turn (Fetch, kernels.h): found out with the weights themselves, as
// no list of processors would know the next one, nor what a hypervisor leaves of one.
#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>

#include "decoder.h"

namespace tinychat {
namespace {

constexpr int kTurns = 5;                 // of each way
constexpr int64_t kEnough = 16ll << 20;   // bytes that are read in a turn, or all there are

}  // namespace

// One row passes through linears of all layers, in turns of the three ways; the one with the least median wins. A turn goes on in
// the layers where the last one ended, so that what caches hold of a large model is not read again soon.
void Decoder::choose_fetching() {
    struct Subject {  // reads rows of x
        const PackedLinear* linear;
        float* y;
    };
    reserve(1);
    std::vector<Subject> subjects;
    for (const Layer& layer : layers_) {
        subjects.push_back({&layer.qkv, qkv_.floats()});
        if (layer.expert_up.empty()) subjects.push_back({&layer.up, gate_up_.floats()});
    }
    if (subjects.empty()) return;
    const Team::Awake awake(team());
    std::memset(x_.data(), 0, static_cast<size_t>(shape_.hidden_size) * sizeof(float));
    size_t next = 0;
    const auto turn = [&] {  // nanoseconds for a byte
        int64_t bytes = 0;
        double ns = 0;
        for (size_t i = 0; i < subjects.size() && bytes < kEnough; ++i) {
            const auto [linear, y] = subjects[next++ % subjects.size()];
            prepare_rows(*linear, 1, x_.floats(), shape_.hidden_size);
            const auto begin = std::chrono::steady_clock::now();
            apply(*linear, 1, y, 0);
            ns += std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - begin).count();
            bytes += linear->nbytes();
        }
        return ns / static_cast<double>(bytes);
    };
    std::array<std::array<double, kTurns>, 3> found{};
    turn();
    for (int i = 0; i < kTurns; ++i) {
        for (size_t way = 0; way < found.size(); ++way) {
            set_fetching(static_cast<Fetch>(way));
            found[way][static_cast<size_t>(i)] = turn();
        }
    }
    for (auto& times : found) std::sort(times.begin(), times.end());
    const auto faster = [](const auto& a, const auto& b) { return a[kTurns / 2] < b[kTurns / 2]; };
    set_fetching(static_cast<Fetch>(std::min_element(found.begin(), found.end(), faster) - found.begin()));
}

}  // namespace tinychat
