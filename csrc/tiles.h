// Matrices in global memory, tiles of them in shared memory, and the way from the one to the other.
#pragma once

#include "primitives.h"

namespace interp_nn {

// A row-major matrix in global memory. `unit` is how many bytes at a time it can be copied in: 16 where its address
// and its rows are multiples of that, down to the size of one element.
template <class T> struct Matrix {
    const T* data;
    int64_t rows;
    int columns;
    int unit;
};

template <class T> DEVICE Matrix<T> matrix(const void* data, int64_t rows, int columns) {
    const auto bits = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(data)) | static_cast<uint32_t>(columns * sizeof(T));
    const int unit = bits % 16 == 0 ? 16 : bits % 8 == 0 ? 8 : bits % 4 == 0 ? 4 : static_cast<int>(sizeof(T));
    return {static_cast<const T*>(data), rows, columns, unit};
}

// A tile in shared memory, a view. Its rows are cut into chunks of 16 bytes, whose places are exchanged row by row
// (XOR with the row's number) so that neither eight rows of one chunk nor, in fp32, eight columns of four rows meet
// in a bank.
template <class T, int ROWS_, int COLUMNS_> struct Tile {
    using Element = T;
    static constexpr int ROWS = ROWS_;
    static constexpr int COLUMNS = COLUMNS_;
    static constexpr int ROW_BYTES = COLUMNS * sizeof(T);
    static constexpr int CHUNKS = ROW_BYTES / 16;
    static constexpr int PER_CHUNK = 16 / sizeof(T);
    static constexpr int BYTES = ROWS * ROW_BYTES;
    static_assert(CHUNKS >= 2 && (CHUNKS & (CHUNKS - 1)) == 0, "rows are two chunks or a larger power of two");

    unsigned char* base;

    DEVICE static int exchange(int row) {
        if constexpr (CHUNKS >= 8) return (row & 3) << 1 | (row >> 2 & 1);
        if constexpr (CHUNKS == 4) return (row >> 1 & 1) << 1 | (row >> 2 & 1);  // two rows in the width of all banks
        return row >> 2 & 1;                                                     // four rows
    }
    // The exchange is among eight chunks: written so, the places of all others are these plus a constant.
    DEVICE unsigned char* chunk(int row, int chunk) const {
        return base + row * ROW_BYTES + (((chunk & 7) ^ exchange(row)) << 4) + (chunk & ~7) * 16;
    }
    DEVICE T* at(int row, int column) const {
        return reinterpret_cast<T*>(chunk(row, column / PER_CHUNK)) + column % PER_CHUNK;
    }
};

// How many of `size` things are left from `first` on, at most a tile's worth; never negative.
DEVICE int left(int64_t size, int64_t first) {
    const int64_t rest = size - first;
    return rest < 0 ? 0 : rest > 65536 ? 65536 : static_cast<int>(rest);
}

template <int UNIT, class T, class Tile>
DEVICE void load_units(const Tile& tile, const T* from, int64_t pitch, int rows, int columns) {
    constexpr int ELEMENTS = UNIT / sizeof(T);
    constexpr int ACROSS = Tile::COLUMNS / ELEMENTS;
    NO_UNROLL for (int i = thread(); i < Tile::ROWS * ACROSS; i += THREADS) {
        const int row = i / ACROSS, column = i % ACROSS * ELEMENTS;
        const bool inside = row < rows && column < columns;
        const T* source = inside ? from + row * pitch + column : nullptr;
        if constexpr (UNIT >= 4) {
            copy_async<UNIT>(tile.at(row, column), source, inside);
        } else {
            *tile.at(row, column) = inside ? *source : from_float<T>(0.f);
        }
    }
}

// tile = M[row :, column :], zeros outside of M. Asynchronous: commit, wait, and a barrier come before anyone reads.
template <class T, class Tile> DEVICE void load_tile(const Tile& tile, const Matrix<T>& m, int64_t row, int column) {
    const int rows = left(m.rows, row), columns = m.columns - column;
    const T* from = m.data + row * m.columns + column;
    if (m.unit == 16) {
        load_units<16>(tile, from, m.columns, rows, columns);
    } else if (m.unit == 8) {
        load_units<8>(tile, from, m.columns, rows, columns);
    } else if (sizeof(T) == 4 || m.unit == 4) {
        load_units<4>(tile, from, m.columns, rows, columns);
    } else {
        load_units<sizeof(T)>(tile, from, m.columns, rows, columns);
    }
}

// b as its memory has it, and the tile of its rows and columns: both are (d, k), or (k, d) where TRANSPOSED.
template <class T, bool TRANSPOSED> DEVICE Matrix<T> matrix_b(const void* b, int d, int k) {
    return TRANSPOSED ? matrix<T>(b, k, d) : matrix<T>(b, d, k);
}
template <class T, int DEPTH, int COLUMNS, bool TRANSPOSED> struct TileOfB {
    using type = Tile<T, DEPTH, COLUMNS>;
};
template <class T, int DEPTH, int COLUMNS> struct TileOfB<T, DEPTH, COLUMNS, true> {
    using type = Tile<T, COLUMNS, DEPTH>;
};
template <bool TRANSPOSED, class T, class Tile> DEVICE void load_b(const Tile& tile, const Matrix<T>& b, int feature) {
    load_tile(tile, b, TRANSPOSED ? 0 : feature, TRANSPOSED ? feature : 0);
}

// Walk through `steps` steps whose tiles are copied stages - 1 steps ahead: load(step, stage) starts the copies of a
// step into one of the stages, use(step, stage) reads them. Afterwards all copies of the block are done, and the
// stages free.
template <class Load, class Use> DEVICE void pipeline(int steps, int stages, Load load, Use use) {
    for (int step = 0; step < stages - 1; ++step) {
        if (step < steps) load(step, step);
        commit_copies();
    }
    int stage = 0, ahead = stages - 1;
    NO_UNROLL for (int step = 0; step < steps; ++step) {
        wait_copies(stages - 2);
        block_barrier();  // everyone's copies of this step are here, and everyone is done with the stage loaded next
        if (step + stages - 1 < steps) load(step + stages - 1, ahead);
        commit_copies();
        use(step, stage);
        ahead = stage;
        stage = stage + 1 == stages ? 0 : stage + 1;
    }
    wait_copies(0);
    block_barrier();
}

// Whether pairs of columns of rows of `columns` elements may be read and written as one word.
template <class T> DEVICE bool paired(const void* data, int columns) {
    return columns % 2 == 0 && reinterpret_cast<uintptr_t>(data) % (2 * sizeof(T)) == 0;
}

// Two neighbours of a row, those below `columns`, rounded to T.
template <class T> DEVICE void store_two(T* row, int column, int columns, float first, float second, bool pairs) {
    if (pairs) {
        if (column >= columns) return;
        if constexpr (sizeof(T) == 2) {
            *reinterpret_cast<uint32_t*>(row + column) = pack<T>(first, second);
        } else {
            struct alignas(8) Two {
                float first, second;
            };
            *reinterpret_cast<Two*>(row + column) = {first, second};
        }
    } else {
        if (column < columns) row[column] = from_float<T>(first);
        if (column + 1 < columns) row[column + 1] = from_float<T>(second);
    }
}

}  // namespace interp_nn
