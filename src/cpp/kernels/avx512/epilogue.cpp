#include <math.h>

#include "kernels/avx512/set.h"
#include "kernels/scalar/activations.h"

namespace kt::avx512 {

namespace {

// 32 elements. Each step is written for both halves, because the CPU does not look far enough ahead to
// overlap two whole chains of dependent steps.
struct Pair {
  __m512 low, high;

  static Pair both(float x) { return {_mm512_set1_ps(x), _mm512_set1_ps(x)}; }
};

Pair mul(Pair a, Pair b) { return {_mm512_mul_ps(a.low, b.low), _mm512_mul_ps(a.high, b.high)}; }
Pair sub(Pair a, Pair b) { return {_mm512_sub_ps(a.low, b.low), _mm512_sub_ps(a.high, b.high)}; }
Pair add(Pair a, Pair b) { return {_mm512_add_ps(a.low, b.low), _mm512_add_ps(a.high, b.high)}; }
Pair mul_add(Pair a, Pair b, Pair c) {
  return {_mm512_fmadd_ps(a.low, b.low, c.low), _mm512_fmadd_ps(a.high, b.high, c.high)};
}

Pair mul_sub(Pair a, Pair b, Pair c) {
  return {_mm512_fmsub_ps(a.low, b.low, c.low), _mm512_fmsub_ps(a.high, b.high, c.high)};
}

// 1 / x, x >= 1: fourteen bits, then a Newton step, which infinity must not take. Division keeps its unit
// busy for longer than all of that.
__m512 reciprocal(__m512 x) {
  const __m512 y = _mm512_rcp14_ps(x), rest = _mm512_fnmadd_ps(x, y, _mm512_set1_ps(1.0f));
  return _mm512_mask_fmadd_ps(y, _mm512_cmp_ps_mask(x, _mm512_set1_ps(INFINITY), _CMP_NEQ_UQ), rest, y);
}

Pair reciprocal(Pair x) { return {reciprocal(x.low), reciprocal(x.high)}; }

// Only the elements under the mask are read or written.
Pair load(__mmask32 mask, const float* src) {
  return {_mm512_maskz_loadu_ps(mask, src), _mm512_maskz_loadu_ps(mask >> 16, src + 16)};
}

Pair load(__mmask32 mask, const uint16_t* src) {
  return {widen(_mm256_maskz_loadu_epi16(mask, src)), widen(_mm256_maskz_loadu_epi16(mask >> 16, src + 16))};
}

void store(__mmask32 mask, uint16_t* dst, Pair x) {
  _mm512_mask_storeu_epi16(dst, mask, round_to_bf16(x.low, x.high));
}

// Whole lines go past the caches: G and U are read again only by backward.
void stream(__mmask32 mask, uint16_t* dst, Pair x) {
  if (mask == 0xffffffff && reinterpret_cast<uintptr_t>(dst) % 64 == 0)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(dst), (__m512i)round_to_bf16(x.low, x.high));
  else
    store(mask, dst, x);
}

// -most to most: the smaller magnitude, with the sign of x.
Pair clamp(Pair x, float most) {
  constexpr int kSmallerMagnitude = 2;
  const __m512 bound = _mm512_set1_ps(most);
  return {_mm512_range_ps(x.low, bound, kSmallerMagnitude),
          _mm512_range_ps(x.high, bound, kSmallerMagnitude)};
}

// A NaN stays one.
Pair at_most(Pair x, float most) {
  const __m512 bound = _mm512_set1_ps(most);
  return {_mm512_min_ps(bound, x.low), _mm512_min_ps(bound, x.high)};
}

Pair at_least(Pair x, float least) {
  const __m512 bound = _mm512_set1_ps(least);
  return {_mm512_max_ps(bound, x.low), _mm512_max_ps(bound, x.high)};
}

// y, but 0 where a limit has changed x.
Pair within(Pair x, Pair limited, Pair y) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.low, limited.low, _CMP_EQ_UQ), y.low),
          _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.high, limited.high, _CMP_EQ_UQ), y.high)};
}

// x, but away from 0 where a limit has changed it.
Pair beyond(Pair x, Pair limited) {
  const __m512 factor = _mm512_set1_ps(kBeyondLimit);
  return {_mm512_mask_mul_ps(x.low, _mm512_cmp_ps_mask(x.low, limited.low, _CMP_NEQ_OQ), x.low, factor),
          _mm512_mask_mul_ps(x.high, _mm512_cmp_ps_mask(x.high, limited.high, _CMP_NEQ_OQ), x.high, factor)};
}

Pair nearest_integers(Pair x) {
  return {_mm512_roundscale_ps(x.low, _MM_FROUND_TO_NEAREST_INT),
          _mm512_roundscale_ps(x.high, _MM_FROUND_TO_NEAREST_INT)};
}

// 1 / (1 + exp(-x)). The clamp keeps infinities out of exp_minus; exp(128) is one.
__attribute__((always_inline)) inline Pair sigmoid(Pair x) {
  const auto [n, y] = exp_minus(clamp(x, 128.0f));
  return reciprocal(
      add({_mm512_scalef_ps(y.low, n.low), _mm512_scalef_ps(y.high, n.high)}, Pair::both(1.0f)));
}

__attribute__((always_inline)) inline Pair times_sigmoid(Pair a, Pair x) { return mul(a, sigmoid(x)); }

template <class Activation>
void forward(int n, const float* g, const float* u, uint16_t* g_saved, uint16_t* u_saved, uint16_t* h) {
  for (int i = 0; i < n; i += 32) {
    const __mmask32 m = first32(n - i);
    const auto [gate, up, hidden] = Activation::forward(load(m, g + i), load(m, u + i));
    stream(m, g_saved + i, gate);
    stream(m, u_saved + i, up);
    store(m, h + i, hidden);
  }
}

template <class Activation>
float backward(int n, const float* dh, float weight, const uint16_t* g, const uint16_t* u, uint16_t* dg,
               uint16_t* du, uint16_t* h) {
  const Pair w = Pair::both(weight);
  Pair dot = Pair::both(0.0f);
  for (int i = 0; i < n; i += 32) {
    const __mmask32 m = first32(n - i);
    const Pair d = load(m, dh + i), weighted = mul(w, d);
    const auto [hidden, by_gate, by_up] = Activation::backward(load(m, g + i), load(m, u + i));
    dot = mul_add(d, hidden, dot);
    store(m, dg + i, mul(weighted, by_gate));
    store(m, du + i, mul(weighted, by_up));
    store(m, h + i, hidden);
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(dot.low, dot.high));
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

// Four lines of every x at a time: what is far away is asked for together.
void sum_scaled(int n, int count, const float* const* x, const float* scale, float* y) {
  constexpr int kLines = 4;
  for (int i = 0; i < n; i += 16 * kLines) {
    __m512 sum[kLines];
    __mmask16 mask[kLines];
#pragma GCC unroll 4
    for (int v = 0; v < kLines; ++v) {
      sum[v] = _mm512_setzero_ps();
      mask[v] = first16(n - i - 16 * v);
    }
    for (int j = 0; j < count; ++j) {
      const __m512 factor = _mm512_set1_ps(scale[j]);
#pragma GCC unroll 4
      for (int v = 0; v < kLines; ++v)
        sum[v] = _mm512_fmadd_ps(factor, _mm512_maskz_loadu_ps(mask[v], x[j] + i + 16 * v), sum[v]);
    }
#pragma GCC unroll 4
    for (int v = 0; v < kLines; ++v) _mm512_mask_storeu_ps(y + i + 16 * v, mask[v], sum[v]);
  }
}

void round_scaled(int n, float scale, const float* x, uint16_t* y) {
  for (int i = 0; i < n; i += 32) {
    const __mmask32 m = first32(n - i);
    store(m, y + i, mul(Pair::both(scale), load(m, x + i)));
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

}  // namespace kt::avx512
