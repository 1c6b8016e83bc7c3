// Packing. The functions named _f32 are for sets whose panels hold fp32, written over the set's own Vec
// (generic/epilogue.h says what it has): A [k / KB][MR][KB], lines of 64 bytes reached from one pointer with
// constant offsets, and B [k][NR] with NR two Vecs. Everything here is local to the file that includes it.
#pragma once

#include "kernels/kernel_set.h"

namespace kt {
namespace {

template <int N>
struct Constant {
  static constexpr int value = N;
};

// Calls body(Constant<n>), 1 <= n <= Most.
template <int Most, class Body>
KT_INLINE void with_constant(int n, const Body& body) {
  if (n == Most) return body(Constant<Most>{});
  if constexpr (Most > 1) with_constant<Most - 1>(n, body);
}

constexpr int smaller(int a, int b) { return a < b ? a : b; }

inline const uint16_t* source_row(RowSource src, int i) {
  return src.base + (src.index ? src.index[i] : i) * src.stride;
}

constexpr int kRowsAhead = 32;  // between a prefetch, into the second cache level, and its use

// pack(P, src, cols, dst) packs the next P panels of B, of NR columns each.
template <int NR, class Pack>
void pack_b_rows_by(RowSource src, int cols, void* panels, ptrdiff_t panel_bytes, const Pack& pack) {
  char* dst = static_cast<char*>(panels);
  for (; cols > 0; cols -= 4 * NR, src.base += 4 * NR, dst += 4 * panel_bytes)
    with_constant<4>(smaller(4, (cols + NR - 1) / NR), [&](auto p) { pack(p, src, cols, dst); });
}

// Elements p to p + 2 Vec::kSize - 1 of rows i and following, as pairs and as many rows as a Vec has
// elements; zeros behind the last row and behind k. Four lines further are asked for, into the second cache
// level: in the first, rows that lie a power of two of bytes apart share a set.
template <class Vec>
void load_rows(RowSource src, int i, int rows, int p, int k, Vec (&r)[Vec::kSize]) {
  constexpr int kAhead = 4 * 32;
  for (int j = 0; j < Vec::kSize; ++j) {
    r[j] = Vec::all(0.0f);
    if (i + j >= rows) continue;
    const uint16_t* row = source_row(src, i + j) + p;
    r[j] = Vec::load_pairs(row, Vec::first_pairs(k - p));
    __builtin_prefetch(row + kAhead, 0, 2);
  }
}

template <class Vec, int MR, int KB>
void pack_a_f32(RowSource src, int rows, int k, void* panel) {
  float* dst = static_cast<float*>(panel);
  for (int i = 0; i < rows; ++i) {
    const uint16_t* row = source_row(src, i);
    for (int p = 0; p < k; p += KB)
      for (int v = 0; v < KB; v += Vec::kSize)
        Vec::load_bf16(row + p + v, Vec::first(k - p - v)).store(dst + p * MR + i * KB + v);
  }
}

// A row is read in runs of P panels' lines. One line at a time, rows that lie a power of two of bytes apart
// fall into one cache set, and what is fetched beside a line is lost before its turn comes.
template <class Vec, int P>
void pack_panels_f32(RowSource src, int k, int cols, char* dst, ptrdiff_t panel_bytes) {
  constexpr int NR = 2 * Vec::kSize, kLine = 32;
  const typename Vec::Part low = Vec::first(cols - (P - 1) * NR),
                           high = Vec::first(cols - (P - 1) * NR - Vec::kSize);
  for (int p = 0; p < k; ++p, dst += NR * sizeof(float)) {
    const uint16_t* row = source_row(src, p);
    const uint16_t* ahead = p + kRowsAhead < k ? source_row(src, p + kRowsAhead) : row;
#pragma GCC unroll 4
    for (int i = 0; i < P; ++i) {
      if (i * NR % kLine == 0) __builtin_prefetch(ahead + i * NR, 0, 2);
      const bool last = i + 1 == P;
      float* panel = reinterpret_cast<float*>(dst + i * panel_bytes);
      Vec::load_bf16(row + i * NR, last ? low : Vec::kAll).store(panel);
      Vec::load_bf16(row + i * NR + Vec::kSize, last ? high : Vec::kAll).store(panel + Vec::kSize);
    }
  }
}

template <class Vec>
void pack_b_rows_f32(RowSource src, int k, int cols, void* panels, ptrdiff_t panel_bytes) {
  pack_b_rows_by<2 * Vec::kSize>(src, cols, panels, panel_bytes,
                                 [=](auto p, RowSource from, int left, char* dst) {
                                   pack_panels_f32<Vec, p.value>(from, k, left, dst, panel_bytes);
                                 });
}

// Pairs of neighbours in k are transposed, then taken apart.
template <class Vec>
void pack_b_cols_f32(RowSource src, int cols, int k, void* panel) {
  constexpr int N = Vec::kSize, NR = 2 * N;
  float* dst = static_cast<float*>(panel);
  for (int j = 0; j < NR; j += N)
    for (int p = 0; p < k; p += 2 * N) {
      Vec r[N];
      load_rows(src, j, cols, p, k, r);
      transpose_block(r);
      for (int i = 0; i < N && p + 2 * i < k; ++i) {
        float* pair = dst + (p + 2 * i) * NR + j;
        r[i].even().store(pair);
        if (p + 2 * i + 1 < k) r[i].odd().store(pair + NR);
      }
    }
}

}  // namespace
}  // namespace kt
