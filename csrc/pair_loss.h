// The three-term loss of (P, Y) with its gradients E1 and E2 pushed back: D = E1 + E2 G, dX = D bᵀ, db = Xᵀ D + b (T +
// Tᵀ) with T = Pᵀ E2. The logits never leave the chip.
//
// Phases: rows, with D, parts of T and of the loss; strips, T and the loss; db.
#pragma once

#include "cross_entropy.h"
#include "forward.h"

namespace interp_nn {

template <class P, int BK> struct PairLossTiles : ForwardTiles<P, BK> {
    using Base = ForwardTiles<P, BK>;
    using Correlation = CorrelationTiles<P, BK, BK>;
    static constexpr size_t shared(int stages) {
        const size_t rows = Base::shared(stages), again = Correlation::shared(1, stages);
        const size_t strips = backprop_shared<P, BK>(stages), last = SliceTiles<BK>::SHARED;
        const size_t first = rows > again ? rows : again, second = strips > last ? strips : last;
        return first > second ? first : second;
    }
};

// Where things lie in the workspaces: (splits, d, BK) parts of Xᵀ D, (programs, BK, BK) parts of T, T, parts of loss
// and count; and in rows of width_of(k) numbers of X's type, D, P and E2.
template <class T, int BK> struct PairLossWork {
    float *s, *t_parts, *t, *losses, *counts;
    T *d, *p, *e;
    int width;

    DEVICE PairLossWork(const PairLoss& arguments, int splits) : width(width_of(arguments.k)) {
        s = arguments.work;
        t_parts = s + int64_t{splits} * arguments.d * BK;
        t = t_parts + int64_t{programs()} * BK * BK;
        losses = t + BK * BK;
        counts = losses + programs();
        d = static_cast<T*>(arguments.rows);
        p = d + arguments.n * width;
        e = p + arguments.n * width;
    }
};

// The first phase.
template <int BK, class P, class T> DEVICE void pair_loss_rows(const P& products, const PairLoss& arguments,
                                                               const Matrix<T>& x, const Matrix<T>& b,
                                                               const PairLossWork<T, BK>& work, int stages) {
    using Tiles = PairLossTiles<P, BK>;
    const Mode& mode = products.mode;
    const int64_t n = arguments.n;
    const bool need_b = arguments.db != nullptr, through = need_b || arguments.dx != nullptr;
    const int width = work.width, mine = 16 * warp();
    const typename Tiles::G gram{shared_memory()};
    unsigned char* const memory = shared_memory() + Tiles::G::BYTES;
    const typename Tiles::Own own{memory};  // in the stages' place, between two row tiles
    const int64_t first_row = static_cast<int64_t>(program()) * Tiles::BN,
                  step = static_cast<int64_t>(programs()) * Tiles::BN;
    LossSums sums;
    NO_UNROLL for (int64_t row = first_row; row < n; row += step) {
        float o1[BK / 8][4], o2[BK / 8][4];
        project<Tiles>(products, o1, o2, row == first_row, x, b, row, memory, stages);
        if (row == first_row) share_gram(mode, gram, o2);
        const int64_t own_row = row + mine;
        const int rows = remaining(n, own_row);
        put_sums(mode, own, mine, 0, o1);
        warp_barrier();
        if (need_b) store_rows(work.p + own_row * width, width, rows, width, own, mine);
        clear(o2);
        multiply_tiles<false, true>(products, o2, own, mine, gram, 0, 0, BK);  // G is its own transpose
        warp_barrier();
        loss_terms(arguments.terms, o1, o2, own_row, n, arguments.k, sums);
        if (through) {
            put_sums(mode, own, mine, 0, o2);
            warp_barrier();
            if (need_b) store_rows(work.e + own_row * width, width, rows, width, own, mine);
            multiply_tiles<false, true>(products, o1, own, mine, gram, 0, 0, BK);
            warp_barrier();
            put_sums(mode, own, mine, 0, o1);
            store_rows(work.d + own_row * width, width, rows, width, own, mine);
        }
        block_barrier();  // the stages are free again
    }
    store_loss_sums(sums, work.losses, work.counts, shared_memory());
    if (need_b) {
        using Correlation = typename Tiles::Correlation;
        using Square = typename Correlation::Piece;
        float t[1][Square::TILES][4];
        const Matrix<T> lefts[1] = {matrix<T>(work.p, n, width)};
        correlate_rows<Correlation, Tiles::BN>(products, t, lefts, matrix<T>(work.e, n, width), shared_memory(), stages,
                                               [](int, const auto&) {});
        float* const part = work.t_parts + int64_t{program()} * BK * BK;
        if (Square::warp_active()) store_sums(part + Square::row() * BK + Square::column(), BK, 16, t[0]);
    }
}

template <int BK, class P> DEVICE void pair_loss_phases(const P& products, const PairLoss& arguments, int splits, int stages) {
    using T = typename P::Element;
    const bool need_b = arguments.db != nullptr, through = need_b || arguments.dx != nullptr;
    const Matrix<T> x = matrix<T>(arguments.x, arguments.n, arguments.d), b = matrix_b<T>(arguments);
    const PairLossWork<T, BK> work(arguments, splits);
    pair_loss_rows<BK>(products, arguments, x, b, work, stages);
    if (!through && arguments.terms.reduction == Reduction::NONE) return;
    grid_barrier(arguments.counter);
    if (program() == programs() - 1) store_value(arguments.terms, work.losses, work.counts);
    if (!through) return;
    const float scale = gradient_scale(arguments.terms, work.counts);
    backprop_projection<BK>(products, x, b, matrix<T>(work.d, arguments.n, work.width), static_cast<T*>(arguments.dx),
                        need_b ? work.s : nullptr, splits, scale, stages);
    if (!need_b) return;
    add_parts(work.t_parts, work.t, programs(), BK * BK);
    grid_barrier(arguments.counter);  // before db
    const SliceTiles<BK> tiles(shared_memory());
    fill_twice_symmetric(tiles, work.t);
    store_parameters(products.mode, static_cast<T*>(arguments.db), arguments.db_transposed, tiles, b, work.s, splits, scale);
}

template <class P, int BK> KERNEL pair_loss_kernel(PairLoss arguments, Mode mode, int splits, int stages) {
    if constexpr (P::available) pair_loss_phases<BK>(P{mode}, arguments, splits, stages);
}

template <class P, int BK> struct PairLossInstance {
    using Tiles = PairLossTiles<P, BK>;
    static constexpr int BD = JobShape<P, BK>::BD;
    static Plan plan(const PairLoss& arguments, const DeviceSpec& device) {
        const bool need_b = arguments.db != nullptr, through = need_b || arguments.dx != nullptr;
        return plan_grid(chip, arguments.n, arguments.d, BD, divide_up(arguments.n, Tiles::BN), through, need_b);
    }
    static Workspace call(const PairLoss& arguments, const DeviceSpec& device) {
        const auto [splits, programs] = plan(arguments, chip);
        const bool need_b = arguments.db != nullptr, through = need_b || arguments.dx != nullptr;
        const int64_t matrices = need_b ? 3 : through ? 1 : 0;
        return {int64_t{splits} * arguments.d * BK + (programs + int64_t{1}) * BK * BK + 2 * programs,
                matrices * arguments.n * width_of(arguments.k)};
    }
    static const char* call(const PairLoss& arguments, const DeviceSpec& device, Stream stream) {
        const int stages = stages_for(chip, 2, 4, Tiles::shared);
        if (stages == 0) return TOO_LITTLE_SHARED;
        const auto [splits, programs] = plan(arguments, chip);
        return start(pair_loss_kernel<P, BK>, programs, Tiles::shared(stages), true, stream, arguments, mode_of(arguments.kind),
                     splits, stages);
    }
};

}  // namespace interp_nn
