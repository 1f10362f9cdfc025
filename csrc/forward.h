// The forward for up to 128 columns: Y = P q(G) + bias, and optionally P, G and q(G).
#pragma once

#include <type_traits>

#include "dispatch.h"
#include "polynomial.h"

namespace interp_nn {

// Features at a time: as many as two kinds of tiles and G leave room for.
template <class P> constexpr int forward_depth(int columns) {
    if (!IS_WIDE<P>) return 64;
    return columns == 128 || (columns == 64 && std::is_same_v<P, ProductsF32>) ? 16 : 32;
}

template <class P, int BK> struct ForwardTiles : ProjectionTiles<P, BK, forward_depth<P>(BK)> {
    using Base = ProjectionTiles<P, BK, forward_depth<P>(BK)>;
    static constexpr size_t shared(int stages) {
        const size_t all = static_cast<size_t>(stages) * Base::STAGE, own = Base::Own::BYTES;
        return Base::G::BYTES + BK * sizeof(float) + (all > own ? all : own);
    }
};

// The first program stores a square tile, (k, k), where it is asked for.
template <class Square> NOINLINE void store_square(void* to, int k, Square square) {
    if (to == nullptr || program() != 0 || 16 * warp() >= k) return;
    store_rows(static_cast<typename Square::Element*>(to) + 16 * warp() * k, k, k - 16 * warp(), k, square,
               16 * warp());
}

// Each program takes row tiles in turn. At its first it also forms G and q(G) from the same tiles of b: recomputing G
// in every program costs about as much as a grid barrier.
template <class P, int BK> DEVICE void forward_rows(const P& products, const Forward& arguments, int stages) {
    using Tiles = ForwardTiles<P, BK>;
    using T = typename P::Element;
    const Mode& mode = products.mode;
    const int64_t n = arguments.n;
    const int k = arguments.k;
    const Matrix<T> x = matrix<T>(arguments.x, n, arguments.d), b = matrix_b<T>(arguments);
    const typename Tiles::G gram{shared_memory()};
    auto* const bias = reinterpret_cast<float*>(shared_memory() + Tiles::G::BYTES);
    unsigned char* const memory = shared_memory() + Tiles::G::BYTES + BK * sizeof(float);
    const typename Tiles::Own own{memory};  // in the stages' place, between two row tiles
    auto* const out_p = static_cast<T*>(arguments.p);
    auto* const out_y = static_cast<T*>(arguments.y);
    const Polynomial& q = arguments.q;
    const int64_t first_row = static_cast<int64_t>(program()) * Tiles::BN,
                  step = static_cast<int64_t>(programs()) * Tiles::BN;
    load_row<T>(mode, bias, BK, arguments.bias, k);

    NO_UNROLL for (int64_t row = first_row; row < n || row == first_row; row += step) {
        float p[BK / 8][4], y[BK / 8][4];
        project<Tiles>(products, p, y, row == first_row, x, b, row, memory, stages);
        const int64_t own_row = row + 16 * warp();
        const int rows = remaining(n, own_row);
        if (q.coefficients != nullptr) scale_sums(p, scale_of(q));
        put_sums(mode, own, 16 * warp(), 0, p);
        // P may have to wait where Y will be, because powers of G need its place.
        const bool stashed = row == first_row && q.coefficients != nullptr && q.degree > 1;
        T* const to = out_p != nullptr ? out_p : stashed ? out_y : nullptr;
        if (to != nullptr) store_rows(to + own_row * k, k, rows, k, own, 16 * warp());
        if (row == first_row) {
            if (q.coefficients != nullptr) scale_sums(y, scale_of(q) * scale_of(q));
            share_gram(mode, gram, y);
            store_square(arguments.g, k, gram);
            if (q.coefficients != nullptr) {
                form_polynomial<P, BK>(mode, q, gram.base, memory);
                store_square(arguments.q_of_g, k, gram);
                if (stashed) {
                    load_tile(own, matrix<T>(to, n, k), row, 0);
                    commit_copies();
                    wait_copies(0);
                    block_barrier();
                }
            }
        }
        warp_barrier();
        clear(y);
        add_row(y, bias);
        multiply_tiles<false, true>(products, y, own, 16 * warp(), gram, 0, 0, BK);  // q(G) is its own transpose
        warp_barrier();
        put_sums(mode, own, 16 * warp(), 0, y);
        store_rows(out_y + own_row * k, k, rows, k, own, 16 * warp());
        block_barrier();  // the stages are free again
    }
}

template <class P, int BK> KERNEL forward_kernel(Forward arguments, Mode mode, int stages) {
    RUN_IF_AVAILABLE(P, forward_rows<P, BK>(P{mode}, arguments, stages))
}

template <class P, int BK> struct ForwardInstance {
    static const char* call(const Forward& arguments, const DeviceSpec& device, Stream stream) {
        using Tiles = ForwardTiles<P, BK>;
        const int stages = stages_for(device, Tiles::shared);
        if (stages == 0) return NO_KERNEL;
        const int blocks = programs_for(device, divide_up(arguments.n, Tiles::BN));
        return start(forward_kernel<P, BK>, blocks, Tiles::shared(stages), false, stream, arguments,
                     mode_of(arguments.kind), stages);
    }
};

}  // namespace interp_nn
