// What the files of this kernel set share.
#pragma once

#include "kernels/avx512/product.h"

namespace kt::avx512_bf16 {

using avx512::Vec;

constexpr int MR = avx512::TileTuning::kTileRows, NR = 2 * Vec::kSize;
constexpr int KB = 2 * kLineSteps;  // k in 64 bytes of a row of A

extern const GemvKernels gemv;

// Which AMX uses too.
PackRows pack_b_cols;
PackAcross pack_b_rows;

namespace {

// 32 codes decoded in registers with VCVTNE2PS2BF16, which rounds as wanted where no product is denormal.
struct Int8 {
  __m512 scale;

  Int8() = default;
  KT_INLINE explicit Int8(float all) : scale(_mm512_set1_ps(all)) {}

  KT_INLINE __m512 product(const uint8_t* codes) const {
    const __m512i values = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)codes));
    return _mm512_mul_ps(_mm512_cvtepi32_ps(values), scale);
  }
  KT_INLINE __m512i line(const uint8_t* codes) const {
    return (__m512i)_mm512_cvtne2ps_pbh(product(codes + 16), product(codes));
  }
};

}  // namespace

// The A panel of a set with `Rows` rows: [k / KB][Rows][KB]; behind the last row, up to a multiple of four,
// it is repeated.
template <int Rows>
static inline void copy_rows(RowSource src, int rows, int k, void* panel) {
  constexpr int kTogether = 4;  // rows; meanwhile the next four are asked for
  static_assert(Rows % kTogether == 0);
  uint16_t* dst = static_cast<uint16_t*>(panel);
  for (int i = 0; i < rows; i += kTogether) {
    const uint16_t *row[kTogether], *ahead[kTogether];
    for (int j = 0; j < kTogether; ++j) {
      row[j] = source_row(src, i + j < rows ? i + j : rows - 1);
      ahead[j] = source_row(src, i + kTogether + j < rows ? i + kTogether + j : rows - 1);
    }
    for (int p = 0; p < k; p += KB)
#pragma GCC unroll 4
      for (int j = 0; j < kTogether; ++j) {
        _mm_prefetch(ahead[j] + p, _MM_HINT_T1);
        _mm512_store_si512(dst + p * Rows + (i + j) * KB,
                           _mm512_maskz_loadu_epi16(first32(k - p), row[j] + p));
      }
  }
}

}  // namespace kt::avx512_bf16
