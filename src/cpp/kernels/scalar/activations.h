// The activations and their derivatives, for the sets that have a Pair: two registers of floats, with
// mul, add, sub, mul_add and mul_sub, at_most and at_least, nearest_integers, within and beyond, sigmoid and
// times_sigmoid. Pairs are local to a set's file, and so are these templates on them.
#pragma once

#include "kernels/kernel_set.h"

namespace kt {

// What forward stores: G and U to be saved, and h.
template <class Pair>
struct Activated {
  Pair gate, up, hidden;
};

// h and its derivatives.
template <class Pair>
struct Derived {
  Pair hidden, by_gate, by_up;
};

// exp(-x) is 2^whole * rest.
template <class Pair>
struct ExpParts {
  Pair whole, rest;
};

// Relative error of rest below 3e-7. exp(-x) is 2^n 2^f with n + f = -x / ln 2 and |f| <= 1/2, the factor
// 1 / ln 2 in two parts; 2^f is the minimax polynomial of degree 5 with its constant set to 1.
// Inlined into every activation: a call would pass Pairs through memory.
template <class Pair>
__attribute__((always_inline)) static inline ExpParts<Pair> exp_minus(Pair x) {
  const Pair scale = Pair::both(-1.44269502f), scale_rest = Pair::both(-1.92596303e-8f);
  const Pair n = nearest_integers(mul(x, scale));
  const Pair f = mul_add(x, scale_rest, mul_sub(x, scale, n));
  constexpr float kCoefficients[] = {9.67554096e-3f, 5.55071309e-2f, 0.240221202f, 0.693146944f, 1.0f};
  Pair y = Pair::both(1.32764725e-3f);
  for (float c : kCoefficients) y = mul_add(y, f, Pair::both(c));
  return {n, y};
}

// silu(g) = g * sigmoid(g) and its derivative sigmoid(g) * (1 + g * (1 - sigmoid(g))).
template <class Pair>
struct Silu {
  static Activated<Pair> forward(Pair g, Pair u) { return {g, u, mul(times_sigmoid(g, g), u)}; }
  static Derived<Pair> backward(Pair g, Pair u) {
    const Pair s = sigmoid(g), act = mul(g, s), slope = mul_add(act, sub(Pair::both(1.0f), s), s);
    return {mul(act, u), mul(u, slope), act};
  }
};

// The derivative of g * sigmoid(alpha * g) is s + alpha * g * s * (1 - s), s = sigmoid(alpha * g).
template <class Pair>
struct GptOss {
  static Pair limited_gate(Pair g) { return at_most(g, kGptOssLimit); }
  static Pair limited_up(Pair u) { return at_least(at_most(u, kGptOssLimit), -kGptOssLimit); }
  static Activated<Pair> forward(Pair g, Pair u) {
    const Pair gate = limited_gate(g), up = limited_up(u);
    const Pair act = times_sigmoid(gate, mul(Pair::both(kGptOssAlpha), gate));
    return {beyond(g, gate), beyond(u, up), mul(act, add(up, Pair::both(1.0f)))};
  }
  static Derived<Pair> backward(Pair g, Pair u) {
    const Pair alpha = Pair::both(kGptOssAlpha), one = Pair::both(1.0f);
    const Pair gate = limited_gate(g), up = limited_up(u), up_and_one = add(up, one);
    const Pair s = sigmoid(mul(alpha, gate)), act = mul(gate, s);
    const Pair slope = mul_add(mul(alpha, act), sub(one, s), s);
    return {mul(act, up_and_one), within(g, gate, mul(up_and_one, slope)), within(u, up, act)};
  }
};

template <class Pair>
struct ClampedSilu {
  static Pair limited_gate(Pair g) { return at_most(g, kClampedSiluLimit); }
  static Pair limited_up(Pair u) { return at_least(at_most(u, kClampedSiluLimit), -kClampedSiluLimit); }
  static Activated<Pair> forward(Pair g, Pair u) {
    const Pair gate = limited_gate(g), up = limited_up(u);
    return {beyond(g, gate), beyond(u, up), mul(times_sigmoid(gate, gate), up)};
  }
  static Derived<Pair> backward(Pair g, Pair u) {
    const Pair gate = limited_gate(g), up = limited_up(u);
    const Pair s = sigmoid(gate), act = mul(gate, s), slope = mul_add(act, sub(Pair::both(1.0f), s), s);
    return {mul(act, up), within(g, gate, mul(up, slope)), within(u, up, act)};
  }
};

// As scalar/epilogue.cpp has it.
template <class Pair>
struct GeluTanh {
  static Pair near(Pair g) { return at_least(at_most(g, kGeluFar), -kGeluFar); }
  static Pair z_of(Pair x, Pair square) {
    return mul(mul(Pair::both(kGeluSlope), x), mul_add(square, Pair::both(kGeluCubic), Pair::both(1.0f)));
  }
  static Activated<Pair> forward(Pair g, Pair u) {
    const Pair x = near(g);
    return {g, u, mul(times_sigmoid(g, z_of(x, mul(x, x))), u)};
  }
  static Derived<Pair> backward(Pair g, Pair u) {
    const Pair x = near(g), square = mul(x, x), one = Pair::both(1.0f);
    const Pair z_by_g = mul(Pair::both(kGeluSlope), mul_add(square, Pair::both(3.0f * kGeluCubic), one));
    const Pair s = sigmoid(z_of(x, square)), act = mul(g, s);
    const Pair slope = mul_add(mul(act, sub(one, s)), z_by_g, s);
    return {mul(act, u), mul(u, slope), act};
  }
};

}  // namespace kt
