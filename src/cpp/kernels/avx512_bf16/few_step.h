// The step of this set's products of few rows. Internal linkage.
#pragma once

#include "kernels/avx512/few.h"

namespace kt::avx512_bf16 {

namespace {

// Pairs of bf16 along k.
struct Step {
  using Line = __m512bh;
  static constexpr int kLineBytes = 64;  // of X, for a line of W
  static constexpr int kRows = 2;        // of W in a term of `times`
  static constexpr int kUnaided = 2;     // rows of X whose loads need no requests along k

  static Line load(const uint16_t* w, __mmask32 mask) { return (__m512bh)_mm512_maskz_loadu_epi16(mask, w); }
  static __m512 dot(Line w, const char* x, __m512 c) {
    return _mm512_dpbf16_ps(c, w, (__m512bh)_mm512_load_si512(x));
  }
  static void keep(const uint16_t* from, __mmask32 mask, char* to) {
    _mm512_store_si512(to, _mm512_maskz_loadu_epi16(mask, from));
  }

  static void load_across(const uint16_t* w, ptrdiff_t to_odd, __mmask32 even_mask, __mmask32 odd_mask,
                          __m512i* b) {
    const __m512i even = _mm512_maskz_loadu_epi16(even_mask, w);
    const __m512i odd = _mm512_maskz_loadu_epi16(odd_mask, w + to_odd);
    b[0] = _mm512_unpacklo_epi16(even, odd);
    b[1] = _mm512_unpackhi_epi16(even, odd);
  }
  static __m512 multiply_add(__m512i x, __m512i w, __m512 c) {
    return _mm512_dpbf16_ps(c, (__m512bh)x, (__m512bh)w);
  }
  static void keep_terms(const uint16_t* x, int rows, uint32_t* to, int step) {
    for (int p = 0; p < rows; p += 2, to += step) *to = x[p] | (p + 1 < rows ? uint32_t{x[p + 1]} << 16 : 0);
  }
  // Unpacking interleaves within 128 bits: the first half has columns 0-3, 8-11, ...
  static void in_order(__m512 (&half)[2]) {
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    interleave(half, low);
  }
};

}  // namespace

}  // namespace kt::avx512_bf16
