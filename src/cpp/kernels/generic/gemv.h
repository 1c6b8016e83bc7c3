// The GEMVs of sets with vectors, written over the set's own Vec (generic/epilogue.h says what it has).
// `Traits` says how a run of weights, a register full of bf16, is read and multiplied, and what is tuned for
// the set:
//   Run, load(w, pairs)        a run of a row of W; zeros behind what there is of it
//   kRunBytes, keep            of X, for a run of W; keep(x, pairs, to) stores them
//   dot(run, x, c)             c += the run times such bytes of X
//   kRows, Terms, load_across  rows of W in a term of `nn`; load_across loads kRun columns of them
//   keep_terms, broadcast      the same elements of X, as 32 bits a term, and one of these in all lanes
//   multiply_add, in_order     c += terms * columns; the sums' columns in the order of C
//   kStackBytes                of X or C kept in the order of use
//   kUnaided                   rows of X whose loads need no requests along k
//   dot_rows, tile_rows(m)     rows of W in a tile of `nt`, and of m rows of X those in a tile of `nn`
//   block_rows(m)              rows of W between two visits to C, and the far request's distance
//   kInOrder, kNearLines       whether far requests go line by line through the block; the near ones'
//   distances
// `Traits` has internal linkage, and so has what is instantiated with it.
//
// A weight takes part in few multiplications, so what counts is how many lines are on their way from memory.
// A prefetch that finds no free miss buffer is dropped: each line is asked for far ahead and again when it is
// near, into L2 (a request into L1 holds its buffer until the line is there). Where a line takes only one or
// two instructions, the loads themselves run far enough ahead, and requests only take their buffers.
#pragma once

#include "kernels/generic/groups.h"
#include "kernels/generic/pack.h"

namespace kt {
namespace {

constexpr int kLine = 32;        // bf16 in 64 bytes
constexpr int kL1Bytes = 16384;  // of X that one pass along k uses
constexpr int kPanelRows = 16;   // rows of W' whose parts follow each other, and the far request's distance
constexpr int kNearRows = 4;     // the near one's

// Always inlined: gcc takes a function that only prefetches for one without effect, and drops calls of it.
KT_INLINE void request(const void* line) { __builtin_prefetch(line, 0, 2); }

template <class Vec>
constexpr int kRun = 2 * Vec::kSize;  // bf16 in a register, and columns of a tile of `nn`

// The loops over r, i and v are unrolled by order: gcc keeps acc in registers only when no index is left.

// A run of each of R weights' rows times the same run of M rows of X.
template <class Traits, int M, int R>
KT_INLINE void dot_run(typename Traits::Vec (&acc)[R * M], const char* x, const uint16_t* const (&w)[R],
                       int p, typename Traits::Vec::Pairs pairs) {
  typename Traits::Run run[R];
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r) run[r] = Traits::load(w[r] + p, pairs);
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r)
      acc[i * R + r] = Traits::dot(run[r], x + i * Traits::kRunBytes, acc[i * R + r]);
}

// C[M x rows] (+)= the accumulators, rows <= R.
template <int M, int R, class Vec>
KT_INLINE void add_dots(const Vec (&acc)[R * M], int rows, float* c, ptrdiff_t ldc, int accumulate) {
  float sum[(R * M + 3) / 4 * 4];
  sum_each(acc, sum);
  for (int i = 0; i < M; ++i)
    for (int r = 0; r < rows; ++r) c[i * ldc + r] = (accumulate ? c[i * ldc + r] : 0.0f) + sum[i * R + r];
}

// C[M x rows], rows <= R, from k elements of X in the order of use and as many of each row of W.
template <class Traits, int M, int R>
void dot_tile(const char* x, int k, const uint16_t* w, ptrdiff_t stride, int rows, ptrdiff_t far,
              ptrdiff_t near, float* c, ptrdiff_t ldc, int accumulate) {
  using Vec = typename Traits::Vec;
  constexpr int N = kRun<Vec>;
  const uint16_t* row[R];
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r) row[r] = w + smaller(r, rows - 1) * stride;
  Vec acc[R * M];
#pragma GCC unroll 16
  for (int q = 0; q < R * M; ++q) acc[q] = Vec::all(0.0f);
  int p = 0;
  for (; p + kLine <= k; p += kLine) {
    if constexpr (M > Traits::kUnaided) {
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) request(row[r] + p + far);
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) request(row[r] + p + near);
    }
#pragma GCC unroll 4
    for (int q = 0; q < kLine; q += N, x += M * Traits::kRunBytes)
      dot_run<Traits, M, R>(acc, x, row, p + q, Vec::first_pairs(N));
  }
  for (; p < k; p += N, x += M * Traits::kRunBytes) {
    dot_run<Traits, M, R>(acc, x, row, p, Vec::first_pairs(k - p));
    if constexpr (N == kLine) break;  // so that a rank of 8 costs no loop
  }
  add_dots<M, R>(acc, rows, c, ldc, accumulate);
}

// X goes through the stack as [runs of k][M]: rows a power of two apart would share their cache sets.
// tile(X's runs, p, count, j, panel): the product of elements p to p + count of X and of W's rows j to j + R,
// of the panel that begins with that row; the elements before p have been added.
template <class Traits, int M, int R, class Tile>
inline void for_dot_tiles(int n, int k, RowSource x, const Tile& tile) {
  using Vec = typename Traits::Vec;
  constexpr int N = kRun<Vec>, kBytes = M * Traits::kRunBytes;
  constexpr int kWhole = Traits::kStackBytes / kBytes * N, kPart = kL1Bytes / kBytes * N;
  alignas(64) char runs[Traits::kStackBytes];
  for (int begin = 0; begin < k; begin += kWhole) {
    const int whole = smaller(kWhole, k - begin);
    for (int i = 0; i < M; ++i)
      for (int p = 0; p < whole; p += N)
        Traits::keep(source_row(x, i) + begin + p, Vec::first_pairs(whole - p),
                     runs + (p / N * M + i) * Traits::kRunBytes);
    for (int panel = 0; panel < n; panel += kPanelRows)
      for (int p = 0; p < whole; p += kPart)
        for (int j = panel; j < smaller(panel + kPanelRows, n); j += R)
          tile(runs + p / N * kBytes, begin + p, smaller(kPart, whole - p), j, panel);
  }
}

template <class Traits, int M>
void gemv_nt_of(int n, int k, RowSource x, const uint16_t* w, ptrdiff_t stride, float* c, ptrdiff_t ldc,
                int accumulate) {
  constexpr int R = Traits::dot_rows(M);
  for_dot_tiles<Traits, M, R>(n, k, x, [&](const char* runs, int p, int count, int j, int panel) {
    const ptrdiff_t far = panel + 2 * kPanelRows <= n ? kPanelRows * stride : 0;
    const ptrdiff_t near = j + kNearRows + R <= n ? kNearRows * stride : 0;
    dot_tile<Traits, M, R>(runs, count, w + j * stride + p, stride, smaller(R, n - j), far, near, c + j, ldc,
                           accumulate || p > 0);
  });
}

// What is asked for in `nn` while a block of W is multiplied, line by line of a row: a line of the next block
// (to_next away), by the order of memory or in the order of use, and some near ones.
template <class Traits>
struct Requests {
  static constexpr int kNear = sizeof Traits::kNearLines / sizeof *Traits::kNearLines;

  const uint16_t* line;
  int left, lines;
  ptrdiff_t stride, to_next;
  ptrdiff_t near[kNear] = {};

  // In this block, or at the start of the next one, never in the columns beside, which others may own.
  // Without branches: a mispredicted one costs as much as several lines.
  void from_column(int j) {
    const ptrdiff_t width = lines * kLine;
    for (int i = 0; i < kNear; ++i) {
      const ptrdiff_t offset = smaller(Traits::kNearLines[i], lines) * kLine;
      near[i] = offset + ((to_next - width) & -ptrdiff_t{j + offset >= width});
    }
  }

  KT_INLINE void beside(const uint16_t* w) {
    if constexpr (Traits::kInOrder) {
      request(line);
      line += kLine;
      if (--left == 0) {
        left = lines;
        line += stride - lines * kLine;
      }
    } else {
      request(w + to_next);
    }
#pragma GCC unroll 2
    for (const ptrdiff_t distance : near) request(w + distance);
  }
};

// sum[M x a run of columns] (+)= X * W for `rows` rows of W; x holds its terms as [rows / kRows][All].
template <class Traits, int M, int All>
void cross_tile(const uint32_t* x, int rows, const uint16_t* w, ptrdiff_t stride, int cols,
                Requests<Traits>& requests, float* sum, bool fresh) {
  using Vec = typename Traits::Vec;
  constexpr int kRows = Traits::kRows, kSize = Vec::kSize;
  Requests<Traits> next = requests;  // in registers
  const typename Vec::Pairs pairs = Vec::first_pairs(cols);
  Vec acc[M][2];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) acc[i][v] = fresh ? Vec::all(0.0f) : Vec::load(sum + (2 * i + v) * kSize);
  for (int p = 0; p < rows; p += kRows, w += kRows * stride, x += All) {
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r) next.beside(w + r * stride);
    const bool all = p + kRows <= rows;
    typename Traits::Terms b[2];
    Traits::load_across(w, all ? stride : 0, pairs, all ? pairs : 0, b);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const typename Traits::Terms term = Traits::broadcast(x[i]);
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) acc[i][v] = Traits::multiply_add(term, b[v], acc[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) acc[i][v].store(sum + (2 * i + v) * kSize);
  requests = next;
}

// C[M x cols] (+)= the sums of its tiles, which hold columns in the order of Traits.
template <class Traits, int M>
void store_sums(const float* sum, int cols, float* c, ptrdiff_t ldc, int accumulate) {
  using Vec = typename Traits::Vec;
  constexpr int kSize = Vec::kSize;
  for (int j = 0; j < cols; j += 2 * kSize)
    for (int i = 0; i < M; ++i, sum += 2 * kSize) {
      Vec half[2] = {Vec::load(sum), Vec::load(sum + kSize)};
      Traits::in_order(half);
      for (int h = 0; h < 2; ++h) {
        const typename Vec::Part part = Vec::first(cols - j - h * kSize);
        float* to = c + i * ldc + j + h * kSize;
        if (accumulate) half[h] = half[h] + Vec::load(to, part);
        half[h].store(to, part);
      }
    }
}

// Goes through a block of rows of W run by run of columns, from top to bottom with C in registers; between
// blocks C is on the stack.
template <class Traits, int M>
void gemv_nn_of(int n, int k, RowSource x, const uint16_t* w, ptrdiff_t stride, float* c, ptrdiff_t ldc,
                int accumulate) {
  constexpr int N = kRun<typename Traits::Vec>, kBlock = Traits::block_rows(M);
  constexpr int kFirst = Traits::tile_rows(M), kColumns = Traits::kStackBytes / (4 * M * N) * N;
  alignas(64) float sum[kColumns * M];
  uint32_t terms[kBlock / Traits::kRows * M];
  for (int begin = 0; begin < n; begin += kColumns) {
    const int cols = smaller(kColumns, n - begin), lines = (cols + kLine - 1) / kLine;
    for (int p = 0; p < k; p += kBlock) {
      const int rows = smaller(kBlock, k - p);
      for (int i = 0; i < M; ++i) Traits::keep_terms(source_row(x, i) + p, rows, terms + i, M);
      const uint16_t* block = w + p * stride + begin;
      const ptrdiff_t to_next = p + 2 * kBlock > k ? 0 : kBlock * stride;
      Requests<Traits> requests{block + to_next, lines, lines, stride, to_next};
      for (int j = 0; j < cols; j += N) {
        requests.from_column(j);
        float* to = sum + M * j;
        cross_tile<Traits, kFirst, M>(terms, rows, block + j, stride, cols - j, requests, to, p == 0);
        if constexpr (M > kFirst)
          cross_tile<Traits, M - kFirst, M>(terms + kFirst, rows, block + j, stride, cols - j, requests,
                                            to + kFirst * N, p == 0);
      }
    }
    store_sums<Traits, M>(sum, cols, c + begin, ldc, accumulate);
  }
}

template <class Traits>
void gemv_nt(int rows, int n, int k, RowSource x, const uint16_t* w, ptrdiff_t stride, float* c,
             ptrdiff_t ldc, int accumulate) {
  with_constant<kGemvRows>(
      rows, [&](auto m) { gemv_nt_of<Traits, m.value>(n, k, x, w, stride, c, ldc, accumulate); });
}

template <class Traits>
void gemv_nn(int rows, int n, int k, RowSource x, const uint16_t* w, ptrdiff_t stride, float* c,
             ptrdiff_t ldc, int accumulate) {
  with_constant<kGemvRows>(
      rows, [&](auto m) { gemv_nn_of<Traits, m.value>(n, k, x, w, stride, c, ldc, accumulate); });
}

// The Traits of sets that widen bf16 to fp32 where it is, the even and the odd elements of a run, but for
// what is tuned.
template <class V>
struct F32Gemv {
  using Vec = V;
  using Terms = V;
  struct Run {
    V even, odd;
  };
  static constexpr int kRunBytes = 2 * sizeof(V), kRows = 1;

  static Run load(const uint16_t* w, typename V::Pairs pairs) {
    const V bits = V::load_pairs(w, pairs);
    return {bits.even(), bits.odd()};
  }
  static V dot(Run w, const char* x, V c) {
    const float* terms = reinterpret_cast<const float*>(x);
    return mul_add(w.odd, V::load(terms + V::kSize), mul_add(w.even, V::load(terms), c));
  }
  static void keep(const uint16_t* x, typename V::Pairs pairs, char* to) {
    const Run run = load(x, pairs);
    run.even.store(reinterpret_cast<float*>(to));
    run.odd.store(reinterpret_cast<float*>(to) + V::kSize);
  }

  static void load_across(const uint16_t* w, ptrdiff_t, typename V::Pairs pairs, typename V::Pairs,
                          V (&columns)[2]) {
    const Run run = load(w, pairs);
    columns[0] = run.even, columns[1] = run.odd;
  }
  static V broadcast(uint32_t term) { return V::all(from_bits(term)); }
  static V multiply_add(V x, V w, V c) { return mul_add(x, w, c); }
  static void keep_terms(const uint16_t* x, int rows, uint32_t* to, int stride) {
    for (int p = 0; p < rows; ++p, to += stride) *to = uint32_t{x[p]} << 16;
  }
  static void in_order(V (&half)[2]) { interleave(half); }
};

}  // namespace
}  // namespace kt
