// The readable truth: every other set is tested against this one.
#include "kernels/scalar/set.h"

namespace kt::scalar {

// Panels hold fp32: A as [k][MR], B as [k][NR].
void micro_kernel(int rows, int, const BatchElement* batch, int count, float* c, ptrdiff_t ldc,
                  int accumulate) {
  float sum[MR][NR] = {};
  for (const BatchElement* element = batch; element != batch + count; ++element) {
    const float* a = static_cast<const float*>(element->a);
    const float* b = static_cast<const float*>(element->b);
    for (int p = 0; p < element->k; ++p)
      for (int i = 0; i < MR; ++i)
        for (int j = 0; j < NR; ++j) sum[i][j] += a[p * MR + i] * b[p * NR + j];
  }
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < NR; ++j) c[i * ldc + j] = (accumulate ? c[i * ldc + j] : 0.0f) + sum[i][j];
}

extern const KernelSet table;
const KernelSet table = {
    .gemm = {MR, NR, 1, sizeof(float), pack_a, pack_b_cols, pack_b_rows, micro_kernel, nullptr, nullptr,
             nullptr, false},
    .few = {kFewRows, 0, few_times_transposed, few_times},
    .epilogue = {transpose, sum_scaled, round_scaled, activations.kernels},
    .decode = {from_f32, from_f16, {nullptr, from_int8, from_int4, from_e4m3, from_e2m1}},
};

}  // namespace kt::scalar
