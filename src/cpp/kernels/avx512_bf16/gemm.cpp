// A panel: [k / KB][MR][KB] bf16, plain copies of 64 bytes, so one pointer and constant offsets reach every
// row whatever the stride of the source (a power of two there would put all rows into one cache set). B
// panel: [k / 2][NR][2] bf16, neighbours in k side by side as VDPBF16PS multiplies them.
#include <string.h>

#include "kernels/avx512_bf16/set.h"
#include "kernels/generic/groups.h"

namespace kt::avx512_bf16 {

namespace {

// Two rows of one panel, side by side.
void interleave(__m512i even, __m512i odd, char* dst) {
  alignas(64) static const uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  _mm512_store_si512(dst, _mm512_permutex2var_epi16(even, low, odd));
  _mm512_store_si512(dst + 64, _mm512_permutex2var_epi16(even, high, odd));
}

// A row is read in runs of P lines: see generic/pack.h.
template <int P>
void pack_panels(RowSource src, int k, int cols, char* dst, ptrdiff_t panel_bytes) {
  const __mmask32 last = first32(cols - (P - 1) * NR);
  const auto load = [last](const uint16_t* row, int i) {
    return i + 1 < P ? _mm512_loadu_si512(row + i * NR) : _mm512_maskz_loadu_epi16(last, row + i * NR);
  };
  int p = 0;
  for (; p + 1 < k; p += 2, dst += 2 * NR * sizeof(uint16_t)) {
    const uint16_t *even = source_row(src, p), *odd = source_row(src, p + 1);
    const bool ahead = p + 1 + kRowsAhead < k;
    const uint16_t *even_ahead = ahead ? source_row(src, p + kRowsAhead) : even,
                   *odd_ahead = ahead ? source_row(src, p + 1 + kRowsAhead) : odd;
#pragma GCC unroll 4
    for (int i = 0; i < P; ++i) {
      _mm_prefetch(even_ahead + i * NR, _MM_HINT_T1);
      _mm_prefetch(odd_ahead + i * NR, _MM_HINT_T1);
      interleave(load(even, i), load(odd, i), dst + i * panel_bytes);
    }
  }
  const __m512i zero = _mm512_setzero_si512();
  for (; p < (k + KB - 1) / KB * KB; p += 2, dst += 2 * NR * sizeof(uint16_t))
    for (int i = 0; i < P; ++i)
      interleave(p < k ? load(source_row(src, p), i) : zero, zero, dst + i * panel_bytes);
}

// A pair of k.
struct TileTraits : avx512::TileTuning {
  using Vec = avx512::Vec;
  using Operand = __m512bh;
  static constexpr int kDepth = 2;
  static constexpr bool kInPlace = true;  // rows of a matrix are what a panel's are
  static Operand load(const char* b) { return (__m512bh)_mm512_load_si512(b); }
  static Operand broadcast(const char* a) {
    int pair;  // of a matrix it may lie at any even address
    memcpy(&pair, a, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
  }
  static Vec multiply_add(Operand a, Operand b, Vec c) { return {_mm512_dpbf16_ps(c.x, a, b)}; }
};

void pack_a(RowSource src, int rows, int k, void* panel) { copy_rows<MR>(src, rows, k, panel); }

// VCVTNE2PS2BF16 rounds as wanted where no product is denormal.
void from_int8(const CodedRows& src, uint16_t* dst, ptrdiff_t dst_stride) {
  if (!products_are_normal(src)) return scalar::from_int8(src, dst, dst_stride);
  decode_rows<32>(src, dst, dst_stride, [](float scale, float) { return Stored<Int8>(scale); });
}

constexpr GemmKernels gemm = gemm_kernels<TileTraits>(pack_a, pack_b_cols, pack_b_rows);
constexpr DecodeKernels decode = {nullptr, nullptr, {nullptr, from_int8}};

}  // namespace

void pack_b_cols(RowSource src, int cols, int k, void* panel) {
  uint32_t* dst = static_cast<uint32_t*>(panel);
  for (int j = 0; j < NR; j += 16)
    for (int p = 0; p < k; p += 32) {
      Vec r[16];
      load_rows(src, j, cols, p, k, r);
      transpose_block(r);
      for (int i = 0; i < 16; ++i) _mm512_store_ps(dst + (p / 2 + i) * NR + j, r[i].x);
    }
}

void pack_b_rows(RowSource src, int k, int cols, void* panels, ptrdiff_t panel_bytes) {
  pack_b_rows_by<NR>(src, cols, panels, panel_bytes, [=](auto p, RowSource from, int left, char* dst) {
    pack_panels<p.value>(from, k, left, dst, panel_bytes);
  });
}

extern const OwnKernels kernels;
const OwnKernels kernels = {.gemm = &gemm, .gemv = &gemv, .decode = &decode};

}  // namespace kt::avx512_bf16
