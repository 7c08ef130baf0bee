// Rotation, storing and attention of every level: against float64, and nothing beyond an end is touched.
#include <cmath>

#include "check.h"
#include "half.h"
#include "kernels.h"

namespace tinychat::test {
namespace {

// Entries of one head in memory of their exact size, and the numbers that they stand for.
struct Cache {
    CacheType type;
    int64_t n, dim;
    Memory keys, values;
    std::vector<float> key_scales, value_scales;

    Cache(CacheType type, int64_t n, int64_t dim)
        : type(type), n(n), dim(dim), keys(n * dim * size(type)), values(n * dim * size(type)),
          key_scales(static_cast<size_t>(n)), value_scales(static_cast<size_t>(n)) {}
    static int64_t size(CacheType type) { return type == CacheType::f32 ? 4 : type == CacheType::f16 ? 2 : 1; }
    CacheView view() { return {type, keys.data(), values.data(), key_scales.data(), value_scales.data()}; }
    double number(const Memory& entries, const std::vector<float>& scales, int64_t entry, int64_t d) const {
        const char* at = entries.data() + (entry * dim + d) * size(type);
        if (type == CacheType::f32) return *reinterpret_cast<const float*>(at);
        if (type == CacheType::f16) return from_half(*reinterpret_cast<const uint16_t*>(at));
        return static_cast<int8_t>(*at) * static_cast<double>(scales[static_cast<size_t>(entry)]);
    }
    double key(int64_t entry, int64_t d) const { return number(keys, key_scales, entry, d); }
    double value(int64_t entry, int64_t d) const { return number(values, value_scales, entry, d); }
};

void rotation(const AttentionKernels& kernels, const std::string& isa) {
    for (int64_t half : {1, 3, 4, 7, 16, 33, 64}) {
        Random random(static_cast<uint64_t>(half));
        const Memory memory(half * 8);
        auto* head = reinterpret_cast<float*>(memory.data());
        const std::vector<float> x = random.normals(2 * half), angle = random.normals(half);
        std::vector<float> cos, sin;
        std::vector<double> expected(x.size());
        for (size_t j = 0; j < angle.size(); j++) {
            const size_t other = j + angle.size();
            cos.push_back(std::cos(angle[j]));
            sin.push_back(std::sin(angle[j]));
            expected[j] = static_cast<double>(x[j]) * cos[j] - static_cast<double>(x[other]) * sin[j];
            expected[other] = static_cast<double>(x[other]) * cos[j] + static_cast<double>(x[j]) * sin[j];
        }
        std::memcpy(head, x.data(), x.size() * 4);
        kernels.rotate(head, cos.data(), sin.data(), half);
        check(nmse(expected, head) < 1e-13, "rotation of " + std::to_string(half) + " pairs, " + isa);
    }
}

// What is stored differs from x by rounding alone.
void storing(const AttentionKernels& kernels, const std::string& isa, CacheType type, int64_t dim) {
    Cache cache(type, 3, dim);
    std::memset(cache.keys.data(), 77, static_cast<size_t>(3 * dim * Cache::size(type)));
    Random random(static_cast<uint64_t>(dim));
    const std::vector<float> key = random.normals(dim), value = random.normals(dim);
    kernels.store(cache.view(), key.data(), value.data(), dim, 1);
    const double limit = type == CacheType::f32 ? 0 : type == CacheType::f16 ? 2e-7 : 1e-4;
    for (const bool keys : {true, false}) {
        const std::vector<float>& x = keys ? key : value;
        std::vector<float> found;
        for (int64_t d = 0; d < dim; d++) found.push_back(static_cast<float>(keys ? cache.key(1, d) : cache.value(1, d)));
        const double error = nmse(std::vector<double>(x.begin(), x.end()), found.data());
        check(error <= limit, "NMSE " + std::to_string(error) + " of a stored entry of " + std::to_string(dim) + ", " + isa);
    }
    bool kept = true;
    const int64_t entry = dim * Cache::size(type);
    for (int64_t b = 0; b < entry; b++) kept &= cache.keys.data()[b] == 77 && cache.keys.data()[2 * entry + b] == 77;
    check(kept, "other entries stay, " + isa);
}

struct Case {
    int64_t rows, heads, position, window;
};

void attended(const AttentionKernels& kernels, const std::string& isa, Cache& cache, const Case& c, bool slopes, float cap) {
    const int64_t dim = cache.dim, queries = c.rows * c.heads, end = c.position + c.rows;
    Random random(static_cast<uint64_t>(queries));
    const std::vector<float> q = random.normals(queries * dim), slope = random.normals(c.heads);
    const float scale = 1 / std::sqrt(static_cast<float>(dim));
    const QueryGroup group{dim, c.heads, scale, slopes ? slope.data() : nullptr, cap};
    const QueryRows rows{q.data(), c.heads * dim, c.rows, c.position, c.window};
    const Memory scratch(kernels.scratch(group, c.rows, end) * 4);
    std::vector<float> out(q.size(), NAN), maximum(static_cast<size_t>(queries)), sum(static_cast<size_t>(queries));
    kernels.attend(cache.view(), group, rows, 0, end, reinterpret_cast<float*>(scratch.data()),
                   {out.data(), c.heads * dim, maximum.data(), sum.data()});
    std::vector<double> expected;
    for (int64_t m = 0; m < queries; m++) {
        const int64_t position = c.position + m / c.heads, first = c.window ? std::max<int64_t>(0, position + 1 - c.window) : 0;
        std::vector<double> mixed(static_cast<size_t>(dim), 0), scores;
        double largest = -INFINITY, total = 0;
        for (int64_t j = first; j <= position; j++) {
            double dot = 0;
            for (int64_t d = 0; d < dim; d++) dot += cache.key(j, d) * q[static_cast<size_t>(m * dim + d)];
            dot *= static_cast<double>(scale);
            if (cap != 0) dot = cap * std::tanh(dot / static_cast<double>(cap));
            if (slopes) dot += slope[static_cast<size_t>(m % c.heads)] * static_cast<double>(j - position);
            scores.push_back(dot);
            largest = std::max(largest, dot);
        }
        for (int64_t j = first; j <= position; j++) {
            const double weight = std::exp(scores[static_cast<size_t>(j - first)] - largest);
            total += weight;
            for (int64_t d = 0; d < dim; d++) mixed[static_cast<size_t>(d)] += weight * cache.value(j, d);
        }
        for (int64_t d = 0; d < dim; d++) {
            expected.push_back(mixed[static_cast<size_t>(d)] / total);
            out[static_cast<size_t>(m * dim + d)] /= sum[static_cast<size_t>(m)];
        }
    }
    const double error = nmse(expected, out.data());
    check(error < 1e-10, "NMSE " + std::to_string(error) + " of attention, " + std::to_string(c.rows) + " rows of " +
                             std::to_string(c.heads) + " heads of " + std::to_string(dim) + " at " + std::to_string(c.position) +
                             ", cache " + std::to_string(Cache::size(cache.type)) + " bytes, " + isa);
}

}  // namespace

void test_attention() {
    constexpr Case kCases[] = {{1, 1, 0, 0}, {1, 3, 16, 0}, {1, 7, 199, 0}, {1, 4, 198, 49}, {2, 5, 190, 2},
                               {3, 4, 0, 0}, {20, 1, 0, 0}, {65, 1, 100, 0}, {40, 3, 63, 17}};
    for (const std::string& isa : isas()) {
        const AttentionKernels& kernels = tinychat::kernels(isa.c_str()).attention;
        rotation(kernels, isa);
        for (const CacheType type : {CacheType::f32, CacheType::f16, CacheType::q8}) {
            for (int64_t dim : {1, 7, 16, 64, 100, 128}) {
                storing(kernels, isa, type, dim);
                Random random(3);
                Cache cache(type, 200, dim);
                for (int64_t j = 0; j < cache.n; j++) {
                    kernels.store(cache.view(), random.normals(dim).data(), random.normals(dim).data(), dim, j);
                }
                for (const Case& c : kCases) attended(kernels, isa, cache, c, false, 0);
                attended(kernels, isa, cache, kCases[3], true, 5);
                attended(kernels, isa, cache, kCases[8], true, 5);
            }
        }
    }
}

}  // namespace tinychat::test
