// What the native tests share: a check that counts and reports, random numbers, and memory of an exact size, so that a
// sanitizer sees the first byte read or written beyond it.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <vector>

namespace tinychat::test {

inline int failures = 0, checks = 0;
inline uint64_t digest = 0xcbf29ce484222325u;  // of all results, to compare runs

inline void check(bool holds, const std::string& what) {
    ++checks;
    if (holds) return;
    ++failures;
    std::fprintf(stderr, "FAILED: %s\n", what.c_str());
}

// xorshift64*: the same numbers on every machine.
class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
    uint64_t next() {
        state_ ^= state_ >> 12;
        state_ ^= state_ << 25;
        state_ ^= state_ >> 27;
        return state_ * 0x2545f4914f6cdd1du;
    }
    int64_t below(int64_t n) { return static_cast<int64_t>(next() >> 33) % n; }
    double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }
    // Near enough to normal: the sum of 12 uniform numbers.
    float normal() {
        double sum = -6;
        for (int i = 0; i < 12; i++) sum += uniform();
        return static_cast<float>(sum);
    }
    std::vector<float> normals(int64_t n) {
        std::vector<float> values(static_cast<size_t>(n));
        for (float& value : values) value = normal();
        return values;
    }

  private:
    uint64_t state_;
};

// Exactly `bytes` bytes on a 64-byte boundary.
class Memory {
  public:
    explicit Memory(int64_t bytes) : data_(::operator new(static_cast<size_t>(bytes), std::align_val_t{64})) {}
    ~Memory() { ::operator delete(data_, std::align_val_t{64}); }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    char* data() const { return static_cast<char*>(data_); }

  private:
    void* data_;
};

// Sum of squared errors over the sum of squares.
inline double nmse(const std::vector<double>& expected, const float* found) {
    double error = 0, power = 0;
    for (size_t i = 0; i < expected.size(); i++) {
        uint32_t bits;
        std::memcpy(&bits, found + i, 4);
        digest = (digest ^ bits) * 0x100000001b3u;  // FNV-1a, by words
        error += (expected[i] - found[i]) * (expected[i] - found[i]);
        power += expected[i] * expected[i];
    }
    return power > 0 ? error / power : error;
}

// fp32 to fp16, rounded to nearest even; for numbers that fp16 holds normally.
inline uint16_t to_half(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest < 0x38800000) return static_cast<uint16_t>(sign);  // below the smallest normal: zero
    const uint32_t rounded = rest + 0xfff + (rest >> 13 & 1);
    return static_cast<uint16_t>(sign | (rounded - 0x38000000) >> 13);
}

// The instruction-set levels that run here.
std::vector<std::string> isas();

void test_arena();
void test_attention();
void test_block();
void test_clip();
void test_decoder();
void test_draw();
void test_linear();
void test_macos();
void test_packing();
void test_team();

}  // namespace tinychat::test
