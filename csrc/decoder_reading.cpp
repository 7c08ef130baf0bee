// How weights are read fastest here (Reading, decoder.h): found out with the weights themselves, as no list of processors would
// know the next one, nor what a hypervisor leaves of one. By all threads together; where memory keeps them waiting whatever
// they do, as at some minutes of a shared machine, by one alone.
#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>

#include "decoder.h"

namespace tinychat {
namespace {

constexpr size_t kTurns = 7;            // of each way
constexpr size_t kCounts = 2;           // so many turns are better than the one that counts: luck is as rare as trouble is not
constexpr int64_t kEnough = 8ll << 20;  // bytes to read in a turn, or all there are
constexpr double kWorth = 0.97;         // of the time of a simpler way, for one that does more to be taken
constexpr std::array kWays{Reading::none, Reading::two, Reading::near, Reading::far};

// The linears of all layers that do the same.
struct Alike {
    Reading* chosen;
    int64_t n, k;  // of each
    std::vector<PackedLinear*> linears;
    size_t next = 0;   // of them
    int64_t tile = 0;  // of the next one
    // Nanoseconds for a byte in each turn, of each way.
    std::array<std::array<double, kTurns>, kWays.size()> together{}, alone{};

    Alike(Reading* reading, int64_t outputs, int64_t inputs) : chosen(reading), n(outputs), k(inputs) {}

    Reading fastest() {
        std::array<double, kWays.size()> all, one;
        for (size_t way = 0; way < kWays.size(); ++way) {
            all[way] = that_counts(together[way]);
            one[way] = that_counts(alone[way]);
        }
        const double enough = *std::min_element(all.begin(), all.end()) / kWorth;
        size_t best = kWays.size();
        for (size_t way = 0; way < kWays.size(); ++way) {
            if (all[way] <= enough && (best == kWays.size() || one[way] < kWorth * one[best])) best = way;
        }
        return kWays[best];
    }

    static double that_counts(std::array<double, kTurns>& turns) {
        std::nth_element(turns.begin(), turns.begin() + kCounts, turns.end());
        return turns[kCounts];
    }
};

void ask(PackedLinear& linear, Reading reading) { linear.ask(fetch_of(reading), reading == Reading::two); }

}  // namespace

void Decoder::choose_readings() {
    const DecoderShape& s = shape_;
    Readings chosen;
    std::vector<Alike> all;
    const auto add = [&](Reading* reading, int64_t n, int64_t k, PackedLinear Layer::* linear) {
        Alike alike(reading, n, k);
        for (Layer& layer : layers_) {
            const bool stacked = !layer.expert_up.empty() && (linear == &Layer::up || linear == &Layer::down);
            if (!stacked) alike.linears.push_back(&(layer.*linear));  // of experts few are read in a step
        }
        if (!alike.linears.empty()) all.push_back(std::move(alike));
    };
    add(&chosen.qkv, s.qkv_size(), s.hidden_size, &Layer::qkv);
    add(&chosen.out, s.hidden_size, s.q_size(), &Layer::out);
    add(&chosen.up, s.up_size(), s.hidden_size, &Layer::up);
    add(&chosen.down, s.hidden_size, s.intermediate_size, &Layer::down);
    all.emplace_back(&chosen.head, s.vocab_size, s.embed_size).linears.push_back(&head_);

    int64_t n = 0, k = 0;
    for (const Alike& alike : all) n = std::max(n, alike.n), k = std::max(k, alike.k);
    Buffer x(k * static_cast<int64_t>(sizeof(float))), y(n * static_cast<int64_t>(sizeof(float)));
    std::memset(x.data(), 0, static_cast<size_t>(x.bytes()));
    reserve(1);
    Team one(1);
    const Team::Awake awake(team());
    // One row through them, on from where the last turn ended: of a large model nothing is read that a cache still holds.
    const auto time = [&](Alike& alike, Reading reading, Team& team) {
        double bytes = 0, ns = 0;
        for (size_t i = 0; i < alike.linears.size() && bytes < kEnough; ++i) {
            PackedLinear& linear = *alike.linears[alike.next % alike.linears.size()];
            const double tile_bytes = static_cast<double>(linear.nbytes()) / static_cast<double>(linear.tiles());
            const auto enough = static_cast<int64_t>((kEnough - bytes) / tile_bytes) + 1;
            const Range tiles{alike.tile, std::min(alike.tile + enough, linear.tiles())};
            ask(linear, reading);
            prepare_rows(linear, 1, x.floats(), alike.k);
            const auto begin = std::chrono::steady_clock::now();
            linear.apply(kernels_.linear, activations_.data(), 1, tiles, y.floats(), 0, team);
            ns += std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - begin).count();
            bytes += tile_bytes * static_cast<double>(tiles.end - tiles.begin);
            alike.tile = tiles.end % linear.tiles();
            if (alike.tile == 0) ++alike.next;
        }
        return ns / bytes;
    };
    for (Alike& alike : all) time(alike, Reading::none, *team_);  // it counts for nothing
    for (size_t turn = 0; turn < kTurns; ++turn) {
        for (Alike& alike : all) {
            for (size_t i = 0; i < kWays.size(); ++i) {  // each way meets all layers in time, wherever a turn begins
                const size_t way = (i + turn) % kWays.size();
                const double together = time(alike, kWays[way], *team_);
                alike.together[way][turn] = together;
                alike.alone[way][turn] = n_threads_ == 1 ? together : time(alike, kWays[way], one);
            }
        }
    }
    chosen.up = chosen.down = all.front().fastest();  // where all layers have experts
    for (Alike& alike : all) *alike.chosen = alike.fastest();
    read_as(chosen);
}

void Decoder::read_as(const Readings& readings) {
    readings_ = readings;
    for (Layer& layer : layers_) {
        ask(layer.qkv, readings.qkv);
        ask(layer.out, readings.out);
        ask(layer.up, readings.up);
        ask(layer.down, readings.down);
        ask(layer.shared_down, readings.down);
    }
    for (PackedLinear* linear : {&project_in_, &project_out_, &head_}) ask(*linear, readings.head);
}

}  // namespace tinychat
