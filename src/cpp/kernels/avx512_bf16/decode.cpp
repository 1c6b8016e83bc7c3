#include "kernels/avx512/set.h"
#include "kernels/avx512_bf16/set.h"
#include "kernels/scalar/groups.h"

namespace kt::avx512_bf16 {

namespace {

struct Int8 {
  __m512 scale;

  __attribute__((always_inline)) __m512 product(const uint8_t* codes) const {
    const __m512i values = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)codes));
    return _mm512_mul_ps(_mm512_cvtepi32_ps(values), scale);
  }
  __attribute__((always_inline)) void operator()(const uint8_t* codes, uint16_t* dst) const {
    _mm512_storeu_si512(dst, (__m512i)_mm512_cvtne2ps_pbh(product(codes + 16), product(codes)));
  }
};

}  // namespace

// VCVTNE2PS2BF16 rounds as wanted where no product is denormal.
void from_int8(const CodedRows& src, uint16_t* dst, ptrdiff_t dst_stride) {
  if (!products_are_normal(src)) return avx512::from_int8(src, dst, dst_stride);
  decode_rows<32>(src, dst, dst_stride, [](float scale, float) { return Int8{_mm512_set1_ps(scale)}; });
}

}  // namespace kt::avx512_bf16
