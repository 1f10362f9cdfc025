// What the programs of one launch do together: each leaves its part of a sum in a workspace, all add the parts up.
#pragma once

#include "fragments.h"

namespace interp_nn {

// out[i] = the sum of parts[q, i] over q < count, for i < size, in a fixed order; the grid shares the i.
DEVICE void add_parts(const float* parts, float* out, int count, int size) {
    for (int i = program() * THREADS + thread(); i < size; i += programs() * THREADS) {
        float sums[4] = {};  // four loads under way at a time: one would be all latency
        NO_UNROLL for (int first = 0; first < count; first += 4) {
            UNROLL for (int q = 0; q < 4; ++q) {
                if (first + q < count) sums[q] += parts[static_cast<int64_t>(first + q) * size + i];
            }
        }
        out[i] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }
}

// Square matrices of fp32 in shared memory, for the last phase: db = sums + b (T + Tᵀ), a strip of features at a time.
template <int BK> struct StripTiles {
    static constexpr int BC = 16;
    using Square = Tile<float, BK, BK>;
    using Strip = Tile<float, BC, BK>;
    static constexpr size_t SHARED = Square::BYTES + Strip::BYTES;
    Square square;
    Strip strip;
};

template <int BK> DEVICE StripTiles<BK> strip_tiles(unsigned char* memory) {
    using Tiles = StripTiles<BK>;
    return {typename Tiles::Square{memory}, typename Tiles::Strip{memory + Tiles::Square::BYTES}};
}

// The square T + Tᵀ of a (BK, BK) workspace.
template <int BK> DEVICE void load_twice_symmetric(const StripTiles<BK>& tiles, const float* t) {
    for (int i = thread(); i < BK * BK; i += THREADS) {
        const int row = i / BK, column = i % BK;
        *tiles.square.at(row, column) = t[i] + t[column * BK + row];
    }
}

// The square G (k, k) with zeros around.
template <int BK, class T> DEVICE void load_square(const StripTiles<BK>& tiles, const T* g, int k) {
    for (int i = thread(); i < BK * BK; i += THREADS) {
        const int row = i / BK, column = i % BK;
        *tiles.square.at(row, column) = row < k && column < k ? to_float(g[row * k + column]) : 0.f;
    }
}

// The strip b[feature : feature + BC] with zeros around.
template <bool B_T, int BK, class T> DEVICE void load_strip(const StripTiles<BK>& tiles, const T* b, int feature, int d, int k) {
    for (int i = thread(); i < StripTiles<BK>::BC * BK; i += THREADS) {
        const int row = B_T ? i % StripTiles<BK>::BC : i / BK, column = B_T ? i / StripTiles<BK>::BC : i % BK;
        const int64_t f = feature + row;
        const bool inside = f < d && column < k;
        *tiles.strip.at(row, column) = inside ? to_float(B_T ? b[column * int64_t{d} + f] : b[f * k + column]) : 0.f;
    }
}

// The sum over splits of parts[split, feature, column] in a fixed order, for parts of (d, BK).
template <int BK> DEVICE float add_splits(const float* parts, int splits, int feature, int column, int d) {
    float sum = 0.f;
    if (feature < d) {
        for (int q = 0; q < splits; ++q) sum += parts[(int64_t{q} * d + feature) * BK + column];
    }
    return sum;
}

// Visit each pair of neighbours of strip times square: visit(row, column, first, second). Exact products: there are
// few of them.
template <int BK, class Visit> DEVICE void multiply_strip(const StripTiles<BK>& tiles, Visit visit) {
    static_assert(BK <= 16 * WARPS, "sixteen columns a warp");
    const int column = 16 * warp();
    if (column >= BK) return;
    float sums[2][4];
    clear(sums);
    multiply_tiles<ProductsF32, false, false>(sums, tiles.strip, 0, tiles.square, column, 0, BK);
    each_pair(sums, [&](int r, int c, float first, float second) { visit(r, column + c, first, second); });
}

// db[feature, column] and its neighbour in b's memory order.
template <bool B_T, class T> DEVICE void store_b(T* db, int feature, int column, int d, int k, float first, float second) {
    if (feature >= d) return;
    if (column < k) db[B_T ? column * int64_t{d} + feature : int64_t{feature} * k + column] = from_float<T>(first);
    ++column;
    if (column < k) db[B_T ? column * int64_t{d} + feature : int64_t{feature} * k + column] = from_float<T>(second);
}

}  // namespace interp_nn
