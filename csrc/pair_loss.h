// The three-term loss of (P, Y) with its gradients: D = E1 + E2 q(G), dX = a D bᵀ, db = a Xᵀ D + a² b M, T = Pᵀ E2,
// where E1 and E2 are the gradients of the logits. The logits stay in registers.
//
//     Phase  computes                                left out
//     1      D, parts of T and of the loss
//     2      dX, parts of Xᵀ D, T, the loss
//     3      M, the gradients of q                   without need_derivative
//     4      db
#pragma once

#include "cross_entropy.h"
#include "forward.h"

namespace interp_nn {

template <class P, int BK> struct PairLossTiles : ForwardTiles<P, BK> {
    using Base = ForwardTiles<P, BK>;
    using Correlation = CorrelationTiles<P, BK, BK>;
    static constexpr size_t shared(int stages) {
        const size_t rows = Base::shared(stages), again = Correlation::shared(1, stages);
        const size_t jobs = backprop_shared<P, BK>(stages), last = DerivativeWork<BK>::SHARED;
        const size_t first = rows > again ? rows : again, second = jobs > last ? jobs : last;
        return first > second ? first : second;
    }
};

// The workspaces.
//     floats: s (splits, d, BK)               parts of Xᵀ D
//             t_parts (programs, BK, BK)
//             losses (programs), counts (programs)
//             t (BK, BK)
//             derivative                      of DerivativeWork
//     rows:   d, p, e (n, width), X's type    D, P and E2
template <class T, int BK> struct PairLossWork {
    bool need_t, need_d;
    int width;
    Area<float> floats;
    Area<T> rows;
    float *s, *t_parts, *t, *losses, *counts;
    T *d, *p, *e;

    DEVICE DerivativeWork<BK> derivative() const { return {t + BK * BK}; }
    HOST_DEVICE PairLossWork(const PairLoss& arguments, int splits, int programs)
        : need_t(interp_nn::need_t(arguments)),
          need_d(interp_nn::need_d(arguments) || need_t),
          width(width_of(arguments.k)),
          floats(arguments.work),
          rows(arguments.rows) {
        s = floats.take(int64_t{splits} * arguments.d * BK);
        t_parts = floats.take(int64_t{programs} * BK * BK);
        losses = floats.take(width_of(programs));
        counts = floats.take(width_of(programs));
        t = floats.take(BK * BK + DerivativeWork<BK>::size(arguments));
        d = rows.take(need_d ? arguments.n * width : 0);
        p = rows.take(need_t ? arguments.n * width : 0);
        e = rows.take(need_t ? arguments.n * width : 0);
    }
};

// The first phase.
template <int BK, class P, class T> DEVICE void pair_loss_rows(const P& products, const PairLoss& arguments,
                                                               const Matrix<T>& x, const Matrix<T>& b,
                                                               const PairLossWork<T, BK>& work, int stages) {
    using Tiles = PairLossTiles<P, BK>;
    const Mode& mode = products.mode;
    const int64_t n = arguments.n;
    const bool need_t = work.need_t;
    const Polynomial& q = arguments.q;
    const int width = work.width, warp_row = 16 * warp();
    const typename Tiles::G gram{shared_memory()};
    unsigned char* const memory = shared_memory() + Tiles::G::BYTES;
    const typename Tiles::Own own{memory};  // in the stages' place, between two row tiles
    const int64_t first_row = static_cast<int64_t>(program()) * Tiles::BN,
                  step = static_cast<int64_t>(programs()) * Tiles::BN;
    LossSums sums;
    NO_UNROLL for (int64_t row = first_row; row < n; row += step) {
        float o1[BK / 8][4], o2[BK / 8][4];
        project<Tiles>(products, o1, o2, q.coefficients == nullptr && row == first_row, x, b, row, memory, stages);
        if (q.coefficients == nullptr && row == first_row) share_gram(mode, gram, o2);
        if (q.scale != nullptr) scale_sums(o1, *q.scale);
        const int64_t own_row = row + warp_row;
        const int rows = remaining(n, own_row);
        put_sums(mode, own, warp_row, 0, o1);
        warp_barrier();
        if (need_t) store_rows(work.p + own_row * width, width, rows, width, own, warp_row);
        clear(o2);
        multiply_tiles<false, true>(products, o2, own, warp_row, gram, 0, 0, BK);  // q(G) is its own transpose
        warp_barrier();
        loss_terms(arguments.terms, o1, o2, own_row, n, arguments.k, sums);
        if (work.need_d) {
            put_sums(mode, own, warp_row, 0, o2);
            warp_barrier();
            if (need_t) store_rows(work.e + own_row * width, width, rows, width, own, warp_row);
            multiply_tiles<false, true>(products, o1, own, warp_row, gram, 0, 0, BK);
            warp_barrier();
            put_sums(mode, own, warp_row, 0, o1);
            store_rows(work.d + own_row * width, width, rows, width, own, warp_row);
        }
        block_barrier();  // the stages are free again
    }
    store_loss_sums(sums, work.losses, work.counts, shared_memory());
    if (need_t) {
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

template <int BK, class P>
DEVICE void pair_loss_phases(const P& products, const PairLoss& arguments, int splits, int stages) {
    using T = typename P::Element;
    const Matrix<T> x = matrix<T>(arguments.x, arguments.n, arguments.d), b = matrix_b<T>(arguments);
    const PairLossWork<T, BK> work(arguments, splits, programs());
    if (arguments.q.coefficients != nullptr) {
        using Tiles = PairLossTiles<P, BK>;
        float* const to = need_derivative(arguments) && program() == 0 ? work.derivative().g : nullptr;
        walk_polynomial<P, BK, Tiles::BD>(products.mode, arguments.q, matrix_b<T>(arguments), to, shared_memory(),
                                          shared_memory() + Tiles::G::BYTES, stages);
    }
    pair_loss_rows<BK>(products, arguments, x, b, work, stages);
    if (!work.need_d && arguments.terms.reduction == Reduction::NONE) return;
    grid_barrier(arguments.counter);
    if (program() == programs() - 1) store_value(arguments.terms, work.losses, work.counts);
    if (!work.need_d) return;
    const float loss_scale = gradient_scale(arguments.terms, work.counts), scale = loss_scale * scale_of(arguments.q);
    backprop_projection<BK>(products, x, b, matrix<T>(work.d, arguments.n, work.width), static_cast<T*>(arguments.dx),
                            arguments.db != nullptr ? work.s : nullptr, splits, scale, stages);
    if (!work.need_t) return;
    add_parts(work.t_parts, work.t, programs(), BK * BK);
    grid_barrier(arguments.counter);  // before db
    const SliceTiles<BK> tiles(shared_memory());
    fill_derivative(arguments, tiles, work.derivative(), 1.f, loss_scale,
                    [&](float factor) { fill_symmetrized(tiles, work.t, factor); });
    if (arguments.db != nullptr) store_db(products.mode, arguments, tiles, b, work.s, splits, scale);
}

template <class P, int BK> KERNEL pair_loss_kernel(PairLoss arguments, Mode mode, int splits, int stages) {
    RUN_IF_AVAILABLE(P, pair_loss_phases<BK>(P{mode}, arguments, splits, stages))
}

template <class P, int BK> struct PairLossInstance : PhasedLaunch<PairLossInstance<P, BK>, PairLoss> {
    using Tiles = PairLossTiles<P, BK>;
    using Work = PairLossWork<typename P::Element, BK>;
    static Plan plan(const PairLoss& arguments, const DeviceSpec& device) {
        return plan_grid(device, arguments.n, arguments.d, JobShape<P, BK>::BD, divide_up(arguments.n, Tiles::BN),
                         need_d(arguments), arguments.db != nullptr);
    }
    static auto kernel() { return pair_loss_kernel<P, BK>; }
};

}  // namespace interp_nn
