// Memory taken from an arena: on its boundary, apart from what else was taken, and there until the end.
#include <algorithm>

#include "buffer.h"
#include "check.h"

namespace tinychat::test {

void test_arena() {
    Random random(11);
    Arena arena;
    struct Taken {
        char* data;
        int64_t bytes;
    };
    std::vector<Taken> all;
    const auto mark = [](size_t i) { return static_cast<char>(i * 2654435761u >> 13); };
    int apart = 0;  // pieces that do not follow the one before
    for (int i = 0; i < 400; i++) {  // pieces of a block, some that do not fit into what is left, some larger than a block
        const int64_t bytes = 1 + (i % 50 == 49 ? random.below(24 << 20) : random.below(300000));
        all.push_back({arena.take(bytes), bytes});
        std::memset(all.back().data, mark(all.size() - 1), static_cast<size_t>(bytes));
        if (i > 0) apart += all.back().data - all[all.size() - 2].data != (all[all.size() - 2].bytes + 63) / 64 * 64;
    }
#if !defined(__SANITIZE_ADDRESS__)
    // Blocks at most double what was taken, so that more than 128 MiB are in four or more.
    check(apart >= 4 && apart < 40, std::to_string(apart) + " of 400 pieces begin a block, or are one, or follow such a one");
#endif
    for (size_t i = 0; i < all.size(); i++) {
        const auto [data, bytes] = all[i];
        check(reinterpret_cast<uintptr_t>(data) % 64 == 0, "a boundary of 64 bytes");
        const auto other = [&](char value) { return value != mark(i); };
        check(std::none_of(data, data + bytes, other), "piece " + std::to_string(i) + " holds what was written to it");
    }
}

}  // namespace tinychat::test
