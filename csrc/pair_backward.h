// Backward of the pair: dX = D bᵀ and db = Xᵀ D + b (T + Tᵀ) with D = dP + dY G and T = Pᵀ dY, for up to 128 columns.
//
// Phases: rows, with D and parts of T; strips, and T; db. Without dY there is no first one, without db no last one.
#pragma once

#include "strips.h"

namespace interp_nn {

template <Kind KIND, int BK, bool B_T> struct PairTiles {
    using T = typename Products<KIND>::Element;
    static constexpr bool WIDE = sizeof(T) == 4;
    static constexpr int ROWS = WIDE ? BK == 128 ? 16 : 32 : 64;  // of the first phase
    using Part = Tile<T, ROWS, BK>;
    using G = Tile<T, BK, BK>;
    using Gradient = Pieces<ROWS, BK>;
    using Square = Pieces<BK, BK>;
    using Shape = StripShape<KIND, BK, B_T, WIDE ? 32 : 64, WIDE ? 64 : 128>;
    using Last = StripTiles<BK>;
    static constexpr size_t shared(int stages) {
        const size_t first = G::BYTES + static_cast<size_t>(stages) * 2 * Part::BYTES;
        const size_t second = Shape::B::BYTES + static_cast<size_t>(stages) * Shape::STAGE;
        return first > second ? first > Last::SHARED ? first : Last::SHARED : second > Last::SHARED ? second : Last::SHARED;
    }
};

// The row length of a workspace with k columns: whole 16-byte words of 16-bit numbers.
DEVICE int width_of(int k) { return (k + 7) / 8 * 8; }

// The first phase. T's part of this program goes to t_part, if not null.
template <Kind KIND, int BK, bool B_T> DEVICE void pair_rows(const PairBackward& arguments, float* t_part, int stages) {
    using Tiles = PairTiles<KIND, BK, B_T>;
    using P = Products<KIND>;
    using T = typename Tiles::T;
    using Gradient = typename Tiles::Gradient;
    using Square = typename Tiles::Square;
    const int64_t n = arguments.n;
    const int k = arguments.k, width = width_of(k);
    const Matrix<T> p = matrix<T>(arguments.p, n, k), dy = matrix<T>(arguments.dy, n, k);
    const auto* const dp = static_cast<const T*>(arguments.dp);
    auto* const gradients = static_cast<T*>(arguments.rows);
    const bool pairs = paired<T>(gradients, width);
    unsigned char* const memory = shared_memory() + Tiles::G::BYTES;
    const typename Tiles::G gram{shared_memory()};
    const auto tile_dy = [&](int stage) { return typename Tiles::Part{memory + 2 * stage * Tiles::Part::BYTES}; };
    const auto tile_p = [&](int stage) { return typename Tiles::Part{memory + (2 * stage + 1) * Tiles::Part::BYTES}; };
    const auto row_of = [&](int step) { return (program() + static_cast<int64_t>(step) * programs()) * Tiles::ROWS; };
    const int64_t tiles = (n + Tiles::ROWS - 1) / Tiles::ROWS;
    const int steps = static_cast<int>((tiles - program() + programs() - 1) / programs());

    float t[Square::TILES][4];
    clear(t);
    load_tile(gram, matrix<T>(arguments.g, k, k), 0, 0);
    commit_copies();
    const auto load = [&](int step, int stage) {
        load_tile(tile_dy(stage), dy, row_of(step), 0);
        if (t_part != nullptr) load_tile(tile_p(stage), p, row_of(step), 0);
    };
    pipeline(steps, stages, load, [&](int step, int stage) {
        if (Gradient::mine()) {
            float gradient[Gradient::TILES][4];
            clear(gradient);
            multiply_tiles<P, false, true>(gradient, tile_dy(stage), Gradient::row(), gram, Gradient::column(), 0, BK);
            const int64_t row = row_of(step) + Gradient::row();
            const int rows = left(n, row);
            each_pair(gradient, [&](int r, int c, float first, float second) {
                c += Gradient::column();
                if (r >= rows) return;
                if (dp != nullptr) {
                    const T* const at = dp + (row + r) * k + c;
                    first += c < k ? to_float(at[0]) : 0.f;
                    second += c + 1 < k ? to_float(at[1]) : 0.f;
                }
                store_two(gradients + (row + r) * width, c, width, first, second, pairs);
            });
        }
        if (t_part != nullptr && Square::mine()) {
            multiply_tiles<P, true, false>(t, tile_p(stage), Square::row(), tile_dy(stage), Square::column(), 0, Tiles::ROWS);
        }
    });
    if (t_part != nullptr && Square::mine()) {
        each_pair(t, [&](int r, int c, float first, float second) {
            store_two(t_part + (Square::row() + r) * BK + Square::column(), c, BK, first, second, true);
        });
    }
}

// The second phase: parts of Xᵀ D, and dX.
template <Kind KIND, int BK, bool B_T> DEVICE void pair_strips(const PairBackward& arguments, int splits, int stages) {
    using Tiles = PairTiles<KIND, BK, B_T>;
    using Shape = typename Tiles::Shape;
    using T = typename Tiles::T;
    const int64_t n = arguments.n;
    const int d = arguments.d, k = arguments.k;
    const bool through = arguments.dy != nullptr;
    const Matrix<T> x = matrix<T>(arguments.x, n, d), b = matrix_b<T, B_T>(arguments.b, d, k);
    const Matrix<T> gradients =
        through ? matrix<T>(arguments.rows, n, width_of(k)) : matrix<T>(arguments.dp, n, k);
    const typename Shape::B tile_b{shared_memory()};
    const int jobs = (d + Shape::BD - 1) / Shape::BD * splits;
    NO_UNROLL for (int i = program(); i < jobs; i += programs()) {
        const Job job = job_of(i, d, n, splits, Shape::BD, Shape::BN);
        load_b<B_T>(tile_b, b, job.feature);
        commit_copies();
        float sum[Shape::Sum::TILES][4];
        clear(sum);
        walk_rows<KIND, Shape, B_T>(job, sum, arguments.db != nullptr, static_cast<T*>(arguments.dx), x, gradients, tile_b,
                                    shared_memory() + Shape::B::BYTES, stages, [](const auto&) {});
        if (arguments.db != nullptr) store_sum<Shape, BK>(arguments.work, job, sum, d);
    }
}

// The last phase.
template <Kind KIND, int BK, bool B_T> DEVICE void pair_parameters(const PairBackward& arguments, const float* t, int splits) {
    using T = typename PairTiles<KIND, BK, B_T>::T;
    constexpr int BC = StripTiles<BK>::BC;
    const int d = arguments.d, k = arguments.k;
    const StripTiles<BK> tiles = strip_tiles<BK>(shared_memory());
    auto* const db = static_cast<T*>(arguments.db);
    if (arguments.dy != nullptr) {
        load_twice_symmetric(tiles, t);
    } else {
        for (int i = thread(); i < BK * BK; i += THREADS) *tiles.square.at(i / BK, i % BK) = 0.f;
    }
    NO_UNROLL for (int feature = program() * BC; feature < d; feature += programs() * BC) {
        block_barrier();  // the strip before is done with
        load_strip<B_T>(tiles, static_cast<const T*>(arguments.b), feature, d, k);
        block_barrier();
        multiply_strip(tiles, [&](int r, int c, float first, float second) {
            first += add_splits<BK>(arguments.work, splits, feature + r, c, d);
            second += add_splits<BK>(arguments.work, splits, feature + r, c + 1, d);
            store_b<B_T>(db, feature + r, c, d, k, first, second);
        });
    }
}

// `work` has (splits, d, BK) parts of Xᵀ D, (programs, BK, BK) parts of T, T.
template <Kind KIND, int BK, bool B_T> KERNEL pair_backward_kernel(PairBackward arguments, int splits, int stages) {
    const bool need_b = arguments.db != nullptr, through = arguments.dy != nullptr;
    float* const t_parts = arguments.work + int64_t{splits} * arguments.d * BK;
    float* const t = t_parts + int64_t{programs()} * BK * BK;
    if (through) {
        pair_rows<KIND, BK, B_T>(arguments, need_b ? t_parts + int64_t{program()} * BK * BK : nullptr, stages);
        grid_barrier(arguments.counter);
    }
    pair_strips<KIND, BK, B_T>(arguments, splits, stages);
    if (!need_b) return;
    if (through) add_parts(t_parts, t, programs(), BK * BK);
    grid_barrier(arguments.counter);  // before db
    pair_parameters<KIND, BK, B_T>(arguments, t, splits);
}

template <Kind KIND, int BK, bool B_T> struct PairBackwardInstance {
    using Tiles = PairTiles<KIND, BK, B_T>;
    struct Plan {
        int splits, programs;
    };
    static Plan plan(const PairBackward& arguments, const Chip& chip) {
        const int64_t d = arguments.d;
        const int splits = splits_for(chip, arguments.n, arguments.d, Tiles::Shape::BD);
        int64_t jobs = divide_up(d, Tiles::Shape::BD) * splits;
        const int64_t rows = arguments.dy != nullptr ? divide_up(arguments.n, Tiles::ROWS) : 0;
        const int64_t strips = arguments.db != nullptr ? divide_up(d, StripTiles<BK>::BC) : 0;
        jobs = jobs < rows ? rows : jobs;
        return {splits, programs_for(chip, jobs < strips ? strips : jobs)};
    }
    static Workspace call(const PairBackward& arguments, const Chip& chip) {
        const auto [splits, programs] = plan(arguments, chip);
        return {int64_t{splits} * arguments.d * BK + (programs + int64_t{1}) * BK * BK,
                arguments.dy != nullptr ? arguments.n * ((arguments.k + 7) / 8 * 8) : 0};
    }
    static const char* call(const PairBackward& arguments, const Chip& chip, Stream stream) {
        const int stages = stages_for(chip, 2, 3, Tiles::shared);
        if (stages == 0) return TOO_LITTLE_SHARED;
        const auto [splits, programs] = plan(arguments, chip);
        return start(pair_backward_kernel<KIND, BK, B_T>, programs, Tiles::shared(stages), true, stream, arguments, splits,
                     stages);
    }
};

}  // namespace interp_nn
