// Backward of the summary alone: dX = dY Wᵀ with W = b G, db = S G + b (T + Tᵀ) with S = Xᵀ dY and T = bᵀ S, and
// dbias, the column sums of dY, for up to 128 columns. No (n, k) matrix but dY.
//
// Phases: strips, with parts of S, T and dbias; T and dbias; db.
#pragma once

#include "strips.h"

namespace interp_nn {

template <Kind KIND, int BK, bool B_T> struct SummaryTiles {
    using T = typename Products<KIND>::Element;
    static constexpr bool WIDE = sizeof(T) == 4;
    using Shape = StripShape<KIND, BK, B_T, WIDE ? 32 : 64, WIDE ? BK == 128 ? 32 : 64 : 128>;
    using B = typename Shape::B;
    using W = Tile<T, Shape::BD, BK>;
    using G = Tile<T, BK, BK>;
    using S = Tile<float, Shape::BD, BK>;
    using Square = Pieces<BK, BK>;
    using Last = StripTiles<BK>;
    static constexpr int GROUPS = THREADS / BK;  // of threads, each adding up its rows of every column of dY

    // W stays for a whole job; beside it lie first b and G, then the stages, then S, with b in W's place.
    static constexpr size_t shared(int stages) {
        const size_t first = B::BYTES + G::BYTES, second = static_cast<size_t>(stages) * Shape::STAGE;
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

// t_part = or += bᵀ S for the strip of a job, whose sums are in registers. Sums meet b as sums do: exactly, or as tf32.
template <Kind KIND, int BK, bool B_T, class T>
DEVICE void add_square(const Matrix<T>& b, const Job& job, float* t_part, bool first_job,
                       float (&sum)[SummaryTiles<KIND, BK, B_T>::Shape::Sum::TILES][4]) {
    using Tiles = SummaryTiles<KIND, BK, B_T>;
    using Sum = typename Tiles::Shape::Sum;
    using Square = typename Tiles::Square;
    const typename Tiles::B tile_b{shared_memory()};
    const typename Tiles::S tile_s{shared_memory() + Tiles::W::BYTES};
    load_b<B_T>(tile_b, b, job.feature);
    commit_copies();
    if (Sum::mine()) {
        each_pair(sum, [&](int r, int c, float first, float second) {
            store_two(tile_s.at(Sum::row() + r, Sum::column() + c), 0, 2, first, second, true);
        });
    }
    wait_copies(0);
    block_barrier();
    if (Square::mine()) {
        constexpr int AT_ONCE = Square::WIDE < 32 ? Square::WIDE : 32;
        NO_UNROLL for (int column = Square::column(); column < Square::column() + Square::WIDE; column += AT_ONCE) {
            float t[AT_ONCE / 8][4];
            clear(t);
            multiply_tiles<SumProducts<KIND>, !B_T, false>(t, tile_b, Square::row(), tile_s, column, 0, Tiles::Shape::BD);
            each_pair(t, [&](int r, int c, float first, float second) {
                float* const at = t_part + (Square::row() + r) * BK + column + c;
                at[0] = first_job ? first : at[0] + first;
                at[1] = first_job ? second : at[1] + second;
            });
        }
    }
    block_barrier();
}

// W = b G for the features of a job, rounded, into its place.
template <Kind KIND, int BK, bool B_T, class T>
DEVICE void effective_weight(const Matrix<T>& b, const Matrix<T>& g, int feature) {
    using Tiles = SummaryTiles<KIND, BK, B_T>;
    using Piece = typename Tiles::Shape::Sum;
    const typename Tiles::W tile_w{shared_memory()};
    const typename Tiles::B tile_b{shared_memory() + Tiles::W::BYTES};
    const typename Tiles::G gram{shared_memory() + Tiles::W::BYTES + Tiles::B::BYTES};
    load_b<B_T>(tile_b, b, feature);
    load_tile(gram, g, 0, 0);
    commit_copies();
    wait_copies(0);
    block_barrier();
    if (Piece::mine()) {
        float w[Piece::TILES][4];
        clear(w);
        multiply_tiles<Products<KIND>, B_T, true>(w, tile_b, Piece::row(), gram, Piece::column(), 0, BK);
        each_pair(w, [&](int r, int c, float first, float second) {
            store_two(tile_w.at(Piece::row() + r, Piece::column() + c), 0, 2, first, second, true);
        });
    }
    block_barrier();
}

// The first phase.
template <Kind KIND, int BK, bool B_T>
DEVICE void summary_strips(const SummaryBackward& arguments, const SummaryWork<BK>& work, int splits, int stages) {
    using Tiles = SummaryTiles<KIND, BK, B_T>;
    using Shape = typename Tiles::Shape;
    using T = typename Tiles::T;
    const int64_t n = arguments.n;
    const int d = arguments.d, k = arguments.k;
    const bool need_b = arguments.db != nullptr;
    const Matrix<T> x = matrix<T>(arguments.x, n, d), b = matrix_b<T, B_T>(arguments.b, d, k);
    const Matrix<T> dy = matrix<T>(arguments.dy, n, k);
    const typename Tiles::W tile_w{shared_memory()};
    const int strips = (d + Shape::BD - 1) / Shape::BD;
    NO_UNROLL for (int i = program(); i < strips * splits; i += programs()) {
        const Job job = job_of(i, d, n, splits, Shape::BD, Shape::BN);
        if (arguments.dx != nullptr) {
            effective_weight<KIND, BK, B_T>(b, matrix<T>(arguments.g, k, k), job.feature);
        }
        const bool need_bias = arguments.dbias != nullptr && job.feature == 0;
        const int group = thread() / BK, column = thread() % BK;
        float total = 0.f;
        float sum[Shape::Sum::TILES][4];
        clear(sum);
        walk_rows<KIND, Shape, false>(job, sum, need_b, static_cast<T*>(arguments.dx), x, dy, tile_w,
                                      shared_memory() + Tiles::W::BYTES, stages, [&](const auto& tile) {
                                          if (!need_bias) return;
                                          NO_UNROLL for (int r = group; r < Shape::BN; r += Tiles::GROUPS) {
                                              total += to_float(*tile.at(r, column));
                                          }
                                      });
        if (need_bias) work.columns[(job.split * Tiles::GROUPS + group) * BK + column] = total;
        if (need_b) {
            store_sum<Shape, BK>(work.s, job, sum, d);
            float* const t_part = work.t_parts + int64_t{program()} * BK * BK;
            add_square<KIND, BK, B_T>(b, job, t_part, i == program(), sum);
        }
    }
}

// The last phase: S G first, in the place of S's first part, then b (T + Tᵀ), so that one square at a time is in
// shared memory.
template <Kind KIND, int BK, bool B_T>
DEVICE void summary_parameters(const SummaryBackward& arguments, const SummaryWork<BK>& work, int splits) {
    using T = typename SummaryTiles<KIND, BK, B_T>::T;
    constexpr int BC = StripTiles<BK>::BC;
    const int d = arguments.d, k = arguments.k;
    const StripTiles<BK> tiles = strip_tiles<BK>(shared_memory());
    load_square(tiles, static_cast<const T*>(arguments.g), k);
    NO_UNROLL for (int feature = program() * BC; feature < d; feature += programs() * BC) {
        block_barrier();  // the strip before is done with
        for (int i = thread(); i < BC * BK; i += THREADS) {
            const int row = i / BK, column = i % BK;
            *tiles.strip.at(row, column) = add_splits<BK>(work.s, splits, feature + row, column, d);
        }
        block_barrier();
        multiply_strip(tiles, [&](int r, int c, float first, float second) {
            if (feature + r < d) store_two(work.s + int64_t{feature + r} * BK, c, BK, first, second, true);
        });
    }
    block_barrier();
    load_twice_symmetric(tiles, work.t);
    NO_UNROLL for (int feature = program() * BC; feature < d; feature += programs() * BC) {
        block_barrier();
        load_strip<B_T>(tiles, static_cast<const T*>(arguments.b), feature, d, k);
        block_barrier();
        multiply_strip(tiles, [&](int r, int c, float first, float second) {
            first += add_splits<BK>(work.s, 1, feature + r, c, d);
            second += add_splits<BK>(work.s, 1, feature + r, c + 1, d);
            store_b<B_T>(static_cast<T*>(arguments.db), feature + r, c, d, k, first, second);
        });
    }
}

template <Kind KIND, int BK, bool B_T> KERNEL summary_backward_kernel(SummaryBackward arguments, int splits, int stages) {
    using Tiles = SummaryTiles<KIND, BK, B_T>;
    using T = typename Tiles::T;
    const bool need_b = arguments.db != nullptr, need_bias = arguments.dbias != nullptr;
    const int jobs = (arguments.d + Tiles::Shape::BD - 1) / Tiles::Shape::BD * splits;
    const SummaryWork<BK> work(arguments.work, splits, arguments.d, jobs);
    summary_strips<KIND, BK, B_T>(arguments, work, splits, stages);
    if (!need_b && !need_bias) return;
    grid_barrier(arguments.counter);
    if (need_b) add_parts(work.t_parts, work.t, work.parts, BK * BK);
    if (need_bias && program() == programs() - 1 && thread() < arguments.k) {
        float total = 0.f;
        for (int q = 0; q < splits * Tiles::GROUPS; ++q) total += work.columns[q * BK + thread()];
        static_cast<T*>(arguments.dbias)[thread()] = from_float<T>(total);
    }
    if (!need_b) return;
    grid_barrier(arguments.counter);  // before db
    summary_parameters<KIND, BK, B_T>(arguments, work, splits);
}

template <Kind KIND, int BK, bool B_T> struct SummaryBackwardInstance {
    using Tiles = SummaryTiles<KIND, BK, B_T>;
    struct Plan {
        int splits, programs;
        int64_t jobs;
    };
    static Plan plan(const SummaryBackward& arguments, const Chip& chip) {
        const int64_t d = arguments.d;
        const int splits = splits_for(chip, arguments.n, arguments.d, Tiles::Shape::BD);
        const int64_t jobs = divide_up(d, Tiles::Shape::BD) * splits;
        const int64_t strips = arguments.db != nullptr ? divide_up(d, StripTiles<BK>::BC) : 0;
        return {splits, programs_for(chip, jobs < strips ? strips : jobs), jobs};
    }
    static Workspace call(const SummaryBackward& arguments, const Chip& chip) {
        const auto [splits, programs, jobs] = plan(arguments, chip);
        const int64_t parts = jobs < programs ? jobs : programs;
        return {int64_t{splits} * arguments.d * BK + (parts + 1) * BK * BK + int64_t{splits} * THREADS, 0};
    }
    static const char* call(const SummaryBackward& arguments, const Chip& chip, Stream stream) {
        const int stages = stages_for(chip, 2, 3, Tiles::shared);
        if (stages == 0) return TOO_LITTLE_SHARED;
        const Plan planned = plan(arguments, chip);
        return start(summary_backward_kernel<KIND, BK, B_T>, planned.programs, Tiles::shared(stages), true, stream, arguments,
                     planned.splits, stages);
    }
};

}  // namespace interp_nn
