// Lines of 32 codes decoded in registers with VCVTNE2PS2BF16, which rounds as wanted where no product is
// denormal. Internal linkage.
#pragma once

#include "kernels/avx512/lines.h"

namespace kt::avx512_bf16 {

namespace {

struct Int8 {
  __m512 scale;

  __attribute__((always_inline)) __m512 product(const uint8_t* codes) const {
    const __m512i values = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)codes));
    return _mm512_mul_ps(_mm512_cvtepi32_ps(values), scale);
  }
  __attribute__((always_inline)) __m512i line(const uint8_t* codes) const {
    return (__m512i)_mm512_cvtne2ps_pbh(product(codes + 16), product(codes));
  }
};

}  // namespace

}  // namespace kt::avx512_bf16
