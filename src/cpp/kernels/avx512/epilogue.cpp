#include <math.h>

#include "kernels/avx512/set.h"
#include "kernels/generic/vectors.h"

namespace kt::avx512 {

namespace {

struct Vec {
  __m512 x;

  static Vec all(float value) { return {_mm512_set1_ps(value)}; }
};

Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.x, b.x)}; }
Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.x, b.x)}; }
Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.x, b.x)}; }
Vec mul_add(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.x, b.x, c.x)}; }
Vec mul_sub(Vec a, Vec b, Vec c) { return {_mm512_fmsub_ps(a.x, b.x, c.x)}; }

// 1 / b: fourteen bits, then a Newton step, which infinity must not take. Division keeps its unit busy for
// longer than all of that.
Vec quotient(Vec a, Vec b) {
  const __m512 y = _mm512_rcp14_ps(b.x), rest = _mm512_fnmadd_ps(b.x, y, _mm512_set1_ps(1.0f));
  const __mmask16 finite = _mm512_cmp_ps_mask(b.x, _mm512_set1_ps(INFINITY), _CMP_NEQ_UQ);
  return a * Vec{_mm512_mask_fmadd_ps(y, finite, rest, y)};
}

// A NaN stays one.
Vec at_most(Vec x, float most) { return {_mm512_min_ps(_mm512_set1_ps(most), x.x)}; }
Vec at_least(Vec x, float least) { return {_mm512_max_ps(_mm512_set1_ps(least), x.x)}; }

Vec magnitude(Vec x) { return {_mm512_abs_ps(x.x)}; }
Vec where_negative(Vec x, Vec a, Vec b) {
  return {_mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(x.x)), b.x, a.x)};
}

// y, but 0 where a limit has changed x.
Vec within(Vec x, Vec limited, Vec y) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.x, limited.x, _CMP_EQ_UQ), y.x)};
}

// x, but away from 0 where a limit has changed it.
Vec beyond(Vec x, Vec limited) {
  const __mmask16 changed = _mm512_cmp_ps_mask(x.x, limited.x, _CMP_NEQ_OQ);
  return {_mm512_mask_mul_ps(x.x, changed, x.x, _mm512_set1_ps(kBeyondLimit))};
}

Vec nearest_integer(Vec x) { return {_mm512_roundscale_ps(x.x, _MM_FROUND_TO_NEAREST_INT)}; }

// No infinities; exp(128) is one. The smaller magnitude, with the sign of x.
Vec exp_domain(Vec x) {
  constexpr int kSmallerMagnitude = 2;
  return {_mm512_range_ps(x.x, _mm512_set1_ps(128.0f), kSmallerMagnitude)};
}
Vec times_power_of_two(Vec y, Vec n) { return {_mm512_scalef_ps(y.x, n.x)}; }

struct Lanes {
  static constexpr int kSize = 32;
  __mmask32 mask;
  static Lanes first(int n) { return {first32(n)}; }
};

// Only the elements under the mask are read or written.
Pair<Vec> load(Lanes lanes, const float* src) {
  return {{_mm512_maskz_loadu_ps(lanes.mask, src)}, {_mm512_maskz_loadu_ps(lanes.mask >> 16, src + 16)}};
}

Pair<Vec> load(Lanes lanes, const uint16_t* src) {
  return {{widen(_mm256_maskz_loadu_epi16(lanes.mask, src))},
          {widen(_mm256_maskz_loadu_epi16(lanes.mask >> 16, src + 16))}};
}

void store(Lanes lanes, uint16_t* dst, Pair<Vec> x) {
  _mm512_mask_storeu_epi16(dst, lanes.mask, round_to_bf16(x.low.x, x.high.x));
}

// Whole lines go past the caches: G and U are read again only by backward.
void stream(Lanes lanes, uint16_t* dst, Pair<Vec> x) {
  if (lanes.mask == 0xffffffff && reinterpret_cast<uintptr_t>(dst) % 64 == 0)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(dst), (__m512i)round_to_bf16(x.low.x, x.high.x));
  else
    store(lanes, dst, x);
}

float sum(Pair<Vec> x) { return _mm512_reduce_add_ps(_mm512_add_ps(x.low.x, x.high.x)); }

template <class A>
struct Kernels {
  static constexpr ActivationForward* forward = kt::forward<A, Lanes>;
  static constexpr ActivationBackward* backward = kt::backward<A, Lanes>;
  static constexpr UngatedForward* ungated_forward = kt::ungated_forward<A, Lanes>;
  static constexpr UngatedBackward* ungated_backward = kt::ungated_backward<A, Lanes>;
};

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

const ActivationTable activations = activation_table<Kernels>();

void round_scaled(int n, float scale, const float* x, uint16_t* y) {
  for (int i = 0; i < n; i += Lanes::kSize) {
    const Lanes lanes = Lanes::first(n - i);
    store(lanes, y + i, Pair<Vec>::all(scale) * load(lanes, x + i));
  }
}

}  // namespace kt::avx512
