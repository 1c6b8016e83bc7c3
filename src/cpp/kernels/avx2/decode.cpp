#include <string.h>

#include "kernels/avx2/set.h"

namespace kt::avx2 {

namespace {

constexpr int kAhead = 512;  // elements between a prefetch and its use: memory then gives more

void store(__m256 x, uint16_t* dst, int n) {
  alignas(16) uint16_t rounded[8];
  _mm_store_si128((__m128i*)rounded, round_to_bf16(x));
  memcpy(dst, rounded, n * sizeof *dst);
}

}  // namespace

void from_f32(int n, const float* src, uint16_t* dst) {
  int i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm_prefetch(src + i + kAhead, _MM_HINT_T0);
    _mm_storeu_si128((__m128i*)(dst + i), round_to_bf16(_mm256_loadu_ps(src + i)));
  }
  if (i == n) return;
  float edge[8] = {};
  memcpy(edge, src + i, (n - i) * sizeof *src);
  store(_mm256_loadu_ps(edge), dst + i, n - i);
}

void from_f16(int n, const uint16_t* src, uint16_t* dst) {
  int i = 0;
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128((__m128i*)(dst + i),
                     round_to_bf16(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(src + i)))));
  if (i == n) return;
  uint16_t edge[8] = {};
  memcpy(edge, src + i, (n - i) * sizeof *src);
  store(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)edge)), dst + i, n - i);
}

}  // namespace kt::avx2
