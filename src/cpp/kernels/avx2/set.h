// What the files of this kernel set share.
#pragma once

#include <immintrin.h>

#include "kernels/kernel_set.h"

namespace kt::avx2 {

constexpr int MR = 6;   // with NR: 12 accumulators, 2 vectors of B and 1 broadcast of A in 16 registers
constexpr int NR = 16;  // two vectors
constexpr int KB = 16;  // k in one 64-byte run of a packed A row

PackRows pack_a, pack_b_cols;
PackAcross pack_b_rows;
MicroKernel micro_kernel;
Gemv gemv_nt, gemv_nn;

Transpose transpose;
SumScaled sum_scaled;
RoundScaled round_scaled;
extern const ActivationTable activations;

DecodeF32 from_f32;
DecodeF16 from_f16;
DecodeCodes from_int8, from_int4, from_e4m3, from_e2m1;

static inline __m256 widen(__m128i bits) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

// fp32 to bf16 in the upper half of each lane: nearest even, the lower half arbitrary. Of NaNs, only the two
// default ones stay NaN.
static inline __m256i nearest_bf16(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
}

// The same in the lower half, zeros above, and for every x.
static inline __m256i lower_bf16(__m256 x) {
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_or_si256(nearest_bf16(x), nan), 16);
}

static inline __m128i round_to_bf16(__m256 x) {
  const __m256i bits = lower_bf16(x);
  return _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
}

static inline __m256i round_to_bf16(__m256 low, __m256 high) {
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(lower_bf16(low), lower_bf16(high)), 0xd8);
}

// In place: lane j of row i and lane i of row j change places.
static inline void transpose8(__m256 r[8]) {
  __m256 t[8];
  for (int i = 0; i < 8; i += 4) {
    const __m256 a = _mm256_unpacklo_ps(r[i], r[i + 1]), b = _mm256_unpackhi_ps(r[i], r[i + 1]);
    const __m256 c = _mm256_unpacklo_ps(r[i + 2], r[i + 3]), d = _mm256_unpackhi_ps(r[i + 2], r[i + 3]);
    t[i] = _mm256_shuffle_ps(a, c, 0x44);
    t[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
    t[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
    t[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x31);
  }
}

}  // namespace kt::avx2
