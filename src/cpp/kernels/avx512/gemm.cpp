// Panels hold fp32. A: [k / KB][MR][KB], runs of 64 bytes reached from one pointer with constant offsets.
// B: [k][NR].
#include "kernels/avx512/set.h"

namespace kt::avx512 {

namespace {

constexpr int kAhead = 32;  // rows between a prefetch, into the second cache level, and its use

__m512 load(const uint16_t* row, int n) { return widen(_mm256_maskz_loadu_epi16(first16(n), row)); }

// The next P panels: a row is read in runs of P lines. One line at a time, rows that lie a power of two of
// bytes apart fall into one cache set, and what is fetched beside a line is lost before its turn comes.
template <int P>
void pack_panels(RowSource src, int k, int cols, char* dst, ptrdiff_t panel_bytes) {
  const __mmask32 last = first32(cols - (P - 1) * NR);
  for (int p = 0; p < k; ++p, dst += NR * sizeof(float)) {
    const uint16_t* row = source_row(src, p);
    const uint16_t* ahead = p + kAhead < k ? source_row(src, p + kAhead) : row;
#pragma GCC unroll 4
    for (int i = 0; i < P; ++i) {
      _mm_prefetch(ahead + i * NR, _MM_HINT_T1);
      const __m512i x =
          i + 1 < P ? _mm512_loadu_si512(row + i * NR) : _mm512_maskz_loadu_epi16(last, row + i * NR);
      _mm512_store_ps(dst + i * panel_bytes, widen(_mm512_castsi512_si256(x)));
      _mm512_store_ps(dst + i * panel_bytes + 64, widen(_mm512_extracti64x4_epi64(x, 1)));
    }
  }
}

using PackPanels = void (*)(RowSource, int, int, char*, ptrdiff_t);
constexpr PackPanels kPackPanels[] = {pack_panels<1>, pack_panels<2>, pack_panels<3>, pack_panels<4>};

struct Step {
  static constexpr int kDepth = 1;
  static constexpr bool kInPlace = false;  // fp32: panels only
  using Operand = __m512;
  static Operand load(const char* b) { return _mm512_load_ps(b); }
  static Operand broadcast(const char* a) { return _mm512_set1_ps(*reinterpret_cast<const float*>(a)); }
  static __m512 multiply_add(Operand a, Operand b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
};

}  // namespace

void pack_a(RowSource src, int rows, int k, void* panel) {
  float* dst = static_cast<float*>(panel);
  for (int i = 0; i < rows; ++i) {
    const uint16_t* row = source_row(src, i);
    for (int p = 0; p < k; p += KB) _mm512_store_ps(dst + p * MR + i * KB, load(row + p, k - p));
  }
}

// Pairs of neighbours in k are transposed, then taken apart.
void pack_b_cols(RowSource src, int cols, int k, void* panel) {
  float* dst = static_cast<float*>(panel);
  for (int j = 0; j < NR; j += 16)
    for (int p = 0; p < k; p += 32) {
      __m512i r[16];
      load_rows(src, j, cols, p, k, r);
      transpose16(r);
      for (int i = 0; i < 16 && p + 2 * i < k; ++i) {
        float* pair = dst + (p + 2 * i) * NR + j;
        _mm512_store_si512(pair, _mm512_slli_epi32(r[i], 16));
        if (p + 2 * i + 1 < k)
          _mm512_store_si512(pair + NR, _mm512_and_si512(r[i], _mm512_set1_epi32(0xffff0000)));
      }
    }
}

void pack_b_rows(RowSource src, int k, int cols, void* panels, ptrdiff_t panel_bytes) {
  char* dst = static_cast<char*>(panels);
  for (; cols > 0; cols -= 4 * NR, src.base += 4 * NR, dst += 4 * panel_bytes)
    kPackPanels[cols > 3 * NR ? 3 : (cols - 1) / NR](src, k, cols, dst, panel_bytes);
}

void micro_kernel(int rows, int cols, const BatchElement* batch, int count, float* c, ptrdiff_t ldc,
                  int accumulate) {
  kTiles<Step>[rows - 1][cols > 16](batch, count, c, ldc, accumulate);
}

extern const KernelSet table;
const KernelSet table = {
    .gemm = {MR, NR, KB, sizeof(float), pack_a, pack_b_cols, pack_b_rows, micro_kernel, nullptr, nullptr,
             multiply_registers<Step>, Step::kInPlace},
    .gemv = {kGemvRows, kGemvRows, gemv_nt, gemv_nn},
    .epilogue = {transpose, sum_scaled, round_scaled, activations.kernels},
    .decode = {from_f32, from_f16, {nullptr, from_int8, from_int4, from_e4m3, from_e2m1}},
};

}  // namespace kt::avx512
