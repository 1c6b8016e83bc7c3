#include <string.h>

#include "kernels/avx512/few.h"
#include "kernels/avx512/peak.h"
#include "kernels/avx512_bf16/set.h"

namespace kt::avx512_bf16 {

namespace {

// A pair of k.
struct Step {
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

}  // namespace

void micro_kernel(int rows, int cols, const BatchElement* batch, int count, float* c, ptrdiff_t ldc,
                  int accumulate) {
  kTiles<Step>[rows - 1][cols > 16](batch, count, c, ldc, accumulate);
}

extern const KernelSet table;
const KernelSet table = {
    .gemm = {MR, NR, KB, sizeof(uint16_t), pack_a, pack_b_cols, pack_b_rows, micro_kernel, nullptr, nullptr,
             multiply_registers<Step>, Step::kInPlace},
    .few = {kFewRows, kFewRows, few_times_transposed, few_times, kFewCoded},
    .epilogue = {},
    .decode = {.from_f32 = nullptr, .from_f16 = nullptr, .from_codes = {nullptr, from_int8}},
};

}  // namespace kt::avx512_bf16
