#include <string.h>

#include "kernels/avx2/set.h"

namespace kt::avx2 {

namespace {

// Panels hold fp32. A: [k / KB][MR][KB], runs of 64 bytes reached from one pointer with constant offsets.
// B: [k][NR].
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

// The loops over r and v are unrolled by order: gcc keeps acc in registers only when no index is left.

// One k: every row of A times V vectors of B.
template <int R, int V>
__attribute__((always_inline)) inline void step(__m256 (&acc)[R][V], const float* a, const float* b) {
  __m256 column[V];
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) column[v] = _mm256_load_ps(b + 8 * v);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const __m256 row = _mm256_broadcast_ss(a + r * KB);
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) acc[r][v] = _mm256_fmadd_ps(row, column[v], acc[r][v]);
  }
}

template <int R, int V>
void tile(const BatchElement* batch, int count, float* c, ptrdiff_t ldc, int accumulate) {
  __m256 acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v)
      acc[r][v] = accumulate ? _mm256_loadu_ps(c + r * ldc + 8 * v) : _mm256_setzero_ps();

  for (const BatchElement* element = batch; element != batch + count; ++element) {
    const float* a = static_cast<const float*>(element->a);
    const float* b = static_cast<const float*>(element->b);
    int k = element->k;
    for (; k >= KB; k -= KB, a += MR * KB)
#pragma GCC unroll 4
      for (int p = 0; p < KB; ++p, b += NR) step<R, V>(acc, a + p, b);
    for (int p = 0; p < k; ++p, b += NR) step<R, V>(acc, a + p, b);
  }

#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) _mm256_storeu_ps(c + r * ldc + 8 * v, acc[r][v]);
}

using Tile = void (*)(const BatchElement*, int, float*, ptrdiff_t, int);
constexpr Tile kTiles[MR][2] = {{tile<1, 1>, tile<1, 2>}, {tile<2, 1>, tile<2, 2>}, {tile<3, 1>, tile<3, 2>},
                                {tile<4, 1>, tile<4, 2>}, {tile<5, 1>, tile<5, 2>}, {tile<6, 1>, tile<6, 2>}};

double peak(int rounds, void* registers) {
  constexpr int kChains = 12;  // two units, each with a latency of at most 6 multiply-adds
  float* words = static_cast<float*>(registers);
  const __m256 a = _mm256_load_ps(words), b = _mm256_load_ps(words + 8);
  __m256 acc[kChains];
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) acc[i] = _mm256_load_ps(words + 8 * i);
  for (int round = 0; round < rounds; ++round)
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) acc[i] = _mm256_fmadd_ps(a, b, acc[i]);
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) _mm256_store_ps(words + 8 * i, acc[i]);
  return 2.0 * 8 * kChains * rounds;
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

void micro_kernel(int rows, int cols, const BatchElement* batch, int count, float* c, ptrdiff_t ldc,
                  int accumulate) {
  kTiles[rows - 1][cols > 8](batch, count, c, ldc, accumulate);
}

extern const KernelSet table;
const KernelSet table = {
    .gemm = {MR, NR, KB, sizeof(float), pack_a, pack_b_cols, pack_b_rows, micro_kernel, nullptr, nullptr,
             peak, false},
    .gemv = {kGemvRows, kGemvRows / 2, gemv_nt, gemv_nn},
    .epilogue = {transpose, sum_scaled, round_scaled, activations.kernels},
    .decode = {from_f32, from_f16, {nullptr, from_int8, from_int4, from_e4m3, from_e2m1}},
};

}  // namespace kt::avx2
