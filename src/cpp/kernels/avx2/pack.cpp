// Panels hold fp32. A: [k / KB][MR][KB], runs of 64 bytes reached from one pointer with constant offsets.
// B: [k][NR].
#include <string.h>

#include "kernels/avx2/set.h"

namespace kt::avx2 {

namespace {

constexpr int kAhead = 32;  // rows between a prefetch, into the second cache level, and its use

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

// The first n of 16 elements, n > 0, as pairs of neighbours.
__m256 load_pairs(const uint16_t* row, int n) {
  if (n >= 16) return _mm256_loadu_ps((const float*)row);
  alignas(32) uint16_t edge[16] = {};
  memcpy(edge, row, n * sizeof *row);
  return _mm256_load_ps((const float*)edge);
}

// The next P panels: a row is read in runs of P lines. One line at a time, rows that lie a power of two of
// bytes apart fall into one cache set, and what is fetched beside a line is lost before its turn comes.
template <int P>
void pack_panels(RowSource src, int k, int cols, char* dst, ptrdiff_t panel_bytes) {
  for (int p = 0; p < k; ++p, dst += NR * sizeof(float)) {
    const uint16_t* row = source_row(src, p);
    const uint16_t* ahead = p + kAhead < k ? source_row(src, p + kAhead) : row;
#pragma GCC unroll 4
    for (int i = 0; i < P; ++i) {
      if (i % 2 == 0) _mm_prefetch(ahead + i * NR, _MM_HINT_T1);  // a panel takes half a line
      const int n = i + 1 < P ? NR : cols - i * NR;
      float* panel = reinterpret_cast<float*>(dst + i * panel_bytes);
      _mm256_store_ps(panel, load(row + i * NR, n));
      _mm256_store_ps(panel + 8, load(row + i * NR + 8, n - 8));
    }
  }
}

using PackPanels = void (*)(RowSource, int, int, char*, ptrdiff_t);
constexpr PackPanels kPackPanels[] = {pack_panels<1>, pack_panels<2>, pack_panels<3>, pack_panels<4>};

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

// Pairs of neighbours in k are transposed, then taken apart.
void pack_b_cols(RowSource src, int cols, int k, void* panel) {
  float* dst = static_cast<float*>(panel);
  const __m256 odd = _mm256_castsi256_ps(_mm256_set1_epi32(0xffff0000));
  for (int j = 0; j < NR; j += 8)
    for (int p = 0; p < k; p += 16) {
      __m256 r[8];
      for (int i = 0; i < 8; ++i)
        r[i] = j + i < cols ? load_pairs(source_row(src, j + i) + p, k - p) : _mm256_setzero_ps();
      transpose8(r);
      for (int i = 0; i < 8 && p + 2 * i < k; ++i) {
        float* pair = dst + (p + 2 * i) * NR + j;
        _mm256_store_ps(pair, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(r[i]), 16)));
        if (p + 2 * i + 1 < k) _mm256_store_ps(pair + NR, _mm256_and_ps(r[i], odd));
      }
    }
}

void pack_b_rows(RowSource src, int k, int cols, void* panels, ptrdiff_t panel_bytes) {
  char* dst = static_cast<char*>(panels);
  for (; cols > 0; cols -= 4 * NR, src.base += 4 * NR, dst += 4 * panel_bytes)
    kPackPanels[cols > 3 * NR ? 3 : (cols - 1) / NR](src, k, cols, dst, panel_bytes);
}

}  // namespace kt::avx2
