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

// Make the tile of G that of q(G). Powers beyond the first need another such tile at `memory`, for R. Not inlined,
// because it comes once a launch, and its registers are not to count where the rows are.
template <class P, int BK>
NOINLINE void form_polynomial(Mode mode, Polynomial q, unsigned char* gram, unsigned char* memory) {
    using T = typename P::Element;
    using Square = Tile<T, BK, BK>;
    using Piece = Pieces<BK, BK>;
    using Powers = std::conditional_t<IS_WIDE<P>, ProductsF32, P>;  // of fp32 the ordinary units, in half the code
    const Square tile_g{gram}, r{memory};
    const Square& to = q.degree == 1 ? tile_g : r;
    const float last = q.coefficients[q.degree], before = q.coefficients[q.degree - 1];
    block_barrier();  // G has been stored, and `memory` is free
    NO_UNROLL for (int i = thread(); i < BK * Square::CHUNKS; i += THREADS) {
        const int row = i / Square::CHUNKS, column = i % Square::CHUNKS * Square::PER_CHUNK;
        const auto* const from = tile_g.at(row, column);
        auto* const at = to.at(row, column);
        UNROLL for (int e = 0; e < Square::PER_CHUNK; ++e) {
            const float term = last * widen(from[e], mode.is_bf16);
            at[e] = round_to<T>(row == column + e ? term + before : term, mode.is_bf16);
        }
    }
    NO_UNROLL for (int i = q.degree - 2; i >= 0; --i) {
        float sums[Piece::TILES][4];
        clear(sums);
        block_barrier();  // R is whole
        if (Piece::warp_active()) {
            multiply_tiles<false, true>(Powers{mode}, sums, r, Piece::row(), tile_g, Piece::column(), 0, BK);
            add_diagonal(sums, Piece::row(), Piece::column(), q.coefficients[i]);
        }
        block_barrier();  // R, and at last G, are no longer read
        if (Piece::warp_active()) put_sums(mode, i > 0 ? r : tile_g, Piece::row(), Piece::column(), sums);
    }
    block_barrier();
}

// The sums of G's rows of each warp by a walk over b of its own, BD features a step.
template <int BD, class P, int TILES, class T>
DEVICE void walk_gram(const P& products, const Polynomial& q, const Matrix<T>& b, float (&g)[TILES][4],
                      unsigned char* memory, int stages) {
    using B = Tile<T, 8 * TILES, BD>;
    const int row = 16 * warp();
    const auto load = [&](int step, int stage) { load_tile(B{memory + stage * B::BYTES}, b, 0, step * BD); };
    clear(g);
    pipeline((b.columns + BD - 1) / BD, stages, load, [&](int, int stage) {
        const B tile{memory + stage * B::BYTES};
        if (row < 8 * TILES) multiply_tiles<false, true>(products, g, tile, row, tile, 0, 0, BD);
    });
    scale_sums(g, scale_of(q) * scale_of(q));
}

// The tile of q(G) by such a walk, for kernels whose rows leave no registers for it. Where `to` is not null, G is stored
// there, (BK, BK).
template <class P, int BK, int BD>
NOINLINE void walk_polynomial(Mode mode, Polynomial q, Matrix<typename P::Element> b, float* to, unsigned char* gram,
                              unsigned char* memory, int stages) {
    float g[BK / 8][4];
    walk_gram<BD>(P{mode}, q, b, g, memory, stages);
    if (to != nullptr && 16 * warp() < BK) store_sums(to + 16 * warp() * BK, BK, 16, g);
    share_gram(mode, Tile<typename P::Element, BK, BK>{gram}, g);
    form_polynomial<P, BK>(mode, q, gram, memory);
}

}  // namespace interp_nn
