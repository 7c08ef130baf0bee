// How weights are read fastest here (Reading, decoder.h): found out with the weights themselves, as no list of processors would
// know the next one, nor what a hypervisor leaves of one. It depends on how long a row is, among other things, so that each
// linear of a layer has its own. All threads together are measured, and one alone, which decides among the ways that all find
// about as fast: that is every way where memory keeps two threads waiting.
#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>
#include <numeric>

#include "decoder.h"

namespace tinychat {
namespace {

constexpr size_t kTurns = 7;               // of each way
constexpr size_t kRank = 2;                // so many are better than the one that counts: luck is rare, trouble is not
constexpr int64_t kTurnBytes = 8 << 20;    // to read in a turn, or all there are,
constexpr int64_t kThreadBytes = 4 << 20;  // of which a thread has so many, to read in streams as long as in a step
constexpr double kSame = 0.97;  // of a time: what is nearer to it is about as fast, and no reason to take a way that does more
constexpr std::array kWays{Reading::none, Reading::two, Reading::near, Reading::far};
constexpr size_t kNone = 0, kTwo = 1;

using Times = std::array<std::array<double, kTurns>, kWays.size()>;  // nanoseconds for a byte

double that_counts(std::array<double, kTurns> turns) {
    std::nth_element(turns.begin(), turns.begin() + kRank, turns.end());
    return turns[kRank];
}

Reading fastest(const Times& together, const Times& alone) {
    const auto time = [&](size_t way) { return that_counts(together[way]); };
    double least = time(0);
    for (size_t way = 1; way < kWays.size(); ++way) least = std::min(least, time(way));
    size_t best = kWays.size();
    for (size_t way = 0; way < kWays.size(); ++way) {
        if (kSame * time(way) > least) continue;
        if (best == kWays.size() || that_counts(alone[way]) < kSame * that_counts(alone[best])) best = way;
    }
    return kWays[best];
}

}  // namespace

// The linears of all layers that do the same.
struct Decoder::Alike {
    const char* name;
    int64_t n, k;  // of each
    std::vector<PackedLinear*> linears;
    size_t next = 0;   // of them
    int64_t tile = 0;  // of the next one

    void ask(Reading reading) const {
        for (PackedLinear* linear : linears) linear->ask(fetch_of(reading), reading == Reading::two);
    }
};

std::vector<Decoder::Alike> Decoder::alike() {
    const DecoderShape& s = shape_;
    const ExpertsShape& e = s.experts;
    std::vector<Alike> all;
    const auto add = [&](const char* name, int64_t n, int64_t k, PackedLinear Layer::* linear, const auto& has_it) {
        Alike some{name, n, k, {}};
        for (Layer& layer : layers_) {
            if (has_it(layer)) some.linears.push_back(&(layer.*linear));
        }
        if (!some.linears.empty()) all.push_back(std::move(some));
    };
    const auto every = [](const Layer&) { return true; };
    const auto plain = [](const Layer& layer) { return layer.expert_up.empty(); };
    const auto mixture = [](const Layer& layer) { return !layer.expert_up.empty(); };
    const auto shared = [&](const Layer& layer) { return mixture(layer) && e.shared_size > 0; };
    add("qkv", s.qkv_size(), s.hidden_size, &Layer::qkv, every);
    add("out", s.hidden_size, s.q_size(), &Layer::out, every);
    add("up", s.up_size(), s.hidden_size, &Layer::up, plain);
    add("down", s.hidden_size, s.intermediate_size, &Layer::down, plain);
    const int64_t experts_up = e.router_size() + (s.gated ? 2 : 1) * (e.shared_size + e.n_experts * e.intermediate_size);
    add("experts' up", experts_up, s.hidden_size, &Layer::up, mixture);
    add("experts' down", e.n_experts * s.hidden_size, e.intermediate_size, &Layer::down, mixture);
    add("shared down", s.hidden_size, e.shared_size, &Layer::shared_down, shared);
    all.push_back({"head", s.vocab_size, s.embed_size, {&head_}});
    return all;
}

void Decoder::choose_readings() {
    std::vector<Alike> all = alike();
    int64_t n = 0, k = 0;
    for (const Alike& some : all) n = std::max(n, some.n), k = std::max(k, some.k);
    Buffer x(k * static_cast<int64_t>(sizeof(float))), y(n * static_cast<int64_t>(sizeof(float)));
    std::memset(x.data(), 0, static_cast<size_t>(x.bytes()));
    reserve(1);
    // One row through some of them, on from where the last turn ended: of a large model nothing is read that a cache holds.
    const auto turn = [&](Alike& some, Reading reading, Team& workers, int64_t wanted) {
        const auto add_bytes = [](double sum, const PackedLinear* linear) { return sum + static_cast<double>(linear->nbytes()); };
        const double whole = std::accumulate(some.linears.begin(), some.linears.end(), 0.0, add_bytes);
        const double enough = std::min(static_cast<double>(wanted), whole);
        double bytes = 0, ns = 0;
        some.ask(reading);
        while (bytes < enough) {
            const PackedLinear& linear = *some.linears[some.next];
            const double tile_bytes = static_cast<double>(linear.nbytes()) / static_cast<double>(linear.tiles());
            const auto most = static_cast<int64_t>((enough - bytes) / tile_bytes) + 1;
            const Range tiles{some.tile, std::min(some.tile + most, linear.tiles())};
            prepare(linear, 1, {x.floats(), some.k});
            const auto begin = std::chrono::steady_clock::now();
            workers.run(tiles.end - tiles.begin, [&](Range part, int) {
                const Range its_tiles{tiles.begin + part.begin, tiles.begin + part.end};
                linear.apply(kernels_.linear, activations_.data(), 1, its_tiles, y.floats(), 0);
            });
            ns += std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - begin).count();
            bytes += tile_bytes * static_cast<double>(tiles.end - tiles.begin);
            some.tile = tiles.end % linear.tiles();
            if (some.tile == 0) some.next = (some.next + 1) % some.linears.size();
        }
        return ns / bytes;
    };
    std::vector<bool> pairs;  // else `two` is `none`
    for (const Alike& some : all) {
        const auto obey = [&](const PackedLinear* linear) { return linear->pairs(kernels_.linear); };
        pairs.push_back(std::any_of(some.linears.begin(), some.linears.end(), obey));
    }
    const int64_t wanted = std::max(kTurnBytes, n_threads_ * kThreadBytes);
    std::vector<Times> together(all.size()), alone(all.size());
    Team one(1);
    const Team::Awake awake(team());
    for (Alike& some : all) turn(some, Reading::none, *team_, wanted);  // it counts for nothing
    for (size_t t = 0; t < kTurns; ++t) {  // long enough for trouble of some turns to pass
        for (size_t i = 0; i < all.size(); ++i) {
            for (size_t j = 0; j < kWays.size(); ++j) {  // each way meets all layers in time, wherever a turn begins
                const size_t way = (j + t) % kWays.size();
                if (way == kTwo && !pairs[i]) continue;
                together[i][way][t] = turn(all[i], kWays[way], *team_, wanted);
                alone[i][way][t] = n_threads_ == 1 ? together[i][way][t] : turn(all[i], kWays[way], one, kTurnBytes);
            }
        }
    }
    for (size_t i = 0; i < all.size(); ++i) {
        if (!pairs[i]) together[i][kTwo] = together[i][kNone], alone[i][kTwo] = alone[i][kNone];
        settle(all[i], fastest(together[i], alone[i]));
    }
}

void Decoder::read_as(Reading reading) {
    for (const Alike& some : alike()) settle(some, reading);
}

// What embedding and head are projected with is read as the head is, the cache as qkv.
void Decoder::settle(const Alike& some, Reading reading) {
    some.ask(reading);
    readings_.emplace_back(some.name, reading);
    if (some.linears.front() == &layers_.front().qkv) cache_fetch_ = fetch_of(reading);
    if (some.linears.front() != &head_) return;
    for (PackedLinear* linear : {&project_in_, &project_out_}) linear->ask(fetch_of(reading), reading == Reading::two);
}

}  // namespace tinychat
