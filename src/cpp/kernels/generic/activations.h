// The activations, once for every set: h = value(G) * factor(U) and the derivatives of both. Without a gate
// it is h = value(U).
//
// A set calls them on its own type V of floats, one or many, which has V::all(float), the operators + - * and
//   mul_add(a, b, c)           a b + c
//   quotient(a, b)             a / b, b >= 1
//   exp_minus(x)               exp(-x)
//   at_most, at_least(x, float)
//   magnitude(x), where_negative(x, a, b)
//   within, beyond(x, limited, ...)
// Everything here is local to the file that includes it: each set's objects keep their own copy. What a
// kernel calls is inlined into it: a call would pass vectors through memory.
#pragma once

#include "kernels/kernel_set.h"

namespace kt {
namespace {

template <class V>
struct WithSlope {
  V value, slope;
};

template <class V>
KT_INLINE V times_sigmoid(V a, V x) {
  return quotient(a, exp_minus(x) + V::all(1.0f));
}

template <class V>
KT_INLINE V sigmoid(V x) {
  return times_sigmoid(V::all(1.0f), x);
}

// A distribution function and its density.
template <class V>
struct Distribution {
  V below, density;
};

// The normal distribution. Its tail is P(-t) = exp(-t^2 / 2) m(t), t >= 0, and m, half of the scaled
// complementary error function of t / sqrt(2), is k times the minimax polynomial of degree 7 in k = 1 / (1 +
// 0.3 t). The relative error is below 5e-7, and that of t^2 in fp32 adds t^2 / 2 times its own.
template <class V>
KT_INLINE Distribution<V> normal(V x) {
  const V t = magnitude(x), one = V::all(1.0f);
  const V e = exp_minus(V::all(0.5f) * t * t), k = quotient(one, mul_add(t, V::all(0.3f), one));
  constexpr float kCoefficients[] = {-0.156158209f, 0.204556361f, -0.052033633f, 0.127691567f,
                                     0.100176007f,  0.120712124f, 0.119632006f};
  V m = V::all(0.0354236774f);
  for (float c : kCoefficients) m = mul_add(m, k, V::all(c));
  const V tail = e * (k * m);
  return {where_negative(x, tail, one - tail), V::all(0.398942280f) * e};
}

// tanh(t) is (1 - e) / (1 + e) with e = exp(-2 t), t >= 0; near 0, where that cancels, its series. The
// relative error is below 5e-7.
template <class V>
KT_INLINE WithSlope<V> tanh_and_slope(V x) {
  constexpr float kFar = 20.0f, kNear = 0.2f;  // from the former on tanh is 1
  const V t = at_most(magnitude(x), kFar), square = t * t, one = V::all(1.0f);
  const V e = mul_add(t, V::all(0.0f), exp_minus(t + t));  // so that a NaN stays one
  const V q = quotient(one, one + e);
  const V series =
      mul_add(mul_add(square, V::all(-17.0f / 315), V::all(2.0f / 15)), square, V::all(-1.0f / 3));
  const V near = mul_add(series * square, t, t),
          value = where_negative(t - V::all(kNear), near, (one - e) * q);
  return {where_negative(x, V::all(0.0f) - value, value), V::all(4.0f) * e * (q * q)};
}

template <class V>
KT_INLINE WithSlope<V> softcap_and_slope(V x, float cap) {
  const auto [tanh, slope] = tanh_and_slope(x * V::all(1.0f / cap));
  return {V::all(cap) * tanh, slope};
}

// What most activations have: no limit, and U itself as the factor.
struct Unlimited {
  static constexpr float kLimit = 0.0f;
};

struct TimesUp {
  template <class V>
  KT_INLINE static V factor(V u) {
    return u;
  }
  template <class V>
  KT_INLINE static WithSlope<V> factor_and_slope(V u) {
    return {u, V::all(1.0f)};
  }
};

// g * sigmoid(g), whose slope is s + g * s * (1 - s), s = sigmoid(g).
struct Silu : Unlimited, TimesUp {
  template <class V>
  KT_INLINE static V value(V g) {
    return times_sigmoid(g, g);
  }
  template <class V>
  KT_INLINE static WithSlope<V> value_and_slope(V g) {
    const V s = sigmoid(g), value = g * s;
    return {value, mul_add(value, V::all(1.0f) - s, s)};
  }
};

struct ClampedSilu : Silu {
  static constexpr float kLimit = kClampedSiluLimit;
};

// g * sigmoid(alpha * g), whose slope is s + alpha * g * s * (1 - s), s = sigmoid(alpha * g).
struct GptOss {
  static constexpr float kLimit = kGptOssLimit;
  template <class V>
  KT_INLINE static V value(V g) {
    return times_sigmoid(g, V::all(kGptOssAlpha) * g);
  }
  template <class V>
  KT_INLINE static WithSlope<V> value_and_slope(V g) {
    const V alpha = V::all(kGptOssAlpha), s = sigmoid(alpha * g), value = g * s;
    return {value, mul_add(alpha * value, V::all(1.0f) - s, s)};
  }
  template <class V>
  KT_INLINE static V factor(V u) {
    return u + V::all(1.0f);
  }
  template <class V>
  KT_INLINE static WithSlope<V> factor_and_slope(V u) {
    return {factor(u), V::all(1.0f)};
  }
};

// g * sigmoid(z) with z = slope * (g + cubic * g^3), whose slope is s + g * s * (1 - s) * dz / dg. z is taken
// of a g that is not far, so that no infinity meets the 0 of s or 1 - s.
struct GeluTanh : Unlimited, TimesUp {
  template <class V>
  KT_INLINE static V near(V g) {
    return at_least(at_most(g, kGeluFar), -kGeluFar);
  }
  template <class V>
  KT_INLINE static V z_of(V x, V square) {
    return V::all(kGeluSlope) * x * mul_add(square, V::all(kGeluCubic), V::all(1.0f));
  }
  template <class V>
  KT_INLINE static V value(V g) {
    const V x = near(g);
    return times_sigmoid(g, z_of(x, x * x));
  }
  template <class V>
  KT_INLINE static WithSlope<V> value_and_slope(V g) {
    const V x = near(g), square = x * x, one = V::all(1.0f);
    const V z_by_g = V::all(kGeluSlope) * mul_add(square, V::all(3.0f * kGeluCubic), one);
    const V s = sigmoid(z_of(x, square)), value = g * s;
    return {value, mul_add(value * (one - s), z_by_g, s)};
  }
};

// g * P(g), whose slope is P(g) + g * p(g): P is the normal distribution, p its density. Both are taken of a
// g that is not far, as above.
struct Gelu : Unlimited, TimesUp {
  template <class V>
  KT_INLINE static V value(V g) {
    return g * normal(GeluTanh::near(g)).below;
  }
  template <class V>
  KT_INLINE static WithSlope<V> value_and_slope(V g) {
    const V x = GeluTanh::near(g);
    const auto [below, density] = normal(x);
    return {g * below, mul_add(x, density, below)};
  }
};

struct SoftcappedSilu : Unlimited {
  template <class V>
  KT_INLINE static V value(V g) {
    return softcap_and_slope(g, kGateSoftcap).value * sigmoid(g);
  }
  template <class V>
  KT_INLINE static WithSlope<V> value_and_slope(V g) {
    const auto [capped, slope] = softcap_and_slope(g, kGateSoftcap);
    const V s = sigmoid(g), value = capped * s;
    return {value, mul_add(value, V::all(1.0f) - s, slope * s)};
  }
  template <class V>
  KT_INLINE static V factor(V u) {
    return softcap_and_slope(u, kUpSoftcap).value;
  }
  template <class V>
  KT_INLINE static WithSlope<V> factor_and_slope(V u) {
    return softcap_and_slope(u, kUpSoftcap);
  }
};

// relu(g)^2, whose slope is 2 relu(g).
struct Relu2 : Unlimited, TimesUp {
  template <class V>
  KT_INLINE static V value(V g) {
    const V x = at_least(g, 0.0f);
    return x * x;
  }
  template <class V>
  KT_INLINE static WithSlope<V> value_and_slope(V g) {
    const V x = at_least(g, 0.0f);
    return {x * x, x + x};
  }
};

// In the order of `Activation`.
template <class... A>
struct List {};
using Activations = List<Silu, GptOss, ClampedSilu, GeluTanh, Gelu, SoftcappedSilu, Relu2>;

template <template <class, bool> class Kernels, class... A>
constexpr ActivationTable table_of(List<A...>) {
  static_assert(sizeof...(A) == kActivationCount);
  return {{{Kernels<A, true>::forward, Kernels<A, true>::backward}...},
          {{Kernels<A, false>::forward, Kernels<A, false>::backward}...}};
}

// A set's table, from a template of its kernels for an activation and for whether there is a gate.
template <template <class, bool> class Kernels>
constexpr ActivationTable activation_table() {
  return table_of<Kernels>(Activations{});
}

// What lies beyond an activation's limit is the limit.
template <class A, class V>
KT_INLINE V limited_gate(V g) {
  if constexpr (A::kLimit > 0.0f) return at_most(g, A::kLimit);
  return g;
}

template <class A, class V>
KT_INLINE V limited_up(V u) {
  if constexpr (A::kLimit > 0.0f) return at_least(at_most(u, A::kLimit), -A::kLimit);
  return u;
}

// A G or U to be saved, of which `limited` is what its limit leaves.
template <class A, class V>
KT_INLINE V to_save(V x, V limited) {
  if constexpr (A::kLimit > 0.0f) return beyond(x, limited);
  return x;
}

}  // namespace
}  // namespace kt
