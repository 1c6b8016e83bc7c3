#include "kernels/scalar/set.h"

namespace kt::scalar {

namespace {

const uint16_t* row(RowSource src, int i) { return src.base + (src.index ? src.index[i] : i) * src.stride; }

// W [n x k] or [k x n] by the distance between neighbours in n and in k.
void multiply(int rows, int n, int k, RowSource x, const uint16_t* w, ptrdiff_t n_stride, ptrdiff_t k_stride,
              float* c, ptrdiff_t ldc, int accumulate) {
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < n; ++j) {
      float sum = 0.0f;
      for (int p = 0; p < k; ++p) sum += widen(row(x, i)[p]) * widen(w[j * n_stride + p * k_stride]);
      c[i * ldc + j] = (accumulate ? c[i * ldc + j] : 0.0f) + sum;
    }
}

}  // namespace

void few_times_transposed(int rows, int n, int k, RowSource x, const uint16_t* w, ptrdiff_t w_stride,
                          float* c, ptrdiff_t ldc, int accumulate) {
  multiply(rows, n, k, x, w, w_stride, 1, c, ldc, accumulate);
}

void few_times(int rows, int n, int k, RowSource x, const uint16_t* w, ptrdiff_t w_stride, float* c,
               ptrdiff_t ldc, int accumulate) {
  multiply(rows, n, k, x, w, 1, w_stride, c, ldc, accumulate);
}

}  // namespace kt::scalar
