// The activations' loops and the functions they need, for sets with vectors: written over the set's own Vec,
// a register of floats. A Vec has all(float), the operators + - *, mul_add, mul_sub, at_most, at_least,
// magnitude, where_negative, within, beyond, nearest_integer, and
//   exp_domain(x)             x, if times_power_of_two can make its exponential, else the nearest that it can
//   times_power_of_two(y, n)  y 2^n
//   quotient(a, b)            a / b, b >= 1
// and a set's Lanes, which elements of a Pair a row has, says how Pairs are read and written: load, store,
// stream. Everything here is local to the file that includes it, as in activations.h.
#pragma once

#include "kernels/generic/activations.h"

namespace kt {
namespace {

// Two registers: each step is written for both, because the CPU does not look far enough ahead to overlap two
// whole chains of dependent steps.
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

// Rows of n elements, as many at a time as Lanes has; of the last step only what `first` says is read or
// written. A set without masks gives whole steps alone to these loops.
template <class A, class Lanes>
void forward(int n, const float* g, const float* u, uint16_t* g_saved, uint16_t* u_saved, uint16_t* h) {
  for (int i = 0; i < n; i += Lanes::kSize) {
    const Lanes lanes = Lanes::first(n - i);
    const auto [gate, up, hidden] = activate<A>(load(lanes, g + i), load(lanes, u + i));
    stream(lanes, g_saved + i, gate);
    stream(lanes, u_saved + i, up);
    store(lanes, h + i, hidden);
  }
}

template <class A, class Lanes>
float backward(int n, const float* dh, float weight, const uint16_t* g_saved, const uint16_t* u_saved,
               uint16_t* dg, uint16_t* du, uint16_t* h) {
  using V = decltype(load(Lanes{}, dh));
  V dot = V::all(0.0f);
  for (int i = 0; i < n; i += Lanes::kSize) {
    const Lanes lanes = Lanes::first(n - i);
    const V g = load(lanes, g_saved + i), u = load(lanes, u_saved + i);
    const V gate = limited_gate<A>(g), up = limited_up<A>(u);
    const auto [value, slope] = A::value_and_slope(gate);
    const auto [factor, factor_slope] = A::factor_and_slope(up);
    const V hidden = value * factor;
    V by_gate = factor * slope, by_up = value * factor_slope;
    if constexpr (A::kLimit > 0.0f) by_gate = within(g, gate, by_gate), by_up = within(u, up, by_up);
    const V d = load(lanes, dh + i), weighted = V::all(weight) * d;
    dot = mul_add(d, hidden, dot);
    store(lanes, dg + i, weighted * by_gate);
    store(lanes, du + i, weighted * by_up);
    store(lanes, h + i, hidden);
  }
  return sum(dot);
}

// The same without a gate.
template <class A, class Lanes>
void ungated_forward(int n, const float* u, uint16_t* u_saved, uint16_t* h) {
  for (int i = 0; i < n; i += Lanes::kSize) {
    const Lanes lanes = Lanes::first(n - i);
    const auto [up, hidden] = activate<A>(load(lanes, u + i));
    stream(lanes, u_saved + i, up);
    store(lanes, h + i, hidden);
  }
}

template <class A, class Lanes>
float ungated_backward(int n, const float* dh, float weight, const uint16_t* u_saved, uint16_t* du,
                       uint16_t* h) {
  using V = decltype(load(Lanes{}, dh));
  V dot = V::all(0.0f);
  for (int i = 0; i < n; i += Lanes::kSize) {
    const Lanes lanes = Lanes::first(n - i);
    const V u = load(lanes, u_saved + i), up = limited_gate<A>(u);
    auto [hidden, slope] = A::value_and_slope(up);
    if constexpr (A::kLimit > 0.0f) slope = within(u, up, slope);
    const V d = load(lanes, dh + i);
    dot = mul_add(d, hidden, dot);
    store(lanes, du + i, V::all(weight) * d * slope);
    store(lanes, h + i, hidden);
  }
  return sum(dot);
}

}  // namespace
}  // namespace kt
