// The micro-kernel that the AVX-512 sets have in common. A step is what one multiply-add takes: 4 bytes of a
// row of A (kDepth of k: an fp32, or a pair of bf16) and 4 * kTileCols bytes of packed B. `Traits` says how
// those are read and multiplied, and whether rows of A may lie in a matrix; it has internal linkage, and so
// has what is instantiated with it.
#pragma once

#include "kernels/avx512/set.h"

namespace kt {

// How far prefetch a tile asks for its operands. A panel of activations comes from L3 or memory, being one of
// more than L2 holds: out-of-order execution sees 15 steps of 12 cycles prefetch, too few for that. Where a
// panel is at hand, nothing is lost. What lies behind the operand may be asked for: a prefetch never faults.
constexpr int kRunsAhead = 8;    // of A
constexpr int kStepsAhead = 48;  // of B

// Rows of A, the same number of bytes apart.
struct TileRows {
  const char* fourth[kTileRows / 4];  // rows 0, 4 and 8
  ptrdiff_t stride, thrice;           // so that no row needs a register of its own
};

KT_INLINE static const char* row_of(const TileRows& a, int r) {
  return a.fourth[r / 4] + (r % 4 == 3 ? a.thrice : r % 4 * a.stride);
}

// The loops over r and v are unrolled by order: gcc keeps acc in registers only when no index is left.

// One step: every row of A, at an offset, times V vectors of B.
template <class Traits, int R, int V>
KT_INLINE static void add_step(__m512 (&acc)[R][V], const TileRows& a, int offset, const char* b) {
  typename Traits::Operand column[V];
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) column[v] = Traits::load(b + 64 * v);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const typename Traits::Operand row = Traits::broadcast(row_of(a, r) + offset);
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) acc[r][v] = Traits::multiply_add(row, column[v], acc[r][v]);
  }
}

// Into L2: packing will read it from there.
KT_INLINE static void request(Prefetch& prefetch) {
  for (int i = 0; i < prefetch.lines_per_step; ++i) {
    _mm_prefetch(prefetch.row + 64 * prefetch.line, _MM_HINT_T1);
    if (++prefetch.line < prefetch.row_lines) continue;
    prefetch.line = 0;
    prefetch.row += prefetch.stride;
  }
}

// `stride` and `run`: bytes from a row of A to the next, and from a run to the next. Constants for panels.
template <class Traits, int R, int V>
KT_INLINE static void add_element(__m512 (&acc)[R][V], const BatchElement& element, ptrdiff_t stride,
                                  ptrdiff_t run) {
  const char *first = static_cast<const char*>(element.a), *b = static_cast<const char*>(element.b);
  TileRows a{{first, first + 4 * stride, first + 8 * stride}, stride, 3 * stride};
  Prefetch prefetch = element.prefetch;
  int steps = (element.k + Traits::kDepth - 1) / Traits::kDepth;
  for (; steps >= kRun; steps -= kRun) {
    request(prefetch);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) _mm_prefetch(row_of(a, r) + kRunsAhead * run, _MM_HINT_T0);
#pragma GCC unroll 4
    for (int p = 0; p < kRun; ++p, b += 4 * kTileCols) {
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) _mm_prefetch(b + 4 * kTileCols * kStepsAhead + 64 * v, _MM_HINT_T0);
      add_step<Traits, R, V>(acc, a, 4 * p, b);
    }
#pragma GCC unroll 3
    for (const char*& row : a.fourth) row += run;
  }
  for (int p = 0; p < steps; ++p, b += 4 * kTileCols) add_step<Traits, R, V>(acc, a, 4 * p, b);
}

template <class Traits, int R, int V>
static void tile(const BatchElement* batch, int count, float* c, ptrdiff_t ldc, int accumulate) {
  __m512 acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) acc[r][v] = _mm512_setzero_ps();

  for (const BatchElement* element = batch; element != batch + count; ++element) {
    if (Traits::kInPlace && element->a_stride != 0)
      add_element<Traits, R, V>(acc, *element, element->a_stride, 64);
    else  // a panel
      add_element<Traits, R, V>(acc, *element, 64, 64 * kTileRows);
  }

#pragma GCC unroll 16
  for (int r = 0; r < R; ++r, c += ldc)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v)
      _mm512_storeu_ps(c + 16 * v,
                       accumulate ? _mm512_add_ps(_mm512_loadu_ps(c + 16 * v), acc[r][v]) : acc[r][v]);
}

using Tile = void (*)(const BatchElement*, int, float*, ptrdiff_t, int);

template <class Traits, int R>
constexpr Tile kTilesOf[2] = {tile<Traits, R, 1>, tile<Traits, R, 2>};

template <class Traits>
constexpr const Tile* kTiles[kTileRows] = {
    kTilesOf<Traits, 1>, kTilesOf<Traits, 2>,  kTilesOf<Traits, 3>,  kTilesOf<Traits, 4>,
    kTilesOf<Traits, 5>, kTilesOf<Traits, 6>,  kTilesOf<Traits, 7>,  kTilesOf<Traits, 8>,
    kTilesOf<Traits, 9>, kTilesOf<Traits, 10>, kTilesOf<Traits, 11>, kTilesOf<Traits, 12>,
};

// The multiply-add of a set on registers alone.
template <class Traits>
static double multiply_registers(int rounds, void* registers) {
  constexpr int kChains = 16;  // two units, each with a latency of at most 8 multiply-adds
  char* words = static_cast<char*>(registers);
  const typename Traits::Operand a = Traits::load(words), b = Traits::load(words + 64);
  __m512 acc[kChains];
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) acc[i] = _mm512_load_ps(words + 64 * i);
  for (int round = 0; round < rounds; ++round)
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) acc[i] = Traits::multiply_add(a, b, acc[i]);
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) _mm512_store_ps(words + 64 * i, acc[i]);
  return 2.0 * Traits::kDepth * 16 * kChains * rounds;
}

}  // namespace kt
