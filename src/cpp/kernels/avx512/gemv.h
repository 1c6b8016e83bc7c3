// The GEMVs that the AVX-512 sets have in common. `Traits` says how a line of 32 weights is
// read and multiplied; it has internal linkage, and so has what is instantiated with it.
//
// A weight takes part in few multiplications, so what counts is how many lines are on their way from memory.
// A prefetch that finds no free miss buffer is dropped: each line is asked for far ahead and again when it is
// near, into L2 (a request into L1 holds its buffer until the line is there). Where a line takes only one or
// two instructions, the loads themselves run far enough ahead, and requests only take their buffers.
#pragma once

#include "kernels/avx512/set.h"

namespace kt {

constexpr int kLine = 32;           // bf16 in 64 bytes
constexpr int kStackBytes = 65536;  // of X or C kept in the order of use: L2 holds them
constexpr int kL1Bytes = 16384;     // of X that one pass along k uses
constexpr int kPanelRows = 16;  // rows of W' whose parts follow each other, and the far request's distance
constexpr int kNearRows = 4;    // the near one's
constexpr int kRowsBetweenSums = 32;  // rows of W between two visits to C, and the far request's distance

static constexpr int smaller(int a, int b) { return a < b ? a : b; }

// Always inlined: gcc takes a function that only prefetches for one without effect, and drops calls of it.
KT_INLINE static void request(const void* line) { _mm_prefetch((const char*)line, _MM_HINT_T1); }

// {a, b, c, d}, each summed over its lanes.
static inline __m128 sum_lanes(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// The loops over r, i and v are unrolled by order: gcc keeps acc in registers only when no index is left.

// A line of each of R weights' rows times the same line of M rows of X.
template <class Traits, int M, int R>
KT_INLINE static void dot_line(__m512 (&acc)[R * M], const char* x, const uint16_t* const (&w)[R], int p,
                               __mmask32 mask) {
  typename Traits::Line line[R];
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r) line[r] = Traits::load(w[r] + p, mask);
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r)
      acc[i * R + r] = Traits::dot(line[r], x + i * Traits::kLineBytes, acc[i * R + r]);
}

// `low` picks the first half of the columns out of both; the second half lies 8 lanes on.
static inline void interleave(__m512 (&half)[2], __m512i low) {
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  const __m512 first = _mm512_permutex2var_ps(half[0], low, half[1]);
  half[1] = _mm512_permutex2var_ps(half[0], high, half[1]);
  half[0] = first;
}

// C[M x rows] (+)= the accumulators, rows <= R.
template <int M, int R>
KT_INLINE static void add_dots(const __m512 (&acc)[R * M], int rows, float* c, ptrdiff_t ldc,
                               int accumulate) {
  float sum[(R * M + 3) / 4 * 4];
#pragma GCC unroll 4
  for (int q = 0; q < R * M; q += 4) {
    const auto part = [&](int i) { return q + i < R * M ? acc[q + i] : _mm512_setzero_ps(); };
    _mm_storeu_ps(sum + q, sum_lanes(part(0), part(1), part(2), part(3)));
  }
  for (int i = 0; i < M; ++i)
    for (int r = 0; r < rows; ++r) c[i * ldc + r] = (accumulate ? c[i * ldc + r] : 0.0f) + sum[i * R + r];
}

// C[M x rows], rows <= R, from k elements of X in the order of use and as many of each row of W.
template <class Traits, int M, int R>
static void dot_tile(const char* x, int k, const uint16_t* w, ptrdiff_t stride, int rows, ptrdiff_t far,
                     ptrdiff_t near, float* c, ptrdiff_t ldc, int accumulate) {
  const uint16_t* row[R];
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r) row[r] = w + smaller(r, rows - 1) * stride;
  __m512 acc[R * M];
#pragma GCC unroll 16
  for (int q = 0; q < R * M; ++q) acc[q] = _mm512_setzero_ps();
  int p = 0;
  for (; p + kLine <= k; p += kLine, x += M * Traits::kLineBytes) {
    if constexpr (M > Traits::kUnaided) {
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) request(row[r] + p + far);
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) request(row[r] + p + near);
    }
    dot_line<Traits, M, R>(acc, x, row, p, ~0u);
  }
  if (p < k) dot_line<Traits, M, R>(acc, x, row, p, first32(k - p));

  add_dots<M, R>(acc, rows, c, ldc, accumulate);
}

// X goes through the stack as [k / 32][M] lines: rows a power of two apart would share their cache sets.
// tile(X's lines, p, count, j, panel): the product of elements p to p + count of X and of W's rows j to j +
// R, of the panel that begins with that row; the elements before p have been added.
template <class Traits, int M, int R, class Tile>
static inline void for_dot_tiles(int n, int k, RowSource x, const Tile& tile) {
  constexpr int kWhole = kStackBytes / (M * Traits::kLineBytes) * kLine;
  constexpr int kPart = kL1Bytes / (M * Traits::kLineBytes) * kLine;
  alignas(64) char lines[kStackBytes];
  for (int begin = 0; begin < k; begin += kWhole) {
    const int whole = smaller(kWhole, k - begin);
    for (int i = 0; i < M; ++i)
      for (int p = 0; p < whole; p += kLine)
        Traits::keep(source_row(x, i) + begin + p, first32(whole - p),
                     lines + (p / kLine * M + i) * Traits::kLineBytes);
    for (int panel = 0; panel < n; panel += kPanelRows)
      for (int p = 0; p < whole; p += kPart)
        for (int j = panel; j < smaller(panel + kPanelRows, n); j += R)
          tile(lines + p / kLine * M * Traits::kLineBytes, begin + p, smaller(kPart, whole - p), j, panel);
  }
}

template <class Traits, int M>
static void gemv_nt(int n, int k, RowSource x, const uint16_t* w, ptrdiff_t stride, float* c, ptrdiff_t ldc,
                    int accumulate) {
  constexpr int R = M <= 4 ? 1 : 2;
  for_dot_tiles<Traits, M, R>(n, k, x, [&](const char* lines, int p, int count, int j, int panel) {
    const ptrdiff_t far = panel + 2 * kPanelRows <= n ? kPanelRows * stride : 0;
    const ptrdiff_t near = j + kNearRows + R <= n ? kNearRows * stride : 0;
    dot_tile<Traits, M, R>(lines, count, w + j * stride + p, stride, smaller(R, n - j), far, near, c + j, ldc,
                           accumulate || p > 0);
  });
}

// Asks for a block of W line by line in the order of memory, whatever the order of use.
struct Requests {
  const uint16_t* line;
  int left, lines;
  ptrdiff_t to_next_row;
};

KT_INLINE static void request_next(Requests& of) {
  request(of.line);
  of.line += kLine;
  if (--of.left == 0) {
    of.left = of.lines;
    of.line += of.to_next_row;
  }
}

// From column j of a block `lines` wide to the line that is used `count` lines later: in this block, or at
// the start of the one that is to_next away, never in the columns beside, which others may own. Without
// branches: a mispredicted one costs as much as several lines.
static inline ptrdiff_t lines_later(int count, int j, int lines, ptrdiff_t to_next) {
  const ptrdiff_t offset = smaller(count, lines) * kLine, width = lines * kLine;
  return offset + ((to_next - width) & -ptrdiff_t{j + offset >= width});
}

// sum[M x 32 columns] (+)= X * W for `rows` rows of W; x holds its terms as [rows / kRows][M].
template <class Traits, int M>
static void cross_tile(const uint32_t* x, int rows, const uint16_t* w, ptrdiff_t stride, int cols,
                       Requests& requests, ptrdiff_t near, ptrdiff_t nearest, float* sum, bool fresh) {
  constexpr int kRows = Traits::kRows;
  Requests far = requests;  // in registers
  const __mmask32 mask = first32(cols);
  __m512 acc[M][2];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v)
      acc[i][v] = fresh ? _mm512_setzero_ps() : _mm512_load_ps(sum + i * kLine + v * 16);
  for (int p = 0; p < rows; p += kRows, w += kRows * stride, x += M) {
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r) {
      request_next(far);
      request(w + r * stride + near);
      request(w + r * stride + nearest);
    }
    const bool all = p + kRows <= rows;
    __m512i b[2];
    Traits::load_across(w, all ? stride : 0, mask, all ? mask : 0, b);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const __m512i term = _mm512_set1_epi32(static_cast<int>(x[i]));
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) acc[i][v] = Traits::multiply_add(term, b[v], acc[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) _mm512_store_ps(sum + i * kLine + v * 16, acc[i][v]);
  requests = far;
}

// C[M x cols] (+)= the sums of its tiles, which hold columns in the order of Traits.
template <class Traits, int M>
static void store_sums(const float* sum, int cols, float* c, ptrdiff_t ldc, int accumulate) {
  for (int j = 0; j < cols; j += kLine)
    for (int i = 0; i < M; ++i, sum += kLine) {
      __m512 half[2] = {_mm512_load_ps(sum), _mm512_load_ps(sum + 16)};
      Traits::in_order(half);
      for (int h = 0; h < 2; ++h) {
        const __mmask16 mask = first16(cols - j - 16 * h);
        float* to = c + i * ldc + j + 16 * h;
        if (accumulate) half[h] = _mm512_add_ps(half[h], _mm512_maskz_loadu_ps(mask, to));
        _mm512_mask_storeu_ps(to, mask, half[h]);
      }
    }
}

// Goes through a block of rows of W line by line of columns, from top to bottom with C in registers; between
// blocks C is on the stack.
template <class Traits, int M>
static void gemv_nn(int n, int k, RowSource x, const uint16_t* w, ptrdiff_t stride, float* c, ptrdiff_t ldc,
                    int accumulate) {
  constexpr int kColumns = kStackBytes / (4 * M * kLine) * kLine;
  alignas(64) float sum[kColumns * M];
  uint32_t terms[kRowsBetweenSums / Traits::kRows * M];
  for (int begin = 0; begin < n; begin += kColumns) {
    const int cols = smaller(kColumns, n - begin), lines = (cols + kLine - 1) / kLine;
    for (int p = 0; p < k; p += kRowsBetweenSums) {
      const int rows = smaller(kRowsBetweenSums, k - p);
      for (int i = 0; i < M; ++i) Traits::keep_terms(source_row(x, i) + p, rows, terms + i, M);
      const uint16_t* block = w + p * stride + begin;
      const ptrdiff_t to_next = p + 2 * kRowsBetweenSums > k ? 0 : kRowsBetweenSums * stride;
      Requests far{block + to_next, lines, lines, stride - lines * kLine};
      for (int j = 0; j < cols; j += kLine)
        cross_tile<Traits, M>(terms, rows, block + j, stride, cols - j, far,
                              lines_later(6, j, lines, to_next), lines_later(2, j, lines, to_next),
                              sum + M * j, p == 0);
    }
    store_sums<Traits, M>(sum, cols, c + begin, ldc, accumulate);
  }
}

template <class Traits>
constexpr GemvByRows kGemvNt = {
    gemv_nt<Traits, 1>, gemv_nt<Traits, 2>, gemv_nt<Traits, 3>, gemv_nt<Traits, 4>,
    gemv_nt<Traits, 5>, gemv_nt<Traits, 6>, gemv_nt<Traits, 7>, gemv_nt<Traits, 8>,
};

template <class Traits>
constexpr GemvByRows kGemvNn = {
    gemv_nn<Traits, 1>, gemv_nn<Traits, 2>, gemv_nn<Traits, 3>, gemv_nn<Traits, 4>,
    gemv_nn<Traits, 5>, gemv_nn<Traits, 6>, gemv_nn<Traits, 7>, gemv_nn<Traits, 8>,
};

}  // namespace kt
