#include "kernels/avx512/set.h"

namespace kt::avx512 {

namespace {

__m512 load_bf16(__mmask16 mask, const uint16_t* src) { return widen(_mm256_maskz_loadu_epi16(mask, src)); }

void store_bf16(__mmask16 mask, uint16_t* dst, __m512 x) {
  _mm256_mask_storeu_epi16(dst, mask, round_to_bf16(x));
}

// exp by x = n ln 2 + r, |r| <= ln 2 / 2, and the Taylor polynomial of degree 7 in r: relative error below
// 2e-7. The operands of min and max are ordered so that a NaN goes through.
__m512 exp(__m512 x) {
  x = _mm512_min_ps(_mm512_set1_ps(105.0f), _mm512_max_ps(_mm512_set1_ps(-105.0f), x));
  const __m512 n =
      _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
  constexpr float kInverseFactorials[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  __m512 y = _mm512_set1_ps(1.0f / 5040);
  for (float c : kInverseFactorials) y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(c));
  return _mm512_scalef_ps(y, n);
}

__m512 sigmoid(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  return _mm512_div_ps(one, _mm512_add_ps(one, exp(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

}  // namespace

void transpose(const float* src, ptrdiff_t src_stride, int rows, int cols, float* dst, ptrdiff_t dst_stride) {
  for (int i = 0; i < rows; i += 16)
    for (int j = 0; j < cols; j += 16) {
      __m512i r[16];
      for (int p = 0; p < 16; ++p)
        r[p] = i + p < rows ? _mm512_maskz_loadu_epi32(first16(cols - j), src + (i + p) * src_stride + j)
                            : _mm512_setzero_si512();
      transpose16(r);
      for (int p = 0; p < 16 && j + p < cols; ++p)
        _mm512_mask_storeu_epi32(dst + (j + p) * dst_stride + i, first16(rows - i), r[p]);
    }
}

void add_scaled(int n, float scale, const float* x, float* y) {
  for (int i = 0; i < n; i += 16) {
    const __mmask16 m = first16(n - i);
    const __m512 sum = _mm512_fmadd_ps(_mm512_set1_ps(scale), _mm512_maskz_loadu_ps(m, x + i),
                                       _mm512_maskz_loadu_ps(m, y + i));
    _mm512_mask_storeu_ps(y + i, m, sum);
  }
}

void round_scaled(int n, float scale, const float* x, uint16_t* y) {
  for (int i = 0; i < n; i += 16) {
    const __mmask16 m = first16(n - i);
    store_bf16(m, y + i, _mm512_mul_ps(_mm512_set1_ps(scale), _mm512_maskz_loadu_ps(m, x + i)));
  }
}

// silu(g) = g * sigmoid(g) and its derivative sigmoid(g) * (1 + g * (1 - sigmoid(g))).
void silu_forward(int n, const float* g, const float* u, uint16_t* g_saved, uint16_t* u_saved, uint16_t* h) {
  for (int i = 0; i < n; i += 16) {
    const __mmask16 m = first16(n - i);
    const __m512 gate = _mm512_maskz_loadu_ps(m, g + i), up = _mm512_maskz_loadu_ps(m, u + i);
    store_bf16(m, g_saved + i, gate);
    store_bf16(m, u_saved + i, up);
    store_bf16(m, h + i, _mm512_mul_ps(_mm512_mul_ps(gate, sigmoid(gate)), up));
  }
}

float silu_backward(int n, const float* dh, float weight, const uint16_t* g, const uint16_t* u, uint16_t* dg,
                    uint16_t* du, uint16_t* h) {
  const __m512 one = _mm512_set1_ps(1.0f), w = _mm512_set1_ps(weight);
  __m512 dot = _mm512_setzero_ps();
  for (int i = 0; i < n; i += 16) {
    const __mmask16 m = first16(n - i);
    const __m512 gate = load_bf16(m, g + i), up = load_bf16(m, u + i), d = _mm512_maskz_loadu_ps(m, dh + i);
    const __m512 s = sigmoid(gate), act = _mm512_mul_ps(gate, s), hidden = _mm512_mul_ps(act, up);
    const __m512 slope = _mm512_mul_ps(s, _mm512_fmadd_ps(gate, _mm512_sub_ps(one, s), one));
    const __m512 weighted = _mm512_mul_ps(w, d);
    dot = _mm512_fmadd_ps(d, hidden, dot);
    store_bf16(m, dg + i, _mm512_mul_ps(_mm512_mul_ps(weighted, up), slope));
    store_bf16(m, du + i, _mm512_mul_ps(weighted, act));
    store_bf16(m, h + i, hidden);
  }
  return _mm512_reduce_add_ps(dot);
}

}  // namespace kt::avx512
