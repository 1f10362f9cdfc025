// Cooperation of the programs of one launch: each stores its part of a sum in a workspace, and all add the parts up.
#pragma once

#include "projection.h"

namespace interp_nn {

// The sum of from[q * stride] over q < count in a fixed order, with eight loads under way: one would wait for memory
// each time.
DEVICE float add_strided(const float* from, int64_t stride, int count) {
    constexpr int UNDER_WAY = 8;
    float sums[UNDER_WAY] = {};
    NO_UNROLL for (; count >= UNDER_WAY; count -= UNDER_WAY) {
        UNROLL for (int q = 0; q < UNDER_WAY; ++q) sums[q] += from[q * stride];
        from += UNDER_WAY * stride;
    }
    UNROLL for (int q = 0; q < UNDER_WAY - 1; ++q) {  // the rest, in two waits: a condition takes one of six predicates
        if (q < count) sums[q] += from[q * stride];
    }
    UNROLL for (int half = UNDER_WAY / 2; half > 0; half /= 2) {
        UNROLL for (int q = 0; q < half; ++q) sums[q] += sums[q + half];
    }
    return sums[0];
}

// out[i] = the sum of parts[q, i] over q < count in a fixed order, for i < size; the grid shares the i. `out` may be
// parts[0].
NOINLINE void add_parts(const float* parts, float* out, int count, int64_t size) {
    NO_UNROLL for (int64_t i = program() * THREADS + thread(); i < size; i += programs() * THREADS) {
        out[i] = add_strided(parts + i, size, count);
    }
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

// The sum over a block's groups of BK threads, thread i of each, for thread i < BK. It overwrites shared memory.
template <int BK> DEVICE float add_groups(float value) {
    auto* const values = reinterpret_cast<float*>(shared_memory());
    values[thread()] = value;
    block_barrier();
    float sum = 0.f;
    if (thread() < BK) {
        UNROLL for (int group = 0; group < THREADS / BK; ++group) sum += values[group * BK + thread()];
    }
    block_barrier();
    return sum;
}

// to[column] = scale times the sum of parts[q, column] over q < count, for parts of (count, BK). One program calls it.
template <int BK, class T>
DEVICE void store_columns(const Mode& mode, T* to, int columns, const float* parts, int count, float scale) {
    constexpr int GROUPS = THREADS / BK;
    const int group = thread() / BK;
    const float part = add_strided(parts + thread(), THREADS, (count - group + GROUPS - 1) / GROUPS);
    const float sum = add_groups<BK>(part);
    if (thread() < columns) to[thread()] = round_to<T>(sum * scale, mode.is_bf16);
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
            const float sum = add_strided(parts + f * BK + column, int64_t{d} * BK, splits);
            db[arguments.db_transposed ? column * int64_t{d} + f : f * k + column] =
                round_to<T>((sum + product) * scale, mode.is_bf16);
        });
    }
}

}  // namespace interp_nn
