// Backward of the summary alone: dX = dY Wᵀ with W = b G, db = S G + b (T + Tᵀ) with S = Xᵀ dY and T = bᵀ S, and
// dbias, the column sums of dY, for up to 128 columns. No (n, k) matrix but dY.
//
// Phases: strips, with parts of S, T and dbias; T and dbias; db.
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
    static constexpr int GROUPS = THREADS / BK;  // of threads, each adding up its rows of every column of dY

    // W stays for a whole job; beside it lie first b and G, then the stages, then S, with b in W's place.
    static constexpr size_t shared(int stages) {
        const size_t first = B::BYTES + G::BYTES, second = Shape::shared(stages);
        const size_t most = first > second ? first : second;
        const size_t strips = W::BYTES + (most > S::BYTES ? most : S::BYTES);
        return strips > Last::SHARED ? strips : Last::SHARED;
    }
};

// Where a program's parts lie in the workspace: (splits, d, BK) of S, (parts, BK, BK) of T, T, (splits, GROUPS, BK)
// of dbias.
template <int BK> struct SummaryWork {
    float *s, *t_parts, *t, *columns;
    int parts;

    DEVICE SummaryWork(float* work, int splits, int d, int jobs) {
        parts = jobs < programs() ? jobs : programs();
        s = work;
        t_parts = s + int64_t{splits} * d * BK;
        t = t_parts + int64_t{parts} * BK * BK;
        columns = t + BK * BK;
    }
};

// t_part = or += bᵀ S for the strip of a job, whose sums are in registers.
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

// W = b G for the features of a job, rounded, into its place.
template <int BK, class P, class T>
DEVICE void effective_weight(const P& products, const Matrix<T>& b, const Matrix<T>& g, int feature) {
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
        put_sums(products.mode, tile_w, Piece::row(), Piece::column(), w);
    }
    block_barrier();
}

// The first phase.
template <int BK, class P, class T>
DEVICE void summary_jobs(const P& products, const SummaryBackward& arguments, const Matrix<T>& b, const SummaryWork<BK>& work,
                           int splits, int stages) {
    using Tiles = SummaryTiles<P, BK>;
    using Shape = typename Tiles::Shape;
    const int64_t n = arguments.n;
    const int d = arguments.d, k = arguments.k;
    const bool need_b = arguments.db != nullptr;
    const Matrix<T> x = matrix<T>(arguments.x, n, d), dy = matrix<T>(arguments.dy, n, k);
    const typename Tiles::W tile_w{shared_memory()};
    const int strips = (d + Shape::BD - 1) / Shape::BD;
    NO_UNROLL for (int i = program(); i < strips * splits; i += programs()) {
        const Job job = job_of(i, d, n, splits, Shape::BD, Shape::BN);
        if (arguments.dx != nullptr) effective_weight<BK>(products, b, matrix<T>(arguments.g, k, k), job.feature);
        const bool need_bias = arguments.dbias != nullptr && job.feature == 0;
        const int group = thread() / BK, column = thread() % BK;
        float total = 0.f;
        float sum[Shape::Sum::TILES][4];
        clear(sum);
        walk_rows<Shape, false>(products, job, sum, need_b, static_cast<T*>(arguments.dx), 1.f, x, dy, tile_w,
                                shared_memory() + Tiles::W::BYTES, stages, [&](const auto& tile) {
                                    if (need_bias) total += add_rows<Tiles::GROUPS>(products.mode, tile, group, column);
                                });
        if (need_bias) work.columns[(job.split * Tiles::GROUPS + group) * BK + column] = total;
        if (need_b) {
            store_sum<Shape, BK>(work.s, job, sum, d);
            add_square<BK>(products, b, job, work.t_parts + int64_t{program()} * BK * BK, i == program(), sum);
        }
    }
}

// The last phase: S G first, in the place of S's first part, then b (T + Tᵀ), so that one square at a time is in
// shared memory.
template <int BK, class P, class T>
DEVICE void summary_parameters(const P& products, const SummaryBackward& arguments, const Matrix<T>& b,
                               const SummaryWork<BK>& work, int splits) {
    const int d = arguments.d, k = arguments.k;
    const SliceTiles<BK> tiles(shared_memory());
    const auto* const g = static_cast<const T*>(arguments.g);
    fill(tiles.square, [&](int row, int column) {
        return row < k && column < k ? widen(g[row * k + column], products.mode.is_bf16) : 0.f;
    });
    NO_UNROLL for (int feature = program() * SLICE; feature < d; feature += programs() * SLICE) {
        const auto of_s = [&](int row, int column) { return add_splits<BK>(work.s, splits, feature + row, column, d); };
        multiply_slice(tiles, of_s, [&](int row, int column, float product) {
            if (feature + row < d) work.s[int64_t{feature + row} * BK + column] = product;
        });
    }
    block_barrier();
    fill_twice_symmetric(tiles, work.t);
    store_parameters(products.mode, static_cast<T*>(arguments.db), arguments.db_transposed, tiles, b, work.s, 1, 1.f);
}

template <int BK, class P>
DEVICE void summary_phases(const P& products, const SummaryBackward& arguments, int splits, int stages) {
    using Tiles = SummaryTiles<P, BK>;
    using T = typename P::Element;
    const bool need_b = arguments.db != nullptr, need_bias = arguments.dbias != nullptr;
    const Matrix<T> b = matrix_b<T>(arguments);
    const int jobs = (arguments.d + Tiles::Shape::BD - 1) / Tiles::Shape::BD * splits;
    const SummaryWork<BK> work(arguments.work, splits, arguments.d, jobs);
    summary_jobs<BK>(products, arguments, b, work, splits, stages);
    if (!need_b && !need_bias) return;
    grid_barrier(arguments.counter);
    if (need_b) add_parts(work.t_parts, work.t, work.parts, BK * BK);
    if (need_bias && program() == programs() - 1) {
        store_columns<BK>(products.mode, static_cast<T*>(arguments.dbias), arguments.k, work.columns, splits * Tiles::GROUPS, 1.f);
    }
    if (!need_b) return;
    grid_barrier(arguments.counter);  // before db
    summary_parameters<BK>(products, arguments, b, work, splits);
}

template <class P, int BK> KERNEL summary_backward_kernel(SummaryBackward arguments, Mode mode, int splits, int stages) {
    if constexpr (P::available) summary_phases<BK>(P{mode}, arguments, splits, stages);
}

template <class P, int BK> struct SummaryBackwardInstance {
    using Tiles = SummaryTiles<P, BK>;
    static Plan plan(const SummaryBackward& arguments, const DeviceSpec& device) {
        return plan_grid(chip, arguments.n, arguments.d, Tiles::Shape::BD, 0, true, arguments.db != nullptr);
    }
    static Workspace call(const SummaryBackward& arguments, const DeviceSpec& device) {
        const auto [splits, programs] = plan(arguments, chip);
        const int64_t jobs = divide_up(arguments.d, Tiles::Shape::BD) * splits, parts = jobs < programs ? jobs : programs;
        return {int64_t{splits} * arguments.d * BK + (parts + 1) * BK * BK + int64_t{splits} * THREADS, 0};
    }
    static const char* call(const SummaryBackward& arguments, const DeviceSpec& device, Stream stream) {
        const int stages = stages_for(chip, 2, 4, Tiles::shared);
        if (stages == 0) return TOO_LITTLE_SHARED;
        const auto [splits, programs] = plan(arguments, chip);
        return start(summary_backward_kernel<P, BK>, programs, Tiles::shared(stages), true, stream, arguments,
                     mode_of(arguments.kind), splits, stages);
    }
};

}  // namespace interp_nn
