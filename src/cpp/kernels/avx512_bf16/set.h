// What the files of this kernel set share.
#pragma once

#include "kernels/avx512/tile.h"

namespace kt::avx512_bf16 {

constexpr int MR = kTileRows, NR = kTileCols;
constexpr int KB = 2 * kRun;  // k in one 64-byte run of a packed A row

PackRows pack_a, pack_b_cols;
PackAcross pack_b_rows;
MicroKernel micro_kernel;
FewRows few_times_transposed, few_times;

// The A panel of a set with `Rows` rows: [k / KB][Rows][KB].
template <int Rows>
static inline void copy_rows(RowSource src, int rows, int k, void* panel) {
  uint16_t* dst = static_cast<uint16_t*>(panel);
  for (int i = 0; i < rows; ++i) {
    const uint16_t* row = source_row(src, i);
    for (int p = 0; p < k; p += KB)
      _mm512_store_si512(dst + p * Rows + i * KB, _mm512_maskz_loadu_epi16(first32(k - p), row + p));
  }
}

}  // namespace kt::avx512_bf16
