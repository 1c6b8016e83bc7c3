#include <math.h>

#include "kernels/generic/activations.h"
#include "kernels/scalar/set.h"

namespace kt::scalar {

namespace {

struct Vec {  // of one float
  float x;

  static Vec all(float value) { return {value}; }
};

Vec operator+(Vec a, Vec b) { return {a.x + b.x}; }
Vec operator-(Vec a, Vec b) { return {a.x - b.x}; }
Vec operator*(Vec a, Vec b) { return {a.x * b.x}; }
Vec mul_add(Vec a, Vec b, Vec c) { return c + a * b; }
Vec quotient(Vec a, Vec b) { return {a.x * (1.0f / b.x)}; }
Vec exp_minus(Vec x) { return {expf(-x.x)}; }

// A NaN stays one.
Vec at_most(Vec x, float most) { return {x.x > most ? most : x.x}; }
Vec at_least(Vec x, float least) { return {x.x < least ? least : x.x}; }

Vec magnitude(Vec x) { return {fabsf(x.x)}; }
Vec where_negative(Vec x, Vec a, Vec b) { return x.x < 0.0f ? a : b; }

bool changed(Vec x, Vec limited) { return x.x < limited.x || x.x > limited.x; }
Vec beyond(Vec x, Vec limited) { return changed(x, limited) ? x * Vec::all(kBeyondLimit) : x; }

// Without a gate U takes the place of G, and there is no factor.
template <class A, bool Gated>
struct Kernels {
  static void forward(int n, const float* g, const float* u, uint16_t* g_saved, uint16_t* u_saved,
                      uint16_t* h) {
    if (!Gated) g = u, g_saved = u_saved;
    for (int i = 0; i < n; ++i) {
      const Vec gate{g[i]}, limited = limited_gate<A>(gate);
      Vec hidden = A::value(limited);
      g_saved[i] = round(to_save<A>(gate, limited).x);
      if constexpr (Gated) {
        const Vec up{u[i]}, limited_u = limited_up<A>(up);
        hidden = hidden * A::factor(limited_u);
        u_saved[i] = round(to_save<A>(up, limited_u).x);
      }
      h[i] = round(hidden.x);
    }
  }

  static float backward(int n, const float* dh, float weight, const uint16_t* g_saved,
                        const uint16_t* u_saved, uint16_t* dg, uint16_t* du, uint16_t* h) {
    if (!Gated) g_saved = u_saved, dg = du;
    float dot = 0.0f;
    for (int i = 0; i < n; ++i) {
      const Vec g{widen(g_saved[i])}, gate = limited_gate<A>(g);
      auto [hidden, slope] = A::value_and_slope(gate);
      float d_value = weight * dh[i];
      if constexpr (Gated) {
        const Vec u{widen(u_saved[i])}, up = limited_up<A>(u);
        const auto [factor, factor_slope] = A::factor_and_slope(up);
        du[i] = changed(u, up) ? 0 : round(d_value * hidden.x * factor_slope.x);
        hidden = hidden * factor, d_value *= factor.x;
      }
      dot += dh[i] * hidden.x;
      dg[i] = changed(g, gate) ? 0 : round(d_value * slope.x);
      h[i] = round(hidden.x);
    }
    return dot;
  }
};

void transpose(const float* src, ptrdiff_t src_stride, int rows, int cols, float* dst, ptrdiff_t dst_stride) {
  for (int j = 0; j < cols; ++j)
    for (int i = 0; i < rows; ++i) dst[j * dst_stride + i] = src[i * src_stride + j];
}

void sum_scaled(int n, int count, const float* const* x, const float* scale, float* y) {
  for (int i = 0; i < n; ++i) {
    float sum = 0.0f;
    for (int j = 0; j < count; ++j) sum += scale[j] * x[j][i];
    y[i] = sum;
  }
}

void round_scaled(int n, float scale, const float* x, uint16_t* y) {
  for (int i = 0; i < n; ++i) y[i] = round(scale * x[i]);
}

constexpr ActivationTable activations = activation_table<Kernels>();

}  // namespace

const EpilogueKernels epilogue = {transpose, sum_scaled, round_scaled, &activations};

}  // namespace kt::scalar
