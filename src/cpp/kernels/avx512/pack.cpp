// Panels hold fp32. A: [k / KB][MR][KB], runs of 64 bytes reached from one pointer with constant offsets.
// B: [k][NR].
#include "kernels/avx512/set.h"

namespace kt::avx512 {

namespace {

__m512 load(const uint16_t* row, int n) { return widen(_mm256_maskz_loadu_epi16(first16(n), row)); }

}  // namespace

void pack_a(RowSource src, int rows, int k, void* panel) {
  float* dst = static_cast<float*>(panel);
  for (int i = 0; i < rows; ++i) {
    const uint16_t* row = source_row(src, i);
    for (int p = 0; p < k; p += KB) _mm512_store_ps(dst + p * MR + i * KB, load(row + p, k - p));
  }
}

void pack_b_cols(RowSource src, int cols, int k, void* panel) {
  float* dst = static_cast<float*>(panel);
  for (int j = 0; j < NR; j += 16)
    for (int p = 0; p < k; p += 16) {
      __m512i r[16];
      for (int i = 0; i < 16; ++i)
        r[i] = j + i < cols ? _mm512_castps_si512(load(source_row(src, j + i) + p, k - p))
                            : _mm512_setzero_si512();
      transpose16(r);
      for (int i = 0; i < 16 && p + i < k; ++i) _mm512_store_si512(dst + (p + i) * NR + j, r[i]);
    }
}

void pack_b_rows(RowSource src, int k, int cols, void* panel) {
  float* dst = static_cast<float*>(panel);
  for (int p = 0; p < k; ++p) {
    const uint16_t* row = source_row(src, p);
    for (int j = 0; j < NR; j += 16) _mm512_store_ps(dst + p * NR + j, load(row + j, cols - j));
  }
}

}  // namespace kt::avx512
