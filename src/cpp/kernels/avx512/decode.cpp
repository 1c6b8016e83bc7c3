#include "kernels/avx512/set.h"
#include "kernels/generic/groups.h"
#include "kernels/scalar/set.h"

namespace kt::avx512 {

namespace {

constexpr int kAhead = 512;  // elements between a prefetch and its use: memory then gives three times as much

}  // namespace

void from_f32(int n, const float* src, uint16_t* dst) {
  for (int i = 0; i < n; i += 16) {
    _mm_prefetch(src + i + kAhead, _MM_HINT_T0);
    _mm256_mask_storeu_epi16(dst + i, first16(n - i),
                             round_to_bf16(_mm512_maskz_loadu_ps(first16(n - i), src + i)));
  }
}

void from_f16(int n, const uint16_t* src, uint16_t* dst) {
  for (int i = 0; i < n; i += 16) {
    const __m256i half = _mm256_maskz_loadu_epi16(first16(n - i), src + i);
    _mm256_mask_storeu_epi16(dst + i, first16(n - i), round_to_bf16(_mm512_cvtph_ps(half)));
  }
}

void from_int8(const CodedRows& src, uint16_t* dst, ptrdiff_t dst_stride) {
  decode_rows<32>(src, dst, dst_stride,
                  [](float scale, float) { return Stored<Int8>{{_mm512_set1_ps(scale)}}; });
}

void from_int4(const CodedRows& src, uint16_t* dst, ptrdiff_t dst_stride) {
  decode_rows<16>(src, dst, dst_stride, [](float scale, float zero) {
    const __m512 zeros = _mm512_set1_ps(zero);
    return Stored<Nibbles>{{_mm512_sub_ps(_mm512_load_ps(kCounts), zeros), scale}};
  });
}

void from_e2m1(const CodedRows& src, uint16_t* dst, ptrdiff_t dst_stride) {
  if (has_half_steps(src))
    return decode_half_steps<16>(src, dst, dst_stride, [](float first, float second) {
      const auto rounded = [](float scale) {
        return nearest_bf16(_mm512_mul_ps(_mm512_load_ps(kE2M1), _mm512_set1_ps(scale)));
      };
      return Stored<HalfNibbles>{{upper_halves(rounded(first), rounded(second))}};
    });
  decode_rows<16>(src, dst, dst_stride,
                  [](float scale, float) { return Stored<Nibbles>{{_mm512_load_ps(kE2M1), scale}}; });
}

void from_e4m3(const CodedRows& src, uint16_t* dst, ptrdiff_t dst_stride) {
  if (!products_are_normal(src)) return scalar::from_e4m3(src, dst, dst_stride);
  decode_rows<32>(src, dst, dst_stride, [](float scale, float) { return Stored<Fp8>{Fp8(scale)}; });
}

}  // namespace kt::avx512
