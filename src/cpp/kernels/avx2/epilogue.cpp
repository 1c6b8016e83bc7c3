#include <string.h>

#include "kernels/avx2/set.h"
#include "kernels/generic/vectors.h"

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

struct Vec {
  __m256 x;

  static Vec all(float value) { return {_mm256_set1_ps(value)}; }
};

Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.x, b.x)}; }
Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.x, b.x)}; }
Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.x, b.x)}; }
Vec mul_add(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.x, b.x, c.x)}; }
Vec mul_sub(Vec a, Vec b, Vec c) { return {_mm256_fmsub_ps(a.x, b.x, c.x)}; }
Vec quotient(Vec a, Vec b) { return {_mm256_div_ps(a.x, b.x)}; }

// A NaN stays one.
Vec at_most(Vec x, float most) { return {_mm256_min_ps(_mm256_set1_ps(most), x.x)}; }
Vec at_least(Vec x, float least) { return {_mm256_max_ps(_mm256_set1_ps(least), x.x)}; }

Vec magnitude(Vec x) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), x.x)}; }
Vec where_negative(Vec x, Vec a, Vec b) { return {_mm256_blendv_ps(b.x, a.x, x.x)}; }

// y, but 0 where a limit has changed x.
Vec within(Vec x, Vec limited, Vec y) {
  return {_mm256_and_ps(_mm256_cmp_ps(x.x, limited.x, _CMP_EQ_UQ), y.x)};
}

// x, but away from 0 where a limit has changed it.
Vec beyond(Vec x, Vec limited) {
  const __m256 changed = _mm256_cmp_ps(x.x, limited.x, _CMP_NEQ_OQ);
  return {_mm256_blendv_ps(x.x, _mm256_mul_ps(x.x, _mm256_set1_ps(kBeyondLimit)), changed)};
}

Vec nearest_integer(Vec x) { return {_mm256_round_ps(x.x, _MM_FROUND_TO_NEAREST_INT)}; }

// The limits leave exponents from -127 to 128, of which times_power_of_two makes 0 and infinity.
Vec exp_domain(Vec x) { return at_most(at_least(x, -89.0f), 88.0f); }
Vec times_power_of_two(Vec y, Vec n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.x), _mm256_set1_epi32(127));
  return {_mm256_mul_ps(y.x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)))};
}

struct Lanes {  // all of a Pair
  static constexpr int kSize = 16;
  static Lanes first(int /* at least kSize */) { return {}; }
};

Pair<Vec> load(Lanes, const float* src) { return {{_mm256_loadu_ps(src)}, {_mm256_loadu_ps(src + 8)}}; }

Pair<Vec> load(Lanes, const uint16_t* src) {
  return {{widen(_mm_loadu_si128((const __m128i*)src))}, {widen(_mm_loadu_si128((const __m128i*)(src + 8)))}};
}

void store(Lanes, uint16_t* dst, Pair<Vec> x) {
  _mm256_storeu_si256((__m256i*)dst, round_to_bf16(x.low.x, x.high.x));
}

void stream(Lanes lanes, uint16_t* dst, Pair<Vec> x) { store(lanes, dst, x); }

float sum(Pair<Vec> x) { return sum(_mm256_add_ps(x.low.x, x.high.x)); }

// n < 16 elements, on a copy that goes on with zeros.
template <class T>
struct Edge {
  T data[16] = {};
  Edge() = default;
  Edge(const T* src, int n) { memcpy(data, src, n * sizeof *src); }
  void copy_to(T* dst, int n) const { memcpy(dst, data, n * sizeof *dst); }
};

template <class A>
struct Kernels {
  static void forward(int n, const float* g, const float* u, uint16_t* g_saved, uint16_t* u_saved,
                      uint16_t* h) {
    if (n < 16) {
      const Edge<float> g_edge(g, n), u_edge(u, n);
      Edge<uint16_t> gate, up, hidden;
      kt::forward<A, Lanes>(16, g_edge.data, u_edge.data, gate.data, up.data, hidden.data);
      gate.copy_to(g_saved, n);
      up.copy_to(u_saved, n);
      return hidden.copy_to(h, n);
    }
    const int last = n - 16;  // the last 16 elements overlap those before them
    kt::forward<A, Lanes>(n / 16 * 16, g, u, g_saved, u_saved, h);
    if (n % 16 != 0) kt::forward<A, Lanes>(16, g + last, u + last, g_saved + last, u_saved + last, h + last);
  }

  static float backward(int n, const float* dh, float weight, const uint16_t* g, const uint16_t* u,
                        uint16_t* dg, uint16_t* du, uint16_t* h) {
    const int left = n % 16, whole = n - left;
    const float dot = kt::backward<A, Lanes>(whole, dh, weight, g, u, dg, du, h);
    if (left == 0) return dot;
    const Edge<float> dh_edge(dh + whole, left);
    const Edge<uint16_t> g_edge(g + whole, left), u_edge(u + whole, left);
    Edge<uint16_t> gate, up, hidden;
    const float rest = kt::backward<A, Lanes>(16, dh_edge.data, weight, g_edge.data, u_edge.data, gate.data,
                                              up.data, hidden.data);
    gate.copy_to(dg + whole, left);
    up.copy_to(du + whole, left);
    hidden.copy_to(h + whole, left);
    return dot + rest;
  }

  static void ungated_forward(int n, const float* u, uint16_t* u_saved, uint16_t* h) {
    if (n < 16) {
      const Edge<float> u_edge(u, n);
      Edge<uint16_t> up, hidden;
      kt::ungated_forward<A, Lanes>(16, u_edge.data, up.data, hidden.data);
      up.copy_to(u_saved, n);
      return hidden.copy_to(h, n);
    }
    const int last = n - 16;  // the last 16 elements overlap those before them
    kt::ungated_forward<A, Lanes>(n / 16 * 16, u, u_saved, h);
    if (n % 16 != 0) kt::ungated_forward<A, Lanes>(16, u + last, u_saved + last, h + last);
  }

  static float ungated_backward(int n, const float* dh, float weight, const uint16_t* u, uint16_t* du,
                                uint16_t* h) {
    const int left = n % 16, whole = n - left;
    const float dot = kt::ungated_backward<A, Lanes>(whole, dh, weight, u, du, h);
    if (left == 0) return dot;
    const Edge<float> dh_edge(dh + whole, left);
    const Edge<uint16_t> u_edge(u + whole, left);
    Edge<uint16_t> up, hidden;
    const float rest =
        kt::ungated_backward<A, Lanes>(16, dh_edge.data, weight, u_edge.data, up.data, hidden.data);
    up.copy_to(du + whole, left);
    hidden.copy_to(h + whole, left);
    return dot + rest;
  }
};

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

const ActivationTable activations = activation_table<Kernels>();

void round_scaled(int n, float scale, const float* x, uint16_t* y) {
  const Pair<Vec> factor = Pair<Vec>::all(scale);
  if (n < 16) {
    const Edge<float> x_edge(x, n);
    Edge<uint16_t> y_edge;
    store(Lanes{}, y_edge.data, factor * load(Lanes{}, x_edge.data));
    return y_edge.copy_to(y, n);
  }
  for (int next = 0; next < n; next += 16) {
    const int i = next + 16 <= n ? next : n - 16;  // the last 16 elements overlap those before them
    store(Lanes{}, y + i, factor * load(Lanes{}, x + i));
  }
}

}  // namespace kt::avx2
