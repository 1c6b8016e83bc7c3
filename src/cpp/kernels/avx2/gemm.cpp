#include "kernels/avx2/set.h"

namespace kt::avx2 {

namespace {

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

void micro_kernel(int rows, int cols, const BatchElement* batch, int count, float* c, ptrdiff_t ldc,
                  int accumulate) {
  kTiles[rows - 1][cols > 8](batch, count, c, ldc, accumulate);
}

extern const KernelSet table;
const KernelSet table = {
    .gemm = {MR, NR, KB, sizeof(float), pack_a, pack_b_cols, pack_b_rows, micro_kernel, nullptr, nullptr,
             peak, false},
    .few = {kFewRows, kFewRows / 2, few_times_transposed, few_times},
    .epilogue = {transpose, sum_scaled, round_scaled, activations.kernels},
    .decode = {from_f32, from_f16, {nullptr, from_int8, from_int4, from_e4m3, from_e2m1}},
};

}  // namespace kt::avx2
