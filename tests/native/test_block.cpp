// Norms, activations and sums of every level against float64; nothing beyond an end is touched.
#include <algorithm>
#include <cmath>

#include "check.h"
#include "kernels.h"

namespace tinychat::test {
namespace {

double activated(Activation activation, double x) {
    switch (activation) {
        case Activation::silu: return x / (1 + std::exp(-x));
        case Activation::gelu: return x * std::erfc(-x / std::sqrt(2.0)) / 2;
        case Activation::gelu_tanh: return x / (1 + std::exp(-2 * std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
        case Activation::relu: return x < 0 ? 0 : x;
    }
    return x;
}

struct Tester {
    std::string isa;
    int64_t n;
    std::vector<float> x, other, bias;
    Memory memory;  // of n values and no more

    void close(const char* what, double (*expected)(const Tester&, size_t)) const {
        std::vector<double> values;
        for (size_t i = 0; i < static_cast<size_t>(n); i++) values.push_back(expected(*this, i));
        const double error = nmse(values, y());
        check(error < 1e-12, std::string(what) + " of " + std::to_string(n) + " values, NMSE " + std::to_string(error) + ", " + isa);
    }
    float* y() const { return reinterpret_cast<float*>(memory.data()); }
    float* copied() const {
        std::memcpy(y(), x.data(), x.size() * 4);
        return y();
    }
    double mean() const {
        double sum = 0;
        for (float value : x) sum += static_cast<double>(value);
        return sum / static_cast<double>(n);
    }
    double variance(double around) const {
        double sum = 0;
        for (float value : x) sum += (value - around) * (value - around);
        return sum / static_cast<double>(n);
    }
};

template <Activation activation>
void act(const BlockKernels& kernels, const Tester& t, const char* what) {
    kernels.activate(activation, t.x.data(), t.other.data(), t.n, t.y());
    t.close(what, [](const Tester& own, size_t i) { return activated(activation, own.x[i]) * static_cast<double>(own.other[i]); });
    kernels.activate(activation, t.copied(), nullptr, t.n, t.y());
    t.close(what, [](const Tester& own, size_t i) { return activated(activation, own.x[i]); });
}

void peaks(const BlockKernels& kernels, const Tester& t, Random& random) {
    const int64_t n = t.n, n_peaks = (n + kPeak - 1) / kPeak;
    const Memory memory(n_peaks * 4), spoilt_memory(n * 4);  // what is touched beside them is seen
    float *found = reinterpret_cast<float*>(memory.data()), *spoilt = reinterpret_cast<float*>(spoilt_memory.data());
    kernels.peaks(t.x.data(), n, found);
    for (int64_t i = 0; i < n_peaks; ++i) {
        const auto begin = t.x.begin() + i * kPeak, end = t.x.begin() + std::min(n, (i + 1) * kPeak);
        check(found[i] == *std::max_element(begin, end), "the largest of each 16 of " + std::to_string(n) + ", " + t.isa);
    }
    for (const float wrong : {INFINITY, -INFINITY, NAN}) {
        std::copy(t.x.begin(), t.x.end(), spoilt);
        spoilt[random.below(n)] = wrong;
        kernels.peaks(spoilt, n, found);
        check(std::isnan(found[0]), "a peak of what is not finite, " + t.isa);
    }
}

}  // namespace

void test_block() {
    for (const std::string& isa : isas()) {
        const BlockKernels& kernels = tinychat::kernels(isa.c_str()).block;
        for (int64_t n : {1, 3, 4, 7, 16, 33, 100, 1001}) {
            Random random(static_cast<uint64_t>(n));
            Tester t{isa, n, random.normals(n), random.normals(n), random.normals(n), Memory(n * 4)};
            for (float& value : t.x) value = value * 4 + 1;
            kernels.add(t.copied(), t.other.data(), 0.25f, n);
            t.close("a sum", [](const Tester& own, size_t i) { return own.x[i] + 0.25 * own.other[i]; });
            kernels.soft_cap(t.copied(), 3, n);
            t.close("a cap", [](const Tester& own, size_t i) { return 3 * std::tanh(own.x[i] / 3.0); });
            peaks(kernels, t, random);
            kernels.rms_norm(t.x.data(), t.other.data(), 1e-5f, n, t.y());
            t.close("RMSNorm", [](const Tester& own, size_t i) {
                return own.x[i] / std::sqrt(own.variance(0) + 1e-5) * static_cast<double>(own.other[i]);
            });
            const Moments moments = kernels.moments(NormType::layer, t.x.data(), n);
            check(std::abs(moments.mean - t.mean()) < 1e-5 && std::abs(moments.variance - t.variance(t.mean())) < 1e-4,
                  "mean and variance of " + std::to_string(n) + " values, " + isa);
            kernels.normalize(t.x.data(), 2, 3, t.other.data(), t.bias.data(), n, t.y());
            t.close("a norm", [](const Tester& own, size_t i) { return (own.x[i] - 2.0) * 3 * own.other[i] + own.bias[i]; });
            act<Activation::silu>(kernels, t, "silu");
            act<Activation::gelu>(kernels, t, "gelu");
            act<Activation::gelu_tanh>(kernels, t, "gelu_tanh");
            act<Activation::relu>(kernels, t, "relu");
        }
        std::vector<float> broken{NAN, INFINITY, -1e30f, 1e30f}, y(4);
        kernels.activate(Activation::silu, broken.data(), nullptr, 4, y.data());
        check(std::isnan(y[0]) && y[1] == INFINITY && y[2] == 0 && y[3] == 1e30f, "silu of what is not finite, " + isa);
    }
}

}  // namespace tinychat::test
