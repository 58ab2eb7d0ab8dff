// One pass over dense elements, which writes them as another type and, if asked for, in the other
// order of channels.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>

#include "vectors.h"

namespace nmlightning {

constexpr int TILE = 16;  // rows and columns that are transposed in registers
constexpr int64_t ELEMENTS_A_TASK = 32768;

template <class E>
using Row = typename VectorOf<E, TILE>::Type;

// Matrices of rows by columns, each to be written as columns by rows; or elements to be kept in
// their order, which are one row. A matrix, and a row of it, is so far from the next.
struct Matrices {
  int64_t count, rows, columns;
  bool transposed = false;
  int64_t from_matrix = rows * columns, from_row = columns;
  int64_t to_matrix = rows * columns, to_row = rows;
};

// Takes the columns for rows: log2(16) times, the first half is interleaved with the second.
template <class E>
inline void transpose(Row<E> (&tile)[TILE]) {
  for (int stage = 0; stage < 4; stage++) {
    Row<E> next[TILE];
#pragma GCC unroll 8
    for (int i = 0; i < TILE / 2; i++) {
      const Row<E> a = tile[i], b = tile[i + TILE / 2];
      next[2 * i] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22,
                                            7, 23);
      next[2 * i + 1] = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29,
                                                14, 30, 15, 31);
    }
    std::copy(next, next + TILE, tile);
  }
}

// Writes f(values, position) of a tile of up to 16 rows, whose first element is the i-th of `from`.
template <class From, class To, class F>
inline void write_tile(const Matrices& all, int64_t rows, int64_t columns, const From* from,
                       int64_t i, To* to, F f) {
  using E = std::conditional_t<sizeof(To) == 4, uint32_t,
                               std::conditional_t<sizeof(To) == 2, uint16_t, uint8_t>>;
  E written[TILE][TILE];
#pragma GCC unroll 16
  for (int row = 0; row < rows; row++, i += all.from_row)
    store<TILE>(reinterpret_cast<To*>(written[row]), f(load<TILE>(from + i), i));
  if (rows < TILE) {
    for (int64_t c = 0; c < columns; c++, to += all.to_row)
      for (int64_t row = 0; row < rows; row++) std::memcpy(to + row, &written[row][c], sizeof(To));
    return;
  }
  Row<E> tile[TILE];
  std::memcpy(tile, written, sizeof tile);
  transpose<E>(tile);
#pragma GCC unroll 16
  for (int row = 0; row < columns; row++, to += all.to_row)
    std::memcpy(to, &tile[row], sizeof tile[row]);
}

// Writes the columns from one on of a matrix as rows.
template <class From, class To, class F>
inline void write_columns(const Matrices& all, const From* from, int64_t matrix, int64_t column,
                          To* to, F f) {
  const int64_t start = matrix * all.from_matrix + column, number = all.columns - column;
  const int64_t columns = std::min<int64_t>(TILE, number);
  const int64_t last =
      (all.count - 1) * all.from_matrix + (all.rows - 1) * all.from_row + all.columns;
  to += matrix * all.to_matrix + column * all.to_row;
  int64_t row = 0;
  const auto is_readable = [&](int64_t rows) {
    return start + (row + rows - 1) * all.from_row + TILE <= last;
  };
  for (; row + TILE <= all.rows && is_readable(TILE); row += TILE) {
    const int64_t i = start + row * all.from_row;
    if (columns == TILE)
      write_tile(all, TILE, TILE, from, i, to + row, f);
    else
      write_tile(all, TILE, columns, from, i, to + row, f);
  }
  if (const int64_t few = all.rows - row; 0 < few && few < TILE && is_readable(few)) {
    write_tile(all, few, columns, from, start + row * all.from_row, to + row, f);
    row = all.rows;
  }
  for (; row < all.rows; row++)
    for (int64_t c = 0; c < columns; c++) {
      const int64_t i = start + row * all.from_row + c;
      store<1>(to + c * all.to_row + row, f(load<1>(from + i), i));
    }
}

// Writes f(values, position in `from`) of all elements.
template <class From, class To, class F>
void write_elements(const Matrices& all, const From* from, To* to, F f) {
  const int64_t number = all.count * all.rows * all.columns;
  if (!all.transposed)
    return at::parallel_for(0, number, ELEMENTS_A_TASK, [&](int64_t begin, int64_t end) {
      each_place(begin, end, [&](auto in) { in.write(to, f(in(from), in.i)); });
    });
  const int64_t blocks = (all.columns + TILE - 1) / TILE;
  const int64_t grain = std::max<int64_t>(1, ELEMENTS_A_TASK / (all.rows * TILE + 1));
  at::parallel_for(0, all.count * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      write_columns(all, from, i / blocks, i % blocks * TILE, to, f);
  });
}

}  // namespace nmlightning
