// How weights are read fastest here (Reading, decoder.h): found out with the weights themselves, as no list of processors would
// know the next one, nor what a hypervisor leaves of one.
#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>
#include <limits>

#include "decoder.h"

namespace tinychat {
namespace {

constexpr int kTurns = 7;                // of each way
constexpr int64_t kEnough = 16ll << 20;  // bytes to read in a turn, or all there are
constexpr double kWorth = 0.97;          // of the time of a simpler way, for one that does more to be taken

}  // namespace

// Of each way the best turn: others of the machine only ever take time.
void Decoder::choose_reading() {
    constexpr std::array kWays{Reading::none, Reading::two, Reading::near, Reading::far};
    std::array<double, kWays.size()> least;
    least.fill(std::numeric_limits<double>::infinity());
    time_reading();
    for (int turn = 0; turn < kTurns; ++turn) {
        for (size_t i = 0; i < kWays.size(); ++i) {  // each way meets all layers in time, wherever a turn begins
            const size_t way = (i + static_cast<size_t>(turn)) % kWays.size();
            read_as(kWays[way]);
            least[way] = std::min(least[way], time_reading());
        }
    }
    size_t best = 0;
    for (size_t way = 1; way < kWays.size(); ++way) {
        if (least[way] < kWorth * least[best]) best = way;
    }
    read_as(kWays[best]);
}

void Decoder::read_as(Reading reading) {
    reading_ = reading;
    const auto ask = [reading](PackedLinear& linear) { linear.ask(fetch_of(reading), reading == Reading::two); };
    for (Layer& layer : layers_) {
        for (PackedLinear* linear : {&layer.qkv, &layer.out, &layer.up, &layer.down, &layer.shared_down}) ask(*linear);
    }
    for (PackedLinear* linear : {&project_in_, &project_out_, &head_}) ask(*linear);
}

// Nanoseconds for a byte, with one row through linears of whole layers, on from where the last call ended: of a large model
// nothing is read that a cache still holds.
double Decoder::time_reading() {
    reserve(1);
    const Team::Awake awake(team());
    std::memset(x_.data(), 0, static_cast<size_t>(shape_.hidden_size) * sizeof(float));
    int64_t bytes = 0;
    double ns = 0;
    const auto time = [&](const PackedLinear& linear, float* y) {
        prepare_rows(linear, 1, x_.floats(), shape_.hidden_size);
        const auto begin = std::chrono::steady_clock::now();
        apply(linear, 1, y, 0);
        ns += std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - begin).count();
        bytes += linear.nbytes();
    };
    for (size_t i = 0; i < layers_.size() && bytes < kEnough; ++i) {
        const Layer& layer = layers_[timed_layers_++ % layers_.size()];
        time(layer.qkv, qkv_.floats());
        if (layer.expert_up.empty()) time(layer.up, gate_up_.floats());
    }
    return ns / static_cast<double>(bytes);
}

}  // namespace tinychat
