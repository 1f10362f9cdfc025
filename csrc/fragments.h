// Products of tiles, one warp at a time: A (16 rows) times B (16 columns), over DEPTH at a time, spread over the lanes.
//
// A sum of 16 x 8 is four registers a lane. With g = lane / 4 and t = lane % 4, register i is row g + 8 (i / 2),
// column 2 t + i % 2. Every kind of product keeps sums in this form, so that whoever stores or reuses them needs to
// know only it. In shared memory an operand may lie either way: A as [row][depth], or [depth][row] where TRANSPOSED;
// B as [depth][column], or [column][depth] where TRANSPOSED.
#pragma once

#include "tiles.h"

namespace interp_nn {

// 16-bit operands on the matrix units.
template <class T> struct Products16 {
    using Element = T;
    static constexpr int DEPTH = 16;
    static constexpr int AHEAD = 4;  // steps of a loop over depth that are unrolled
    struct A {
        uint32_t r[4];
    };
    struct B {
        uint32_t r[4];
    };

    template <bool TRANSPOSED, class Tile> DEVICE static void load_a(A& a, const Tile& tile, int row, int depth) {
        const int l = lane();
        if constexpr (TRANSPOSED) {
            load_matrices<true>(a.r, tile.chunk(depth + (l & 7) + (l >> 4 << 3), row / 8 + (l >> 3 & 1)));
        } else {
            load_matrices<false>(a.r, tile.chunk(row + (l & 15), depth / 8 + (l >> 4)));
        }
    }

    template <bool TRANSPOSED, class Tile> DEVICE static void load_b(B& b, const Tile& tile, int depth, int column) {
        const int l = lane();
        if constexpr (TRANSPOSED) {
            load_matrices<false>(b.r, tile.chunk(column + (l & 7) + (l >> 4 << 3), depth / 8 + (l >> 3 & 1)));
        } else {
            load_matrices<true>(b.r, tile.chunk(depth + (l & 15), column / 8 + (l >> 4)));
        }
    }

    // An A made of sums, rounded: two neighbouring sums of 8 columns are a depth of 16.
    template <int TILES> DEVICE static void from_sums(A& a, const float (&sums)[TILES][4], int depth) {
        const float(&left)[4] = sums[depth / 8];
        const float(&right)[4] = sums[depth / 8 + 1];
        a.r[0] = pack<T>(left[0], left[1]);
        a.r[1] = pack<T>(left[2], left[3]);
        a.r[2] = pack<T>(right[0], right[1]);
        a.r[3] = pack<T>(right[2], right[3]);
    }
    // The B that goes with it.
    template <bool TRANSPOSED, class Tile> DEVICE static void load_b_for_sums(B& b, const Tile& tile, int depth, int column) {
        load_b<TRANSPOSED>(b, tile, depth, column);
    }

    DEVICE static void multiply(float (&left)[4], float (&right)[4], const A& a, const B& b) {
        interp_nn::multiply<T>(left, a.r, b.r);
        interp_nn::multiply<T>(right, a.r, b.r + 2);
    }
};

// fp32 rounded to tf32 on the matrix units. Tiles may hold any type: 16-bit numbers are exact in tf32 (fp16, bf16).
struct ProductsTF32 {
    using Element = float;
    static constexpr int DEPTH = 8;
    static constexpr int AHEAD = 2;
    struct A {
        uint32_t r[4];
    };
    struct B {
        uint32_t r[4];
    };

    template <bool TRANSPOSED, class Tile> DEVICE static uint32_t operand(const Tile& tile, int row, int column) {
        return round_tf32(to_float(TRANSPOSED ? *tile.at(column, row) : *tile.at(row, column)));
    }

    template <bool TRANSPOSED, class Tile> DEVICE static void load_a(A& a, const Tile& tile, int row, int depth) {
        const int g = lane() / 4, t = lane() % 4;
        UNROLL for (int i = 0; i < 4; ++i) a.r[i] = operand<TRANSPOSED>(tile, row + g + i % 2 * 8, depth + t + i / 2 * 4);
    }

    template <bool TRANSPOSED, class Tile> DEVICE static void load_b(B& b, const Tile& tile, int depth, int column) {
        const int g = lane() / 4, t = lane() % 4;
        UNROLL for (int i = 0; i < 4; ++i) b.r[i] = operand<TRANSPOSED>(tile, depth + t + i % 2 * 4, column + g + i / 2 * 8);
    }

    // A lane has columns 2 t and 2 t + 1 of the sums where an A wants t and t + 4: the depth is walked in another
    // order.
    template <int TILES> DEVICE static void from_sums(A& a, const float (&sums)[TILES][4], int depth) {
        const float(&sum)[4] = sums[depth / 8];
        UNROLL for (int i = 0; i < 4; ++i) a.r[i] = round_tf32(sum[i % 2 * 2 + i / 2]);
    }
    template <bool TRANSPOSED, class Tile> DEVICE static void load_b_for_sums(B& b, const Tile& tile, int depth, int column) {
        const int g = lane() / 4, t = lane() % 4;
        UNROLL for (int i = 0; i < 4; ++i) b.r[i] = operand<TRANSPOSED>(tile, depth + 2 * t + i % 2, column + g + i / 2 * 8);
    }

    DEVICE static void multiply(float (&left)[4], float (&right)[4], const A& a, const B& b) {
        interp_nn::multiply<float>(left, a.r, b.r);
        interp_nn::multiply<float>(right, a.r, b.r + 2);
    }
};

// Exact products of fp32 numbers on the ordinary units, on any GPU: a lane has its two rows of A and its four columns
// of B.
struct ProductsF32 {
    using Element = float;
    static constexpr int DEPTH = 4;
    static constexpr int AHEAD = 1;
    struct A {
        float r[2][DEPTH];
    };
    struct B {
        float r[2][DEPTH][2];
    };

    template <bool TRANSPOSED, class Tile> DEVICE static float operand(const Tile& tile, int row, int column) {
        return to_float(TRANSPOSED ? *tile.at(column, row) : *tile.at(row, column));
    }

    template <bool TRANSPOSED, class Tile> DEVICE static void load_a(A& a, const Tile& tile, int row, int depth) {
        const int g = lane() / 4;
        UNROLL for (int i = 0; i < 2; ++i) {
            UNROLL for (int j = 0; j < DEPTH; ++j) a.r[i][j] = operand<TRANSPOSED>(tile, row + g + 8 * i, depth + j);
        }
    }

    template <bool TRANSPOSED, class Tile> DEVICE static void load_b(B& b, const Tile& tile, int depth, int column) {
        const int t = lane() % 4;
        UNROLL for (int i = 0; i < 2; ++i) {
            UNROLL for (int j = 0; j < DEPTH; ++j) {
                UNROLL for (int h = 0; h < 2; ++h) {
                    b.r[i][j][h] = operand<TRANSPOSED>(tile, depth + j, column + 8 * i + 2 * t + h);
                }
            }
        }
    }

    // Each lane of a row's four has two of eight columns; all need all of them.
    template <int TILES> DEVICE static void from_sums(A& a, const float (&sums)[TILES][4], int depth) {
        const float(&sum)[4] = sums[depth / 8];
        UNROLL for (int i = 0; i < 2; ++i) {
            UNROLL for (int j = 0; j < DEPTH; ++j) {
                a.r[i][j] = shuffle(sum[2 * i + j % 2], lane() / 4 * 4 + (depth % 8 + j) / 2);
            }
        }
    }
    template <bool TRANSPOSED, class Tile> DEVICE static void load_b_for_sums(B& b, const Tile& tile, int depth, int column) {
        load_b<TRANSPOSED>(b, tile, depth, column);
    }

    DEVICE static void multiply(float (&left)[4], float (&right)[4], const A& a, const B& b) {
        UNROLL for (int j = 0; j < DEPTH; ++j) {
            UNROLL for (int i = 0; i < 4; ++i) {
                left[i] += a.r[i / 2][j] * b.r[0][j][i % 2];
                right[i] += a.r[i / 2][j] * b.r[1][j][i % 2];
            }
        }
    }
};

template <Kind> struct ProductsOf;
template <> struct ProductsOf<Kind::F16> {
    using type = Products16<half>;
};
template <> struct ProductsOf<Kind::BF16> {
    using type = Products16<bfloat16>;
};
template <> struct ProductsOf<Kind::TF32> {
    using type = ProductsTF32;
};
template <> struct ProductsOf<Kind::F32> {
    using type = ProductsF32;
};
template <Kind KIND> using Products = typename ProductsOf<KIND>::type;

// How fp32 sums are multiplied further: exactly if the operands are, else as tf32.
template <Kind KIND> struct SumProductsOf {
    using type = ProductsTF32;
};
template <> struct SumProductsOf<Kind::F32> {
    using type = ProductsF32;
};
template <Kind KIND> using SumProducts = typename SumProductsOf<KIND>::type;

template <int TILES> DEVICE void clear(float (&sums)[TILES][4]) {
    UNROLL for (int i = 0; i < TILES; ++i) {
        UNROLL for (int j = 0; j < 4; ++j) sums[i][j] = 0.f;
    }
}

// sums += A[row : row + 16, from : to] B[from : to, column :], where the depths `from` and `to` are those of both
// tiles.
template <class Products, bool A_TRANSPOSED, bool B_TRANSPOSED, int TILES, class TileA, class TileB>
DEVICE void multiply_tiles(float (&sums)[TILES][4], const TileA& a_tile, int row, const TileB& b_tile, int column, int from,
                           int to) {
    UNROLL_BY(Products::AHEAD) for (int depth = from; depth < to; depth += Products::DEPTH) {
        typename Products::A a;
        Products::template load_a<A_TRANSPOSED>(a, a_tile, row, depth);
        UNROLL for (int i = 0; i < TILES; i += 2) {
            typename Products::B b;
            Products::template load_b<B_TRANSPOSED>(b, b_tile, depth, column + 8 * i);
            Products::multiply(sums[i], sums[i + 1], a, b);
            if constexpr (sizeof(typename Products::Element) == 4) in_order();
        }
    }
}

// sums += left B[:, column :], where `left` are sums of the same rows, rounded to what the products take.
template <class Products, bool B_TRANSPOSED, int DEPTH_TILES, int TILES, class TileB>
DEVICE void multiply_sums(float (&sums)[TILES][4], const float (&left)[DEPTH_TILES][4], const TileB& b_tile, int column) {
    UNROLL for (int depth = 0; depth < 8 * DEPTH_TILES; depth += Products::DEPTH) {
        typename Products::A a;
        Products::from_sums(a, left, depth);
        UNROLL for (int i = 0; i < TILES; i += 2) {
            typename Products::B b;
            Products::template load_b_for_sums<B_TRANSPOSED>(b, b_tile, depth, column + 8 * i);
            Products::multiply(sums[i], sums[i + 1], a, b);
            if constexpr (sizeof(typename Products::Element) == 4) in_order();
        }
    }
}

// Visit the pairs of neighbours in a warp's sums: visit(row, column, first, second), relative to the sums' corner.
template <int TILES, class Visit> DEVICE void each_pair(float (&sums)[TILES][4], Visit visit) {
    const int g = lane() / 4, t = lane() % 4;
    UNROLL for (int i = 0; i < TILES; ++i) {
        UNROLL for (int h = 0; h < 2; ++h) visit(g + 8 * h, 8 * i + 2 * t, sums[i][2 * h], sums[i][2 * h + 1]);
    }
}

}  // namespace interp_nn
