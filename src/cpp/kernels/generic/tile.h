// The micro-kernel of sets with vectors, written over the set's own Vec (generic/epilogue.h says what it
// has). A step is what one multiply-add takes: 4 bytes of a row of A (kDepth of k: an fp32, or a pair of
// bf16) and two Vecs of packed B, the columns of a tile. `Traits` says how those are read and multiplied, and
// what is tuned:
//   kTileRows, kChains    rows of a tile; accumulators that hide the latency of a multiply-add
//   kMaxEdge              rows behind whole tiles that are cheaper as a GEMV than as a tile
//   kInPlace              whether rows of A may lie in a matrix
//   kFromC                whether the sum starts from C, which else is added at its end
//   kPrefetches           whether a tile prefetches its operands, and what is needed next
// `Traits` has internal linkage, and so has what is instantiated with it.
#pragma once

#include "kernels/generic/pack.h"

namespace kt {
namespace {

constexpr int kLineSteps = 16;  // in 64 bytes of a row of A

// How far a tile asks for its operands. A panel of activations comes from L3 or memory, being one of more
// than L2 holds: out-of-order execution sees 15 steps of 12 cycles ahead, too few for that. Where a panel is
// at hand, nothing is lost. What lies behind the operand may be asked for: a prefetch never faults.
constexpr int kLinesAhead = 8;   // of A
constexpr int kStepsAhead = 48;  // of B

// Rows of A, the same number of bytes apart.
template <int Rows>
struct TileRows {
  const char* fourth[(Rows + 3) / 4];  // rows 0, 4, 8, ...
  ptrdiff_t stride, thrice;            // so that no row needs a register of its own

  KT_INLINE const char* at(int r) const { return fourth[r / 4] + (r % 4 == 3 ? thrice : r % 4 * stride); }
};

// The loops over r and v are unrolled by order: gcc keeps acc in registers only when no index is left.

// One step: every row of A, at an offset, times V vectors of B.
template <class Traits, int R, int V>
KT_INLINE void add_step(typename Traits::Vec (&acc)[R][V], const TileRows<R>& a, int offset, const char* b) {
  typename Traits::Operand column[V];
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) column[v] = Traits::load(b + sizeof(typename Traits::Vec) * v);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const typename Traits::Operand row = Traits::broadcast(a.at(r) + offset);
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) acc[r][v] = Traits::multiply_add(row, column[v], acc[r][v]);
  }
}

// Into L2: packing will read it from there.
KT_INLINE void request(Prefetch& prefetch) {
  for (int i = 0; i < prefetch.lines_per_step; ++i) {
    __builtin_prefetch(prefetch.row + 64 * prefetch.line, 0, 2);
    if (++prefetch.line < prefetch.row_lines) continue;
    prefetch.line = 0;
    prefetch.row += prefetch.stride;
  }
}

// `stride` and `line`: bytes from a row of A to the next, and in a row from 64 bytes to the next. Constants
// for panels.
template <class Traits, int R, int V>
KT_INLINE void add_element(typename Traits::Vec (&acc)[R][V], const BatchElement& element, ptrdiff_t stride,
                           ptrdiff_t line) {
  constexpr int kStep = 2 * sizeof(typename Traits::Vec);  // bytes of B
  const char *first = static_cast<const char*>(element.a), *b = static_cast<const char*>(element.b);
  TileRows<R> a{{}, stride, 3 * stride};
#pragma GCC unroll 3
  for (const char*& row : a.fourth) row = first, first += 4 * stride;
  Prefetch prefetch = element.prefetch;
  int steps = (element.k + Traits::kDepth - 1) / Traits::kDepth;
  for (; steps >= kLineSteps; steps -= kLineSteps) {
    if constexpr (Traits::kPrefetches) {
      request(prefetch);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) __builtin_prefetch(a.at(r) + kLinesAhead * line);
    }
#pragma GCC unroll 4
    for (int p = 0; p < kLineSteps; ++p, b += kStep) {
      if constexpr (Traits::kPrefetches)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) __builtin_prefetch(b + kStep * kStepsAhead + kStep / 2 * v);
      add_step<Traits, R, V>(acc, a, 4 * p, b);
    }
#pragma GCC unroll 3
    for (const char*& row : a.fourth) row += line;
  }
  for (int p = 0; p < steps; ++p, b += kStep) add_step<Traits, R, V>(acc, a, 4 * p, b);
}

template <class Traits, int R, int V>
void tile(const BatchElement* batch, int count, float* c, ptrdiff_t ldc, int accumulate) {
  using Vec = typename Traits::Vec;
  const bool from_c = Traits::kFromC && accumulate;
  Vec acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) acc[r][v] = from_c ? Vec::load(c + r * ldc + Vec::kSize * v) : Vec::all(0.0f);

  for (const BatchElement* element = batch; element != batch + count; ++element) {
    if (Traits::kInPlace && element->a_stride != 0)
      add_element<Traits, R, V>(acc, *element, element->a_stride, 64);
    else  // a panel
      add_element<Traits, R, V>(acc, *element, 64, 64 * Traits::kTileRows);
  }

#pragma GCC unroll 16
  for (int r = 0; r < R; ++r, c += ldc)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      float* to = c + Vec::kSize * v;
      (!Traits::kFromC && accumulate ? Vec::load(to) + acc[r][v] : acc[r][v]).store(to);
    }
}

template <class Traits>
void micro_kernel(int rows, int cols, const BatchElement* batch, int count, float* c, ptrdiff_t ldc,
                  int accumulate) {
  with_constant<Traits::kTileRows>(rows, [&](auto r) {
    const auto by_cols = cols > Traits::Vec::kSize ? tile<Traits, r.value, 2> : tile<Traits, r.value, 1>;
    by_cols(batch, count, c, ldc, accumulate);
  });
}

// The multiply-add of a set on registers alone.
template <class Traits>
double multiply_registers(int rounds, void* registers) {
  using Vec = typename Traits::Vec;
  constexpr int kChains = Traits::kChains;
  char* bytes = static_cast<char*>(registers);
  float* words = static_cast<float*>(registers);
  const typename Traits::Operand a = Traits::load(bytes), b = Traits::load(bytes + sizeof(Vec));
  Vec acc[kChains];
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) acc[i] = Vec::load(words + Vec::kSize * i);
  for (int round = 0; round < rounds; ++round)
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) acc[i] = Traits::multiply_add(a, b, acc[i]);
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) acc[i].store(words + Vec::kSize * i);
  return 2.0 * Traits::kDepth * Vec::kSize * kChains * rounds;
}

template <class Traits>
constexpr GemmKernels gemm_kernels(PackRows* pack_a, PackRows* pack_b_cols, PackAcross* pack_b_rows) {
  return {.mr = Traits::kTileRows,
          .nr = 2 * Traits::Vec::kSize,
          .k_align = kLineSteps * Traits::kDepth,
          .element_bytes = 4 / Traits::kDepth,
          .pack_a = pack_a,
          .pack_b_cols = pack_b_cols,
          .pack_b_rows = pack_b_rows,
          .micro_kernel = micro_kernel<Traits>,
          .max_edge = Traits::kMaxEdge,
          .peak = multiply_registers<Traits>,
          .in_place = Traits::kInPlace};
}

// The Traits of sets whose panels hold fp32, but for what is tuned; and the kernels of these sets.
template <class V>
struct F32Tile {
  using Vec = V;
  using Operand = V;
  static constexpr int kDepth = 1;
  static constexpr bool kInPlace = false;

  static V load(const char* b) { return V::load(reinterpret_cast<const float*>(b)); }
  static V broadcast(const char* a) { return V::all(*reinterpret_cast<const float*>(a)); }
  static V multiply_add(V a, V b, V c) { return mul_add(a, b, c); }
};

template <class Traits, class Vec = typename Traits::Vec>
constexpr GemmKernels kF32Gemm = gemm_kernels<Traits>(pack_a_f32<Vec, Traits::kTileRows, kLineSteps>,
                                                      pack_b_cols_f32<Vec>, pack_b_rows_f32<Vec>);

}  // namespace
}  // namespace kt
