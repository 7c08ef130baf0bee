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
        // as long as it is read. Whole ones only, or the last would hold more than was asked for. A wish: failing is no error.
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

// Bytes side by side that are freed together: a model's packed weights. A buffer for each linear would end in pages that are
// not huge, which cost a tenth of the speed of decoding (1.1 billion weights, Zen 4).
class Arena {
  public:
    // On a 64-byte boundary; what was taken before stays where it is.
    char* take(int64_t bytes) {
        bytes = (bytes + 63) / 64 * 64;
        const int64_t block = taken_ < kLeast ? kLeast : taken_ < kMost ? taken_ : kMost;
        taken_ += bytes;
        if (kEachAlone || (bytes > left_ && bytes > block / 2)) return blocks_.emplace_back(bytes).data();
        if (bytes > left_) {
            blocks_.emplace_back(block);
            at_ = blocks_.back().data();
            left_ = block;
        }
        left_ -= bytes;
        at_ += bytes;
        return at_ - bytes;
    }

  private:
    // Of a block: at first kLeast, then as much as was taken so far. The system gives memory where it is written, a huge page
    // at a time.
    static constexpr int64_t kLeast = 8 << 20, kMost = 256 << 20;
#if defined(__SANITIZE_ADDRESS__)
    static constexpr bool kEachAlone = true;  // for the sanitizer to see where each ends
#else
    static constexpr bool kEachAlone = false;
#endif
    std::vector<Buffer> blocks_;
    char* at_ = nullptr;
    int64_t left_ = 0, taken_ = 0;
};

}  // namespace tinychat
