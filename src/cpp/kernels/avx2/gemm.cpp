// Panels hold fp32.
#include "kernels/avx2/set.h"
#include "kernels/generic/pack.h"

namespace kt::avx2 {

namespace {

void load_pairs(RowSource src, int j, int cols, int p, int k, Vec (&r)[8]) {
  constexpr int kPairs = 16;  // elements in them
  for (int i = 0; i < 8; ++i) {
    r[i] = Vec::all(0.0f);
    if (j + i >= cols) continue;
    const uint16_t* row = source_row(src, j + i) + p;
    r[i].x = k - p >= kPairs ? _mm256_loadu_ps((const float*)row)
                             : _mm256_load_ps((const float*)Edge<uint16_t, kPairs>(row, k - p).data);
  }
}

// The loops over r and v are unrolled by order: gcc keeps acc in registers only when no index is left.

// One k: every row of A times V vectors of B.
template <int R, int V>
KT_INLINE void add_step(__m256 (&acc)[R][V], const float* a, const float* b) {
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
      for (int p = 0; p < KB; ++p, b += NR) add_step<R, V>(acc, a + p, b);
    for (int p = 0; p < k; ++p, b += NR) add_step<R, V>(acc, a + p, b);
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

void pack_b_cols(RowSource src, int cols, int k, void* panel) {
  pack_b_cols_f32<Vec>(src, cols, k, panel, load_pairs);
}

void micro_kernel(int rows, int cols, const BatchElement* batch, int count, float* c, ptrdiff_t ldc,
                  int accumulate) {
  kTiles[rows - 1][cols > 8](batch, count, c, ldc, accumulate);
}

constexpr GemmKernels gemm = {.mr = MR,
                              .nr = NR,
                              .k_align = KB,
                              .element_bytes = sizeof(float),
                              .pack_a = pack_a_f32<Vec, MR, KB>,
                              .pack_b_cols = pack_b_cols,
                              .pack_b_rows = pack_b_rows_f32<Vec>,
                              .micro_kernel = micro_kernel,
                              .max_edge = kGemvRows / 2,
                              .peak = peak};

}  // namespace

extern const OwnKernels kernels;
const OwnKernels kernels = {.gemm = &gemm, .gemv = &gemv, .epilogue = &epilogue, .decode = &decode};

}  // namespace kt::avx2
