#include "kernels/generic/epilogue.h"

#include "kernels/avx2/set.h"

namespace kt::avx2 {

namespace {

Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.x, b.x)}; }
Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.x, b.x)}; }
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

constexpr ActivationTable activations = activation_table<VectorKernels<Vec>::Of>();

}  // namespace

const EpilogueKernels epilogue = {transpose<Vec>, sum_scaled<Vec>, round_scaled<Vec>, &activations};

}  // namespace kt::avx2
