// The three-term loss behind an output layer, O1 = P Aᵀ + c and O2 = Y Aᵀ + c, with its gradients. The layer is linear,
// so Y, dY and Pᵀ dY are never formed. With H = A q(G), logit gradients E1 and E2, and Ui = Eiᵀ P of (m, k):
//
//     O2 = P Hᵀ + c,   D = E1 A + E2 H,   T = U2ᵀ A,   dX = a D bᵀ,   db = a Xᵀ D + a² b M,   dA = U1 + U2 q(G).
//
//     Phase  computes                                left out
//     1      D, parts of U, of dc and of the loss
//     2      dX, parts of Xᵀ D, U, dc, the loss
//     3      M, the gradients of q                   without need_derivative
//     4      db and dA
#pragma once

#include "cross_entropy.h"

namespace interp_nn {

template <class P, int BK, int BM> constexpr int head_depth() { return IS_WIDE<P> ? 16 : BK + BM == 256 ? 32 : 64; }

template <class P, int BK, int BM> struct HeadTiles : ProjectionTiles<P, BK, head_depth<P, BK, BM>()> {
    using Base = ProjectionTiles<P, BK, head_depth<P, BK, BM>()>;
    using T = typename P::Element;
    using A = Tile<T, BM, BK>;
    using Product = Pieces<BM, BK>;  // H
    using Correlation = CorrelationTiles<P, BM, BK>;
    using Chunk = Tile<float, 16, BK>;           // of classes
    static constexpr int GROUPS = THREADS / BM;  // of threads; each adds up its rows of every column
    // Between two row tiles a warp has a place of its own in the stages', for sixteen rows of P and then of gradients.
    static constexpr int OWN = 16 * (BK > BM ? BK : BM) * sizeof(T);
    using OwnP = Tile<T, 16, BK>;
    using OwnE = Tile<T, 16, BM>;
    static constexpr int FIXED = 2 * A::BYTES + BM * sizeof(float);  // A, H, c

    static constexpr size_t shared(int stages) {
        size_t most = static_cast<size_t>(stages) * Base::STAGE;
        if (most < WARPS * OWN) most = WARPS * OWN;
        if (most < Base::G::BYTES) most = Base::G::BYTES;
        most += FIXED;
        if (most < Correlation::shared(2, stages)) most = Correlation::shared(2, stages);
        if (most < backprop_shared<P, BK>(stages)) most = backprop_shared<P, BK>(stages);
        const size_t last = SliceTiles<BK>::SHARED + Chunk::BYTES;
        return most < last ? last : most;
    }
};

// The workspaces.
//     floats: s (splits, d, BK)                   parts of Xᵀ D
//             u_parts (programs, 2, BM, BK)
//             u (2, BM, BK)                       U1 and U2
//             columns (programs, BM)              parts of dc
//             losses (programs), counts (programs)
//             g (BK, BK)                          G, the first of DerivativeWork
//     rows:   d, p (n, width), X's type           D and P
//             e[0], e[1] (n, classes), X's type   E1 and E2
template <class T, int BK, int BM> struct HeadWork {
    bool need_d, need_u;  // D; U and dc
    int width, classes;
    Area<float> floats;
    Area<T> rows;
    float *s, *u_parts, *u, *g, *columns, *losses, *counts;
    T *d, *p, *e[2];

    HOST_DEVICE HeadWork(const HeadLoss& arguments, int splits, int programs)
        : need_d(interp_nn::need_d(arguments)),
          need_u(need_t(arguments) || arguments.da != nullptr || arguments.dc != nullptr),
          width(width_of(arguments.k)),
          classes(width_of(arguments.m)),
          floats(arguments.work),
          rows(arguments.rows) {
        s = floats.take(int64_t{splits} * arguments.d * BK);
        u_parts = floats.take(int64_t{programs} * 2 * BM * BK);
        u = floats.take(2 * BM * BK);
        columns = floats.take(int64_t{programs} * BM);
        losses = floats.take(width_of(programs));
        counts = floats.take(width_of(programs));
        const int more = DerivativeWork<BK>::size(arguments);
        g = floats.take(more > 0 ? more : BK * BK);
        d = rows.take(arguments.n * width);
        p = rows.take(arguments.n * width);
        e[0] = rows.take(arguments.n * classes);
        e[1] = rows.take(arguments.n * classes);
    }
};

// Fill H's tile from A's and the sums of G. G's tile lies in `memory`, which is free before and after.
template <class Tiles, class P, int TILES> DEVICE void share_products(const P& products, const typename Tiles::A& a,
                                                                      const typename Tiles::A& h, float (&g)[TILES][4],
                                                                      unsigned char* memory) {
    using Product = typename Tiles::Product;
    const typename Tiles::G gram{memory};
    share_gram(products.mode, gram, g);
    if (Product::warp_active()) {
        float sums[Product::TILES][4];
        clear(sums);
        multiply_tiles<false, true>(products, sums, a, Product::row(), gram, Product::column(), 0, 8 * TILES);
        put_sums(products.mode, h, Product::row(), Product::column(), sums);
    }
    block_barrier();  // H is whole
}

// H's tile of a polynomial, by Horner's rule and a walk over b of its own, because the rows leave no registers for it.
// G is stored at `to`, (BK, BK), where that is not null.
template <class P, int BK, int BM> NOINLINE void walk_products(Mode mode, Polynomial q, Matrix<typename P::Element> b,
                                                               Matrix<typename P::Element> output, float* to,
                                                               unsigned char* shared, int stages) {
    using Tiles = HeadTiles<P, BK, BM>;
    using Product = typename Tiles::Product;
    const P products{mode};
    const typename Tiles::A a{shared}, h{shared + Tiles::A::BYTES};
    const typename Tiles::G gram{shared + Tiles::FIXED};
    load_tile(a, output, 0, 0);
    commit_copies();
    float g[BK / 8][4];
    walk_gram<Tiles::BD>(products, q, b, g, shared + Tiles::FIXED, stages);
    if (to != nullptr && 16 * warp() < BK) store_sums(to + 16 * warp() * BK, BK, 16, g);
    share_gram(mode, gram, g);
    NO_UNROLL for (int i = q.degree - 1; i >= 0; --i) {
        const typename Tiles::A& from = i == q.degree - 1 ? a : h;
        float sums[Product::TILES][4];
        clear(sums);
        if (Product::warp_active()) {
            multiply_tiles<false, true>(products, sums, from, Product::row(), gram, Product::column(), 0, BK);
        }
        if (i == q.degree - 1) scale_sums(sums, q.coefficients[q.degree]);
        each_pair(sums, [&](int row, int column, float& first, float& second) {
            if (!Product::warp_active()) return;
            const auto* const at = a.at(Product::row() + row, Product::column() + column);
            first += q.coefficients[i] * widen(at[0], mode.is_bf16);
            second += q.coefficients[i] * widen(at[1], mode.is_bf16);
        });
        block_barrier();  // H is no longer read
        if (Product::warp_active()) put_sums(mode, h, Product::row(), Product::column(), sums);
        block_barrier();  // H is whole
    }
}

// The first phase's pass over the rows.
template <int BK, int BM, class P, class T> DEVICE void head_rows(const P& products, const HeadLoss& arguments,
                                                                  const Matrix<T>& x, const Matrix<T>& b,
                                                                  const HeadWork<T, BK, BM>& work, int stages) {
    using Tiles = HeadTiles<P, BK, BM>;
    const Mode& mode = products.mode;
    const int64_t n = arguments.n;
    const int width = work.width, classes = work.classes;
    const typename Tiles::A a{shared_memory()}, h{shared_memory() + Tiles::A::BYTES};
    auto* const c = reinterpret_cast<float*>(shared_memory() + 2 * Tiles::A::BYTES);
    unsigned char* const memory = shared_memory() + Tiles::FIXED;
    const typename Tiles::OwnP own_p{memory + warp() * Tiles::OWN};
    const typename Tiles::OwnE own_e{memory + warp() * Tiles::OWN};
    const int64_t first_row = static_cast<int64_t>(program()) * Tiles::BN,
                  step = static_cast<int64_t>(programs()) * Tiles::BN;
    const Polynomial& q = arguments.q;
    load_tile(a, matrix<T>(arguments.a, arguments.m, arguments.k), 0, 0);
    commit_copies();
    load_row<T>(mode, c, BM, arguments.c, arguments.m);
    LossSums sums;
    NO_UNROLL for (int64_t row = first_row; row < n || row == first_row; row += step) {
        const int64_t own_row = row + 16 * warp();
        const int rows = remaining(n, own_row);
        {
            float p[BK / 8][4], g[BK / 8][4];
            project<Tiles>(products, p, g, q.coefficients == nullptr && row == first_row, x, b, row, memory, stages);
            if (q.coefficients == nullptr && row == first_row) {
                if (program() == 0 && 16 * warp() < BK) store_sums(work.g + 16 * warp() * BK, BK, 16, g);
                share_products<Tiles>(products, a, h, g, memory);
            }
            if (q.scale != nullptr) scale_sums(p, *q.scale);
            put_sums(mode, own_p, 0, 0, p);
        }
        warp_barrier();
        if (work.need_u) store_rows(work.p + own_row * width, width, rows, width, own_p, 0);
        float o1[BM / 8][4], o2[BM / 8][4];
        clear(o1);
        clear(o2);
        add_row(o1, c);
        add_row(o2, c);
        multiply_tiles<false, true>(products, o1, own_p, 0, a, 0, 0, BK);
        multiply_tiles<false, true>(products, o2, own_p, 0, h, 0, 0, BK);
        warp_barrier();
        loss_terms(arguments.terms, o1, o2, own_row, n, arguments.m, sums);
        float d[BK / 8][4];
        clear(d);
        if (work.need_d || work.need_u) {
            put_sums(mode, own_e, 0, 0, o1);
            warp_barrier();
            if (work.need_u) store_rows(work.e[0] + own_row * classes, classes, rows, classes, own_e, 0);
            if (work.need_d) multiply_tiles<false, false>(products, d, own_e, 0, a, 0, 0, BM);
            warp_barrier();
            put_sums(mode, own_e, 0, 0, o2);
            warp_barrier();
            if (work.need_u) store_rows(work.e[1] + own_row * classes, classes, rows, classes, own_e, 0);
            if (work.need_d) multiply_tiles<false, false>(products, d, own_e, 0, h, 0, 0, BM);
            warp_barrier();
        }
        if (work.need_d) {
            put_sums(mode, own_p, 0, 0, d);
            store_rows(work.d + own_row * width, width, rows, width, own_p, 0);
        }
        block_barrier();  // the stages are free again
    }
    store_loss_sums(sums, work.losses, work.counts, shared_memory());
}

// Its second pass, for the parts of U and of dc.
template <int BK, int BM, class P, class T>
DEVICE void head_correlations(const P& products, int64_t n, const HeadWork<T, BK, BM>& work, int stages) {
    using Tiles = HeadTiles<P, BK, BM>;
    using Correlation = typename Tiles::Correlation;
    using Piece = typename Correlation::Piece;
    float u[2][Piece::TILES][4];
    float column_sum = 0.f;
    const Matrix<T> lefts[2] = {matrix<T>(work.e[0], n, work.classes), matrix<T>(work.e[1], n, work.classes)};
    const int group = thread() / BM, column = thread() % BM;
    correlate_rows<Correlation, Tiles::BN>(products, u, lefts, matrix<T>(work.p, n, work.width), shared_memory(), stages,
                                           [&](int, const auto& tile) {
                                               column_sum += add_rows<Tiles::GROUPS>(products.mode, tile, group, column);
                                           });
    column_sum = add_groups<BM>(column_sum);
    if (thread() < BM) work.columns[program() * BM + thread()] = column_sum;
    if (!Piece::warp_active()) return;
    UNROLL for (int i = 0; i < 2; ++i) {
        float* const part = work.u_parts + (program() * int64_t{2} + i) * BM * BK;
        store_sums(part + Piece::row() * BK + Piece::column(), BK, 16, u[i]);
    }
}

// tiles.square = factor (T + Tᵀ) with T = U2ᵀ A, sixteen classes at a time.
template <int BK, int BM, class P>
NOINLINE void fill_head_square(Mode mode, SliceTiles<BK> tiles, const typename P::Element* a, int m, int k,
                               const float* u2, float factor) {
    using Piece = Pieces<BK, BK>;
    const typename HeadTiles<P, BK, BM>::Chunk chunk{shared_memory() + SliceTiles<BK>::SHARED};
    float t[Piece::TILES][4];
    clear(t);
    NO_UNROLL for (int from = 0; from < m; from += 16) {
        block_barrier();
        fill(tiles.slice, [&](int row, int column) { return u2[(from + row) * BK + column]; });
        fill(chunk, [&](int row, int column) {
            return from + row < m && column < k ? widen(a[(from + row) * k + column], mode.is_bf16) : 0.f;
        });
        block_barrier();
        if (Piece::warp_active()) {
            multiply_tiles<true, false>(P{mode}.for_sums(), t, tiles.slice, Piece::row(), chunk, Piece::column(), 0,
                                        16);
        }
    }
    if (Piece::warp_active()) put_sums(mode, tiles.square, Piece::row(), Piece::column(), t);
    block_barrier();
    NO_UNROLL for (int i = thread(); i < BK * BK; i += THREADS) {
        const int row = i / BK, column = i % BK;
        if (row > column) continue;
        const float both = factor * (*tiles.square.at(row, column) + *tiles.square.at(column, row));
        *tiles.square.at(row, column) = both;
        *tiles.square.at(column, row) = both;
    }
    block_barrier();
}

// dA = scale (U1 + U2 q(G)) by Horner's rule, sixteen classes a program, from the programs that have the least else to do.
template <int BK, int BM, class T>
DEVICE void store_output_weight(const Mode& mode, const SliceTiles<BK>& tiles, const HeadLoss& arguments,
                                const HeadWork<T, BK, BM>& work, float scale) {
    const int k = arguments.k, m = arguments.m, first = 16 * (programs() - 1 - program());
    if (first >= m) return;
    block_barrier();
    fill(tiles.square, [&](int row, int column) { return work.g[row * BK + column]; });
    NO_UNROLL for (int from = first; from < m; from += 16 * programs()) {
        const float *const u1 = work.u + from * BK, *const u2 = u1 + BM * BK;
        const float* const c = arguments.q.coefficients;
        const int degree = degree_of(arguments.q);
        NO_UNROLL for (int i = degree; i > 0; --i) {
            const auto value = [&](int row, int column) {
                const float element = u2[row * BK + column];
                if (c == nullptr) return element;
                return (i < degree ? *tiles.slice.at(row, column) : 0.f) + c[i] * element;  // the last product
            };
            multiply_slice(tiles, value, [&](int row, int column, float product) {
                if (i > 1 || from + row >= m || column >= k) return;
                float sum = u1[row * BK + column] + product;
                if (c != nullptr) sum += c[0] * u2[row * BK + column];
                static_cast<T*>(arguments.da)[(from + row) * k + column] = round_to<T>(sum * scale, mode.is_bf16);
            });
        }
    }
}

template <int BK, int BM, class P>
DEVICE void head_phases(const P& products, const HeadLoss& arguments, int splits, int stages) {
    using T = typename P::Element;
    const Matrix<T> x = matrix<T>(arguments.x, arguments.n, arguments.d), b = matrix_b<T>(arguments);
    const HeadWork<T, BK, BM> work(arguments, splits, programs());
    if (arguments.q.coefficients != nullptr) {
        walk_products<P, BK, BM>(products.mode, arguments.q, matrix_b<T>(arguments),
                                 matrix<T>(arguments.a, arguments.m, arguments.k), program() == 0 ? work.g : nullptr,
                                 shared_memory(), stages);
    }
    head_rows<BK, BM>(products, arguments, x, b, work, stages);
    if (work.need_u) head_correlations<BK, BM>(products, arguments.n, work, stages);
    if (!work.need_d && !work.need_u && arguments.terms.reduction == Reduction::NONE) return;
    grid_barrier(arguments.counter);
    const float loss_scale = gradient_scale(arguments.terms, work.counts), scale = loss_scale * scale_of(arguments.q);
    if (program() == programs() - 1) {
        store_value(arguments.terms, work.losses, work.counts);
        if (arguments.dc != nullptr) {
            store_columns<BM>(products.mode, static_cast<T*>(arguments.dc), arguments.m, work.columns, programs(),
                              loss_scale);
        }
    }
    if (work.need_d) {
        backprop_projection<BK>(products, x, b, matrix<T>(work.d, arguments.n, work.width),
                                static_cast<T*>(arguments.dx), arguments.db != nullptr ? work.s : nullptr, splits, scale, stages);
    }
    if (!need_t(arguments) && arguments.da == nullptr) return;
    add_parts(work.u_parts, work.u, programs(), 2 * BM * BK);
    grid_barrier(arguments.counter);  // before db and dA
    const SliceTiles<BK> tiles(shared_memory());
    if (need_t(arguments)) {
        fill_derivative(arguments, tiles, DerivativeWork<BK>{work.g}, 1.f, loss_scale, [&](float factor) {
            fill_head_square<BK, BM, P>(products.mode, tiles, static_cast<const T*>(arguments.a), arguments.m,
                                        arguments.k, work.u + BM * BK, factor);
        });
    }
    if (arguments.db != nullptr) store_db(products.mode, arguments, tiles, b, work.s, splits, scale);
    if (arguments.da != nullptr) store_output_weight(products.mode, tiles, arguments, work, loss_scale);
}

template <class P, int BK, int BM> KERNEL head_loss_kernel(HeadLoss arguments, Mode mode, int splits, int stages) {
    RUN_IF_AVAILABLE(P, head_phases<BK, BM>(P{mode}, arguments, splits, stages))
}

template <class P, int BK, int BM> struct HeadLossInstance : PhasedLaunch<HeadLossInstance<P, BK, BM>, HeadLoss> {
    using Tiles = HeadTiles<P, BK, BM>;
    using Work = HeadWork<typename P::Element, BK, BM>;
    static Plan plan(const HeadLoss& arguments, const DeviceSpec& device) {
        return plan_grid(device, arguments.n, arguments.d, JobShape<P, BK>::BD, divide_up(arguments.n, Tiles::BN),
                         need_d(arguments), arguments.db != nullptr);
    }
    static auto kernel() { return head_loss_kernel<P, BK, BM>; }
};

// The instances of few classes, and of many.
constexpr int FEW_CLASSES = 16, MOST_CLASSES = 128;
template <class P, int BK> struct HeadLossOfColumns {
    template <class... Rest> static auto call(const HeadLoss& arguments, const DeviceSpec& device, Rest... rest) {
        return arguments.m <= FEW_CLASSES ? HeadLossInstance<P, BK, FEW_CLASSES>::call(arguments, device, rest...)
                                          : HeadLossInstance<P, BK, MOST_CLASSES>::call(arguments, device, rest...);
    }
};

inline const char* invalid(const HeadLoss& arguments, const DeviceSpec& device) {
    if (arguments.m < 1) return "a head must have one class or more";
    if (arguments.m > MOST_CLASSES) return NO_KERNEL;
    return invalid_operands(arguments, device);
}

}  // namespace interp_nn
