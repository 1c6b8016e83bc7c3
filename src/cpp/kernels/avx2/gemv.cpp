// bf16 widened to fp32 in registers, the even and the odd elements of a run of 16. As in avx512/gemv.h, each
// line of W is asked for twice ahead, since a prefetch may be dropped.
#include <string.h>

#include "kernels/avx2/set.h"
#include "kernels/generic/pack.h"

namespace kt::avx2 {

namespace {

constexpr int kRun = 16;            // bf16 in a vector
constexpr int kLine = 32;           // bf16 in 64 bytes
constexpr int kStackFloats = 8192;  // of X or C kept in the order of use
constexpr int kPanelRows = 16;  // rows of W' whose parts follow each other, and the far request's distance
constexpr int kNearRows = 4;    // the near one's
constexpr int kNearLines = 4;   // the near one's along rows of W

int smaller(int a, int b) { return a < b ? a : b; }

// Always inlined: gcc takes a function that only prefetches for one without effect, and drops calls of it.
KT_INLINE void request(const uint16_t* line) { _mm_prefetch((const char*)line, _MM_HINT_T1); }

struct Run {
  __m256 even, odd;
};

Run widen_run(__m256i bits) {
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)),
          _mm256_castsi256_ps(_mm256_and_si256(bits, upper))};
}

Run load(const uint16_t* w) { return widen_run(_mm256_loadu_si256((const __m256i*)w)); }

// The first n of 16 elements, zeros behind them; reads nothing else.
Run load_first(const uint16_t* w, int n) {
  if (n >= kRun) return load(w);
  alignas(32) uint16_t edge[kRun] = {};
  memcpy(edge, w, n * sizeof *w);
  return load(edge);
}

float sum_lanes(__m256 x) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// The loops over r and i are unrolled by order: gcc keeps acc in registers only when no index is left.

// A run of each of R rows of W times the same run of M rows of X.
template <int M, int R>
KT_INLINE void dot_run(__m256 (&acc)[R * M], const float* x, const uint16_t* const (&row)[R], int p,
                       int left) {
  Run w[R];
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r) w[r] = load_first(row[r] + p, left);
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
      acc[i * R + r] = _mm256_fmadd_ps(w[r].even, _mm256_load_ps(x + i * kRun), acc[i * R + r]);
      acc[i * R + r] = _mm256_fmadd_ps(w[r].odd, _mm256_load_ps(x + i * kRun + 8), acc[i * R + r]);
    }
}

// C[M x rows], rows <= R, from k elements of X in the order of use and as many of each row of W.
template <int M, int R>
void dot_tile(const float* x, int k, const uint16_t* w, ptrdiff_t stride, int rows, ptrdiff_t far,
              ptrdiff_t near, float* c, ptrdiff_t ldc, int accumulate) {
  const uint16_t* row[R];
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r) row[r] = w + smaller(r, rows - 1) * stride;
  __m256 acc[R * M];
#pragma GCC unroll 16
  for (int q = 0; q < R * M; ++q) acc[q] = _mm256_setzero_ps();
  int p = 0;
  for (; p + kLine <= k; p += kLine, x += 2 * M * kRun) {
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
      request(row[r] + p + far);
      request(row[r] + p + near);
    }
    dot_run<M, R>(acc, x, row, p, kRun);
    dot_run<M, R>(acc, x + M * kRun, row, p + kRun, kRun);
  }
  for (; p < k; p += kRun, x += M * kRun) dot_run<M, R>(acc, x, row, p, k - p);
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
      const float sum = sum_lanes(acc[i * R + r]);
      if (r < rows) c[i * ldc + r] = (accumulate ? c[i * ldc + r] : 0.0f) + sum;
    }
}

// X goes through the stack as [k / 16][M] runs, even elements before odd ones.
template <int M>
void gemv_nt(int n, int k, RowSource x, const uint16_t* w, ptrdiff_t stride, float* c, ptrdiff_t ldc,
             int accumulate) {
  constexpr int R = M <= 5 ? 2 : 1;
  constexpr int kWhole = kStackFloats / (M * kRun) * kRun;
  constexpr int kPart = kWhole / 2 / kRun * kRun;  // half of L1
  alignas(32) float runs[kStackFloats];
  for (int begin = 0; begin < k; begin += kWhole, w += kWhole) {
    const int whole = smaller(kWhole, k - begin);
    for (int i = 0; i < M; ++i)
      for (int p = 0; p < whole; p += kRun) {
        const Run run = load_first(source_row(x, i) + begin + p, whole - p);
        _mm256_store_ps(runs + p * M + i * kRun, run.even);
        _mm256_store_ps(runs + p * M + i * kRun + 8, run.odd);
      }
    for (int panel = 0; panel < n; panel += kPanelRows) {
      const ptrdiff_t far = panel + 2 * kPanelRows <= n ? kPanelRows * stride : 0;
      for (int p = 0; p < whole; p += kPart)
        for (int j = panel; j < smaller(panel + kPanelRows, n); j += R)
          dot_tile<M, R>(runs + p * M, smaller(kPart, whole - p), w + j * stride + p, stride,
                         smaller(R, n - j), far, j + kNearRows + R <= n ? kNearRows * stride : 0, c + j, ldc,
                         accumulate || begin + p > 0);
    }
  }
}

// sum[M][16] (+)= X * W for `rows` rows of W and a run of columns; x holds X as [rows][x_stride].
template <int M>
void cross_tile(const float* x, int x_stride, int rows, const uint16_t* w, ptrdiff_t stride, int cols,
                ptrdiff_t far, ptrdiff_t near, float* sum, bool fresh) {
  __m256 acc[M][2];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h)
      acc[i][h] = fresh ? _mm256_setzero_ps() : _mm256_load_ps(sum + i * kRun + 8 * h);
  for (int p = 0; p < rows; ++p, w += stride, x += x_stride) {
    request(w + far);
    request(w + near);
    const Run run = load_first(w, cols);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const __m256 term = _mm256_broadcast_ss(x + i);
      acc[i][0] = _mm256_fmadd_ps(term, run.even, acc[i][0]);
      acc[i][1] = _mm256_fmadd_ps(term, run.odd, acc[i][1]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) _mm256_store_ps(sum + i * kRun + 8 * h, acc[i][h]);
}

// Blocks of kBlock rows of W, in each of them runs of columns from top to bottom with C in registers; in
// between C is on the stack, even columns of a run before odd ones. A line has two runs, and has to stay in
// L1 for the second even where rows are 4 KiB apart.
template <int M>
void gemv_nn(int n, int k, RowSource x, const uint16_t* w, ptrdiff_t stride, float* c, ptrdiff_t ldc,
             int accumulate) {
  constexpr int kFirst = M <= 6 ? M : (M + 1) / 2;  // rows that the registers hold at a time
  constexpr int kBlock = M <= 6 ? 6 : 8;            // not more than a cache set has ways: see above
  constexpr int kColumns = kStackFloats / (M * kRun) * kRun;
  alignas(32) float sum[kColumns * M];
  float terms[kBlock * M];
  for (int begin = 0; begin < n; begin += kColumns) {
    const int cols = smaller(kColumns, n - begin);
    for (int p = 0; p < k; p += kBlock) {
      const int rows = smaller(kBlock, k - p);
      const ptrdiff_t far = p + 2 * kBlock <= k ? kBlock * stride : 0;
      const int width = (cols + kLine - 1) / kLine * kLine, ahead = smaller(kNearLines * kLine, width);
      for (int i = 0; i < M; ++i)
        for (int q = 0; q < rows; ++q)
          terms[q * M + i] = _mm256_cvtss_f32(widen(_mm_cvtsi32_si128(source_row(x, i)[p + q])));
      for (int j = 0; j < cols; j += kRun) {
        const uint16_t* strip = w + p * stride + begin + j;
        // In this block or at the start of the next, not in the columns beside.
        const ptrdiff_t near = j + ahead < width ? ahead : far + ahead - width;
        cross_tile<kFirst>(terms, M, rows, strip, stride, cols - j, far, near, sum + j * M, p == 0);
        if constexpr (M > kFirst)
          cross_tile<M - kFirst>(terms + kFirst, M, rows, strip, stride, cols - j, far, near,
                                 sum + j * M + kFirst * kRun, p == 0);
      }
    }
    for (int i = 0; i < M; ++i)
      for (int j = 0; j < cols; ++j) {
        const float total = sum[(j / kRun * M + i) * kRun + j % 2 * 8 + j % kRun / 2];
        float& to = c[i * ldc + begin + j];
        to = (accumulate ? to : 0.0f) + total;
      }
  }
}

constexpr GemvByRows kGemvNt = {gemv_nt<1>, gemv_nt<2>, gemv_nt<3>, gemv_nt<4>,
                                gemv_nt<5>, gemv_nt<6>, gemv_nt<7>, gemv_nt<8>};
constexpr GemvByRows kGemvNn = {gemv_nn<1>, gemv_nn<2>, gemv_nn<3>, gemv_nn<4>,
                                gemv_nn<5>, gemv_nn<6>, gemv_nn<7>, gemv_nn<8>};

}  // namespace

const GemvKernels gemv = {kGemvNt, kGemvNn};

}  // namespace kt::avx2
