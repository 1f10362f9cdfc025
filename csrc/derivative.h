// M, the derivative of q at G along S = T + Tᵀ, and the gradients of q's coefficients, <T, Gⁱ> = <S, Gⁱ> / 2.
//
// Horner's rule with its derivative: R = cn I and N = 0, then N = N G + R S and R = R G + ci I from i = n - 1 down to
// 0; at the end N is M. Rows of R and N need no other rows of them, so each program takes sixteen, and none waits for
// another. The products are exact, since there are few of them.
#pragma once

#include "phased_launch.h"
#include "polynomial.h"

namespace interp_nn {

// M or the gradients of the coefficients need a step of their own: with degree 1, M is c1 S.
HOST_DEVICE bool need_derivative(const Gradients& arguments) {
    if (arguments.q.coefficients == nullptr) return false;
    return arguments.dcoefficients != nullptr || (arguments.db != nullptr && arguments.q.degree > 1);
}

// T is needed for db and for the gradients of the coefficients.
HOST_DEVICE bool need_t(const Gradients& arguments) {
    return arguments.db != nullptr || arguments.dcoefficients != nullptr;
}

// The end of a workspace, so that no register has to remember where it is.
//     floats: g (BK, BK)                                    G
//             m (BK, BK)                                    M
//             dots (MOST_COEFFICIENTS, BK / SLICE, WARPS)   parts of <S, Gⁱ> / 2
template <int BK> struct DerivativeWork {
    static constexpr int PARTS = BK / SLICE * WARPS;
    float* g;

    DEVICE float* m() const { return g + BK * BK; }
    DEVICE float* dots() const { return g + 2 * BK * BK; }
    HOST_DEVICE static int size(const Gradients& arguments) {
        return need_derivative(arguments) ? 2 * BK * BK + MOST_COEFFICIENTS * PARTS : 0;
    }
    static constexpr size_t SHARED = SliceTiles<BK>::SHARED + SliceTiles<BK>::Slice::BYTES;
};

// A square of fp32 in global or shared memory, so that products with both are the same code.
template <int BK> struct EitherSquare {
    using Element = float;
    const float* rows;  // in global memory, or null
    typename SliceTiles<BK>::Square tile;

    DEVICE const float* at(int row, int column) const {
        return rows != nullptr ? rows + row * BK + column : tile.at(row, column);
    }
};

// Copy G, as forward stored it, to the workspace. A grid barrier must come before its reads.
template <int BK, class T>
DEVICE void widen_gram(const Mode& mode, const Gradients& arguments, const void* g, float* to) {
    if (!need_derivative(arguments)) return;
    const int k = arguments.k;
    NO_UNROLL for (int i = program() * THREADS + thread(); i < BK * BK; i += programs() * THREADS) {
        const int row = i / BK, column = i % BK;
        to[i] = row < k && column < k ? widen(static_cast<const T*>(g)[row * k + column], mode.is_bf16) : 0.f;
    }
}

// The first feature or row of a program's slices where the last programs, which have the least else to do, begin.
DEVICE int first_slice_from_last() { return SLICE * (programs() - 1 - program()); }

// For this program's rows, with S in tiles.square and a second slice behind the first: rows of M, and where need_dots
// parts of the dots.
template <int BK> NOINLINE void derive_rows(const float* coefficients, int degree, SliceTiles<BK> tiles,
                                            DerivativeWork<BK> work, bool need_dots) {
    using Slice = typename SliceTiles<BK>::Slice;
    const Slice r = tiles.slice, n{tiles.slice.base + Slice::BYTES};
    const int from = 16 * warp();
    const bool warp_active = from < BK;
    NO_UNROLL for (int first = first_slice_from_last(); first < BK; first += SLICE * programs()) {
        const auto row_of_g = [&](int row, int column) { return work.g[(first + row) * BK + column]; };
        const auto row_of_i = [&](int row, int column) { return first + row == column ? 1.f : 0.f; };
        block_barrier();  // S is whole, and the slices before are no longer read
        fill(n, [&](int row, int column) { return coefficients[degree] * *tiles.square.at(first + row, column); });
        fill(r, [&](int row, int column) {
            return coefficients[degree] * row_of_g(row, column) + coefficients[degree - 1] * row_of_i(row, column);
        });
        // At first the steps of Horner's rule. Then R is I, G, G² and so on.
        NO_UNROLL for (int step = degree - 2; step >= (need_dots ? -1 - degree : 0); --step) {
            const bool of_rule = step >= 0;
            const int power = -1 - step;  // of G in R
            block_barrier();
            if (of_rule || power > 1) {
                float sums[2][4];
                NO_UNROLL for (int part = of_rule ? 0 : 2; part < 3; ++part) {  // N G + R S, and R G
                    const Slice& left = part == 0 ? n : r;
                    const EitherSquare<BK> right{part == 1 ? nullptr : work.g, tiles.square};
                    if (part != 1) clear(sums);
                    if (warp_active) multiply_tiles<false, true>(ProductsF32{}, sums, left, 0, right, from, 0, BK);
                    if (part == 0) continue;
                    if (part == 2 && of_rule) add_diagonal(sums, first, from, coefficients[step]);
                    block_barrier();
                    if (warp_active) put_sums(Mode{}, part == 1 ? n : r, 0, from, sums);
                }
            } else {
                fill(r, [&](int row, int column) { return power == 0 ? row_of_i(row, column) : row_of_g(row, column); });
            }
            if (of_rule) continue;
            block_barrier();
            float dot = 0.f;
            NO_UNROLL for (int i = thread(); i < SLICE * BK; i += THREADS) {
                dot += *r.at(i / BK, i % BK) * *tiles.square.at(first + i / BK, i % BK);
            }
            dot = warp_sum(dot);
            if (lane() == 0) work.dots()[power * DerivativeWork<BK>::PARTS + first / SLICE * WARPS + warp()] = .5f * dot;
        }
        block_barrier();
        NO_UNROLL for (int i = thread(); i < SLICE * BK; i += THREADS) {
            work.m()[first * BK + i] = *n.at(i / BK, i % BK);
        }
    }
}

// Make tiles.square what db multiplies b with, a M for S = factor (T + Tᵀ), and store the gradients of the coefficients
// times loss_scale. fill_s(factor) fills the square with S. With need_derivative it has a grid barrier.
template <int BK, class Fill>
DEVICE void fill_derivative(const Gradients& arguments, const SliceTiles<BK>& tiles, const DerivativeWork<BK>& work,
                            float factor, float loss_scale, Fill fill_s) {
    const Polynomial& q = arguments.q;
    const bool is_summary = q.coefficients == nullptr;
    if (need_derivative(arguments)) {
        if (first_slice_from_last() < BK) {
            fill_s(factor);
            derive_rows(q.coefficients, q.degree, tiles, work, arguments.dcoefficients != nullptr);
        }
        grid_barrier(arguments.counter);  // before M is read
        if (arguments.dcoefficients != nullptr && program() == programs() - 1 && warp() <= q.degree) {
            constexpr int PARTS = DerivativeWork<BK>::PARTS;
            const float sum = add_scalars(work.dots() + warp() * PARTS, PARTS);
            if (lane() == 0) arguments.dcoefficients[warp()] = loss_scale * sum;
        }
    }
    if (is_summary || q.degree == 1) {  // M is c1 S, with the same bits whether the coefficients' gradients are needed
        return fill_s(is_summary ? 1.f : scale_of(q) * factor * q.coefficients[1]);
    }
    fill(tiles.square, [&](int row, int column) { return scale_of(q) * work.m()[row * BK + column]; });
}

}  // namespace interp_nn
