// The jobs that every backward ends in: a job is a tile of features and a split of the rows. It reads its rows once,
// adds up its part of a (d, k) gradient in registers, and stores its columns of dX.
#pragma once

#include "derivative.h"

namespace interp_nn {

// Tiles of a job: a step has BN rows of X and of an (n, k) matrix D, and BD features. Results go to global memory
// through a tile of 16 rows and OUT columns a warp.
template <class P, int BK> struct JobShape {
    using T = typename P::Element;
    static constexpr bool WIDE = IS_WIDE<P>;
    static constexpr int BN = WIDE || BK == 128 ? 32 : 64;
    static constexpr int BD = WIDE ? 64 : 128;
    static constexpr int OUT = 32;
    using X = Tile<T, BN, BD>;
    using D = Tile<T, BN, BK>;
    using B = Tile<T, BK, BD>;
    using Leaving = Tile<T, 16 * WARPS, OUT>;
    using Sum = Pieces<BD, BK>;  // of Xᵀ D
    using Out = Pieces<BN, BD>;  // of dX
    static constexpr int STAGE = X::BYTES + D::BYTES;
    static constexpr size_t shared(int stages) { return Leaving::BYTES + static_cast<size_t>(stages) * STAGE; }
};

// The features of a job from `feature` on, and its tiles of rows.
struct Job {
    int split, feature, from, to;
};
DEVICE Job job_of(int job, int d, int64_t n, int splits, int depth, int rows) {
    const int feature_tiles = (d + depth - 1) / depth;
    const int64_t tiles = (n + rows - 1) / rows, share = (tiles + splits - 1) / splits;
    const int split = job / feature_tiles;
    const int64_t from = split * share, to = from + share;
    return {split, job % feature_tiles * depth, static_cast<int>(from < tiles ? from : tiles),
            static_cast<int>(to < tiles ? to : tiles)};
}

// sum += X[rows, feature :]ᵀ D[rows] where `need_sum`, and dX[rows, feature :] = scale D[rows] rightᵀ where dx is not
// null, over the rows of a job. `right` is (BD, BK), or (BK, BD) where RIGHT_T; also(tile) sees each tile of D.
template <class Shape, bool RIGHT_T, class P, class T, class Right, class Also>
DEVICE void walk_rows(const P& products, const Job& job, float (&sum)[Shape::Sum::TILES][4], bool need_sum, T* dx,
                      float scale, const Matrix<T>& x, const Matrix<T>& d_matrix, const Right& right,
                      unsigned char* memory, int stages, Also also) {
    using Sum = typename Shape::Sum;
    using Out = typename Shape::Out;
    const int d = x.columns;
    const typename Shape::Leaving leaving{memory};
    memory += Shape::Leaving::BYTES;
    const auto tile_x = [&](int stage) { return typename Shape::X{memory + stage * Shape::STAGE}; };
    const auto tile_d = [&](int stage) { return typename Shape::D{memory + stage * Shape::STAGE + Shape::X::BYTES}; };
    const auto load = [&](int step, int stage) {
        const int64_t row = static_cast<int64_t>(job.from + step) * Shape::BN;
        if (need_sum) load_tile(tile_x(stage), x, row, job.feature);
        load_tile(tile_d(stage), d_matrix, row, 0);
    };
    pipeline(job.to - job.from, stages, load, [&](int step, int stage) {
        if (need_sum && Sum::warp_active()) {
            multiply_tiles<true, false>(products, sum, tile_x(stage), Sum::row(), tile_d(stage), Sum::column(), 0,
                                        Shape::BN);
        }
        if (dx != nullptr && Out::warp_active()) {
            constexpr int AT_ONCE = Out::WIDE < Shape::OUT ? Out::WIDE : Shape::OUT;
            const int64_t row = static_cast<int64_t>(job.from + step) * Shape::BN + Out::row();
    NO_UNROLL for (int column = Out::column(); column < Out::column() + Out::WIDE; column += AT_ONCE) {
                float out[AT_ONCE / 8][4];
                clear(out);
                multiply_tiles<false, !RIGHT_T>(products, out, tile_d(stage), Out::row(), right, column, 0, Shape::D::COLUMNS);
                scale_sums(out, scale);
                put_sums(products.mode, leaving, 16 * warp(), 0, out);
                store_piece<AT_ONCE>(dx + row * d + job.feature + column, d, remaining(x.rows, row),
                                     d - job.feature - column, leaving, 16 * warp(), 0);
            }
        }
        also(tile_d(stage));
    });
}

// parts[split, feature :] = the sum of a job, for parts of (splits, d, BK).
template <class Shape, int BK> DEVICE void store_sum(float* parts, const Job& job, float (&sum)[Shape::Sum::TILES][4], int d) {
    if (!Shape::Sum::warp_active()) return;
    const int feature = job.feature + Shape::Sum::row();
    store_sums(parts + (int64_t{job.split} * d + feature) * BK + Shape::Sum::column(), BK, d - feature, sum);
}

// For D = gradients (n, k): parts of Xᵀ D where `parts` is not null, and dX = scale D bᵀ where dx is not.
template <int BK, class P, class T>
DEVICE void backprop_projection(const P& products, const Matrix<T>& x, const Matrix<T>& b, const Matrix<T>& gradients,
                                T* dx, float* parts, int splits, float scale, int stages) {
    using Shape = JobShape<P, BK>;
    const typename Shape::B tile_b{shared_memory()};
    const int d = x.columns, jobs = (d + Shape::BD - 1) / Shape::BD * splits;
    NO_UNROLL for (int i = program(); i < jobs; i += programs()) {
        const Job job = job_of(i, d, x.rows, splits, Shape::BD, Shape::BN);
        load_tile(tile_b, b, 0, job.feature);
        commit_copies();
        float sum[Shape::Sum::TILES][4];
        clear(sum);
        walk_rows<Shape, true>(products, job, sum, parts != nullptr, dx, scale, x, gradients, tile_b,
                               shared_memory() + Shape::B::BYTES, stages, [](const auto&) {});
        if (parts != nullptr) store_sum<Shape, BK>(parts, job, sum, d);
    }
}
template <class P, int BK> constexpr size_t backprop_shared(int stages) {
    return JobShape<P, BK>::B::BYTES + JobShape<P, BK>::shared(stages);
}

// sums[i] += lefts[i]ᵀ right over the rows of this program's row tiles, OWNED rows each; also(i, tile) sees each tile
// of lefts[i]. Left matrices have LEFT columns, the right one has RIGHT.
template <class P, int LEFT, int RIGHT> struct CorrelationTiles {
    using T = typename P::Element;
    static constexpr int ROWS = LEFT + RIGHT < 256 ? 64 : IS_WIDE<P> ? 16 : 32;
    using Left = Tile<T, ROWS, LEFT>;
    using Right = Tile<T, ROWS, RIGHT>;
    using Piece = Pieces<LEFT, RIGHT>;
    static constexpr size_t shared(int lefts, int stages) {
        return static_cast<size_t>(stages) * (lefts * Left::BYTES + Right::BYTES);
    }
};
template <class Tiles, int OWNED, int LEFTS, class P, class T, class Also>
DEVICE void correlate_rows(const P& products, float (&sums)[LEFTS][Tiles::Piece::TILES][4], const Matrix<T> (&lefts)[LEFTS],
                           const Matrix<T>& right, unsigned char* memory, int stages, Also also) {
    using Piece = typename Tiles::Piece;
    constexpr int STAGE = LEFTS * Tiles::Left::BYTES + Tiles::Right::BYTES, PARTS = OWNED / Tiles::ROWS;
    const int64_t n = right.rows, tiles = (n + OWNED - 1) / OWNED;
    const int steps = static_cast<int>((tiles - program() + programs() - 1) / programs()) * PARTS;
    const auto tile_left = [&](int i, int stage) {
        return typename Tiles::Left{memory + stage * STAGE + Tiles::Right::BYTES + i * Tiles::Left::BYTES};
    };
    const auto load = [&](int step, int stage) {
        const int64_t row = (program() + static_cast<int64_t>(step / PARTS) * programs()) * OWNED + step % PARTS * Tiles::ROWS;
        load_tile(typename Tiles::Right{memory + stage * STAGE}, right, row, 0);
        UNROLL for (int i = 0; i < LEFTS; ++i) load_tile(tile_left(i, stage), lefts[i], row, 0);
    };
    UNROLL for (int i = 0; i < LEFTS; ++i) clear(sums[i]);
    pipeline(steps, stages, load, [&](int, int stage) {
        UNROLL for (int i = 0; i < LEFTS; ++i) {
            if (Piece::warp_active()) {
                multiply_tiles<true, false>(products, sums[i], tile_left(i, stage), Piece::row(),
                                            typename Tiles::Right{memory + stage * STAGE}, Piece::column(), 0,
                                            Tiles::ROWS);
            }
            also(i, tile_left(i, stage));
        }
    });
}

}  // namespace interp_nn
