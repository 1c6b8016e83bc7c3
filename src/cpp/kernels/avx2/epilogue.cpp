#include <string.h>

#include "kernels/avx2/set.h"
#include "kernels/scalar/activations.h"

namespace kt::avx2 {

namespace {

// Up to 8 elements; zeros stand behind the last, and nothing there is read or written.
__m256 load(const float* src, int n) {
  if (n >= 8) return _mm256_loadu_ps(src);
  float edge[8] = {};
  memcpy(edge, src, n * sizeof *src);
  return _mm256_loadu_ps(edge);
}

void store(float* dst, int n, __m256 x) {
  if (n >= 8) return _mm256_storeu_ps(dst, x);
  float edge[8];
  _mm256_storeu_ps(edge, x);
  memcpy(dst, edge, n * sizeof *dst);
}

float sum(__m256 x) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// 16 elements. Each step is written for both halves, because the CPU does not look far enough ahead to
// overlap two whole chains of dependent steps.
struct Pair {
  __m256 low, high;

  static Pair both(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
};

Pair mul(Pair a, Pair b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
Pair add(Pair a, Pair b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
Pair div(Pair a, Pair b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
Pair sub(Pair a, Pair b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
Pair mul_add(Pair a, Pair b, Pair c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}

Pair mul_sub(Pair a, Pair b, Pair c) {
  return {_mm256_fmsub_ps(a.low, b.low, c.low), _mm256_fmsub_ps(a.high, b.high, c.high)};
}

Pair load16(const float* src) { return {_mm256_loadu_ps(src), _mm256_loadu_ps(src + 8)}; }

Pair load16(const uint16_t* src) {
  return {widen(_mm_loadu_si128((const __m128i*)src)), widen(_mm_loadu_si128((const __m128i*)(src + 8)))};
}

void store16(uint16_t* dst, Pair x) { _mm256_storeu_si256((__m256i*)dst, round_to_bf16(x.low, x.high)); }

// A NaN stays one.
Pair at_most(Pair x, float most) {
  const __m256 bound = _mm256_set1_ps(most);
  return {_mm256_min_ps(bound, x.low), _mm256_min_ps(bound, x.high)};
}

Pair at_least(Pair x, float least) {
  const __m256 bound = _mm256_set1_ps(least);
  return {_mm256_max_ps(bound, x.low), _mm256_max_ps(bound, x.high)};
}

// y, but 0 where a limit has changed x.
Pair within(Pair x, Pair limited, Pair y) {
  return {_mm256_and_ps(_mm256_cmp_ps(x.low, limited.low, _CMP_EQ_UQ), y.low),
          _mm256_and_ps(_mm256_cmp_ps(x.high, limited.high, _CMP_EQ_UQ), y.high)};
}

// x, but away from 0 where a limit has changed it.
__m256 beyond(__m256 x, __m256 limited) {
  const __m256 changed = _mm256_cmp_ps(x, limited, _CMP_NEQ_OQ);
  return _mm256_blendv_ps(x, _mm256_mul_ps(x, _mm256_set1_ps(kBeyondLimit)), changed);
}

Pair beyond(Pair x, Pair limited) { return {beyond(x.low, limited.low), beyond(x.high, limited.high)}; }

Pair nearest_integers(Pair x) {
  return {_mm256_round_ps(x.low, _MM_FROUND_TO_NEAREST_INT),
          _mm256_round_ps(x.high, _MM_FROUND_TO_NEAREST_INT)};
}

__m256 power_of_two(__m256 n) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}

// 1 + exp(-x). The limits leave exponents from -127 to 128, of which power_of_two makes 0 and infinity.
__attribute__((always_inline)) inline Pair one_plus_exp_minus(Pair x) {
  const auto [n, y] = exp_minus(at_most(at_least(x, -89.0f), 88.0f));
  return mul_add(y, {power_of_two(n.low), power_of_two(n.high)}, Pair::both(1.0f));
}

__attribute__((always_inline)) inline Pair sigmoid(Pair x) {
  return div(Pair::both(1.0f), one_plus_exp_minus(x));
}

__attribute__((always_inline)) inline Pair times_sigmoid(Pair a, Pair x) {
  return div(a, one_plus_exp_minus(x));
}

template <class Activation>
void forward16(const float* g, const float* u, uint16_t* g_saved, uint16_t* u_saved, uint16_t* h) {
  const auto [gate, up, hidden] = Activation::forward(load16(g), load16(u));
  store16(g_saved, gate);
  store16(u_saved, up);
  store16(h, hidden);
}

// n is a multiple of 16.
template <class Activation>
float backward_whole(int n, const float* dh, float weight, const uint16_t* g, const uint16_t* u, uint16_t* dg,
                     uint16_t* du, uint16_t* h) {
  const Pair w = Pair::both(weight);
  Pair dot = Pair::both(0.0f);
  for (int i = 0; i < n; i += 16) {
    const auto [hidden, by_gate, by_up] = Activation::backward(load16(g + i), load16(u + i));
    const Pair d = load16(dh + i), weighted = mul(w, d);
    dot = mul_add(d, hidden, dot);
    store16(dg + i, mul(weighted, by_gate));
    store16(du + i, mul(weighted, by_up));
    store16(h + i, hidden);
  }
  return sum(_mm256_add_ps(dot.low, dot.high));
}

// n < 16 elements, on a copy that goes on with zeros.
template <class T>
struct Edge {
  T data[16] = {};
  Edge() = default;
  Edge(const T* src, int n) { memcpy(data, src, n * sizeof *src); }
  void copy_to(T* dst, int n) const { memcpy(dst, data, n * sizeof *dst); }
};

template <class Activation>
void forward(int n, const float* g, const float* u, uint16_t* g_saved, uint16_t* u_saved, uint16_t* h) {
  if (n < 16) {
    const Edge<float> g_edge(g, n), u_edge(u, n);
    Edge<uint16_t> gate, up, hidden;
    forward16<Activation>(g_edge.data, u_edge.data, gate.data, up.data, hidden.data);
    gate.copy_to(g_saved, n);
    up.copy_to(u_saved, n);
    return hidden.copy_to(h, n);
  }
  for (int next = 0; next < n; next += 16) {
    const int i = next + 16 <= n ? next : n - 16;
    forward16<Activation>(g + i, u + i, g_saved + i, u_saved + i, h + i);
  }
}

template <class Activation>
float backward(int n, const float* dh, float weight, const uint16_t* g, const uint16_t* u, uint16_t* dg,
               uint16_t* du, uint16_t* h) {
  const int whole = n / 16 * 16, left = n - whole;
  const float dot = backward_whole<Activation>(whole, dh, weight, g, u, dg, du, h);
  if (left == 0) return dot;
  const Edge<float> dh_edge(dh + whole, left);
  const Edge<uint16_t> g_edge(g + whole, left), u_edge(u + whole, left);
  Edge<uint16_t> gate, up, hidden;
  const float rest = backward_whole<Activation>(16, dh_edge.data, weight, g_edge.data, u_edge.data, gate.data,
                                                up.data, hidden.data);
  gate.copy_to(dg + whole, left);
  up.copy_to(du + whole, left);
  hidden.copy_to(h + whole, left);
  return dot + rest;
}

}  // namespace

void transpose(const float* src, ptrdiff_t src_stride, int rows, int cols, float* dst, ptrdiff_t dst_stride) {
  for (int i = 0; i < rows; i += 8)
    for (int j = 0; j < cols; j += 8) {
      __m256 r[8];
      for (int p = 0; p < 8; ++p)
        r[p] = i + p < rows ? load(src + (i + p) * src_stride + j, cols - j) : _mm256_setzero_ps();
      transpose8(r);
      for (int p = 0; p < 8 && j + p < cols; ++p) store(dst + (j + p) * dst_stride + i, rows - i, r[p]);
    }
}

// Two lines of every x at a time: what is far away is asked for together.
void sum_scaled(int n, int count, const float* const* x, const float* scale, float* y) {
  constexpr int kVectors = 4;
  int i = 0;
  for (; i + 8 * kVectors <= n; i += 8 * kVectors) {
    __m256 sum[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[v] = _mm256_setzero_ps();
    for (int j = 0; j < count; ++j) {
      const __m256 factor = _mm256_set1_ps(scale[j]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        sum[v] = _mm256_fmadd_ps(factor, _mm256_loadu_ps(x[j] + i + 8 * v), sum[v]);
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) _mm256_storeu_ps(y + i + 8 * v, sum[v]);
  }
  for (; i < n; i += 8) {
    __m256 sum = _mm256_setzero_ps();
    for (int j = 0; j < count; ++j)
      sum = _mm256_fmadd_ps(_mm256_set1_ps(scale[j]), load(x[j] + i, n - i), sum);
    store(y + i, n - i, sum);
  }
}

// Here and in the activations' forward the last 16 elements of a row overlap those before them.
void round_scaled(int n, float scale, const float* x, uint16_t* y) {
  if (n < 16) {
    const Edge<float> x_edge(x, n);
    Edge<uint16_t> y_edge;
    store16(y_edge.data, mul(Pair::both(scale), load16(x_edge.data)));
    return y_edge.copy_to(y, n);
  }
  for (int next = 0; next < n; next += 16) {
    const int i = next + 16 <= n ? next : n - 16;
    store16(y + i, mul(Pair::both(scale), load16(x + i)));
  }
}

void silu_forward(int n, const float* g, const float* u, uint16_t* g_saved, uint16_t* u_saved, uint16_t* h) {
  forward<Silu<Pair>>(n, g, u, g_saved, u_saved, h);
}

float silu_backward(int n, const float* dh, float weight, const uint16_t* g, const uint16_t* u, uint16_t* dg,
                    uint16_t* du, uint16_t* h) {
  return backward<Silu<Pair>>(n, dh, weight, g, u, dg, du, h);
}

void gpt_oss_forward(int n, const float* g, const float* u, uint16_t* g_saved, uint16_t* u_saved,
                     uint16_t* h) {
  forward<GptOss<Pair>>(n, g, u, g_saved, u_saved, h);
}

float gpt_oss_backward(int n, const float* dh, float weight, const uint16_t* g, const uint16_t* u,
                       uint16_t* dg, uint16_t* du, uint16_t* h) {
  return backward<GptOss<Pair>>(n, dh, weight, g, u, dg, du, h);
}

void clamped_silu_forward(int n, const float* g, const float* u, uint16_t* g_saved, uint16_t* u_saved,
                          uint16_t* h) {
  forward<ClampedSilu<Pair>>(n, g, u, g_saved, u_saved, h);
}

float clamped_silu_backward(int n, const float* dh, float weight, const uint16_t* g, const uint16_t* u,
                            uint16_t* dg, uint16_t* du, uint16_t* h) {
  return backward<ClampedSilu<Pair>>(n, dh, weight, g, u, dg, du, h);
}

void gelu_tanh_forward(int n, const float* g, const float* u, uint16_t* g_saved, uint16_t* u_saved,
                       uint16_t* h) {
  forward<GeluTanh<Pair>>(n, g, u, g_saved, u_saved, h);
}

float gelu_tanh_backward(int n, const float* dh, float weight, const uint16_t* g, const uint16_t* u,
                         uint16_t* dg, uint16_t* du, uint16_t* h) {
  return backward<GeluTanh<Pair>>(n, dh, weight, g, u, dg, du, h);
}

}  // namespace kt::avx2
