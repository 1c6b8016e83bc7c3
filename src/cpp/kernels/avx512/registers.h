// Register-level helpers for AVX-512, shared with the sets that extend it. Static functions only: each set's
// objects keep their own copy.
#pragma once

#include <immintrin.h>

#include "kernels/kernel_set.h"

namespace kt {

static inline const uint16_t* source_row(RowSource src, int i) {
  return src.base + (src.index ? src.index[i] : i) * src.stride;
}

static inline __mmask16 first16(int n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }
static inline __mmask32 first32(int n) { return n >= 32 ? 0xffffffffu : n <= 0 ? 0 : (1u << n) - 1; }

static inline __m512 widen(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// fp32 to bf16 in the upper half of each lane: nearest even, the lower half arbitrary. Done in integers
// because VCVTNEPS2BF16 flushes denormals. Of NaNs, only the two default ones stay NaN.
static inline __m512i nearest_bf16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __m512i half = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  return _mm512_mask_add_epi32(half, odd, half, _mm512_set1_epi32(1));
}

// The same for every x.
static inline __m512i upper_bf16(__m512 x) {
  const __m512i quiet_nan =
      _mm512_set1_epi32(0x22);  // a table: for either kind of NaN in x, x as a quiet NaN
  return _mm512_castps_si512(_mm512_fixupimm_ps(_mm512_castsi512_ps(nearest_bf16(x)), x, quiet_nan, 0));
}

// The upper halves of the lanes of `low`, then of `high`.
static inline __m512i upper_halves(__m512i low, __m512i high) {
  alignas(64) static const uint16_t kUpper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                  23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                  45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return _mm512_permutex2var_epi16(low, _mm512_load_si512(kUpper), high);
}

static inline __m256i round_to_bf16(__m512 x) {
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(upper_bf16(x), 16));
}

static inline __m512i round_to_bf16(__m512 low, __m512 high) {
  return upper_halves(upper_bf16(low), upper_bf16(high));
}

// Elements p to p + 31 of rows i to i + 15; zeros behind the last row and behind k. Four lines further are
// asked for, into the second cache level: in the first, rows that lie a power of two of bytes apart share a
// set.
static inline void load_rows(RowSource src, int i, int rows, int p, int k, __m512i r[16]) {
  constexpr int kAhead = 4 * 32;
  for (int j = 0; j < 16; ++j) {
    r[j] = _mm512_setzero_si512();
    if (i + j >= rows) continue;
    const uint16_t* row = source_row(src, i + j) + p;
    r[j] = _mm512_maskz_loadu_epi16(first32(k - p), row);
    _mm_prefetch(row + kAhead, _MM_HINT_T1);
  }
}

// In place: lane j of row i and lane i of row j change places.
static inline void transpose16(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 4) {
    const __m512i a = _mm512_unpacklo_epi32(r[i], r[i + 1]), b = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    const __m512i c = _mm512_unpacklo_epi32(r[i + 2], r[i + 3]),
                  d = _mm512_unpackhi_epi32(r[i + 2], r[i + 3]);
    t[i] = _mm512_unpacklo_epi64(a, c);
    t[i + 1] = _mm512_unpackhi_epi64(a, c);
    t[i + 2] = _mm512_unpacklo_epi64(b, d);
    t[i + 3] = _mm512_unpackhi_epi64(b, d);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512i a = _mm512_shuffle_i32x4(t[i], t[i + 4], 0x88),
                  b = _mm512_shuffle_i32x4(t[i], t[i + 4], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0xdd);
    r[i] = _mm512_shuffle_i32x4(a, c, 0x88);
    r[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
    r[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
}

}  // namespace kt
