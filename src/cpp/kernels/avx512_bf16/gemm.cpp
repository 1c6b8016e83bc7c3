#include "kernels/avx512_bf16/set.h"

namespace kt::avx512_bf16 {

namespace {

// The loops over r and v are unrolled by order: gcc keeps acc in registers only when no index is left.

constexpr int kPairs = KB / 2;

// One pair of k: every row of A times V vectors of B.
template <int R, int V>
__attribute__((always_inline)) inline void step(__m512 (&acc)[R][V], const int* a, const char* b) {
  __m512bh column[V];
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) column[v] = (__m512bh)_mm512_load_si512(b + 64 * v);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const __m512bh row = (__m512bh)_mm512_set1_epi32(a[r * kPairs]);
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], row, column[v]);
  }
}

template <int R, int V>
void tile(int pairs, const void* a_panel, const void* b_panel, float* c, ptrdiff_t ldc, int accumulate) {
  __m512 acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v)
      acc[r][v] = accumulate ? _mm512_loadu_ps(c + r * ldc + 16 * v) : _mm512_setzero_ps();

  const int* a = static_cast<const int*>(a_panel);
  const char* b = static_cast<const char*>(b_panel);
  for (; pairs >= kPairs; pairs -= kPairs, a += MR * kPairs)
#pragma GCC unroll 4
    for (int p = 0; p < kPairs; ++p, b += 4 * NR) step<R, V>(acc, a + p, b);
  for (int p = 0; p < pairs; ++p, b += 4 * NR) step<R, V>(acc, a + p, b);

#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) _mm512_storeu_ps(c + r * ldc + 16 * v, acc[r][v]);
}

using Tile = void (*)(int, const void*, const void*, float*, ptrdiff_t, int);
constexpr Tile kTiles[MR][2] = {
    {tile<1, 1>, tile<1, 2>},   {tile<2, 1>, tile<2, 2>},   {tile<3, 1>, tile<3, 2>},
    {tile<4, 1>, tile<4, 2>},   {tile<5, 1>, tile<5, 2>},   {tile<6, 1>, tile<6, 2>},
    {tile<7, 1>, tile<7, 2>},   {tile<8, 1>, tile<8, 2>},   {tile<9, 1>, tile<9, 2>},
    {tile<10, 1>, tile<10, 2>}, {tile<11, 1>, tile<11, 2>}, {tile<12, 1>, tile<12, 2>},
};

}  // namespace

void micro_kernel(int rows, int cols, int k, const void* a, const void* b, float* c, ptrdiff_t ldc,
                  int accumulate) {
  kTiles[rows - 1][cols > 16]((k + 1) / 2, a, b, c, ldc, accumulate);
}

extern const KernelSet table;
const KernelSet table = {
    .gemm = {MR, NR, KB, sizeof(uint16_t), pack_a, pack_b_cols, pack_b_rows, micro_kernel, nullptr, nullptr},
    .epilogue = {},
    .decode = {},
};

}  // namespace kt::avx512_bf16
