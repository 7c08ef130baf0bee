// Aligned memory that the lowered decoder owns.
#pragma once
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

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
        bytes_ = 0;
        const std::align_val_t alignment{bytes < kHugePage ? size_t{64} : size_t{kHugePage}};
        memory_ = {::operator new(static_cast<size_t>(bytes), alignment), Free{alignment}};
        bytes_ = bytes;
#if defined(__linux__)
        // Huge pages: of gigabytes, a page of 4 KiB at a time costs a second to enter and misses the address cache for
        // as long as it is read. Whole ones only, so that none holds more than was asked for. A wish: failing is no error.
        if (bytes >= kHugePage) madvise(data(), static_cast<size_t>(bytes / kHugePage * kHugePage), MADV_HUGEPAGE);
#endif
    }
    int64_t bytes() const { return bytes_; }
    char* data() const { return static_cast<char*>(memory_.get()); }
    float* floats() const { return static_cast<float*>(memory_.get()); }
    explicit operator bool() const { return bytes_ > 0; }

  private:
    static constexpr int64_t kHugePage = 2 << 20;
    struct Free {
        std::align_val_t alignment;
        Free() : alignment{64} {}
        explicit Free(std::align_val_t given) : alignment(given) {}
        void operator()(void* memory) const { ::operator delete(memory, alignment); }
    };
    std::unique_ptr<void, Free> memory_;
    int64_t bytes_ = 0;
};

// Bytes side by side that live and are freed together: a model's weights. A buffer for each would end in pages that are not huge, and
// at each end a processor stops fetching ahead: a tenth of the speed of decoding a model of a billion weights.
class Arena {
  public:
    // On a 64-byte boundary.
    char* take(int64_t bytes) {
        bytes = (bytes + 63) / 64 * 64;
        if (blocks_.empty() || used_ + bytes > blocks_.back().bytes()) {
            blocks_.emplace_back(bytes < kBlock ? kBlock : bytes);
            used_ = 0;
        }
        char* taken = blocks_.back().data() + used_;
        used_ += bytes;
        return taken;
    }

  private:
    static constexpr int64_t kBlock = 256 << 20;  // addresses: the system gives memory where they are written
    std::vector<Buffer> blocks_;
    int64_t used_ = 0;  // of the last
};

}  // namespace tinychat
