// Kernels of one type and size, without Python: quick to compile, because each mutant of csrc is.
#include "forward.h"
#include "pair_backward.h"
#include "pair_loss.h"

using namespace interp_nn;

namespace {

constexpr DeviceSpec DEVICE_SPEC{3, 164 << 10, 80, nullptr};

template <class Run> const char* guarded(Run run) {
    static std::string error;
    try {
        return run();
    } catch (const std::exception& e) {
        error = e.what();
        return error.c_str();
    }
}

void set(Operands& a, const void* x, const void* b, int64_t n, int d, int k) {
    a.x = x, a.b = b, a.n = n, a.d = d, a.k = k, a.b_feature = k, a.b_column = 1, a.kind = Kind::BF16;
}

Stream of_seed(unsigned seed) { return reinterpret_cast<Stream>(static_cast<uintptr_t>(seed)); }

}  // namespace

extern "C" {

long conflicts() { return emulator::counts.conflicts; }

const char* forward(void* x, void* b, void* p, void* y, void* g, int64_t n, int d, int k, unsigned seed) {
    Forward a{};
    set(a, x, b, n, d, k);
    a.p = p, a.y = y, a.g = g;
    return guarded([&] { return ForwardInstance<Products16, 64>::call(a, DEVICE_SPEC, of_seed(seed)); });
}

int64_t backward_floats(int64_t n, int d, int k) {
    PairBackward a{};
    a.n = n, a.d = d, a.k = k, a.dy = &a, a.db = &a;
    return PairBackwardInstance<Products16, 64>::call(a, DEVICE_SPEC).floats;
}

const char* pair_backward(void* x, void* b, void* p, void* g, void* dp, void* dy, void* dx, void* db, void* rows,
                          float* work, int64_t n, int d, int k, unsigned seed) {
    uint32_t counter = 0;
    PairBackward a{};
    set(a, x, b, n, d, k);
    a.p = p, a.q_of_g = g, a.dp = dp, a.dy = dy, a.dx = dx, a.db = db, a.rows = rows, a.work = work,
    a.counter = &counter;
    return guarded([&] { return PairBackwardInstance<Products16, 64>::call(a, DEVICE_SPEC, of_seed(seed)); });
}

static PairLoss loss_of(int64_t n, int d, int k) {
    PairLoss a{};
    set(a, nullptr, nullptr, n, d, k);
    a.dx = a.db = &a;
    return a;
}

int64_t loss_floats(int64_t n, int d, int k) {
    return PairLossInstance<Products16, 16>::call(loss_of(n, d, k), DEVICE_SPEC).floats;
}

const char* pair_loss(void* x, void* b, int64_t* target, float* value, void* dx, void* db, void* rows, float* work,
                      int64_t n, int d, int k, unsigned seed) {
    uint32_t counter = 0;
    PairLoss a = loss_of(n, d, k);
    a.x = x, a.b = b, a.dx = dx, a.db = db, a.rows = rows, a.work = work, a.counter = &counter;
    a.terms = {target, nullptr, value, -100, 1.f, 1.f, 1.f, Reduction::MEAN};
    return guarded([&] { return PairLossInstance<Products16, 16>::call(a, DEVICE_SPEC, of_seed(seed)); });
}
}
