#include <string.h>

#include "kernels/avx2/set.h"

namespace kt::avx2 {

namespace {

// Up to 8 elements; zeros stand behind the last, and nothing there is read or written.
__m256 load(const float* src, int n) {
  if (n >= 8) return _mm256_loadu_ps(src);
  float edge[8] = {};
  memcpy(edge, src, n * sizeof *src);
  return _mm256_loadu_ps(edge);
}

__m256 load(const uint16_t* src, int n) {
  if (n >= 8) return widen(_mm_loadu_si128((const __m128i*)src));
  uint16_t edge[8] = {};
  memcpy(edge, src, n * sizeof *src);
  return widen(_mm_loadu_si128((const __m128i*)edge));
}

void store(float* dst, int n, __m256 x) {
  if (n >= 8) return _mm256_storeu_ps(dst, x);
  float edge[8];
  _mm256_storeu_ps(edge, x);
  memcpy(dst, edge, n * sizeof *dst);
}

void store(uint16_t* dst, int n, __m256 x) {
  if (n >= 8) return _mm_storeu_si128((__m128i*)dst, round_to_bf16(x));
  uint16_t edge[8];
  _mm_storeu_si128((__m128i*)edge, round_to_bf16(x));
  memcpy(dst, edge, n * sizeof *dst);
}

__m256 power_of_two(__m256i n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}

// exp by x = n ln 2 + r, |r| <= ln 2 / 2, and the Taylor polynomial of degree 7 in r: relative error below
// 2e-7. The operands of min and max are ordered so that a NaN goes through. 2^n is two factors, each a normal
// number, so that the product may overflow to infinity and underflow to 0.
__m256 exp(__m256 x) {
  x = _mm256_min_ps(_mm256_set1_ps(105.0f), _mm256_max_ps(_mm256_set1_ps(-105.0f), x));
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693145752f), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(1.42860677e-6f), r);
  constexpr float kInverseFactorials[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  __m256 y = _mm256_set1_ps(1.0f / 5040);
  for (float c : kInverseFactorials) y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(c));
  const __m256i power = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(power, 1);
  return _mm256_mul_ps(_mm256_mul_ps(y, power_of_two(half)), power_of_two(_mm256_sub_epi32(power, half)));
}

__m256 sigmoid(__m256 x) {
  const __m256 one = _mm256_set1_ps(1.0f);
  return _mm256_div_ps(one, _mm256_add_ps(one, exp(_mm256_sub_ps(_mm256_setzero_ps(), x))));
}

float sum(__m256 x) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
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

void add_scaled(int n, float scale, const float* x, float* y) {
  for (int i = 0; i < n; i += 8)
    store(y + i, n - i, _mm256_fmadd_ps(_mm256_set1_ps(scale), load(x + i, n - i), load(y + i, n - i)));
}

void round_scaled(int n, float scale, const float* x, uint16_t* y) {
  for (int i = 0; i < n; i += 8)
    store(y + i, n - i, _mm256_mul_ps(_mm256_set1_ps(scale), load(x + i, n - i)));
}

// silu(g) = g * sigmoid(g) and its derivative sigmoid(g) * (1 + g * (1 - sigmoid(g))).
void silu_forward(int n, const float* g, const float* u, uint16_t* g_saved, uint16_t* u_saved, uint16_t* h) {
  for (int i = 0; i < n; i += 8) {
    const __m256 gate = load(g + i, n - i), up = load(u + i, n - i);
    store(g_saved + i, n - i, gate);
    store(u_saved + i, n - i, up);
    store(h + i, n - i, _mm256_mul_ps(_mm256_mul_ps(gate, sigmoid(gate)), up));
  }
}

float silu_backward(int n, const float* dh, float weight, const uint16_t* g, const uint16_t* u, uint16_t* dg,
                    uint16_t* du, uint16_t* h) {
  const __m256 one = _mm256_set1_ps(1.0f), w = _mm256_set1_ps(weight);
  __m256 dot = _mm256_setzero_ps();
  for (int i = 0; i < n; i += 8) {
    const __m256 gate = load(g + i, n - i), up = load(u + i, n - i), d = load(dh + i, n - i);
    const __m256 s = sigmoid(gate), act = _mm256_mul_ps(gate, s), hidden = _mm256_mul_ps(act, up);
    const __m256 slope = _mm256_mul_ps(s, _mm256_fmadd_ps(gate, _mm256_sub_ps(one, s), one));
    const __m256 weighted = _mm256_mul_ps(w, d);
    dot = _mm256_fmadd_ps(d, hidden, dot);
    store(dg + i, n - i, _mm256_mul_ps(_mm256_mul_ps(weighted, up), slope));
    store(du + i, n - i, _mm256_mul_ps(weighted, act));
    store(h + i, n - i, hidden);
  }
  return sum(dot);
}

}  // namespace kt::avx2
