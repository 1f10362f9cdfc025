// P = X b and G = bᵀb for a tile of rows, for every kernel that forms them.
#pragma once

#include "fragments.h"

namespace interp_nn {

// bᵀ: k rows of d features, for b (d, k) with any strides. Contiguous rows, as a layer's weight has, are copied in
// words; others are gathered.
template <class T, class Arguments> DEVICE Matrix<T> matrix_b(const Arguments& arguments) {
    return strided_matrix<T>(arguments.b, arguments.k, arguments.d, arguments.b_column, arguments.b_feature);
}

// Sixteen rows a warp, BD features a step.
template <class P, int BK, int BD_> struct ProjectionTiles {
    using T = typename P::Element;
    static constexpr int BN = 16 * WARPS;
    static constexpr int BD = BD_;
    using X = Tile<T, BN, BD>;
    using B = Tile<T, BK, BD>;
    using G = Tile<T, BK, BK>;
    using Own = Tile<T, BN, BK>;  // P's rows, or others as wide
    static constexpr int STAGE = X::BYTES + B::BYTES;
};

// p = X[row :] b for the 16 rows of each warp, and where `gram` also g = bᵀb from the same tiles of b, 16 of its rows
// in each of the first warps. Copies run stages - 1 tiles ahead.
template <class Tiles, class P, int TILES, class T>
DEVICE void project(const P& products, float (&p)[TILES][4], float (&g)[TILES][4], bool gram, const Matrix<T>& x,
                    const Matrix<T>& b, int64_t row, unsigned char* memory, int stages) {
    const int d = x.columns, steps = (d + Tiles::BD - 1) / Tiles::BD;
    const bool has_gram = gram && 16 * warp() < 8 * TILES;
    const auto tile_x = [&](int stage) { return typename Tiles::X{memory + stage * Tiles::STAGE}; };
    const auto tile_b = [&](int stage) { return typename Tiles::B{memory + stage * Tiles::STAGE + Tiles::X::BYTES}; };
    const auto load = [&](int step, int stage) {
        load_tile(tile_x(stage), x, row, step * Tiles::BD);
        load_tile(tile_b(stage), b, 0, step * Tiles::BD);
    };
    clear(p);
    clear(g);
    pipeline(steps, stages, load, [&](int, int stage) {
        products.visit([&](const auto& fragments) {
        const auto loop = [&](auto with_gram) {
                using Fragments = std::decay_t<decltype(fragments)>;
    UNROLL_BY((UNROLLED<Fragments, TILES>)) for (int depth = 0; depth < Tiles::BD; depth += Fragments::DEPTH) {
                    typename Fragments::A of_x, of_b;
                    fragments.template load_a<false>(of_x, tile_x(stage), 16 * warp(), depth);
                    if constexpr (decltype(with_gram)::value) fragments.template load_a<false>(of_b, tile_b(stage), 16 * warp(), depth);
                    UNROLL for (int i = 0; i < TILES; i += 2) {
                        typename Fragments::B right;
                        fragments.template load_b<true>(right, tile_b(stage), depth, 8 * i);
                        fragments.multiply(p[i], p[i + 1], of_x, right);
                        if constexpr (decltype(with_gram)::value) fragments.multiply(g[i], g[i + 1], of_b, right);
                        if constexpr (IS_WIDE<P>) in_order();
                    }
                }
            };
            if (has_gram) {
                loop(std::true_type{});
            } else {
                loop(std::false_type{});
            }
        });
    });
}

// Each row of sums += row.
template <int TILES> DEVICE void add_row(float (&sums)[TILES][4], const float* row) {
    UNROLL for (int i = 0; i < TILES; ++i) {
        const Two two = *reinterpret_cast<const Two*>(row + 8 * i + lane() % 4 * 2);
        UNROLL for (int j = 0; j < 4; ++j) sums[i][j] += two.v[j % 2];
    }
}

// Store G's tile from the sums of each warp, and wait until it is whole.
template <int TILES, class G> DEVICE void share_gram(const Mode& mode, const G& gram, float (&g)[TILES][4]) {
    if (16 * warp() < 8 * TILES) put_sums(mode, gram, 16 * warp(), 0, g);
    block_barrier();  // G is whole
}

// Load a vector of `size` elements as fp32 into shared memory, with zeros after it and in place of a null one. Readers
// need a barrier first.
template <class T> DEVICE void load_row(const Mode& mode, float* row, int length, const void* data, int size) {
    for (int i = thread(); i < length; i += THREADS) {
        row[i] = data != nullptr && i < size ? widen(static_cast<const T*>(data)[i], mode.is_bf16) : 0.f;
    }
}

}  // namespace interp_nn
