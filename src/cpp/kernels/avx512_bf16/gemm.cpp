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

constexpr PackPanels* kPackPanels[] = {pack_panels<1>, pack_panels<2>, pack_panels<3>, pack_panels<4>};

// A pair of k.
struct TileTraits {
  static constexpr int kDepth = 2;
  static constexpr bool kInPlace = true;  // rows of a matrix are what a panel's are
  using Operand = __m512bh;
  static Operand load(const char* b) { return (__m512bh)_mm512_load_si512(b); }
  static Operand broadcast(const char* a) {
    int pair;  // of a matrix it may lie at any even address
    memcpy(&pair, a, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
  }
  static __m512 multiply_add(Operand a, Operand b, __m512 c) { return _mm512_dpbf16_ps(c, a, b); }
};

void pack_a(RowSource src, int rows, int k, void* panel) { copy_rows<MR>(src, rows, k, panel); }

// VCVTNE2PS2BF16 rounds as wanted where no product is denormal.
void from_int8(const CodedRows& src, uint16_t* dst, ptrdiff_t dst_stride) {
  if (!products_are_normal(src)) return scalar::from_int8(src, dst, dst_stride);
  decode_rows<32>(src, dst, dst_stride,
                  [](float scale, float) { return Stored<Int8>{{_mm512_set1_ps(scale)}}; });
}

void micro_kernel(int rows, int cols, const BatchElement* batch, int count, float* c, ptrdiff_t ldc,
                  int accumulate) {
  kTiles<TileTraits>[rows - 1][cols > 16](batch, count, c, ldc, accumulate);
}

constexpr GemmKernels gemm = {.mr = MR,
                              .nr = NR,
                              .k_align = KB,
                              .element_bytes = sizeof(uint16_t),
                              .pack_a = pack_a,
                              .pack_b_cols = pack_b_cols,
                              .pack_b_rows = pack_b_rows,
                              .micro_kernel = micro_kernel,
                              .max_edge = kGemvRows,
                              .peak = multiply_registers<TileTraits>,
                              .in_place = TileTraits::kInPlace};
constexpr DecodeKernels decode = {nullptr, nullptr, {nullptr, from_int8}};

}  // namespace

void pack_b_cols(RowSource src, int cols, int k, void* panel) {
  uint32_t* dst = static_cast<uint32_t*>(panel);
  for (int j = 0; j < NR; j += 16)
    for (int p = 0; p < k; p += 32) {
      __m512i r[16];
      load_rows(src, j, cols, p, k, r);
      transpose16(r);
      for (int i = 0; i < 16; ++i) _mm512_store_si512(dst + (p / 2 + i) * NR + j, r[i]);
    }
}

void pack_b_rows(RowSource src, int k, int cols, void* panels, ptrdiff_t panel_bytes) {
  pack_b_rows_by<NR>(kPackPanels, src, k, cols, panels, panel_bytes);
}

extern const OwnKernels kernels;
const OwnKernels kernels = {.gemm = &gemm, .gemv = &gemv, .decode = &decode};

}  // namespace kt::avx512_bf16
