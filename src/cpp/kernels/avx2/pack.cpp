// Panels hold fp32. A: [k / KB][MR][KB], runs of 64 bytes reached from one pointer with constant offsets.
// B: [k][NR].
#include <string.h>

#include "kernels/avx2/set.h"

namespace kt::avx2 {

namespace {

const uint16_t* source_row(RowSource src, int i) {
  return src.base + (src.index ? src.index[i] : i) * src.stride;
}

// The first n of 8 elements, zeros behind them; reads nothing else.
__m256 load(const uint16_t* row, int n) {
  if (n >= 8) return widen(_mm_loadu_si128((const __m128i*)row));
  alignas(16) uint16_t edge[8] = {};
  if (n > 0) memcpy(edge, row, n * sizeof *row);
  return widen(_mm_load_si128((const __m128i*)edge));
}

}  // namespace

void pack_a(RowSource src, int rows, int k, void* panel) {
  float* dst = static_cast<float*>(panel);
  for (int i = 0; i < rows; ++i) {
    const uint16_t* row = source_row(src, i);
    for (int p = 0; p < k; p += KB)
      for (int half = 0; half < KB; half += 8)
        _mm256_store_ps(dst + p * MR + i * KB + half, load(row + p + half, k - p - half));
  }
}

void pack_b_cols(RowSource src, int cols, int k, void* panel) {
  float* dst = static_cast<float*>(panel);
  for (int j = 0; j < NR; j += 8)
    for (int p = 0; p < k; p += 8) {
      __m256 r[8];
      for (int i = 0; i < 8; ++i)
        r[i] = j + i < cols ? load(source_row(src, j + i) + p, k - p) : _mm256_setzero_ps();
      transpose8(r);
      for (int i = 0; i < 8 && p + i < k; ++i) _mm256_store_ps(dst + (p + i) * NR + j, r[i]);
    }
}

void pack_b_rows(RowSource src, int k, int cols, void* panel) {
  float* dst = static_cast<float*>(panel);
  for (int p = 0; p < k; ++p) {
    const uint16_t* row = source_row(src, p);
    for (int j = 0; j < NR; j += 8) _mm256_store_ps(dst + p * NR + j, load(row + j, cols - j));
  }
}

}  // namespace kt::avx2
