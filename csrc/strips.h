// How a block's warps share a product, and the walk that both backwards end in: a job is a tile of features and a
// split of the rows, which are walked over once, adding up a part of a d x k gradient in registers and streaming a
// strip of dX out.
#pragma once

#include "dispatch.h"
#include "grid.h"

namespace interp_nn {

// A product of ROWS by COLUMNS cut into one piece a warp: 16 rows each, and then columns. Warps may be left over.
template <int ROWS, int COLUMNS> struct Pieces {
    static constexpr int DOWN = ROWS / 16;
    static_assert(DOWN >= 1 && DOWN <= WARPS, "at most sixteen rows a warp");
    static constexpr int ACROSS = WARPS / DOWN < COLUMNS / 16 ? WARPS / DOWN : COLUMNS / 16;
    static constexpr int WIDE = COLUMNS / ACROSS;
    static constexpr int TILES = WIDE / 8;

    DEVICE static bool mine() { return warp() < DOWN * ACROSS; }
    DEVICE static int row() { return warp() / ACROSS * 16; }
    DEVICE static int column() { return warp() % ACROSS * WIDE; }
};

// Tiles of a strip: BN rows of X and of an (n, k) matrix D a step, BD features.
template <Kind KIND, int BK, bool B_T, int BN_, int BD_> struct StripShape {
    using T = typename Products<KIND>::Element;
    static constexpr int BN = BN_;
    static constexpr int BD = BD_;
    using X = Tile<T, BN, BD>;
    using D = Tile<T, BN, BK>;
    using B = typename TileOfB<T, BD, BK, B_T>::type;
    using Sum = Pieces<BD, BK>;  // of Xᵀ D
    using Out = Pieces<BN, BD>;  // of dX
    static constexpr int STAGE = X::BYTES + D::BYTES;
};

// Which features and rows a job has.
struct Job {
    int split, feature, from, to;  // tiles of rows
};
DEVICE Job job_of(int job, int d, int64_t n, int splits, int depth, int rows) {
    const int strips = (d + depth - 1) / depth;
    const int64_t tiles = (n + rows - 1) / rows, share = (tiles + splits - 1) / splits;
    const int split = job / strips;
    const int64_t from = split * share, to = from + share;
    return {split, job % strips * depth, static_cast<int>(from < tiles ? from : tiles), static_cast<int>(to < tiles ? to : tiles)};
}

// sum += X[rows, feature :]ᵀ D[rows] where SUM, and dX[rows, feature :] = D[rows] rightᵀ where dx is not null, over
// the rows of a job. `right` is (BD, BK), or (BK, BD) where RIGHT_T; also(tile) sees each tile of D.
template <Kind KIND, class Shape, bool RIGHT_T, class T, class Right, class Also>
DEVICE void walk_rows(const Job& job, float (&sum)[Shape::Sum::TILES][4], bool need_sum, T* dx, const Matrix<T>& x,
                      const Matrix<T>& d_matrix, const Right& right, unsigned char* memory, int stages, Also also) {
    using P = Products<KIND>;
    using Sum = typename Shape::Sum;
    using Out = typename Shape::Out;
    const int d = x.columns;
    const bool pairs = paired<T>(dx, d);
    const auto tile_x = [&](int stage) { return typename Shape::X{memory + stage * Shape::STAGE}; };
    const auto tile_d = [&](int stage) { return typename Shape::D{memory + stage * Shape::STAGE + Shape::X::BYTES}; };
    const auto load = [&](int step, int stage) {
        const int64_t row = static_cast<int64_t>(job.from + step) * Shape::BN;
        if (need_sum) load_tile(tile_x(stage), x, row, job.feature);
        load_tile(tile_d(stage), d_matrix, row, 0);
    };
    pipeline(job.to - job.from, stages, load, [&](int step, int stage) {
        if (need_sum && Sum::mine()) {
            multiply_tiles<P, true, false>(sum, tile_x(stage), Sum::row(), tile_d(stage), Sum::column(), 0, Shape::BN);
        }
        if (dx != nullptr && Out::mine()) {
            constexpr int AT_ONCE = Out::WIDE < 32 ? Out::WIDE : 32;  // columns: as many as leave the sums their registers
            const int64_t row = static_cast<int64_t>(job.from + step) * Shape::BN + Out::row();
            const int rows = left(x.rows, row);
            NO_UNROLL for (int column = Out::column(); column < Out::column() + Out::WIDE; column += AT_ONCE) {
                float out[AT_ONCE / 8][4];
                clear(out);
                multiply_tiles<P, false, !RIGHT_T>(out, tile_d(stage), Out::row(), right, column, 0, Shape::D::COLUMNS);
                T* const at = dx + row * d + job.feature + column;
                const int columns = d - job.feature - column;
                each_pair(out, [&](int r, int c, float first, float second) {
                    if (r < rows) store_two(at + int64_t{r} * d, c, columns, first, second, pairs);
                });
            }
        }
        also(tile_d(stage));
    });
}

// parts[split, feature :] = the sum of a job, for parts of (splits, d, BK).
template <class Shape, int BK> DEVICE void store_sum(float* parts, const Job& job, float (&sum)[Shape::Sum::TILES][4], int d) {
    if (!Shape::Sum::mine()) return;
    each_pair(sum, [&](int r, int c, float first, float second) {
        const int feature = job.feature + Shape::Sum::row() + r;
        if (feature >= d) return;
        store_two(parts + (int64_t{job.split} * d + feature) * BK + Shape::Sum::column(), c, BK, first, second, true);
    });
}

// Into how many parts the rows of a strip are split: enough to occupy the chip, each with some rows to do.
inline int splits_for(const Chip& chip, int64_t n, int d, int depth) {
    const int64_t room = chip.multiprocessors / divide_up(d, depth), rows = divide_up(n, 256);
    const int64_t splits = room < rows ? room : rows;
    return splits < 1 ? 1 : static_cast<int>(splits);
}

}  // namespace interp_nn
