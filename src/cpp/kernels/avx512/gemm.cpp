// Products: panels hold fp32, and GEMVs widen bf16 to fp32 where it is.
#include "kernels/avx512/gemv.h"
#include "kernels/avx512/set.h"
#include "kernels/avx512/tile.h"
#include "kernels/generic/pack.h"

namespace kt::avx512 {

namespace {

struct TileTraits {
  static constexpr int kDepth = 1;
  static constexpr bool kInPlace = false;  // fp32: panels only
  using Operand = __m512;
  static Operand load(const char* b) { return _mm512_load_ps(b); }
  static Operand broadcast(const char* a) { return _mm512_set1_ps(*reinterpret_cast<const float*>(a)); }
  static __m512 multiply_add(Operand a, Operand b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
};

void pack_b_cols(RowSource src, int cols, int k, void* panel) {
  const auto load_pairs = [](RowSource from, int j, int rows, int p, int depth, Vec(&r)[16]) {
    __m512i t[16];
    load_rows(from, j, rows, p, depth, t);
    for (int i = 0; i < 16; ++i) r[i].x = _mm512_castsi512_ps(t[i]);
  };
  pack_b_cols_f32<Vec>(src, cols, k, panel, load_pairs);
}

void micro_kernel(int rows, int cols, const BatchElement* batch, int count, float* c, ptrdiff_t ldc,
                  int accumulate) {
  kTiles<TileTraits>[rows - 1][cols > 16](batch, count, c, ldc, accumulate);
}

constexpr GemmKernels gemm = {.mr = MR,
                              .nr = NR,
                              .k_align = KB,
                              .element_bytes = sizeof(float),
                              .pack_a = pack_a_f32<Vec, MR, KB>,
                              .pack_b_cols = pack_b_cols,
                              .pack_b_rows = pack_b_rows_f32<Vec>,
                              .micro_kernel = micro_kernel,
                              .max_edge = kGemvRows,
                              .peak = multiply_registers<TileTraits>,
                              .in_place = TileTraits::kInPlace};

// bf16 widened to fp32 where it is: the even and the odd elements of a line.
struct GemvTraits {
  struct Line {
    __m512 even, odd;
  };
  static constexpr int kLineBytes = 128;  // of X, for a line of W
  static constexpr int kRows = 1;         // of W in a term of `nn`
  static constexpr int kUnaided = 1;      // rows of X whose loads need no requests along k

  static Line load(const uint16_t* w, __mmask32 mask) {
    const __m512i bits = _mm512_maskz_loadu_epi16(mask, w);
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(bits, upper))};
  }
  static __m512 dot(Line w, const char* x, __m512 c) {
    return _mm512_fmadd_ps(w.odd, _mm512_load_ps(x + 64), _mm512_fmadd_ps(w.even, _mm512_load_ps(x), c));
  }
  static void keep(const uint16_t* from, __mmask32 mask, char* to) {
    const Line line = load(from, mask);
    _mm512_store_ps(to, line.even);
    _mm512_store_ps(to + 64, line.odd);
  }

  static void load_across(const uint16_t* w, ptrdiff_t, __mmask32 mask, __mmask32, __m512i* b) {
    const Line line = load(w, mask);
    b[0] = _mm512_castps_si512(line.even);
    b[1] = _mm512_castps_si512(line.odd);
  }
  static __m512 multiply_add(__m512i x, __m512i w, __m512 c) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(w), c);
  }
  static void keep_terms(const uint16_t* x, int rows, uint32_t* to, int stride) {
    for (int p = 0; p < rows; ++p, to += stride) *to = uint32_t{x[p]} << 16;
  }
  static void in_order(__m512 (&half)[2]) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    interleave(half, low);
  }
};

constexpr GemvKernels gemv = {kGemvNt<GemvTraits>, kGemvNn<GemvTraits>};

}  // namespace

extern const OwnKernels kernels;
const OwnKernels kernels = {.gemm = &gemm, .gemv = &gemv, .epilogue = &epilogue, .decode = &decode};

}  // namespace kt::avx512
