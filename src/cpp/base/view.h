// MatView: a matrix somewhere in memory. Owns nothing; the shape travels with the data.
#pragma once

#include <cstdint>

#include "base/dtype.h"

namespace kt {

using index_t = std::int64_t;

// rows x cols, row-major, `stride` elements from one row to the next (stride >= cols).
struct MatView {
  const void* data = nullptr;
  DType dtype = DType::bf16;
  index_t rows = 0, cols = 0, stride = 0;

  const void* at(index_t row, index_t col) const {
    return static_cast<const char*>(data) + (row * stride + col) * static_cast<index_t>(size_of(dtype));
  }
  MatView block(index_t row, index_t col, index_t n_rows, index_t n_cols) const {
    return {at(row, col), dtype, n_rows, n_cols, stride};
  }
};

inline MatView view(const void* data, DType dtype, index_t rows, index_t cols) {
  return {data, dtype, rows, cols, cols};
}

}  // namespace kt
