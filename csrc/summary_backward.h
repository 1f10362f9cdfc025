// Backward of the summary alone: dX = dY Wᵀ with W = a b q(G), db = a S q(G) + a² b M with S = Xᵀ dY and T = a bᵀ S,
// and dbias, the column sums of dY, for up to 128 columns. The only (n, k) matrix is dY.
//
//     Phase  computes                                left out
//     1      dX, parts of S, bᵀ S and dbias
//     2      S, bᵀ S and dbias
//     3      S q(G), M, the gradients of q           a phase of its own with need_derivative alone
//     4      db                                      without db
#pragma once

#include "feature_tiles.h"

namespace interp_nn {

template <class P, int BK> struct SummaryTiles {
    using T = typename P::Element;
    using Shape = JobShape<P, BK>;
    using B = typename Shape::B;
    using W = Tile<T, Shape::BD, BK>;
    using G = Tile<T, BK, BK>;
    using S = Tile<float, Shape::BD, BK>;
    using Square = Pieces<BK, BK>;
    using Last = SliceTiles<BK>;
    static constexpr int GROUPS = THREADS / BK;  // of threads; each adds up its rows of every column of dY

    // W stays for a whole job. Beside it come first b and G, then the stages, then S, with b in W's place.
    static constexpr size_t shared(int stages) {
        const size_t first = B::BYTES + G::BYTES, second = Shape::shared(stages);
        const size_t most = first > second ? first : second;
        const size_t jobs = W::BYTES + (most > S::BYTES ? most : S::BYTES);
        constexpr size_t last = DerivativeWork<BK>::SHARED;
        return jobs > last ? jobs : last;
    }
};

// The workspace.
//     floats: s (splits, d, BK)              parts of S; in the place of the first S, and then S q(G)
//             t_parts (parts, BK, BK)        parts of bᵀ S, for as many programs as have jobs
//             columns (splits, BK)           parts of dbias
//             t (BK, BK)                     bᵀ S
//             derivative                     of DerivativeWork
template <class P, int BK> struct SummaryWork {
    int parts;
    Area<float> floats;
    Area<float> rows;  // none
    float *s, *t_parts, *columns, *t;

    DEVICE DerivativeWork<BK> derivative() const { return {t + BK * BK}; }
    HOST_DEVICE SummaryWork(const SummaryBackward& arguments, int splits, int programs)
        : floats(arguments.work), rows(nullptr) {
        constexpr int BD = JobShape<P, BK>::BD;
        const int jobs = (arguments.d + BD - 1) / BD * splits;
        parts = jobs < programs ? jobs : programs;
        s = floats.take(int64_t{splits} * arguments.d * BK);
        t_parts = floats.take(int64_t{parts} * BK * BK);
        columns = floats.take(int64_t{splits} * BK);
        t = floats.take(BK * BK + DerivativeWork<BK>::size(arguments));
    }
};

// t_part = or += bᵀ S for the features of a job, whose sums are in registers.
template <int BK, class P, class T> DEVICE void add_square(const P& products, const Matrix<T>& b, const Job& job,
                                                           float* t_part, bool first_job,
                                                           float (&sum)[SummaryTiles<P, BK>::Shape::Sum::TILES][4]) {
    using Tiles = SummaryTiles<P, BK>;
    using Sum = typename Tiles::Shape::Sum;
    using Square = typename Tiles::Square;
    const typename Tiles::B tile_b{shared_memory()};
    const typename Tiles::S tile_s{shared_memory() + Tiles::W::BYTES};
    load_tile(tile_b, b, 0, job.feature);
    commit_copies();
    if (Sum::warp_active()) put_sums(products.mode, tile_s, Sum::row(), Sum::column(), sum);
    wait_copies(0);
    block_barrier();
    if (Square::warp_active()) {
        constexpr int AT_ONCE = Square::WIDE < 32 ? Square::WIDE : 32;
    NO_UNROLL for (int column = Square::column(); column < Square::column() + Square::WIDE; column += AT_ONCE) {
            float t[AT_ONCE / 8][4];
            float* const part = t_part + Square::row() * BK + column;
            clear(t);
            multiply_tiles<false, false>(products.for_sums(), t, tile_b, Square::row(), tile_s, column, 0, Tiles::Shape::BD);
            if (!first_job) add_sums(part, BK, t);
            store_sums(part, BK, 16, t);
        }
    }
    block_barrier();
}

// W = a b q(G) for the features of a job, rounded, into its place.
template <int BK, class P, class T>
DEVICE void effective_weight(const P& products, const Matrix<T>& b, const Matrix<T>& g, const Polynomial& q,
                             int feature) {
    using Tiles = SummaryTiles<P, BK>;
    using Piece = typename Tiles::Shape::Sum;
    const typename Tiles::W tile_w{shared_memory()};
    const typename Tiles::B tile_b{shared_memory() + Tiles::W::BYTES};
    const typename Tiles::G gram{shared_memory() + Tiles::W::BYTES + Tiles::B::BYTES};
    load_tile(tile_b, b, 0, feature);
    load_tile(gram, g, 0, 0);
    commit_copies();
    wait_copies(0);
    block_barrier();
    if (Piece::warp_active()) {
        float w[Piece::TILES][4];
        clear(w);
        multiply_tiles<true, true>(products, w, tile_b, Piece::row(), gram, Piece::column(), 0, BK);
        if (q.coefficients != nullptr) scale_sums(w, scale_of(q));
        put_sums(products.mode, tile_w, Piece::row(), Piece::column(), w);
    }
    block_barrier();
}

// The first phase.
template <int BK, class P, class T>
DEVICE void summary_jobs(const P& products, const SummaryBackward& arguments, const Matrix<T>& b,
                         const SummaryWork<P, BK>& work, int splits, int stages) {
    using Tiles = SummaryTiles<P, BK>;
    using Shape = typename Tiles::Shape;
    const int64_t n = arguments.n;
    const int d = arguments.d, k = arguments.k;
    const bool need_sums = need_t(arguments);
    const Matrix<T> x = matrix<T>(arguments.x, n, d), dy = matrix<T>(arguments.dy, n, k);
    const typename Tiles::W tile_w{shared_memory()};
    const int feature_tiles = (d + Shape::BD - 1) / Shape::BD;
    NO_UNROLL for (int i = program(); i < feature_tiles * splits; i += programs()) {
        const Job job = job_of(i, d, n, splits, Shape::BD, Shape::BN);
        if (arguments.dx != nullptr) {
            effective_weight<BK>(products, b, matrix<T>(arguments.q_of_g, k, k), arguments.q, job.feature);
        }
        const bool need_bias = arguments.dbias != nullptr && job.feature == 0;
        const int group = thread() / BK, column = thread() % BK;
        float total = 0.f;
        float sum[Shape::Sum::TILES][4];
        clear(sum);
        walk_rows<Shape, false>(products, job, sum, need_sums, static_cast<T*>(arguments.dx), 1.f, x, dy, tile_w,
                                shared_memory() + Tiles::W::BYTES, stages, [&](const auto& tile) {
                                    if (need_bias) total += add_rows<Tiles::GROUPS>(products.mode, tile, group, column);
                                });
        if (need_bias) {
            total = add_groups<BK>(total);
            if (thread() < BK) work.columns[job.split * BK + thread()] = total;
        }
        if (need_sums) {
            store_sum<Shape, BK>(work.s, job, sum, d);
            add_square<BK>(products, b, job, work.t_parts + int64_t{program()} * BK * BK, i == program(), sum);
        }
    }
}

// S q(G), in the place of S, before M, so that one square at a time is in shared memory.
template <int BK, class P>
DEVICE void summary_by_q(const P& products, const SummaryBackward& arguments, const SliceTiles<BK>& tiles,
                         const SummaryWork<P, BK>& work) {
    const int d = arguments.d, k = arguments.k;
    const auto* const g = static_cast<const typename P::Element*>(arguments.q_of_g);
    fill(tiles.square, [&](int row, int column) {
        return row < k && column < k ? widen(g[row * k + column], products.mode.is_bf16) : 0.f;
    });
    NO_UNROLL for (int feature = program() * SLICE; feature < d; feature += programs() * SLICE) {
        const auto of_s = [&](int row, int column) {
            return feature + row < d ? work.s[int64_t{feature + row} * BK + column] : 0.f;
        };
        multiply_slice(tiles, of_s, [&](int row, int column, float product) {
            if (feature + row < d) work.s[int64_t{feature + row} * BK + column] = product;
        });
    }
    block_barrier();
}

template <int BK, class P>
DEVICE void summary_phases(const P& products, const SummaryBackward& arguments, int splits, int stages) {
    using T = typename P::Element;
    const bool need_sums = need_t(arguments), need_bias = arguments.dbias != nullptr;
    const Matrix<T> b = matrix_b<T>(arguments);
    const SummaryWork<P, BK> work(arguments, splits, programs());
    summary_jobs<BK>(products, arguments, b, work, splits, stages);
    if (!need_sums && !need_bias) return;
    grid_barrier(arguments.counter);
    if (need_sums) {
        add_parts(work.t_parts, work.t, work.parts, BK * BK);
        if (arguments.db != nullptr && splits > 1) add_parts(work.s, work.s, splits, int64_t{arguments.d} * BK);
        widen_gram<BK, T>(products.mode, arguments, arguments.g, work.derivative().g);
    }
    if (need_bias && program() == programs() - 1) {
        store_columns<BK>(products.mode, static_cast<T*>(arguments.dbias), arguments.k, work.columns, splits, 1.f);
    }
    if (!need_sums) return;
    grid_barrier(arguments.counter);  // before db
    const SliceTiles<BK> tiles(shared_memory());
    if (arguments.db != nullptr) summary_by_q<BK>(products, arguments, tiles, work);
    const float scale = scale_of(arguments.q);
    fill_derivative(arguments, tiles, work.derivative(), scale, 1.f,
                    [&](float factor) { fill_symmetrized(tiles, work.t, factor); });
    if (arguments.db != nullptr) store_db(products.mode, arguments, tiles, b, work.s, 1, scale);
}

template <class P, int BK>
KERNEL summary_backward_kernel(SummaryBackward arguments, Mode mode, int splits, int stages) {
    RUN_IF_AVAILABLE(P, summary_phases<BK>(P{mode}, arguments, splits, stages))
}

template <class P, int BK>
struct SummaryBackwardInstance : PhasedLaunch<SummaryBackwardInstance<P, BK>, SummaryBackward> {
    using Tiles = SummaryTiles<P, BK>;
    using Work = SummaryWork<P, BK>;
    static Plan plan(const SummaryBackward& arguments, const DeviceSpec& device) {
        return plan_grid(device, arguments.n, arguments.d, Tiles::Shape::BD, 0, true, arguments.db != nullptr);
    }
    static auto kernel() { return summary_backward_kernel<P, BK>; }
};

}  // namespace interp_nn
