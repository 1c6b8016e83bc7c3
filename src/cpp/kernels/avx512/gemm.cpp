#include "kernels/avx512/few.h"
#include "kernels/avx512/peak.h"
#include "kernels/avx512/set.h"

namespace kt::avx512 {

namespace {

struct Step {
  static constexpr int kDepth = 1;
  static constexpr bool kInPlace = false;  // fp32: panels only
  using Operand = __m512;
  static Operand load(const char* b) { return _mm512_load_ps(b); }
  static Operand broadcast(const char* a) { return _mm512_set1_ps(*reinterpret_cast<const float*>(a)); }
  static __m512 multiply_add(Operand a, Operand b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
};

}  // namespace

void micro_kernel(int rows, int cols, const BatchElement* batch, int count, float* c, ptrdiff_t ldc,
                  int accumulate) {
  kTiles<Step>[rows - 1][cols > 16](batch, count, c, ldc, accumulate);
}

extern const KernelSet table;
const KernelSet table = {
    .gemm = {MR, NR, KB, sizeof(float), pack_a, pack_b_cols, pack_b_rows, micro_kernel, nullptr, nullptr,
             multiply_registers<Step>, Step::kInPlace},
    .few = {kFewRows, kFewRows, few_times_transposed, few_times},
    .epilogue = {transpose, sum_scaled, round_scaled, activations.kernels},
    .decode = {from_f32, from_f16, {nullptr, from_int8, from_int4, from_e4m3, from_e2m1}},
};

}  // namespace kt::avx512
