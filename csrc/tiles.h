// Matrices in global memory, tiles of them in shared memory, and copies between the two.
#pragma once

#include "primitives.h"

namespace interp_nn {

// A matrix in global memory: element (r, c) is data[r * pitch + c * step].
template <class T> struct Matrix {
    const T* data;
    int64_t rows, pitch, step;
    int columns;
    int unit;  // bytes of the words in which rows can be copied: 16, 4, or 0 where elements must be gathered
};

template <class T>
DEVICE Matrix<T> strided_matrix(const void* data, int64_t rows, int columns, int64_t pitch, int64_t step) {
    const auto bits = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(data)) |
                      static_cast<uint32_t>(pitch * sizeof(T)) | static_cast<uint32_t>(columns * sizeof(T));
    const int unit = step != 1 ? 0 : bits % 16 == 0 ? 16 : bits % 4 == 0 ? 4 : 0;
    return {static_cast<const T*>(data), rows, pitch, step, columns, unit};
}
template <class T> DEVICE Matrix<T> matrix(const void* data, int64_t rows, int columns) {
    return strided_matrix<T>(data, rows, columns, columns, 1);
}

// The offset of a chunk in a tile with so many chunks a row. Eight chunks are exchanged among themselves, so that all
// other places are these plus a constant.
DEVICE int chunk_offset(int row, int chunk, int chunks) {
    const int exchange = chunks >= 8   ? (row & 3) << 1 | (row >> 2 & 1)
                         : chunks == 4 ? (row >> 1 & 1) << 1 | (row >> 2 & 1)  // two rows in the width of all banks
                                       : row >> 2 & 1;                         // four rows
    return (row * chunks + (chunk & ~7) + ((chunk & 7) ^ exchange)) * 16;
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

    DEVICE unsigned char* chunk(int row, int chunk) const { return base + chunk_offset(row, chunk, CHUNKS); }
    DEVICE T* at(int row, int column) const {
        return reinterpret_cast<T*>(chunk(row, column / PER_CHUNK)) + column % PER_CHUNK;
    }
};

template <int POWER> constexpr int LOG = 1 + LOG<POWER / 2>;
template <> constexpr int LOG<1> = 0;

// A chunk of fp32 numbers, or half of one.
struct alignas(16) Four {
    float v[4];
};
struct alignas(8) Two {
    float v[2];
};

// max(size - first, 0), at most 65536.
DEVICE int remaining(int64_t size, int64_t first) {
    const int64_t rest = size - first;
    return rest < 0 ? 0 : rest > 65536 ? 65536 : static_cast<int>(rest);
}

// The copies of load_tile, for a tile of 2^log_height rows of 2^log_chunks chunks at `base`. Not inlined, because it
// would be most of every kernel's code.
template <class T> NOINLINE void copy_tile(unsigned char* base, int log_height, int log_chunks, const Matrix<T> m,
                                           int64_t row, int64_t column) {
    constexpr int PER_CHUNK = 16 / sizeof(T);
    const int rows = remaining(m.rows, row), columns = remaining(m.columns, column);
    const T* const from = m.data + row * m.pitch + column * m.step;
    NO_UNROLL for (int i = thread(); i < 1 << (log_height + log_chunks); i += THREADS) {
        // Neighbouring threads read neighbouring memory.
        const int low = m.step == 1 ? log_chunks : log_height, first = i & ((1 << low) - 1), second = i >> low;
        const int r = m.step == 1 ? second : first, c = m.step == 1 ? first : second;
        unsigned char* const to = base + chunk_offset(r, c, 1 << log_chunks);
        const int inside = r < rows ? columns - c * PER_CHUNK : 0;
        const T* source = from + r * m.pitch + c * PER_CHUNK * m.step;
        if (m.unit == 16) {
            copy_async<16>(to, source, inside > 0);
        } else if (m.unit == 4) {
            constexpr int ELEMENTS = 4 / sizeof(T);
            UNROLL for (int part = 0; part < 4; ++part) {
                copy_async<4>(to + 4 * part, source + ELEMENTS * part, ELEMENTS * part < inside);
            }
        } else {
            UNROLL for (int e = 0; e < PER_CHUNK; ++e, source += m.step) {
                reinterpret_cast<T*>(to)[e] = e < inside ? *source : T{};
            }
        }
    }
}

// tile = M[row :, column :], zeros outside of M. Asynchronous: commit, wait and a barrier must come before reads.
template <class T, class Tile> DEVICE void load_tile(const Tile& tile, const Matrix<T>& m, int64_t row, int64_t column) {
    static_assert((Tile::ROWS & (Tile::ROWS - 1)) == 0, "rows are a power of two");
    copy_tile<T>(tile.base, LOG<Tile::ROWS>, LOG<Tile::CHUNKS>, m, row, column);
}

// Run `steps` steps whose tiles are copied stages - 1 steps ahead: load(step, stage) starts the copies of a step into
// one of the stages, compute(step, stage) reads them. Afterwards all copies of the block are done, and the stages are
// free.
template <class Load, class Compute> DEVICE void pipeline(int steps, int stages, Load load, Compute compute) {
    int stage = 0, ahead = 0;
    NO_UNROLL for (int step = 1 - stages; step < steps; ++step) {
        if (step >= 0) {
            wait_copies(stages - 2);
            block_barrier();  // all copies of this step are done, and no thread reads the stage that is loaded next
        }
        if (step + stages - 1 < steps) load(step + stages - 1, ahead);
        commit_copies();
        ahead = ahead + 1 == stages ? 0 : ahead + 1;
        if (step >= 0) {
            compute(step, stage);
            stage = stage + 1 == stages ? 0 : stage + 1;
        }
    }
    wait_copies(0);
    block_barrier();
}

// Copy a warp's piece of a tile, 16 rows from `row` and WIDE columns from `column` on, to a matrix of `rows` by
// `columns` in global memory. The warp's own lanes have written the piece.
template <int WIDE, class T, class Tile>
DEVICE void store_piece(T* to, int64_t pitch, int rows, int columns, const Tile& tile, int row, int column) {
    constexpr int PER_CHUNK = Tile::PER_CHUNK;
    const Matrix<T> m = strided_matrix<T>(to, rows, columns, pitch, 1);
    constexpr int ACROSS = WIDE / PER_CHUNK;
    warp_barrier();
    NO_UNROLL for (unsigned i = lane(); i < 16 * ACROSS; i += 32) {
        const int r = i / ACROSS, c = i % ACROSS;
        const int inside = r < rows ? columns - c * PER_CHUNK : 0;
        const unsigned char* const from = tile.chunk(row + r, column / PER_CHUNK + c);
        T* const at = to + r * pitch + c * PER_CHUNK;
        if (m.unit == 16) {
            if (inside > 0) *reinterpret_cast<Four*>(at) = *reinterpret_cast<const Four*>(from);
        } else {
            UNROLL for (int e = 0; e < PER_CHUNK; ++e) {
                if (e < inside) at[e] = reinterpret_cast<const T*>(from)[e];
            }
        }
    }
    warp_barrier();
}

// The same for sixteen whole rows.
template <class T, class Tile> DEVICE void store_rows(T* to, int64_t pitch, int rows, int columns, const Tile& tile, int row) {
    store_piece<Tile::COLUMNS>(to, pitch, rows, columns, tile, row, 0);
}

}  // namespace interp_nn
