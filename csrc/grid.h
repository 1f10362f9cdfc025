// Cooperation of the programs of one launch: each stores its part of a sum in a workspace, and all add the parts up.
#pragma once

#include "projection.h"

namespace interp_nn {

// out[i] = the sum of parts[q, i] over q < count in a fixed order, for i < size; the grid shares the i.
NOINLINE void add_parts(const float* parts, float* out, int count, int size) {
    NO_UNROLL for (int i = program() * THREADS + thread(); i < size; i += programs() * THREADS) {
        float sums[4] = {};  // four loads at a time, because one would wait for memory each time
        NO_UNROLL for (int first = 0; first < count; first += 4) {
            UNROLL for (int q = 0; q < 4; ++q) {
                if (first + q < count) sums[q] += parts[static_cast<int64_t>(first + q) * size + i];
            }
        }
        out[i] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }
}

// The sum of parts[split, feature, column] over the splits in a fixed order, for parts of (d, BK).
template <int BK> DEVICE float add_splits(const float* parts, int splits, int feature, int column, int d) {
    float sum = 0.f;
    if (feature < d) {
        NO_UNROLL for (int q = 0; q < splits; ++q) sum += parts[(int64_t{q} * d + feature) * BK + column];
    }
    return sum;
}

// For the last phase: a square matrix of fp32 in shared memory, and a slice of sixteen rows at a time that is
// multiplied with it. The products are exact, since there are few of them.
constexpr int SLICE = 16;
template <int BK> struct SliceTiles {
    using Square = Tile<float, BK, BK>;
    using Slice = Tile<float, SLICE, BK>;
    static constexpr size_t SHARED = Square::BYTES + Slice::BYTES;
    Square square;
    Slice slice;

    DEVICE explicit SliceTiles(unsigned char* memory) : square{memory}, slice{memory + Square::BYTES} {}
};

// tile = value(row, column) everywhere.
template <class Tile, class Value> DEVICE void fill(const Tile& tile, Value value) {
    NO_UNROLL for (int i = thread(); i < Tile::ROWS * Tile::COLUMNS; i += THREADS) {
        const int row = i / Tile::COLUMNS, column = i % Tile::COLUMNS;
        *tile.at(row, column) = value(row, column);
    }
}

// The square factor (T + Tᵀ) of a (BK, BK) workspace.
template <int BK> DEVICE void fill_symmetrized(const SliceTiles<BK>& tiles, const float* t, float factor) {
    fill(tiles.square, [&](int row, int column) { return factor * (t[row * BK + column] + t[column * BK + row]); });
}

// Call visit(row, column, element) for slice times square, where slice = value(row, column). The barrier it begins with
// is also the one that a freshly filled square needs.
template <int BK, class Value, class Visit>
DEVICE void multiply_slice(const SliceTiles<BK>& tiles, Value value, Visit visit) {
    static_assert(BK <= 16 * WARPS, "sixteen columns a warp");
    const bool warp_active = 16 * warp() < BK;
    float sums[2][4];
    block_barrier();  // the slice before is no longer read
    fill(tiles.slice, value);
    block_barrier();
    clear(sums);
    if (warp_active) {
        multiply_tiles<false, false>(ProductsF32{}, sums, tiles.slice, 0, tiles.square, 16 * warp(), 0, BK);
    }
    block_barrier();
    if (warp_active) put_sums(Mode{}, tiles.slice, 0, 16 * warp(), sums);
    block_barrier();
    NO_UNROLL for (int i = thread(); i < SLICE * BK; i += THREADS) {
        visit(i / BK, i % BK, *tiles.slice.at(i / BK, i % BK));
    }
}

// The sum over a warp's lanes in a fixed order, the same in all of them.
DEVICE float warp_sum(float value) {
    UNROLL for (int step = 16; step > 0; step /= 2) value += shuffle(value, lane() ^ step);
    return value;
}

// The sum of `count` numbers, the same in every warp of every program.
DEVICE float add_scalars(const float* parts, int count) {
    float sum = 0.f;
    NO_UNROLL for (int i = lane(); i < count; i += 32) sum += parts[i];
    return warp_sum(sum);
}

// The sum of a column of a tile over every GROUPS-th row: where there are more threads than columns, they share one.
template <int GROUPS, class Tile> DEVICE float add_rows(const Mode& mode, const Tile& tile, int group, int column) {
    float sum = 0.f;
    NO_UNROLL for (int r = group; r < Tile::ROWS; r += GROUPS) sum += widen(*tile.at(r, column), mode.is_bf16);
    return sum;
}

// to[column] = scale times the sum of parts[q, column] over q < count, for parts of (count, BK). One program calls it.
template <int BK, class T>
DEVICE void store_columns(const Mode& mode, T* to, int columns, const float* parts, int count, float scale) {
    if (thread() >= columns) return;
    float sum = 0.f;
    NO_UNROLL for (int q = 0; q < count; ++q) sum += parts[q * BK + thread()];
    to[thread()] = round_to<T>(sum * scale, mode.is_bf16);
}

// Store db = scale (sums + b square), where sums adds up parts of (splits, d, BK); the grid shares the features.
template <int BK, class T>
DEVICE void store_db(const Mode& mode, const Gradients& arguments, const SliceTiles<BK>& tiles, const Matrix<T>& b,
                     const float* parts, int splits, float scale) {
    auto* const db = static_cast<T*>(arguments.db);
    const int d = arguments.d, k = arguments.k;
    NO_UNROLL for (int feature = program() * SLICE; feature < d; feature += programs() * SLICE) {
        const auto of_b = [&](int row, int column) {
            const int64_t f = feature + row;
            return f < d && column < k ? widen(b.data[column * b.pitch + f * b.step], mode.is_bf16) : 0.f;
        };
        multiply_slice(tiles, of_b, [&](int row, int column, float product) {
            const int64_t f = feature + row;
            if (f >= d || column >= k) return;
            const float sum = add_splits<BK>(parts, splits, feature + row, column, d);
            db[arguments.db_transposed ? column * int64_t{d} + f : f * k + column] =
                round_to<T>((sum + product) * scale, mode.is_bf16);
        });
    }
}

}  // namespace interp_nn
