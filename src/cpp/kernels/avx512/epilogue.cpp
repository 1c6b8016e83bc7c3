#include "kernels/generic/epilogue.h"

#include <math.h>

#include "kernels/avx512/set.h"

namespace kt::avx512 {

namespace {

float sum(Vec v) { return _mm512_reduce_add_ps(v.x); }

Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.x, b.x)}; }
Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.x, b.x)}; }
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

constexpr ActivationTable activations = activation_table<VectorKernels<Vec>::Of>();

}  // namespace

const EpilogueKernels epilogue = {transpose<Vec>, sum_scaled<Vec>, round_scaled<Vec>, &activations};

}  // namespace kt::avx512
