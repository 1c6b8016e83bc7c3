// The epilogue for sets with vectors, written over the set's own Vec, a register of floats. Of one the loops
// want
//   kSize, Part             its elements, and which of them a row has: kAll, first(n)
//   load, load_bf16, store  of a Part; nothing else is read or written, and what is not there loads as 0
//   store_bf16, stream_bf16 two neighbours, rounded; the latter past the caches where whole lines are written
//   kMasks                  whether a Part costs no more than all
//   transpose_block(r)      kSize rows of kSize elements, in place
// packing and products, where a Vec also holds 2 kSize bf16, a pair in the place of each float,
//   Pairs, first_pairs(n)   which of these a row has
//   load_pairs, even, odd   loads them; the first of each pair as floats, the second
//   interleave(half)        a Vec of even columns and one of odd columns become the first and the second half
//   sum_each(x, sums)       the sums of several Vecs; `sums` has room for a multiple of four
// and the activations all(float), the operators + - *, mul_add, at_most, at_least, magnitude, where_negative,
// within, beyond, nearest_integer, sum(x) of all elements, and
//   mul_sub(a, b, c)          a b - c, rounded once: exp_minus needs the digits
//   exp_domain(x)             x, if times_power_of_two can make its exponential, else the nearest that it can
//   times_power_of_two(y, n)  y 2^n
//   quotient(a, b)            a / b, b >= 1
// Everything here is local to the file that includes it, as in activations.h.
#pragma once

#include "kernels/generic/activations.h"

namespace kt {
namespace {

// Two registers: each operation is written for both, because the CPU does not look far enough ahead to
// overlap two whole chains of dependent operations.
template <class Vec>
struct Pair {
  Vec low, high;

  static Pair all(float x) { return {Vec::all(x), Vec::all(x)}; }

  friend Pair operator+(Pair a, Pair b) { return {a.low + b.low, a.high + b.high}; }
  friend Pair operator-(Pair a, Pair b) { return {a.low - b.low, a.high - b.high}; }
  friend Pair operator*(Pair a, Pair b) { return {a.low * b.low, a.high * b.high}; }
  friend Pair mul_add(Pair a, Pair b, Pair c) {
    return {mul_add(a.low, b.low, c.low), mul_add(a.high, b.high, c.high)};
  }
  friend Pair mul_sub(Pair a, Pair b, Pair c) {
    return {mul_sub(a.low, b.low, c.low), mul_sub(a.high, b.high, c.high)};
  }
  friend Pair quotient(Pair a, Pair b) { return {quotient(a.low, b.low), quotient(a.high, b.high)}; }
  friend Pair at_most(Pair x, float most) { return {at_most(x.low, most), at_most(x.high, most)}; }
  friend Pair at_least(Pair x, float least) { return {at_least(x.low, least), at_least(x.high, least)}; }
  friend Pair magnitude(Pair x) { return {magnitude(x.low), magnitude(x.high)}; }
  friend Pair where_negative(Pair x, Pair a, Pair b) {
    return {where_negative(x.low, a.low, b.low), where_negative(x.high, a.high, b.high)};
  }
  friend Pair within(Pair x, Pair limited, Pair y) {
    return {within(x.low, limited.low, y.low), within(x.high, limited.high, y.high)};
  }
  friend Pair beyond(Pair x, Pair limited) {
    return {beyond(x.low, limited.low), beyond(x.high, limited.high)};
  }
  friend Pair nearest_integer(Pair x) { return {nearest_integer(x.low), nearest_integer(x.high)}; }
  friend Pair exp_domain(Pair x) { return {exp_domain(x.low), exp_domain(x.high)}; }
  friend Pair times_power_of_two(Pair y, Pair n) {
    return {times_power_of_two(y.low, n.low), times_power_of_two(y.high, n.high)};
  }
  friend float sum(Pair x) { return sum(x.low + x.high); }
};

// exp(-x), relative error below 3e-7. It is 2^n 2^f with n + f = -x / ln 2 and |f| <= 1/2, the factor 1 / ln
// 2 in two parts; 2^f is the minimax polynomial of degree 5 with its constant set to 1.
template <class V>
KT_INLINE V exp_minus(V any) {
  const V x = exp_domain(any), scale = V::all(-1.44269502f), scale_rest = V::all(-1.92596303e-8f);
  const V n = nearest_integer(x * scale);
  const V f = mul_add(x, scale_rest, mul_sub(x, scale, n));
  constexpr float kCoefficients[] = {9.67554096e-3f, 5.55071309e-2f, 0.240221202f, 0.693146944f, 1.0f};
  V y = V::all(1.32764725e-3f);
  for (float c : kCoefficients) y = mul_add(y, f, V::all(c));
  return times_power_of_two(y, n);
}

// Which elements of a Pair a row has.
template <class Vec>
struct Lanes {
  static constexpr int kSize = 2 * Vec::kSize;

  typename Vec::Part low = Vec::kAll, high = Vec::kAll;

  static Lanes first(int n) { return {Vec::first(n), Vec::first(n - Vec::kSize)}; }
};

template <class Vec>
KT_INLINE Pair<Vec> load(Lanes<Vec> lanes, const float* src) {
  return {Vec::load(src, lanes.low), Vec::load(src + Vec::kSize, lanes.high)};
}

template <class Vec>
KT_INLINE Pair<Vec> load(Lanes<Vec> lanes, const uint16_t* src) {
  return {Vec::load_bf16(src, lanes.low), Vec::load_bf16(src + Vec::kSize, lanes.high)};
}

template <class Vec>
KT_INLINE void store(Lanes<Vec> lanes, uint16_t* dst, Pair<Vec> x) {
  Vec::store_bf16(dst, x.low, x.high, lanes.low, lanes.high);
}

template <class Vec>
KT_INLINE void stream(Lanes<Vec> lanes, uint16_t* dst, Pair<Vec> x) {
  Vec::stream_bf16(dst, x.low, x.high, lanes.low, lanes.high);
}

// Calls body(i, lanes) for the n elements of a row. Without masks the last call overlaps the one before.
template <class Vec, class Body>
KT_INLINE void for_lanes(int n, const Body& body) {
  constexpr int kSize = Lanes<Vec>::kSize;
  int i = 0;
  for (; i + kSize <= n; i += kSize) body(i, Lanes<Vec>{});
  if (i == n) return;
  if (!Vec::kMasks && n > kSize) i = n - kSize;
  body(i, Lanes<Vec>::first(n - i));
}

// The sum over a row of what body(i, lanes, sum) adds to the elements of `sum`.
template <class Vec, class Body>
KT_INLINE float sum_lanes(int n, const Body& body) {
  constexpr int kSize = Lanes<Vec>::kSize;
  Pair<Vec> dot = Pair<Vec>::all(0.0f), edge = dot;
  int i = 0;
  for (; i + kSize <= n; i += kSize) body(i, Lanes<Vec>{}, dot);
  if (i == n) return sum(dot);
  body(i, Lanes<Vec>::first(n - i), Vec::kMasks ? dot : edge);
  return Vec::kMasks ? sum(dot) : sum(dot) + sum(edge);
}

// A template in a class, so that activation_table can be given it for a Vec. Without a gate U takes the place
// of G, and there is no factor.
template <class Vec>
struct VectorKernels {
  using V = Pair<Vec>;
  using L = Lanes<Vec>;

  template <class A, bool Gated>
  struct Of {
    static void forward(int n, const float* g, const float* u, uint16_t* g_saved, uint16_t* u_saved,
                        uint16_t* h) {
      if constexpr (!Gated) g = u, g_saved = u_saved;
      for_lanes<Vec>(n, [=](int i, L lanes) KT_INLINE_LAMBDA {
        const V gate = load(lanes, g + i), limited = limited_gate<A>(gate);
        V hidden = A::value(limited);
        stream(lanes, g_saved + i, to_save<A>(gate, limited));
        if constexpr (Gated) {
          const V up = load(lanes, u + i), limited_u = limited_up<A>(up);
          hidden = hidden * A::factor(limited_u);
          stream(lanes, u_saved + i, to_save<A>(up, limited_u));
        }
        store(lanes, h + i, hidden);
      });
    }

    static float backward(int n, const float* dh, float weight, const uint16_t* g_saved,
                          const uint16_t* u_saved, uint16_t* dg, uint16_t* du, uint16_t* h) {
      if constexpr (!Gated) g_saved = u_saved, dg = du;
      return sum_lanes<Vec>(n, [=](int i, L lanes, V& dot) KT_INLINE_LAMBDA {
        const V g = load(lanes, g_saved + i), gate = limited_gate<A>(g);
        auto [hidden, by_gate] = A::value_and_slope(gate);
        const V d = load(lanes, dh + i), weighted = V::all(weight) * d;
        if constexpr (Gated) {
          const V u = load(lanes, u_saved + i), up = limited_up<A>(u);
          const auto [factor, factor_slope] = A::factor_and_slope(up);
          V by_up = hidden * factor_slope;
          if constexpr (A::kLimit > 0.0f) by_up = within(u, up, by_up);
          store(lanes, du + i, weighted * by_up);
          hidden = hidden * factor, by_gate = factor * by_gate;
        }
        if constexpr (A::kLimit > 0.0f) by_gate = within(g, gate, by_gate);
        dot = mul_add(d, hidden, dot);
        store(lanes, dg + i, weighted * by_gate);
        store(lanes, h + i, hidden);
      });
    }
  };
};

template <class Vec>
void round_scaled(int n, float scale, const float* x, uint16_t* y) {
  for_lanes<Vec>(n, [=](int i, Lanes<Vec> lanes) KT_INLINE_LAMBDA {
    store(lanes, y + i, Pair<Vec>::all(scale) * load(lanes, x + i));
  });
}

template <class Vec>
void transpose(const float* src, ptrdiff_t src_stride, int rows, int cols, float* dst, ptrdiff_t dst_stride) {
  constexpr int kSize = Vec::kSize;
  for (int i = 0; i < rows; i += kSize)
    for (int j = 0; j < cols; j += kSize) {
      const typename Vec::Part here = Vec::first(cols - j), there = Vec::first(rows - i);
      Vec r[kSize];
      for (int p = 0; p < kSize; ++p)
        r[p] = i + p < rows ? Vec::load(src + (i + p) * src_stride + j, here) : Vec::all(0.0f);
      transpose_block(r);
      for (int p = 0; p < kSize && j + p < cols; ++p) r[p].store(dst + (j + p) * dst_stride + i, there);
    }
}

// Four vectors of every x at a time: what is far away is asked for together.
template <class Vec>
void sum_scaled(int n, int count, const float* const* x, const float* scale, float* y) {
  constexpr int kVectors = 4;
  using Parts = typename Vec::Part[kVectors];
  const auto sum_part = [=](int i, const Parts& part) KT_INLINE_LAMBDA {
    Vec sum[kVectors];
#pragma GCC unroll 4
    for (Vec& s : sum) s = Vec::all(0.0f);
    for (int j = 0; j < count; ++j) {
      const Vec factor = Vec::all(scale[j]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        sum[v] = mul_add(factor, Vec::load(x[j] + i + Vec::kSize * v, part[v]), sum[v]);
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[v].store(y + i + Vec::kSize * v, part[v]);
  };
  int i = 0;
  for (; i + kVectors * Vec::kSize <= n; i += kVectors * Vec::kSize)
    sum_part(i, {Vec::kAll, Vec::kAll, Vec::kAll, Vec::kAll});
  if (i == n) return;
  Parts part;
  for (int v = 0; v < kVectors; ++v) part[v] = Vec::first(n - i - Vec::kSize * v);
  sum_part(i, part);
}

}  // namespace
}  // namespace kt
