// Aligned memory that the lowered decoder owns.
#pragma once
#include <cstdint>
#include <memory>
#include <new>

namespace tinychat {

// Bytes on a 64-byte boundary, owned; their contents are undefined until written.
class Buffer {
  public:
    Buffer() = default;
    explicit Buffer(int64_t bytes) { reserve(bytes); }

    // At least `bytes`; growing forgets the contents.
    void reserve(int64_t bytes) {
        if (bytes <= bytes_) return;
        memory_.reset();
        memory_.reset(::operator new(static_cast<size_t>(bytes), alignment));
        bytes_ = bytes;
    }
    int64_t bytes() const { return bytes_; }
    char* data() const { return static_cast<char*>(memory_.get()); }
    float* floats() const { return static_cast<float*>(memory_.get()); }
    explicit operator bool() const { return bytes_ > 0; }

  private:
    static constexpr std::align_val_t alignment{64};
    struct Free {
        void operator()(void* memory) const { ::operator delete(memory, alignment); }
    };
    std::unique_ptr<void, Free> memory_;
    int64_t bytes_ = 0;
};

}  // namespace tinychat
