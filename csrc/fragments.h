// Products of tiles, one warp at a time: A (16 rows) times B (16 columns), over DEPTH at a time, spread over the lanes.
//
// A sum of 16 x 8 is four registers a lane. With g = lane / 4 and t = lane % 4, register i is row g + 8 (i / 2), column
// 2 t + i % 2. Every kind of product keeps its sums in this layout. In shared memory an operand may lie either way: A
// as [row][depth], or [depth][row] where TRANSPOSED; B as [depth][column], or [column][depth] where TRANSPOSED.
#pragma once

#include <type_traits>

#include "tiles.h"

namespace interp_nn {

// Properties of the operands that are known only when a kernel runs.
struct Mode {
    bool is_bf16;  // 16-bit numbers are bfloat16, not IEEE halves
    bool exact;    // fp32 numbers are multiplied exactly, not as tf32
};
inline Mode mode_of(Kind kind) { return {kind == Kind::BF16, kind == Kind::F32}; }

#if !defined(__CUDA_ARCH__)
constexpr bool HAS_MATRIX_UNITS = true, LACKS_MATRIX_UNITS = true;  // the host decides at run time
#else
constexpr bool HAS_MATRIX_UNITS = __CUDA_ARCH__ >= 800, LACKS_MATRIX_UNITS = !HAS_MATRIX_UNITS;
#endif

// Round v to tf32, nearly to nearest: the matrix units then cut the result off to a tf32 near v. Cutting off loses half
// a unit in the last place on average, and this adds a third to two thirds. It leaves tf32 numbers, infinities and NaNs
// as they are, and takes one instruction instead of the three or four of cvt.rna, which checks for infinities.
DEVICE float lift_tf32(float v) { return v * (1.f + 2.f / 3.f / 2048.f); }

// fp32 on the matrix units: as tf32, or EXACT, as the sum of two tf32 parts, without the product of the two smaller
// parts. Tiles may also hold 16-bit numbers, which are exact in tf32.
template <bool EXACT> struct FragmentsTF32 {
    using Element = float;
    static constexpr int DEPTH = 8;
    static constexpr int AHEAD = EXACT ? 1 : 2;  // steps of a loop over depth that are unrolled, of few columns
    struct A {
        uint32_t r[4], rest[4];
    };
    using B = A;
    Mode mode;

    template <class T> DEVICE void split(A& a, int i, T element) const {
        const float v = widen(element, mode.is_bf16);
        a.r[i] = bits_of(lift_tf32(v));
        if constexpr (EXACT) a.rest[i] = bits_of(lift_tf32(v - as_float(a.r[i] & TF32_BITS)));
    }

    template <bool TRANSPOSED, class Tile> DEVICE void load_a(A& a, const Tile& tile, int row, int depth) const {
        const int g = lane() / 4, t = lane() % 4;
        UNROLL for (int i = 0; i < 4; ++i) {
            const int r = row + g + i % 2 * 8, z = depth + t + i / 2 * 4;
            split(a, i, TRANSPOSED ? *tile.at(z, r) : *tile.at(r, z));
        }
    }

    template <bool TRANSPOSED, class Tile> DEVICE void load_b(B& b, const Tile& tile, int depth, int column) const {
        const int g = lane() / 4, t = lane() % 4;
        UNROLL for (int i = 0; i < 4; ++i) {
            const int z = depth + t + i % 2 * 4, c = column + g + i / 2 * 8;
            split(b, i, TRANSPOSED ? *tile.at(c, z) : *tile.at(z, c));
        }
    }

    DEVICE void multiply(float (&left)[4], float (&right)[4], const A& a, const B& b) const {
        if constexpr (EXACT) {
            // The matrix units cut off their sums instead of rounding, and the errors add up: so they add up one step
            // only.
            float step[2][4] = {};
            multiply_tf32(step[0], a.rest, b.r);
            multiply_tf32(step[1], a.rest, b.r + 2);
            multiply_tf32(step[0], a.r, b.rest);
            multiply_tf32(step[1], a.r, b.rest + 2);
            multiply_tf32(step[0], a.r, b.r);
            multiply_tf32(step[1], a.r, b.r + 2);
            UNROLL for (int i = 0; i < 4; ++i) {
                left[i] += step[0][i];
                right[i] += step[1][i];
            }
        } else {
            multiply_tf32(left, a.r, b.r);
            multiply_tf32(right, a.r, b.r + 2);
        }
    }
};

// 16-bit operands on the matrix units.
template <bool IS_BF16> struct Fragments16 {
    using Element = Half;
    static constexpr int DEPTH = 16;
    static constexpr int AHEAD = 2;
    struct A {
        uint32_t r[4];
    };
    using B = A;

    template <bool TRANSPOSED, class Tile> DEVICE void load_a(A& a, const Tile& tile, int row, int depth) const {
        const int l = lane();
        if constexpr (TRANSPOSED) {
            load_matrices<true>(a.r, tile.chunk(depth + (l & 7) + (l >> 4 << 3), row / 8 + (l >> 3 & 1)));
        } else {
            load_matrices<false>(a.r, tile.chunk(row + (l & 15), depth / 8 + (l >> 4)));
        }
    }

    template <bool TRANSPOSED, class Tile> DEVICE void load_b(B& b, const Tile& tile, int depth, int column) const {
        const int l = lane();
        if constexpr (TRANSPOSED) {
            load_matrices<false>(b.r, tile.chunk(column + (l & 7) + (l >> 4 << 3), depth / 8 + (l >> 3 & 1)));
        } else {
            load_matrices<true>(b.r, tile.chunk(depth + (l & 15), column / 8 + (l >> 4)));
        }
    }

    DEVICE void multiply(float (&left)[4], float (&right)[4], const A& a, const B& b) const {
        multiply_16<IS_BF16>(left, a.r, b.r);
        multiply_16<IS_BF16>(right, a.r, b.r + 2);
    }
};

// fp32 numbers on the ordinary units, on any GPU: a lane has its two rows of A and its four columns of B.
struct FragmentsF32 {
    using Element = float;
    static constexpr int DEPTH = 4;
    static constexpr int AHEAD = 1;
    struct A {
        Four r[2];
    };
    struct B {
        float r[2][DEPTH][2];
    };

    template <bool TRANSPOSED, class Tile> DEVICE void load_a(A& a, const Tile& tile, int row, int depth) const {
        const int g = lane() / 4;
        UNROLL for (int i = 0; i < 2; ++i) {
            if constexpr (TRANSPOSED) {
                UNROLL for (int j = 0; j < DEPTH; ++j) a.r[i].v[j] = *tile.at(depth + j, row + g + 8 * i);
            } else {
                a.r[i] = *reinterpret_cast<const Four*>(tile.at(row + g + 8 * i, depth));
            }
        }
    }

    template <bool TRANSPOSED, class Tile> DEVICE void load_b(B& b, const Tile& tile, int depth, int column) const {
        const int t = lane() % 4;
        UNROLL for (int i = 0; i < 2; ++i) {
            if constexpr (TRANSPOSED) {
                UNROLL for (int h = 0; h < 2; ++h) {
                    const Four four = *reinterpret_cast<const Four*>(tile.at(column + 8 * i + 2 * t + h, depth));
                    UNROLL for (int j = 0; j < DEPTH; ++j) b.r[i][j][h] = four.v[j];
                }
            } else {
                UNROLL for (int j = 0; j < DEPTH; ++j) {
                    const Two two = *reinterpret_cast<const Two*>(tile.at(depth + j, column + 8 * i + 2 * t));
                    UNROLL for (int h = 0; h < 2; ++h) b.r[i][j][h] = two.v[h];
                }
            }
        }
    }

    DEVICE void multiply(float (&left)[4], float (&right)[4], const A& a, const B& b) const {
        UNROLL for (int j = 0; j < DEPTH; ++j) {
            UNROLL for (int i = 0; i < 4; ++i) {
                left[i] += a.r[i / 2].v[j] * b.r[0][j][i % 2];
                right[i] += a.r[i / 2].v[j] * b.r[1][j][i % 2];
            }
        }
    }
};

// The three families that kernels are compiled for, `available` where the GPU has their instructions. visit(visitor)
// calls visitor(fragments) with the fragments of the mode, so that the choice is made once a loop, not once a product.
struct ProductsTF32 {
    using Element = float;
    using ForSums = ProductsTF32;
    static constexpr bool available = HAS_MATRIX_UNITS;
    Mode mode;

    template <class Visitor> DEVICE void visit(Visitor visitor) const {
        if (mode.exact) {
            visitor(FragmentsTF32<true>{mode});
        } else {
            visitor(FragmentsTF32<false>{mode});
        }
    }
    DEVICE ForSums for_sums() const { return *this; }
};
// The sums of 16-bit products, which are never exact: a family of its own, so that only its code is compiled.
struct ProductsOfSums16 {
    using Element = float;
    Mode mode;

    template <class Visitor> DEVICE void visit(Visitor visitor) const { visitor(FragmentsTF32<false>{mode}); }
};
struct Products16 {
    using Element = Half;
    using ForSums = ProductsOfSums16;
    static constexpr bool available = HAS_MATRIX_UNITS;
    Mode mode;

    template <class Visitor> DEVICE void visit(Visitor visitor) const {
        if (mode.is_bf16) {
            visitor(Fragments16<true>{});
        } else {
            visitor(Fragments16<false>{});
        }
    }
    DEVICE ForSums for_sums() const { return {mode}; }
};
struct ProductsF32 {
    using Element = float;
    using ForSums = ProductsF32;
    static constexpr bool available = LACKS_MATRIX_UNITS;
    Mode mode;

    template <class Visitor> DEVICE void visit(Visitor visitor) const { visitor(FragmentsF32{}); }
    DEVICE ForSums for_sums() const { return *this; }
};

template <class P> constexpr bool IS_WIDE = sizeof(typename P::Element) == 4;

// A product of ROWS by COLUMNS cut into one piece a warp: 16 rows each, and then columns. Some warps may stay inactive.
template <int ROWS, int COLUMNS> struct Pieces {
    static constexpr int DOWN = ROWS / 16;
    static_assert(DOWN >= 1 && DOWN <= WARPS, "at most sixteen rows a warp");
    static constexpr int ACROSS = WARPS / DOWN < COLUMNS / 16 ? WARPS / DOWN : COLUMNS / 16;
    static constexpr int WIDE = COLUMNS / ACROSS;
    static constexpr int TILES = WIDE / 8;

    DEVICE static bool warp_active() { return warp() < DOWN * ACROSS; }
    DEVICE static int row() { return warp() / ACROSS * 16; }
    DEVICE static int column() { return warp() % ACROSS * WIDE; }
};

template <int TILES> DEVICE void clear(float (&sums)[TILES][4]) {
    UNROLL for (int i = 0; i < TILES; ++i) {
        UNROLL for (int j = 0; j < 4; ++j) sums[i][j] = 0.f;
    }
}

template <int TILES> DEVICE void scale_sums(float (&sums)[TILES][4], float scale) {
    UNROLL for (int i = 0; i < TILES; ++i) {
        UNROLL for (int j = 0; j < 4; ++j) sums[i][j] *= scale;
    }
}

// Steps of a loop over depth that are unrolled, so that products hide the next step's loads. Sixteen tiles have enough
// products in one step, and no registers to spare.
template <class Fragments, int TILES> constexpr int UNROLLED = TILES < 16 ? Fragments::AHEAD : 1;

// sums += A[row : row + 16, from : to] B[from : to, column :]; `from` and `to` are depths in both tiles.
template <bool A_TRANSPOSED, bool B_TRANSPOSED, class P, int TILES, class TileA, class TileB>
DEVICE void multiply_tiles(const P& products, float (&sums)[TILES][4], const TileA& a_tile, int row, const TileB& b_tile,
                           int column, int from, int to) {
    const auto loop = [&](const auto& fragments) {
        using Fragments = std::decay_t<decltype(fragments)>;
        UNROLL_BY((UNROLLED<Fragments, TILES>)) for (int depth = from; depth < to; depth += Fragments::DEPTH) {
            typename Fragments::A a;
            fragments.template load_a<A_TRANSPOSED>(a, a_tile, row, depth);
            UNROLL for (int i = 0; i < TILES; i += 2) {
                typename Fragments::B b;
                fragments.template load_b<B_TRANSPOSED>(b, b_tile, depth, column + 8 * i);
                fragments.multiply(sums[i], sums[i + 1], a, b);
                if constexpr (IS_WIDE<Fragments>) in_order();
            }
        }
    };
    products.visit(loop);
}

// Visit the pairs of neighbours in a warp's sums: visit(row, column, first, second), relative to the sums' corner.
template <int TILES, class Visit> DEVICE void each_pair(float (&sums)[TILES][4], Visit visit) {
    const int g = lane() / 4, t = lane() % 4;
    UNROLL for (int i = 0; i < TILES; ++i) {
        UNROLL for (int h = 0; h < 2; ++h) visit(g + 8 * h, 8 * i + 2 * t, sums[i][2 * h], sums[i][2 * h + 1]);
    }
}

// Store the sums of a warp into a tile from (row, column) on, rounded to its type. Further products and stores of whole
// rows read them there.
template <int TILES, class Tile>
DEVICE void put_sums(const Mode& mode, const Tile& tile, int row, int column, float (&sums)[TILES][4]) {
    each_pair(sums, [&](int r, int c, float first, float second) {
        auto* const to = tile.at(row + r, column + c);
        if constexpr (sizeof(typename Tile::Element) == 2) {
            *reinterpret_cast<uint32_t*>(to) = pack(first, second, mode.is_bf16);
        } else {
            *reinterpret_cast<Two*>(to) = {{first, second}};
        }
    });
}

// Load what put_sums has stored.
template <int TILES, class Tile>
DEVICE void take_sums(const Mode& mode, const Tile& tile, int row, int column, float (&sums)[TILES][4]) {
    const int g = lane() / 4, t = lane() % 4;
    UNROLL for (int i = 0; i < TILES; ++i) {
        UNROLL for (int j = 0; j < 4; ++j) {
            sums[i][j] = widen(*tile.at(row + g + j / 2 * 8, column + 8 * i + 2 * t + j % 2), mode.is_bf16);
        }
    }
}

// Store the sums of a warp into a row-major matrix of fp32 in global memory, `rows` rows at most.
template <int TILES> DEVICE void store_sums(float* to, int64_t pitch, int rows, float (&sums)[TILES][4]) {
    each_pair(sums, [&](int r, int c, float first, float second) {
        if (r < rows) *reinterpret_cast<Two*>(to + r * pitch + c) = {{first, second}};
    });
}

// Add what store_sums has stored.
template <int TILES> DEVICE void add_sums(const float* from, int64_t pitch, float (&sums)[TILES][4]) {
    const int g = lane() / 4, t = lane() % 4;
    UNROLL for (int i = 0; i < TILES; ++i) {
        UNROLL for (int j = 0; j < 4; ++j) sums[i][j] += from[(g + j / 2 * 8) * pitch + 8 * i + 2 * t + j % 2];
    }
}

}  // namespace interp_nn
