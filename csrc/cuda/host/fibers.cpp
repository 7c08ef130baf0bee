// See shim.h: the threads of a block as fibers, switched where they wait.
#include <setjmp.h>
#include <ucontext.h>

#include <deque>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "shim.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace tinychat::cuda::host {

bool reverse = false;

namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr int kLanes = 32;

struct Copy {
    void* to;
    const void* from;
    int bytes;
};

struct Warp {
    const char* what = nullptr;  // that its lanes do together, while some wait for others
    void* parts[kLanes] = {};
    int lanes = 0, arrived = 0;
};

struct Fiber {
    enum State { ready, in_barrier, in_warp, done } state = done;
    ucontext_t context;
    jmp_buf jump;
    bool entered = false;
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    void* sanitizer = nullptr;
    dim3 index;
    Warp* warp = nullptr;
    int lane = 0;
    std::vector<Copy> open;                // not yet in a group
    std::deque<std::vector<Copy>> groups;  // not yet waited for
};

struct Launch {
    const std::function<void()>* body = nullptr;
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<Warp> warps;
    std::unique_ptr<char[]> memory;
    Fiber* current = nullptr;
    ucontext_t main;
    jmp_buf jump;
    void* main_sanitizer = nullptr;
    const void* main_stack = nullptr;
    size_t main_stack_bytes = 0;
    std::exception_ptr failed;
};
Launch launched;

// After a failure every fiber that still runs is unwound.
void stop_if_failed() {
    if (launched.failed) std::rethrow_exception(launched.failed);
}

#ifdef __SANITIZE_ADDRESS__

// The sanitizer is told of every change of stacks.
void to_fiber(Fiber& fiber) {
    __sanitizer_start_switch_fiber(&launched.main_sanitizer, fiber.stack.get(), kStackBytes);
    swapcontext(&launched.main, &fiber.context);
    __sanitizer_finish_switch_fiber(launched.main_sanitizer, nullptr, nullptr);
}

void to_main(Fiber& fiber) {
    __sanitizer_start_switch_fiber(&fiber.sanitizer, launched.main_stack, launched.main_stack_bytes);
    swapcontext(&fiber.context, &launched.main);
    __sanitizer_finish_switch_fiber(fiber.sanitizer, &launched.main_stack, &launched.main_stack_bytes);
}

void entered() { __sanitizer_finish_switch_fiber(nullptr, &launched.main_stack, &launched.main_stack_bytes); }

#else

// A jump between stacks costs a tenth of swapcontext, which calls the kernel; a context is only entered by it.
void to_fiber(Fiber& fiber) {
    if (_setjmp(launched.jump)) return;
    if (fiber.entered) _longjmp(fiber.jump, 1);
    fiber.entered = true;
    setcontext(&fiber.context);
}

void to_main(Fiber& fiber) {
    if (!_setjmp(fiber.jump)) _longjmp(launched.jump, 1);
}

void entered() {}

#endif

// Leaves the running fiber in `state`; goes on here when it is resumed.
void leave(Fiber::State state) {
    launched.current->state = state;
    to_main(*launched.current);
}

// A fiber lives on from block to block and from launch to launch.
void enter() {
    entered();
    for (;;) {
        try {
            (*launched.body)();
        } catch (...) {
            if (!launched.failed) launched.failed = std::current_exception();
        }
        launched.current->open.clear();
        launched.current->groups.clear();
        leave(Fiber::done);
    }
}

void prepare(Fiber& fiber, int number) {
    fiber.state = Fiber::ready;
    fiber.index = dim3(number % blockDim.x, number / blockDim.x % blockDim.y, number / blockDim.x / blockDim.y);
    fiber.warp = &launched.warps[number / kLanes];
    fiber.lane = number % kLanes;
    fiber.warp->lanes++;
}

std::unique_ptr<Fiber> new_fiber() {
    auto fiber = std::make_unique<Fiber>();
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack.get();
    fiber->context.uc_stack.ss_size = kStackBytes;
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, enter, 0);
    return fiber;
}

std::string waiting(const char* name, int n) {
    std::string text = std::string(name) + ": threads wait for each other in vain:";
    int counts[4] = {};
    for (int i = 0; i < n; i++) counts[launched.fibers[i]->state]++;
    text += " " + std::to_string(counts[Fiber::in_barrier]) + " at a block barrier, " + std::to_string(counts[Fiber::done]) +
            " done";
    for (size_t w = 0; w < launched.warps.size(); w++) {
        const Warp& warp = launched.warps[w];
        if (!warp.arrived) continue;
        text += ", " + std::to_string(warp.arrived) + " of warp " + std::to_string(w) + " at " + warp.what;
    }
    return text;
}

void run_block(const char* name, int n) {
    launched.warps.assign((n + kLanes - 1) / kLanes, {});
    while (static_cast<int>(launched.fibers.size()) < n) launched.fibers.push_back(new_fiber());
    for (int i = 0; i < n; i++) prepare(*launched.fibers[i], i);
    for (;;) {
        bool progress = false;
        int left = 0, at_barrier = 0;
        for (int i = 0; i < n; i++) {
            Fiber& fiber = *launched.fibers[reverse ? n - 1 - i : i];
            if (fiber.state == Fiber::ready || launched.failed) {
                if (fiber.state == Fiber::done) continue;
                launched.current = &fiber;
                threadIdx = fiber.index;
                to_fiber(fiber);
                progress = true;
            }
        }
        for (int i = 0; i < n; i++) {
            left += launched.fibers[i]->state != Fiber::done;
            at_barrier += launched.fibers[i]->state == Fiber::in_barrier;
        }
        if (!left) return;
        if (at_barrier == left) {
            for (int i = 0; i < n; i++) {
                if (launched.fibers[i]->state == Fiber::in_barrier) launched.fibers[i]->state = Fiber::ready;
            }
        } else if (!progress) {
            launched.failed = std::make_exception_ptr(std::runtime_error(waiting(name, n)));
        }
    }
}

}  // namespace

void run(const char* name, dim3 blocks, dim3 threads, size_t shared, const std::function<void()>& body) {
    launched.body = &body;
    launched.failed = nullptr;
    gridDim = blocks;
    blockDim = threads;
    const int n = static_cast<int>(threads.x * threads.y * threads.z);
    if (n < 1 || n > 1024 || shared > 227 << 10) throw std::runtime_error(std::string(name) + ": no GPU launches that");
    launched.memory.reset(new char[shared]);
    const unsigned total = blocks.x * blocks.y * blocks.z;
    for (unsigned i = 0; i < total && !launched.failed; i++) {
        const unsigned block = reverse ? total - 1 - i : i;
        blockIdx = dim3(block % blocks.x, block / blocks.x % blocks.y, block / blocks.x / blocks.y);
        std::memset(launched.memory.get(), 0xff, shared);
        run_block(name, n);
    }
    launched.body = nullptr;
    if (launched.failed) std::rethrow_exception(launched.failed);
}

void* dynamic_memory() { return launched.memory.get(); }

void block_barrier() {
    stop_if_failed();
    leave(Fiber::in_barrier);
    stop_if_failed();
}

void together(const char* what, void* part, void (*operate)(void* const*)) {
    stop_if_failed();
    Fiber& fiber = *launched.current;
    Warp& warp = *fiber.warp;
    if (warp.arrived && std::strcmp(warp.what, what) != 0) {
        throw std::runtime_error(std::string("lanes of one warp are at ") + warp.what + " and at " + what);
    }
    warp.what = what;
    warp.parts[fiber.lane] = part;
    if (++warp.arrived < warp.lanes) {
        leave(Fiber::in_warp);
        stop_if_failed();
        return;
    }
    operate(warp.parts);
    warp.arrived = 0;
    for (auto& other : launched.fibers) {
        if (other->warp == &warp && other->state == Fiber::in_warp) other->state = Fiber::ready;
    }
}

bool any(bool mine) {
    struct Part {
        bool mine, result;
    } part{mine, false};
    together("vote", &part, [](void* const* parts) {
        bool found = false;
        for (int lane = 0; lane < kLanes; lane++) found |= parts[lane] && static_cast<Part*>(parts[lane])->mine;
        for (int lane = 0; lane < kLanes; lane++) {
            if (parts[lane]) static_cast<Part*>(parts[lane])->result = found;
        }
    });
    return part.result;
}

const void* aligned(const void* at, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(at) % bytes) {
        throw std::runtime_error("an access of " + std::to_string(bytes) + " bytes is not aligned to as many");
    }
    return at;
}

void copy_later(void* shared, const void* global, int bytes) {
    aligned(shared, 16);
    if (bytes) aligned(global, 16);
    std::memset(shared, 0xff, 16);
    launched.current->open.push_back({shared, global, bytes});
}

void end_copies() {
    Fiber& fiber = *launched.current;
    fiber.groups.push_back(std::move(fiber.open));
    fiber.open.clear();
}

void await_copies(int may_run) {
    auto& groups = launched.current->groups;
    while (static_cast<int>(groups.size()) > may_run) {
        for (const Copy& copy : groups.front()) {
            std::memset(copy.to, 0, 16);
            if (copy.bytes) std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
        }
        groups.pop_front();
    }
}

uint16_t to_half(float value) {
    const uint32_t bits = cast<uint32_t>(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    const auto with_sign = [&](uint32_t half) { return static_cast<uint16_t>(sign | half); };
    if (rest > 0x7f800000) return with_sign(0x7e00);
    if (rest >= 0x477ff000) return with_sign(0x7c00);  // from 65520 on
    if (rest < 0x38800000) return with_sign(static_cast<uint32_t>(std::nearbyint(std::fabs(value) * 0x1p24f)));
    return with_sign((rest + 0xfff + (rest >> 13 & 1) - 0x38000000) >> 13);
}

}  // namespace tinychat::cuda::host
