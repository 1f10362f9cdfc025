// The streaming forward: Y = (X b) G + bias, and P and G where asked, for up to 128 columns.
#pragma once

#include "dispatch.h"
#include "fragments.h"

namespace interp_nn {

// Sixteen rows a warp; features at a time as many as two kinds of tiles and G leave room for on every GPU from 8.0 on.
template <Kind KIND, int BK, bool B_T> struct ForwardTiles {
    using T = typename Products<KIND>::Element;
    static constexpr int BN = 16 * WARPS;
    static constexpr int BD = sizeof(T) == 2 ? 64 : BK == 128 ? 16 : 32;
    static constexpr bool TOGETHER = sizeof(T) == 2 || BK < 128;  // fp32 operands leave no registers for two wide sums
    static constexpr int ACROSS = sizeof(T) == 2 && BK >= 32 ? 32 : 16;          // columns of Y at a time
    using X = Tile<T, BN, BD>;
    using B = typename TileOfB<T, BD, BK, B_T>::type;
    using G = Tile<T, BK, BK>;
    static constexpr int STAGE = X::BYTES + B::BYTES;
    static constexpr size_t shared(int stages) { return G::BYTES + static_cast<size_t>(stages) * STAGE; }
};

// p = X[row :] b for the 16 rows of each warp where PROJECT; g = bᵀb, 16 of its rows in each warp that has some,
// where GRAM, from the same tiles of b. Copies run stages - 1 tiles ahead.
template <Kind KIND, int BK, bool B_T, bool PROJECT, bool GRAM, class T>
DEVICE void project(float (&p)[BK / 8][4], float (&g)[BK / 8][4], const Matrix<T>& x, const Matrix<T>& b, int64_t row, int d,
                    unsigned char* memory, int stages) {
    using Tiles = ForwardTiles<KIND, BK, B_T>;
    using P = Products<KIND>;
    const int steps = (d + Tiles::BD - 1) / Tiles::BD;
    const bool has_rows = left(x.rows, row) > 16 * warp();
    const bool has_gram = GRAM && 16 * warp() < BK;
    const auto tile_x = [&](int stage) { return typename Tiles::X{memory + stage * Tiles::STAGE}; };
    const auto tile_b = [&](int stage) { return typename Tiles::B{memory + stage * Tiles::STAGE + Tiles::X::BYTES}; };
    const auto load = [&](int step, int stage) {
        if constexpr (PROJECT) load_tile(tile_x(stage), x, row, step * Tiles::BD);
        load_b<B_T>(tile_b(stage), b, step * Tiles::BD);
    };
    if constexpr (PROJECT) clear(p);
    if constexpr (GRAM) clear(g);
    pipeline(steps, stages, load, [&](int, int stage) {
        UNROLL_BY(P::AHEAD) for (int depth = 0; depth < Tiles::BD; depth += P::DEPTH) {
            typename P::A of_x, of_b;
            if constexpr (PROJECT) P::template load_a<false>(of_x, tile_x(stage), 16 * warp(), depth);
            if (has_gram) P::template load_a<!B_T>(of_b, tile_b(stage), 16 * warp(), depth);
            UNROLL for (int i = 0; i < BK / 8; i += 2) {
                typename P::B right;
                P::template load_b<B_T>(right, tile_b(stage), depth, 8 * i);
                if constexpr (PROJECT) {
                    if (has_rows) P::multiply(p[i], p[i + 1], of_x, right);
                }
                if constexpr (GRAM) {
                    if (has_gram) P::multiply(g[i], g[i + 1], of_b, right);
                }
                if constexpr (sizeof(T) == 4) in_order();
            }
        }
    });
}

// Each program walks over its row tiles. The first also gives it G, from the tiles of b that X is multiplied with:
// recomputing G in every program costs about what a barrier would, and needs none.
template <Kind KIND, int BK, bool B_T> KERNEL forward_kernel(Forward arguments, int stages) {
    using Tiles = ForwardTiles<KIND, BK, B_T>;
    using T = typename Tiles::T;
    const int64_t n = arguments.n;
    const int d = arguments.d, k = arguments.k;
    const Matrix<T> x = matrix<T>(arguments.x, n, d), b = matrix_b<T, B_T>(arguments.b, d, k);
    unsigned char* const stages_memory = shared_memory() + Tiles::G::BYTES;
    const typename Tiles::G gram{shared_memory()};
    auto* const out_p = static_cast<T*>(arguments.p);
    auto* const out_y = static_cast<T*>(arguments.y);
    const auto* const bias = static_cast<const T*>(arguments.bias);
    const bool pairs = paired<T>(out_y, k) && paired<T>(out_p, k);
    const int64_t step = static_cast<int64_t>(programs()) * Tiles::BN;

    const auto emit = [&](float(&p)[BK / 8][4], int64_t row) {
        const int rows = left(n, row + 16 * warp());
        if (rows == 0) return;
        T* const at_y = out_y + (row + 16 * warp()) * k;
        if (out_p != nullptr) {
            T* const at_p = out_p + (row + 16 * warp()) * k;
            each_pair(p, [&](int r, int c, float first, float second) {
                if (r < rows) store_two(at_p + r * k, c, k, first, second, pairs);
            });
        }
        NO_UNROLL for (int column = 0; column < BK; column += Tiles::ACROSS) {
            float y[Tiles::ACROSS / 8][4];
            clear(y);
            multiply_sums<Products<KIND>, true>(y, p, gram, column);  // G is its own transpose
            each_pair(y, [&](int r, int c, float first, float second) {
                c += column;
                if (bias != nullptr) {
                    first += c < k ? to_float(bias[c]) : 0.f;
                    second += c + 1 < k ? to_float(bias[c + 1]) : 0.f;
                }
                if (r < rows) store_two(at_y + r * k, c, k, first, second, pairs);
            });
        }
    };

    int64_t row = static_cast<int64_t>(program()) * Tiles::BN;
    float p[BK / 8][4];
    {
        float g[BK / 8][4];
        if constexpr (Tiles::TOGETHER) {
            project<KIND, BK, B_T, true, true>(p, g, x, b, row, d, stages_memory, stages);
        } else {
            project<KIND, BK, B_T, false, true>(p, g, x, b, row, d, stages_memory, stages);
        }
        if (16 * warp() < BK) {
            each_pair(g, [&](int r, int c, float first, float second) {
                r += 16 * warp();
                store_two(gram.at(r, c), 0, 2, first, second, true);
                if (arguments.g != nullptr && program() == 0 && r < k) {
                    store_two(static_cast<T*>(arguments.g) + r * k, c, k, first, second, false);
                }
            });
        }
        block_barrier();  // G is whole
    }
    if constexpr (Tiles::TOGETHER) {
        emit(p, row);
        row += step;
    }
    NO_UNROLL for (; row < n; row += step) {
        project<KIND, BK, B_T, true, false>(p, p, x, b, row, d, stages_memory, stages);
        emit(p, row);
    }
}

template <Kind KIND, int BK, bool B_T> struct ForwardInstance {
    static const char* call(const Forward& arguments, const Chip& chip, Stream stream) {
        using Tiles = ForwardTiles<KIND, BK, B_T>;
        const int stages = stages_for(chip, 2, 4, Tiles::shared);
        if (stages == 0) return TOO_LITTLE_SHARED;
        const int blocks = programs_for(chip, divide_up(arguments.n, Tiles::BN));
        return start(forward_kernel<KIND, BK, B_T>, blocks, Tiles::shared(stages), false, stream, arguments, stages);
    }
};

}  // namespace interp_nn
