// Backward of the pair: dX = a D bᵀ and db = a Xᵀ D + a² b M with D = dP + dY q(G) and T = Pᵀ dY, for up to 128
// columns.
//
//     Phase  computes                                left out
//     1      D, parts of T                           without dY: D is dP
//     2      dX, parts of Xᵀ D, T
//     3      M, the gradients of q                   without need_derivative
//     4      db                                      without db
#pragma once

#include "feature_tiles.h"

namespace interp_nn {

template <class P, int BK> struct PairTiles {
    using T = typename P::Element;
    static constexpr int ROWS = (BK < 128 ? 64 : 32) / (IS_WIDE<P> ? 2 : 1);  // of the first phase
    using Part = Tile<T, ROWS, BK>;
    using G = Tile<T, BK, BK>;
    using Gradient = Pieces<ROWS, BK>;
    using Square = Pieces<BK, BK>;
    static constexpr size_t shared(int stages) {
        const size_t first = G::BYTES + Part::BYTES + static_cast<size_t>(stages) * 2 * Part::BYTES;
        const size_t second = backprop_shared<P, BK>(stages), last = DerivativeWork<BK>::SHARED;
        const size_t most = first > second ? first : second;
        return most > last ? most : last;
    }
};

// The workspaces.
//     floats: s (splits, d, BK)        parts of Xᵀ D
//             t_parts (programs, BK, BK)
//             t (BK, BK)
//             derivative               of DerivativeWork
//     rows:   d (n, width), X's type   D
template <class T, int BK> struct PairWork {
    int width;
    Area<float> floats;
    Area<T> rows;
    float *s, *t_parts, *t;
    T* d;

    DEVICE DerivativeWork<BK> derivative() const { return {t + BK * BK}; }
    HOST_DEVICE PairWork(const PairBackward& arguments, int splits, int programs)
        : width(width_of(arguments.k)), floats(arguments.work), rows(arguments.rows) {
        s = floats.take(int64_t{splits} * arguments.d * BK);
        t_parts = floats.take(int64_t{programs} * BK * BK);
        t = floats.take(BK * BK + DerivativeWork<BK>::size(arguments));
        d = rows.take(arguments.dy != nullptr ? arguments.n * width : 0);
    }
};

// The first phase. T's part of this program goes to t_part, if not null.
template <int BK, class P, class T> DEVICE void pair_rows(const P& products, const PairBackward& arguments,
                                                          const PairWork<T, BK>& work, float* t_part, int stages) {
    using Tiles = PairTiles<P, BK>;
    using Gradient = typename Tiles::Gradient;
    using Square = typename Tiles::Square;
    const int64_t n = arguments.n;
    const int k = arguments.k, width = work.width;
    const Matrix<T> p = matrix<T>(arguments.p, n, k), dy = matrix<T>(arguments.dy, n, k),
                    dp = matrix<T>(arguments.dp, n, k);
    const typename Tiles::G gram{shared_memory()};
    const typename Tiles::Part leaving{shared_memory() + Tiles::G::BYTES};
    unsigned char* const memory = shared_memory() + Tiles::G::BYTES + Tiles::Part::BYTES;
    const auto tile_dy = [&](int stage) { return typename Tiles::Part{memory + 2 * stage * Tiles::Part::BYTES}; };
    const auto tile_p = [&](int stage) { return typename Tiles::Part{memory + (2 * stage + 1) * Tiles::Part::BYTES}; };
    const auto row_of = [&](int step) { return (program() + static_cast<int64_t>(step) * programs()) * Tiles::ROWS; };
    const int64_t tiles = (n + Tiles::ROWS - 1) / Tiles::ROWS;
    const int steps = static_cast<int>((tiles - program() + programs() - 1) / programs());

    float t[Square::TILES][4];
    clear(t);
    load_tile(gram, matrix<T>(arguments.q_of_g, k, k), 0, 0);
    commit_copies();
    const auto load = [&](int step, int stage) {
        load_tile(tile_dy(stage), dy, row_of(step), 0);
        if (t_part != nullptr) load_tile(tile_p(stage), p, row_of(step), 0);
    };
    pipeline(steps, stages, load, [&](int step, int stage) {
        if (dp.data != nullptr) {
            load_tile(leaving, dp, row_of(step), 0);
            commit_copies();
        }
        if (t_part != nullptr && Square::warp_active()) {
            multiply_tiles<true, false>(products, t, tile_p(stage), Square::row(), tile_dy(stage), Square::column(), 0,
                                        Tiles::ROWS);
        }
        float gradient[Gradient::TILES][4];
        clear(gradient);
        if (dp.data != nullptr) {
            wait_copies(0);
            block_barrier();
            if (Gradient::warp_active()) {
                take_sums(products.mode, leaving, Gradient::row(), Gradient::column(), gradient);
            }
        }
        if (Gradient::warp_active()) {
            multiply_tiles<false, true>(products, gradient, tile_dy(stage), Gradient::row(), gram, Gradient::column(),
                                        0, BK);
            const int64_t row = row_of(step) + Gradient::row();
            put_sums(products.mode, leaving, Gradient::row(), Gradient::column(), gradient);
            store_piece<Gradient::WIDE>(work.d + row * width + Gradient::column(), width, remaining(n, row),
                                        width - Gradient::column(), leaving, Gradient::row(), Gradient::column());
        }
    });
    if (t_part != nullptr && Square::warp_active()) {
        store_sums(t_part + Square::row() * BK + Square::column(), BK, 16, t);
    }
}

template <int BK, class P>
DEVICE void pair_phases(const P& products, const PairBackward& arguments, int splits, int stages) {
    using T = typename P::Element;
    const bool need_b = arguments.db != nullptr, through_y = arguments.dy != nullptr;
    const int64_t n = arguments.n;
    const Matrix<T> x = matrix<T>(arguments.x, n, arguments.d), b = matrix_b<T>(arguments);
    const PairWork<T, BK> work(arguments, splits, programs());
    const float scale = scale_of(arguments.q);
    if (through_y) {
        float* const t_part = need_t(arguments) ? work.t_parts + int64_t{program()} * BK * BK : nullptr;
        pair_rows<BK>(products, arguments, work, t_part, stages);
        grid_barrier(arguments.counter);
    }
    const Matrix<T> gradients = through_y ? matrix<T>(work.d, n, work.width) : matrix<T>(arguments.dp, n, arguments.k);
    if (need_d(arguments)) {
        backprop_projection<BK>(products, x, b, gradients, static_cast<T*>(arguments.dx), need_b ? work.s : nullptr,
                                splits, scale, stages);
    }
    if (!need_t(arguments)) return;
    if (through_y) {
        add_parts(work.t_parts, work.t, programs(), BK * BK);
        widen_gram<BK, T>(products.mode, arguments, arguments.g, work.derivative().g);
    }
    grid_barrier(arguments.counter);  // before db
    const SliceTiles<BK> tiles(shared_memory());
    if (through_y) {
        fill_derivative(arguments, tiles, work.derivative(), 1.f, 1.f,
                        [&](float factor) { fill_symmetrized(tiles, work.t, factor); });
    } else {
        fill(tiles.square, [](int, int) { return 0.f; });
        if (arguments.dcoefficients != nullptr && program() == 0 && thread() <= arguments.q.degree) {
            arguments.dcoefficients[thread()] = 0.f;
        }
    }
    if (need_b) store_db(products.mode, arguments, tiles, b, work.s, splits, scale);
}

template <class P, int BK> KERNEL pair_backward_kernel(PairBackward arguments, Mode mode, int splits, int stages) {
    RUN_IF_AVAILABLE(P, pair_phases<BK>(P{mode}, arguments, splits, stages))
}

inline const char* invalid(const PairBackward& arguments, const DeviceSpec& device) {
    if (arguments.dp == nullptr && arguments.dy == nullptr) return "neither dp nor dy";
    return invalid_operands(arguments, device);
}

template <class P, int BK> struct PairBackwardInstance : PhasedLaunch<PairBackwardInstance<P, BK>, PairBackward> {
    using Tiles = PairTiles<P, BK>;
    using Work = PairWork<typename P::Element, BK>;
    static Plan plan(const PairBackward& arguments, const DeviceSpec& device) {
        const int64_t row_jobs = arguments.dy != nullptr ? divide_up(arguments.n, Tiles::ROWS) : 0;
        return plan_grid(device, arguments.n, arguments.d, JobShape<P, BK>::BD, row_jobs, true,
                         arguments.db != nullptr);
    }
    static auto kernel() { return pair_backward_kernel<P, BK>; }
};

}  // namespace interp_nn
