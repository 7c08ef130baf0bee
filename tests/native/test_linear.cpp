// Every linear of every level: packing is undone by unpacking, products agree with float64, nothing beyond is touched.
#include "weights.h"

namespace tinychat::test {
namespace {

std::string name(const char* isa, const LinearShape& s, int64_t rows) {
    return std::string(isa) + " [" + std::to_string(s.n) + ", " + std::to_string(s.k) + "] group " +
           std::to_string(s.group) + ", " + std::to_string(s.bits) + " bits, activations " +
           std::to_string(s.activation_bits) + ", " + std::to_string(rows) + " rows";
}

void packing(const char* isa, Quantized& weight, const Memory& packed) {
    const LinearKernels& kernels = tinychat::kernels(isa).linear;
    const int64_t tiles = (weight.shape.n + kernels.tile - 1) / kernels.tile;
    for (int64_t tile = 0; tile < tiles; tile++) kernels.pack(weight.shape, weight.data(), packed.data(), tile, tile + 1);
    Quantized found = weight;
    std::memset(found.codes.data(), 255, found.codes.size());
    std::memset(found.zeros.data(), 255, found.zeros.size());
    std::memset(found.scales.data(), 255, found.scales.size() * 2);
    kernels.unpack(weight.shape, packed.data(), found.data());
    check(found.codes == weight.codes && found.zeros == weight.zeros && found.scales == weight.scales,
          "unpacking undoes packing: " + name(isa, weight.shape, 0));
    std::vector<float> row(static_cast<size_t>(weight.shape.k));
    const int64_t last = weight.shape.n - 1;
    kernels.unpack_row(weight.shape, packed.data(), last, row.data());
    bool same = true;
    for (int64_t k = 0; k < weight.shape.k; k++) {
        same &= row[static_cast<size_t>(k)] == static_cast<float>(weight.weight(last, k));
    }
    check(same, "a row is unpacked: " + name(isa, weight.shape, 0));
}

// The codes as streams of bits, in words by rows and by columns, in their own order and in the reverse one: the same bytes.
void streams(const char* isa, Quantized& weight, const Memory& packed) {
    const LinearKernels& kernels = tinychat::kernels(isa).linear;
    const int64_t tiles = (weight.shape.n + kernels.tile - 1) / kernels.tile, bytes = kernels.packed_bytes(weight.shape);
    std::vector<int32_t> reverse;
    for (int64_t i = weight.shape.k; i-- > 0;) reverse.push_back(static_cast<int32_t>(i));
    for (bool reversed : {false, true}) {
        for (bool by_rows : {false, true}) {
            Stream stream(weight, by_rows, reversed ? reverse : std::vector<int32_t>{});
            const WeightData data = stream.data(weight);
            const Memory found(bytes);
            for (int64_t tile = 0; tile < tiles; tile++) kernels.pack(weight.shape, data, found.data(), tile, tile + 1);
            check(std::memcmp(found.data(), packed.data(), static_cast<size_t>(bytes)) == 0,
                  "a stream packs as its codes do: " + name(isa, weight.shape, 0));
        }
    }
}

// `weight(row, k)` is what the packed weight stands for.
template <class Weight>
void product(const char* isa, const LinearShape& shape, const Weight& weight, const Memory& packed, int64_t rows,
             double limit, const std::vector<float>& x) {
    const LinearKernels& kernels = tinychat::kernels(isa).linear;
    const int64_t bytes = kernels.activation_bytes(shape), step = kernels.prepare_step(shape);
    const Memory activations(bytes * rows);
    for (int64_t t = 0; t < rows; t++) {  // in two parts
        const float* row = x.data() + t * shape.k;
        const int64_t middle = shape.k / 2 / step * step;
        char* activation = activations.data() + t * bytes;
        if (middle) kernels.prepare(shape, row, activation, 0, middle);
        kernels.prepare(shape, row + middle, activation, middle, shape.k);
    }
    const int64_t tiles = (shape.n + kernels.tile - 1) / kernels.tile;
    std::vector<float> y(static_cast<size_t>(rows * shape.n), NAN);
    for (int64_t part = 0; part < 2; part++) {
        kernels.linear(shape, packed.data(), activations.data(), rows, tiles * part / 2, tiles * (part + 1) / 2, y.data(),
                       shape.n);
    }
    std::vector<double> expected;
    for (int64_t t = 0; t < rows; t++) {
        for (int64_t r = 0; r < shape.n; r++) {
            double sum = 0;
            for (int64_t k = 0; k < shape.k; k++) sum += weight(r, k) * x[static_cast<size_t>(t * shape.k + k)];
            expected.push_back(sum);
        }
    }
    const double error = nmse(expected, y.data());
    check(error <= limit, "NMSE " + std::to_string(error) + " of " + name(isa, shape, rows));
}

// The largest codes, less a zero of 0, meet the largest activations of either sign: nothing overflows that counts.
void saturated(const char* isa, int32_t bits, int32_t activation_bits) {
    Random random(3);
    for (int64_t group : {1100, 128}) {
        Quantized weight(130, 1100, group, bits, activation_bits, random);
        std::memset(weight.codes.data(), (1 << bits) - 1, weight.codes.size());
        std::memset(weight.zeros.data(), 0, weight.zeros.size());
        const Memory packed(kernels(isa).linear.packed_bytes(weight.shape));
        packing(isa, weight, packed);
        const auto exact = [&](int64_t row, int64_t at) { return weight.weight(row, at); };
        for (float size : {3.0f, -3.0f}) {
            const std::vector<float> same(static_cast<size_t>(5 * weight.shape.k), size);
            for (int64_t rows : {1, 5}) product(isa, weight.shape, exact, packed, rows, 1e-12, same);
            LinearShape pairs = weight.shape;
            pairs.fetch = Fetch::none;
            pairs.two_tiles = true;
            product(isa, pairs, exact, packed, 1, 1e-12, same);
            std::vector<float> mixed = same;  // with others of the other sign, whose sums go the other way
            for (size_t i = 0; i < mixed.size(); i += 3) mixed[i] = -mixed[i];
            for (int64_t rows : {1, 5}) product(isa, weight.shape, exact, packed, rows, 1e-12, mixed);
            product(isa, pairs, exact, packed, 1, 1e-12, mixed);
        }
    }
}

// Which levels say that they take two tiles at once, and of what: results do not tell.
void pairs(const std::string& isa) {
    const bool vnni = isa == "avx512vnni" || isa == "avxvnni" || isa == "amx";
    const auto obeyed = kernels(isa.c_str()).linear.pairs;
    check((obeyed != nullptr) == (vnni || isa == "avx2"), isa + ": whether it has pairs of tiles");
    if (!obeyed) return;
    for (int32_t bits : {2, 3, 4, 8}) {
        for (int32_t activation_bits : {16, 8}) {
            const LinearShape shape{WeightType::quantized, 64, 64, 64, false, bits, activation_bits};
            check(obeyed(shape) == (vnni || bits < 8 || activation_bits == 8), isa + ": pairs of tiles of these bits");
        }
    }
    check(!obeyed({WeightType::f16, 64, 64, 0, false, 0, 0}), isa + ": no pairs of tiles of fp16");
}

// fp32, fp16 and bf16: unpacking gives the same bytes.
void plain(const char* isa, WeightType type, int64_t n, int64_t k, Random& random) {
    const LinearKernels& kernels = tinychat::kernels(isa).linear;
    const LinearShape shape{type, n, k, 0, false, 0, 0};
    const int64_t bytes = type == WeightType::f32 ? 4 : 2;
    std::vector<char> values(static_cast<size_t>(n * k * bytes)), found(values.size());
    std::vector<double> numbers;
    for (int64_t i = 0; i < n * k; i++) {
        const float value = random.normal();
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        if (type == WeightType::f16) bits = to_half(value);
        if (type == WeightType::bf16) bits >>= 16;
        std::memcpy(values.data() + i * bytes, &bits, static_cast<size_t>(bytes));  // little-endian
        const auto half = static_cast<uint16_t>(bits);
        numbers.push_back(type == WeightType::f32 ? value : type == WeightType::f16 ? from_half(half) : from_bf16(half));
    }
    const Memory packed(kernels.packed_bytes(shape));
    kernels.pack(shape, {values.data(), nullptr, nullptr}, packed.data(), 0, (n + kernels.tile - 1) / kernels.tile);
    kernels.unpack(shape, packed.data(), {found.data(), nullptr, nullptr});
    check(values == found, "unpacking undoes packing: " + name(isa, shape, 0));
    const auto weight = [&](int64_t row, int64_t at) { return numbers[static_cast<size_t>(row * k + at)]; };
    for (int64_t rows : {1, 2, 7, 103}) product(isa, shape, weight, packed, rows, 1e-12, random.normals(rows * k));
}

}  // namespace

void test_linear() {
    // The last are of tiles enough for a panel of rows.
    constexpr int64_t kShapes[][3] = {{1, 8, 8},     {17, 100, 100}, {33, 172, 32},    {16, 129, 128},  {40, 192, 64},
                                      {31, 700, 200}, {19, 1100, 1100}, {48, 512, 128}, {129, 172, 100}, {130, 300, 300}};
    for (const std::string& isa : isas()) {
        for (int32_t bits : {2, 3, 4, 8}) {
            for (int32_t activation_bits : {16, 8}) {
                Random random(7);
                for (const auto& [n, k, group] : kShapes) {
                    Quantized weight(n, k, group, bits, activation_bits, random);
                    const Memory packed(kernels(isa.c_str()).linear.packed_bytes(weight.shape));
                    packing(isa.c_str(), weight, packed);
                    if (activation_bits == 16) streams(isa.c_str(), weight, packed);
                    const auto exact = [&](int64_t row, int64_t at) { return weight.weight(row, at); };
                    const double limit = activation_bits == 8 ? 5e-4 : 1e-7;
                    std::vector<float> one;
                    for (int64_t rows : {1, 2, 3, 8, 13, 33}) {
                        const std::vector<float> x = random.normals(rows * k);
                        product(isa.c_str(), weight.shape, exact, packed, rows, limit, x);
                        if (rows == 1) one = x;
                    }
                    for (int way = 0; way < 3; way++) {
                        LinearShape asked = weight.shape;
                        asked.fetch = way == 0 ? Fetch::near : Fetch::none;
                        asked.two_tiles = way == 2;
                        product(isa.c_str(), asked, exact, packed, 1, limit, one);
                    }
                }
            }
        }
        for (int32_t bits : {2, 3, 4, 8}) {
            for (int32_t activation_bits : {16, 8}) saturated(isa.c_str(), bits, activation_bits);
        }
        pairs(isa);
        Random random(5);
        for (const WeightType type : {WeightType::f32, WeightType::f16, WeightType::bf16}) {
            for (const auto& [n, k, group] : kShapes) plain(isa.c_str(), type, n, k, random);
        }
    }
}

}  // namespace tinychat::test
