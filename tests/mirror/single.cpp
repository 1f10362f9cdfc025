// Three kernels of one type and size, without Python: quick to compile, so that each mutant of csrc can be.
#include "forward.h"
#include "pair_backward.h"

using namespace interp_nn;

namespace {

constexpr Chip CHIP{3, 164 << 10, 80};

template <class Run> const char* guarded(Run run) {
    static std::string error;
    try {
        return run();
    } catch (const std::exception& e) {
        error = e.what();
        return error.c_str();
    }
}

Stream of_seed(unsigned seed) { return reinterpret_cast<Stream>(static_cast<uintptr_t>(seed)); }

}  // namespace

extern "C" {

long conflicts() { return emulator::counts.conflicts; }

const char* forward(void* x, void* b, void* p, void* y, void* g, int64_t n, int d, int k, unsigned seed) {
    const Forward a{x, b, nullptr, p, y, g, n, k, 1, d, k, Kind::BF16};
    return guarded([&] { return ForwardInstance<Products16, 64>::call(a, CHIP, of_seed(seed)); });
}

int64_t work_floats(int64_t n, int d, int k) {
    PairBackward a{};
    a.n = n, a.d = d, a.k = k, a.dy = &a, a.db = &a;
    return PairBackwardInstance<Products16, 64>::call(a, CHIP).floats;
}

const char* pair_backward(void* x, void* b, void* p, void* g, void* dp, void* dy, void* dx, void* db, void* rows, float* work,
                          int64_t n, int d, int k, unsigned seed) {
    uint32_t counter = 0;
    const PairBackward a{x, b, p, g, dp, dy, dx, db, rows, work, &counter, n, k, 1, d, k, false, Kind::BF16};
    return guarded([&] { return PairBackwardInstance<Products16, 64>::call(a, CHIP, of_seed(seed)); });
}
}
