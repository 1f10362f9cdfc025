// A CUDA grid on the CPU, for csrc/primitives.h. The tests compile the kernels against it.
//
// Every CUDA thread is a fiber, and all blocks are alive at once, so that grid barriers really wait. A seed decides
// which fiber runs next: even seeds pick uniformly among those that can run, odd seeds prefer the current one. The
// rules are as strict as the hardware's or stricter, so that code that works by luck on a GPU fails here:
//   - shared memory starts as NaN; copy_async fills its destination with NaN, and wait_copies delivers the data;
//   - operations of a warp need all 32 lanes in the same operation, and follow the fragment layouts of the PTX manual;
//   - load_matrices counts bank conflicts; misaligned addresses are errors;
//   - when no fiber can run, or all of them only poll, the launch throws and lists where each one waits.
#pragma once

#include <ucontext.h>

#include <csetjmp>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace interp_nn::emulator {

constexpr int LANES = 32;
constexpr long MOST_POLLS = 2'000'000;
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t STACK = 256 << 10;
#else
constexpr size_t STACK = 64 << 10;
#endif

struct Copy {
    void* to;
    const void* from;
    int bytes;
    bool valid;
};

struct Fiber {
    ucontext_t context;
    std::jmp_buf place;
    bool started = false;
    bool done = false;
    int thread = 0;
    int block = 0;
    const char* waits_in = nullptr;
    std::vector<Copy> open;
    std::vector<std::vector<Copy>> groups;
};

struct Warp {
    const char* operation = nullptr;
    std::vector<Fiber*> waiting;
    void* slots[LANES];
};

struct Block {
    std::vector<Fiber*> waiting;
    std::vector<Warp> warps;
    int live = 0;
    struct Free {
        void operator()(unsigned char* p) const { std::free(p); }
    };
    std::unique_ptr<unsigned char, Free> shared;
};

struct Counts {
    long matrices = 0;
    long conflicts = 0;
    long switches = 0;
    long blocks = 0;  // of the latest launch
};

struct Grid {
    int threads = 0;
    std::vector<Block> blocks;
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<Fiber*> ready;
    std::function<void()> kernel;
    std::string error;
    long polls = 0;
};

inline Grid grid;
inline Counts counts;
inline bool skip_kernels = false;  // launches check their arguments and then do nothing
inline Fiber* current = nullptr;
inline ucontext_t scheduler;
inline std::jmp_buf scheduler_place;

// Switching contexts saves the signal mask by a system call, which is slow. Jumps between existing contexts are fast,
// but AddressSanitizer does not understand them.
inline void to_scheduler() {
#if defined(__SANITIZE_ADDRESS__)
    swapcontext(&current->context, &scheduler);
#else
    if (_setjmp(current->place) == 0) _longjmp(scheduler_place, 1);
#endif
}

inline void to_fiber(Fiber* fiber) {
    current = fiber;
    ++counts.switches;
#if defined(__SANITIZE_ADDRESS__)
    swapcontext(&scheduler, &fiber->context);
#else
    if (_setjmp(scheduler_place) == 0) {
        if (fiber->started) _longjmp(fiber->place, 1);
        fiber->started = true;
        setcontext(&fiber->context);
    }
#endif
}

[[noreturn]] inline void fail(const std::string& what) {
    grid.error =
        what + " (block " + std::to_string(current->block) + ", thread " + std::to_string(current->thread) + ")";
    for (;;) to_scheduler();
}

inline void wake(std::vector<Fiber*>& waiting) {
    for (Fiber* fiber : waiting) fiber->waits_in = nullptr;
    grid.ready.insert(grid.ready.end(), waiting.begin(), waiting.end());
    waiting.clear();
    grid.polls = 0;
}

inline void wait_in(const char* place, std::vector<Fiber*>& waiting) {
    current->waits_in = place;
    waiting.push_back(current);
    to_scheduler();
}

// Let other fibers run; code that polls memory calls this before each read.
inline void poll() {
    ++grid.polls;
    grid.ready.push_back(current);
    to_scheduler();
}

inline Block& block() { return grid.blocks[current->block]; }

inline void block_barrier() {
    Block& own = block();
    if (static_cast<int>(own.waiting.size()) + 1 < own.live) return wait_in("block_barrier", own.waiting);
    wake(own.waiting);
}

// All lanes of a warp meet; the last to arrive computes for all of them, from and into what their slots point to.
template <class Compute> void together(const char* operation, void* slot, Compute compute) {
    Warp& warp = block().warps[current->thread / LANES];
    if (warp.waiting.empty()) warp.operation = operation;
    if (warp.operation != operation) {
        fail(std::string("lanes of one warp meet in different operations: ") + warp.operation + " and " + operation);
    }
    warp.slots[current->thread % LANES] = slot;
    if (warp.waiting.size() + 1 < LANES) return wait_in(operation, warp.waiting);
    compute(warp.slots);
    wake(warp.waiting);
}

inline void entry() {
    grid.kernel();
    current->done = true;
    Block& own = block();
    if (--own.live > 0 && static_cast<int>(own.waiting.size()) == own.live) wake(own.waiting);
    for (;;) to_scheduler();
}

inline std::string list_waiting() {
    std::string text;
    int said = 0;
    for (auto& fiber : grid.fibers) {
        if (fiber->done || fiber->thread % LANES != 0 || ++said > 8) continue;
        text += "; block " + std::to_string(fiber->block) + " thread " + std::to_string(fiber->thread) + ": " +
                (fiber->waits_in ? fiber->waits_in : "polls");
    }
    return text;
}

// Stacks are kept from launch to launch.
inline std::vector<std::unique_ptr<char[]>> stacks;

inline std::unique_ptr<Fiber> make_fiber(int block, int thread, char* stack) {
    auto fiber = std::make_unique<Fiber>();
    fiber->thread = thread;
    fiber->block = block;
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = stack;
    fiber->context.uc_stack.ss_size = STACK;
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, entry, 0);
    return fiber;
}

inline void prepare(int blocks, int threads, size_t shared) {
    counts.blocks = blocks;
    grid.threads = threads;
    grid.blocks = std::vector<Block>(blocks);
    grid.fibers.clear();
    grid.ready.clear();
    grid.error.clear();
    grid.polls = 0;
    for (int b = 0; b < blocks; ++b) {
        Block& block = grid.blocks[b];
        block.live = threads;
        block.warps.resize(threads / LANES);
        const size_t bytes = (shared + 127) / 128 * 128;
        block.shared.reset(static_cast<unsigned char*>(std::aligned_alloc(128, bytes ? bytes : 128)));
        std::memset(block.shared.get(), 0xFF, bytes);
        for (int t = 0; t < threads; ++t) {
            if (stacks.size() <= grid.fibers.size()) stacks.emplace_back(new char[STACK]);
            auto fiber = make_fiber(b, t, stacks[grid.fibers.size()].get());
            grid.ready.push_back(fiber.get());
            grid.fibers.push_back(std::move(fiber));
        }
    }
}

inline void run(int blocks, int threads, size_t shared, unsigned seed, std::function<void()> kernel) {
    if (skip_kernels) return;
    std::mt19937 random(seed);
    grid.kernel = std::move(kernel);
    prepare(blocks, threads, shared);
    const bool stay = seed % 2 == 1;
    while (!grid.ready.empty()) {
        auto& ready = grid.ready;
        if (!stay || random() % 64 == 0) std::swap(ready[random() % ready.size()], ready.back());
        Fiber* next = ready.back();
        ready.pop_back();
        to_fiber(next);
        if (!grid.error.empty()) throw std::runtime_error(grid.error);
        // A fiber that polls must not stay at the end of the list, or the others would never run.
        if (stay && !ready.empty() && ready.back() == next) std::swap(ready[random() % ready.size()], ready.back());
        if (grid.polls > MOST_POLLS) throw std::runtime_error("deadlock: threads only poll" + list_waiting());
    }
    for (auto& fiber : grid.fibers) {
        if (!fiber->done) throw std::runtime_error("deadlock: no thread can run" + list_waiting());
    }
    grid.blocks.clear();
}

inline void check_aligned(const void* address, int bytes, const char* what) {
    if (reinterpret_cast<uintptr_t>(address) % bytes != 0) fail(std::string(what) + ": misaligned address");
}

inline void copy_async(void* shared, const void* global, int bytes, bool valid) {
    check_aligned(shared, bytes, "copy_async");
    if (valid) check_aligned(global, bytes, "copy_async");
    std::memset(shared, 0xFF, bytes);
    current->open.push_back({shared, global, bytes, valid});
}

inline void commit_copies() {
    current->groups.push_back(std::move(current->open));
    current->open.clear();
}

inline void wait_copies(int pending) {
    auto& groups = current->groups;
    while (static_cast<int>(groups.size()) > pending) {
        for (const Copy& copy : groups.front()) {
            if (copy.valid)
                std::memcpy(copy.to, copy.from, copy.bytes);
            else
                std::memset(copy.to, 0, copy.bytes);
        }
        groups.erase(groups.begin());
    }
}

struct Matrices {
    uint32_t* registers;
    const void* row;
};

// ldmatrix.x4: lane 8 i + r gives the address of row r of matrix i. Lane l receives the elements 2 (l % 4) and the
// next one of row l / 4 of each matrix, or of its column when transposed.
inline void load_matrices(uint32_t* registers, const void* row, bool transposed) {
    check_aligned(row, 16, "load_matrices");
    Matrices own{registers, row};
    together(transposed ? "load_matrices<true>" : "load_matrices<false>", &own, [transposed](void** slots) {
        const auto lane = [&](int l) { return static_cast<Matrices*>(slots[l]); };
        for (int i = 0; i < 4; ++i) {
            unsigned banks = 0;
            for (int r = 0; r < 8; ++r) banks |= 1u << (reinterpret_cast<uintptr_t>(lane(8 * i + r)->row) / 16 % 8);
            ++counts.matrices;
            counts.conflicts += banks != 0xFF;
            for (int l = 0; l < LANES; ++l) {
                uint32_t both = 0;
                for (int h = 0; h < 2; ++h) {
                    const int r = transposed ? l % 4 * 2 + h : l / 4;
                    const int c = transposed ? l / 4 : l % 4 * 2 + h;
                    both |= uint32_t{static_cast<const uint16_t*>(lane(8 * i + r)->row)[c]} << (16 * h);
                }
                lane(l)->registers[i] = both;
            }
        }
    });
}

// A number with its exponent: for zero, one below all others; for a subnormal number, that of the least normal number.
struct Operand {
    double value;
    int exponent;
};
constexpr int ZERO = -1000, NOT_FINITE = 128;
inline Operand operand(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, sizeof bits);
    const int biased = static_cast<int>(bits >> 23 & 255);
    return {v, v == 0.f ? ZERO : biased == 0 ? -126 : biased - 127};
}

inline float towards_zero(double v) {
    const auto nearest = static_cast<float>(v);
    return std::isfinite(nearest) && std::abs(nearest) > std::abs(v) ? std::nextafter(nearest, 0.f) : nearest;
}

// sum + row[0] column[0] + ... as the matrix units of an A100 add it up (Khattak & Mikaitis 2025, arXiv:2512.07004;
// H100 and B200 are slightly better). All terms are cut off towards zero at one place, one bit below the last bit of
// the term with the largest exponent. So is the result, to fp32. A long sum thus loses much more than a rounded one.
inline float add_products(const Operand& sum, const Operand* row, const Operand* column, int count) {
    int most = sum.exponent;
    bool finite = sum.exponent < NOT_FINITE;
    for (int k = 0; k < count; ++k) {
        finite &= row[k].exponent < NOT_FINITE && column[k].exponent < NOT_FINITE;
        const int exponent = row[k].exponent + column[k].exponent;
        most = exponent > most ? exponent : most;
    }
    if (!finite) {
        double all = sum.value;
        for (int k = 0; k < count; ++k) all += row[k].value * column[k].value;
        return static_cast<float>(all);
    }
    if (most < -132) most = -132;
    const int last = most - 24;
    const double units = std::ldexp(1., -last);
    auto total = static_cast<int64_t>(sum.value * units);
    for (int k = 0; k < count; ++k) total += static_cast<int64_t>(row[k].value * column[k].value * units);
    return towards_zero(std::ldexp(static_cast<double>(total), last));
}

struct Multiplication {
    float* c;
    const uint32_t *a, *b;
};

// mma.m16n8kDEPTH. With g = lane / 4 and t = lane % 4, register i of c is row g + 8 (i / 2), column 2 t + i % 2. Of
// a, of 16 by DEPTH, register i holds row g + 8 (i % 2); of b, of DEPTH by 8, column g. Along the depth, 16-bit
// registers hold 2 t + 8 j and the next one, 32-bit registers t + 4 j, where j is i / 2 for a and i for b. One half of
// the depth is added after the other.
template <int DEPTH, class Unpack>
void multiply(const char* name, float* c, const uint32_t* a, const uint32_t* b, Unpack unpack) {
    Multiplication own{c, a, b};
    together(name, &own, [unpack](void** slots) {
        constexpr int HALVES = DEPTH == 16 ? 2 : 1, GROUP = DEPTH / 2;
        static Operand left[16][DEPTH], right[8][DEPTH];
        for (int l = 0; l < LANES; ++l) {
            const auto* lane = static_cast<Multiplication*>(slots[l]);
            for (int j = 0; j < 2; ++j) {
                for (int h = 0; h < HALVES; ++h) {
                    const int k = l % 4 * HALVES + h + DEPTH / 2 * j;
                    left[l / 4][k] = operand(unpack(lane->a[2 * j], h));
                    left[l / 4 + 8][k] = operand(unpack(lane->a[2 * j + 1], h));
                    right[l / 4][k] = operand(unpack(lane->b[j], h));
                }
            }
        }
        for (int l = 0; l < LANES; ++l) {
            const auto* lane = static_cast<Multiplication*>(slots[l]);
            for (int i = 0; i < 4; ++i) {
                const Operand* row = left[l / 4 + i / 2 * 8];
                const Operand* column = right[l % 4 * 2 + i % 2];
                for (int k = 0; k < DEPTH; k += GROUP) {
                    lane->c[i] = add_products(operand(lane->c[i]), row + k, column + k, GROUP);
                }
            }
        }
    });
}

inline void warp_barrier() {
    together("warp_barrier", nullptr, [](void**) {});
}

struct Exchange {
    float give, take;
    int from;
};

inline float shuffle(float value, int lane) {
    Exchange own{value, 0.f, lane % LANES};
    together("shuffle", &own, [](void** slots) {
        for (int l = 0; l < LANES; ++l) {
            auto* lane = static_cast<Exchange*>(slots[l]);
            lane->take = static_cast<Exchange*>(slots[lane->from])->give;
        }
    });
    return own.take;
}

}  // namespace interp_nn::emulator
