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
    int64_t sum = 0;
    for (int i = 0; i < 400; i++) {  // pieces of a block, some that do not fit into what is left, some larger than a block
        const int64_t bytes = 1 + (i % 50 == 49 ? random.below(24 << 20) : random.below(300000));
        all.push_back({arena.take(bytes), bytes});
        sum += bytes;
        std::memset(all.back().data, i % 251, static_cast<size_t>(bytes));
    }
    check(sum > 64 << 20, "several blocks");
    for (size_t i = 0; i < all.size(); i++) {
        const auto [data, bytes] = all[i];
        check(reinterpret_cast<uintptr_t>(data) % 64 == 0, "a boundary of 64 bytes");
        const auto other = [i](char value) { return value != static_cast<char>(i % 251); };
        check(std::none_of(data, data + bytes, other), "piece " + std::to_string(i) + " holds what was written to it");
    }
}

}  // namespace tinychat::test
