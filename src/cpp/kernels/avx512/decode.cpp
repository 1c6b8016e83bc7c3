#include "kernels/avx512/set.h"

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

}  // namespace kt::avx512
