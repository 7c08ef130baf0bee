// The quantizer's rounding and search of limits at every level that has them, against both written out.
#include <algorithm>
#include <cmath>

#include "check.h"
#include "half.h"
#include "kernels.h"

namespace tinychat::test {
namespace {

struct Fit {
    float scale, zero;
};

// tinychat/quantize/grid.py: of ranges that are neither one value nor too small for normal fp16.
Fit fitted(float low, float high, float top, bool symmetric) {
    const float middle = (top + 1) / 2;
    const float wide = symmetric ? std::max(std::fabs(low), std::fabs(high)) / middle
                                 : (std::max(high, 0.0f) - std::min(low, 0.0f)) / top;
    const float scale = from_half(to_half(wide));
    return {scale, symmetric ? middle : std::min(std::rint(-std::min(low, 0.0f) / scale), top)};
}

float rounded(float weight, Fit fit, float top) {
    return std::clamp(std::rint(weight / fit.scale), -fit.zero, top - fit.zero) * fit.scale;
}

float* floats(const Memory& memory) { return reinterpret_cast<float*>(memory.data()); }

void fill(const Memory& memory, const std::vector<float>& values) {
    std::memcpy(memory.data(), values.data(), values.size() * sizeof(float));
}

std::string name(const char* isa, int64_t rows, int64_t k, int64_t width, float top, bool symmetric) {
    return std::string(isa) + " [" + std::to_string(rows) + ", " + std::to_string(k) + "] groups of " +
           std::to_string(width) + " to " + std::to_string(static_cast<int>(top)) + (symmetric ? ", symmetric" : "");
}

void rounding(const char* isa, int64_t rows, int64_t k, int64_t width, float top, bool symmetric, Random& random) {
    const ClipKernels& kernels = *tinychat::kernels(isa).clip;
    const int64_t groups = (k + width - 1) / width;
    const Memory weights(rows * k * 4), limits(rows * groups * 8), divisors(k * 4), made(rows * k * 4);
    fill(weights, random.normals(rows * k));
    for (int64_t i = 0; i < k; i++) floats(divisors)[i] = static_cast<float>(0.5 + random.uniform());
    for (int64_t i = 0; i < rows * groups; i++) {
        floats(limits)[2 * i] = static_cast<float>(-1 - random.uniform());
        floats(limits)[2 * i + 1] = static_cast<float>(1 + random.uniform());
    }
    for (int given = 0; given < 4; given++) {
        const float* limit = given & 1 ? floats(limits) : nullptr;
        const float* divisor = given & 2 ? floats(divisors) : nullptr;
        check(kernels.round({rows, k, width, floats(weights), limit, top, symmetric, divisor, floats(made)}), "rounding goes");
        bool same = true;
        for (int64_t row = 0; row < rows; row++) {
            for (int64_t i = 0; i < k; i++) {
                const int64_t group = i / width;
                const float* begin = floats(weights) + row * k + group * width;
                const auto [low, high] = std::minmax_element(begin, begin + std::min(width, k - group * width));
                const float* own = floats(limits) + (row * groups + group) * 2;
                const Fit fit = limit ? fitted(own[0], own[1], top, symmetric) : fitted(*low, *high, top, symmetric);
                const float value = rounded(floats(weights)[row * k + i], fit, top);
                same &= floats(made)[row * k + i] == (divisor ? value / divisor[i] : value);
            }
        }
        check(same, "rounding: " + name(isa, rows, k, width, top, symmetric));
    }
    floats(weights)[rows * k - 1] = NAN;
    check(!kernels.round({rows, k, width, floats(weights), nullptr, top, symmetric, nullptr, floats(made)}), "NaN is refused");
}

void search(const char* isa, int64_t rows, int64_t width, float top, bool symmetric, Random& random) {
    const ClipKernels& kernels = *tinychat::kernels(isa).clip;
    const Memory weights(rows * width * 4), gram(width * width * 4), pull(rows * width * 4), before(rows * width * 4),
        own(rows * 8), limits(rows * 8), change(rows * width * 4);
    fill(weights, random.normals(rows * width));
    fill(pull, random.normals(rows * width));
    const std::vector<float> x = random.normals(20 * width);
    for (int64_t i = 0; i < width; i++) {
        for (int64_t j = 0; j < width; j++) {
            float sum = 0;
            for (int64_t t = 0; t < 20; t++) sum += x[static_cast<size_t>(t * width + i)] * x[static_cast<size_t>(t * width + j)];
            floats(gram)[i * width + j] = sum;
        }
    }
    for (int64_t row = 0; row < rows; row++) {
        const float* begin = floats(weights) + row * width;
        const auto [low, high] = std::minmax_element(begin, begin + width);
        floats(own)[2 * row] = *low;
        floats(own)[2 * row + 1] = *high;
        const Fit fit = fitted(*low, *high, top, symmetric);
        for (int64_t i = 0; i < width; i++) floats(before)[row * width + i] = rounded(begin[i], fit, top);
    }
    std::memcpy(limits.data(), own.data(), static_cast<size_t>(rows * 8));
    const std::vector<float> shrinks{1.1f, 0.9f, 0.75f, 0.6f};
    const std::vector<int32_t> moves{3, 1, 2};
    const Memory scratch(kernels.scratch(width) * 4);
    kernels.clip({rows, width, floats(weights), floats(gram), floats(pull), floats(before), floats(own), floats(limits), 2,
                  top, symmetric, shrinks.data(), 4, moves.data(), 3, floats(change)},
                 floats(scratch));

    const auto loss = [&](int64_t row, const float* ends) {  // what limits add, in double
        const Fit fit = fitted(ends[0], ends[1], top, symmetric);
        std::vector<double> d;
        for (int64_t i = 0; i < width; i++) {
            const int64_t at = row * width + i;
            d.push_back(static_cast<double>(rounded(floats(weights)[at], fit, top)) - floats(before)[at]);
        }
        double sum = 0;
        for (int64_t i = 0; i < width; i++) {
            double product = floats(pull)[row * width + i];
            for (int64_t j = 0; j < width; j++) product += floats(gram)[i * width + j] * d[static_cast<size_t>(j)];
            sum += d[static_cast<size_t>(i)] * product;
        }
        return sum;
    };
    bool best = true, told = true;
    for (int64_t row = 0; row < rows; row++) {
        const float *range = floats(own) + 2 * row, *found = floats(limits) + 2 * row;
        float wanted[2] = {range[0], range[1]};
        double least = 0;
        for (const int32_t move : moves) {
            float next[2] = {wanted[0], wanted[1]};
            for (const float shrink : shrinks) {
                const float tried[2] = {move & 1 ? range[0] * shrink : wanted[0], move & 2 ? range[1] * shrink : wanted[1]};
                const double made = loss(row, tried);
                if (made >= least) continue;
                least = made;
                std::copy(tried, tried + 2, next);
            }
            std::copy(next, next + 2, wanted);
        }
        best &= loss(row, found) <= least + 1e-3 * std::fabs(least) + 1e-6;
        const Fit fit = fitted(found[0], found[1], top, symmetric);
        for (int64_t i = 0; i < width; i++) {
            const int64_t at = row * width + i;
            const float expected = rounded(floats(weights)[at], fit, top) - floats(before)[at];
            told &= std::fabs(floats(change)[at] - expected) <= 1e-6f;
        }
    }
    check(best, "the best limits are found: " + name(isa, rows, width, width, top, symmetric));
    check(told, "what they change is told: " + name(isa, rows, width, width, top, symmetric));
}

}  // namespace

void test_clip() {
    for (const std::string& isa : isas()) {
        if (!kernels(isa.c_str()).clip) continue;
        Random random(11);
        for (const bool symmetric : {false, true}) {
            for (const float top : {3.0f, 15.0f}) {
                rounding(isa.c_str(), 3, 64, 32, top, symmetric, random);
                rounding(isa.c_str(), 2, 77, 30, top, symmetric, random);
                rounding(isa.c_str(), 1, 5, 5, top, symmetric, random);
                search(isa.c_str(), 13, 32, top, symmetric, random);
                search(isa.c_str(), 6, 70, top, symmetric, random);
                search(isa.c_str(), 1, 7, top, symmetric, random);
            }
        }
    }
}

}  // namespace tinychat::test
