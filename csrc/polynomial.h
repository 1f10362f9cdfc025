// q(G) = c0 I + c1 G + ... + cn Gⁿ in G's tile, by Horner's rule: R = cn G + c(n-1) I, then R = R G + ci I down to c0.
#pragma once

#include "projection.h"

namespace interp_nn {

DEVICE float scale_of(const Polynomial& q) { return q.scale != nullptr ? *q.scale : 1.f; }

DEVICE int degree_of(const Polynomial& q) { return q.coefficients != nullptr ? q.degree : 1; }

// Add a number to the diagonal of a matrix, of which the sums of a warp are a part from (row, column) on.
template <int TILES> DEVICE void add_diagonal(float (&sums)[TILES][4], int row, int column, float value) {
    each_pair(sums, [&](int r, int c, float& first, float& second) {
        if (row + r == column + c) first += value;
        if (row + r == column + c + 1) second += value;
    });
}

// The steps of Horner's rule after the first: `gram` has G and becomes q(G), and r has R. Not inlined, because it comes
// once a launch, and its registers are not to count where the rows are.
template <class P, int BK>
NOINLINE void multiply_powers(Mode mode, const float* coefficients, int degree, unsigned char* gram, unsigned char* r) {
    using Piece = Pieces<BK, BK>;
    const Tile<typename P::Element, BK, BK> tile_g{gram};
    const Tile<float, BK, BK> tile_r{r};
    NO_UNROLL for (int i = degree - 2; i >= 0; --i) {
        float sums[Piece::TILES][4];
        clear(sums);
        block_barrier();  // R is whole
        if (Piece::warp_active()) {
            multiply_tiles<false, true>(P{mode}.for_sums(), sums, tile_r, Piece::row(), tile_g, Piece::column(), 0, BK);
            add_diagonal(sums, Piece::row(), Piece::column(), coefficients[i]);
        }
        block_barrier();  // R, and at last G, are no longer read
        if (!Piece::warp_active()) continue;
        if (i > 0) {
            put_sums(mode, tile_r, Piece::row(), Piece::column(), sums);
        } else {
            put_sums(mode, tile_g, Piece::row(), Piece::column(), sums);
        }
    }
    block_barrier();
}

// Replace G by q(G), from the sums of each warp, as for share_gram, which has been called. Return true if that took
// powers beyond the first, which need a square of fp32 in `memory`, free before and after, and many registers.
template <class P, class G, int TILES>
DEVICE bool share_polynomial(const P& products, const Polynomial& q, const G& gram, float (&g)[TILES][4],
                             unsigned char* memory) {
    scale_sums(g, q.coefficients[q.degree]);
    add_diagonal(g, 16 * warp(), 0, q.coefficients[q.degree - 1]);
    block_barrier();  // G has been stored, and `memory` is free
    if (q.degree == 1) {
        share_gram(products.mode, gram, g);
        return false;
    }
    const Tile<float, 8 * TILES, 8 * TILES> r{memory};
    if (16 * warp() < 8 * TILES) put_sums(products.mode, r, 16 * warp(), 0, g);
    multiply_powers<P, 8 * TILES>(products.mode, q.coefficients, q.degree, gram.base, memory);
    return true;
}

// The tile of q(G) by a walk over b of its own: for kernels whose rows leave no registers for it. Where `to` is not
// null, G is stored there, (BK, BK).
template <class P, int BK, int BD>
NOINLINE void form_polynomial(Mode mode, Polynomial q, Matrix<typename P::Element> b, float* to, unsigned char* gram,
                              unsigned char* memory, int stages) {
    using T = typename P::Element;
    using B = Tile<T, BK, BD>;
    const P products{mode};
    const Tile<T, BK, BK> tile_g{gram};
    const int row = 16 * warp();
    float g[BK / 8][4];
    clear(g);
    const auto load = [&](int step, int stage) { load_tile(B{memory + stage * B::BYTES}, b, 0, step * BD); };
    pipeline((b.columns + BD - 1) / BD, stages, load, [&](int, int stage) {
        const B tile{memory + stage * B::BYTES};
        if (row < BK) multiply_tiles<false, true>(products, g, tile, row, tile, 0, 0, BD);
    });
    scale_sums(g, scale_of(q) * scale_of(q));
    if (to != nullptr && row < BK) store_sums(to + row * BK, BK, 16, g);
    share_gram(mode, tile_g, g);
    share_polynomial(products, q, tile_g, g, memory);
}

}  // namespace interp_nn
