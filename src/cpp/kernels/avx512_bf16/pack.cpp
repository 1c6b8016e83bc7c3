// A panel: [k / KB][MR][KB] bf16, plain copies of 64 bytes, so one pointer and constant offsets reach every
// row whatever the stride of the source (a power of two there would put all rows into one cache set). B
// panel: [k / 2][NR][2] bf16, neighbours in k side by side as VDPBF16PS multiplies them.
#include "kernels/avx512_bf16/set.h"

namespace kt::avx512_bf16 {

void pack_a(RowSource src, int rows, int k, void* panel) { copy_rows<MR>(src, rows, k, panel); }

void pack_b_cols(RowSource src, int cols, int k, void* panel) {
  uint32_t* dst = static_cast<uint32_t*>(panel);
  for (int j = 0; j < NR; j += 16)
    for (int p = 0; p < k; p += 32) {
      __m512i r[16];
      for (int i = 0; i < 16; ++i)
        r[i] = j + i < cols ? _mm512_maskz_loadu_epi16(first32(k - p), source_row(src, j + i) + p)
                            : _mm512_setzero_si512();
      transpose16(r);
      for (int i = 0; i < 16; ++i) _mm512_store_si512(dst + (p / 2 + i) * NR + j, r[i]);
    }
}

void pack_b_rows(RowSource src, int k, int cols, void* panel) {
  uint16_t* dst = static_cast<uint16_t*>(panel);
  const __mmask32 mask = first32(cols);
  alignas(64) static const uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  const int padded = (k + KB - 1) / KB * KB;
  for (int p = 0; p < padded; p += 2) {
    const __m512i even = p < k ? _mm512_maskz_loadu_epi16(mask, source_row(src, p)) : _mm512_setzero_si512();
    const __m512i odd =
        p + 1 < k ? _mm512_maskz_loadu_epi16(mask, source_row(src, p + 1)) : _mm512_setzero_si512();
    _mm512_store_si512(dst + p * NR, _mm512_permutex2var_epi16(even, low, odd));
    _mm512_store_si512(dst + p * NR + 32, _mm512_permutex2var_epi16(even, high, odd));
  }
}

}  // namespace kt::avx512_bf16
